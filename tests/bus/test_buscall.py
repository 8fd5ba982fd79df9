# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls to others: each is answered once, whatever happens to the other side, and leaves nothing in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from gi.repository import GLib

from cgpolicy import buscall
from tests.bus.hostile import resident_kib
from tests.bus.privatebus import BUS, Client, private_bus, wait

Answer = tuple[tuple[Any, ...] | None, str]


@pytest.fixture
def address() -> Iterator[str]:
    with private_bus() as address:
        yield address


def start(client: Client, method: str, arguments: Any = None, timeout_ms: int = 10_000, **where: str) -> list[Answer]:
    """Call and return the list in which the answer will be."""
    answers: list[Answer] = []
    to = {**BUS, **where}
    buscall.call(client.connection, to["service"], to["path"], to["interface"], method, arguments, timeout_ms,
                 lambda values, error: answers.append((values, error)))
    return answers


def test_answers_and_errors(address: str) -> None:
    client = Client(address)
    found = start(client, "NameHasOwner", GLib.Variant("(s)", ("org.freedesktop.DBus",)))
    nothing = start(client, "Ping", interface="org.freedesktop.DBus.Peer")
    unknown = start(client, "GetNameOwner", GLib.Variant("(s)", ("no.such",)))
    absent = start(client, "Ping", service="no.such", path="/", interface="org.freedesktop.DBus.Peer")
    wait(lambda: found and nothing and unknown and absent, "the answers")
    assert (found, nothing) == ([((True,), "")], [((), "")])
    assert unknown == [(None, "org.freedesktop.DBus.Error.NameHasNoOwner")]
    assert absent == [(None, "org.freedesktop.DBus.Error.ServiceUnknown")]


def test_no_answer_is_an_answer(address: str) -> None:
    client, silent = Client(address), Client(address)
    silent.own("org.freedesktop.silent")
    held: list[Any] = []
    silent.connection.add_filter(lambda connection, message, incoming: held.append(message))  # and drops it
    late = start(client, "Ping", timeout_ms=50, service="org.freedesktop.silent", path="/", interface="a.b")
    wait(lambda: late, "the end of patience")
    assert late[0][0] is None and late[0][1]
    gone = start(client, "Ping", service="org.freedesktop.silent", path="/", interface="a.b")
    wait(lambda: len(held) > 1, "the call to arrive")
    silent.close()
    wait(lambda: gone, "the error")
    assert gone == [(None, "org.freedesktop.DBus.Error.NoReply")]
    client.connection.set_exit_on_close(False)
    closed = start(client, "ListNames")
    client.close()
    wait(lambda: closed, "an answer of some kind")
    assert len(closed) == len(late) == len(gone) == 1


def test_calls_and_timers_leave_nothing(address: str) -> None:
    client = Client(address)

    def make(count: int) -> int:
        """Make many calls and timers, and return what memory the process then has."""
        sent = answered = 0

        def done(values: Any, error: str) -> None:
            nonlocal answered
            answered += 1

        def under_way() -> int:
            return sent - answered

        for number in range(count):
            sent += 1
            owner = GLib.Variant("(s)", ("no.such",))
            to = BUS["interface"]
            buscall.call(client.connection, to, BUS["path"], to, "GetNameOwner", owner, 10_000, done)
            buscall.cancel(buscall.after(1000, lambda: False))
            if number % 50 == 49:
                wait(lambda: not under_way(), "the answers")
        return resident_kib(os.getpid())

    before = make(2_000)
    assert make(10_000) - before < 800  # 2400 KiB it would be with PyGObject's own


def test_timers(address: str) -> None:
    fired: list[str] = []

    def again() -> bool:
        fired.append("again")
        return len(fired) < 3

    buscall.after(0, again)
    def never() -> bool:
        fired.append("never")
        return False

    number = buscall.after(0, never)
    buscall.cancel(number)
    wait(lambda: len(fired) == 3, "the timer")
    waited = buscall.after(1, again)  # once: there are four by then
    wait(lambda: len(fired) == 4, "the other timer")
    assert fired == ["again"] * 4
    with pytest.raises(KeyError):
        buscall.cancel(waited)
