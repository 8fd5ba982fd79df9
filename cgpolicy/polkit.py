# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may: polkit, asked without waiting (org.freedesktop.PolicyKit1.Authority); without it, root only."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from gi.repository import Gio, GLib

from cgpolicy import buscall
from cgpolicy.error import NotAuthorized, UserError

SERVICE = "org.freedesktop.PolicyKit1"
PATH = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE = "org.freedesktop.PolicyKit1.Authority"

ALLOW_USER_INTERACTION = 1
PROMPT_TIMEOUT_MS = 300_000  # a person who looks for a password
BUS_TIMEOUT_MS = 5_000

# Questions that wait at polkit at once: in all below the 128 replies that the bus lets a connection wait for.
PENDING_MAX = 32
PENDING_MAX_BY_SENDER = 4
PENDING_MAX_BY_USER = 16  # a user can have any number of connections, and is not to keep the others out

# polkit that is not installed, cannot be started, or went away
ABSENT = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.systemd1.",
)

Done = Callable[[UserError | None], None]


class Authority:
    """Asks whether the sender of a call is authorized; done is called with None, or with the refusal."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._pending: Counter[str | int] = Counter()  # by sender and by user
        self._cookies = (f"cgpolicy-{number}" for number in itertools.count())

    def check(self, sender: str, action_id: str, details: Mapping[str, str], interactive: bool, done: Done) -> None:
        """Ask; at once for root, whom polkit would let through as well."""

        def identified(values: tuple[Any, ...] | None, error: str) -> None:
            if values is None:
                done(NotAuthorized("the caller has left the bus"))
            elif values[0] == 0:
                done(None)
            else:
                self._ask(sender, values[0], action_id, details, interactive, done)

        buscall.call(
            self._connection, "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus",
            "GetConnectionUnixUser", GLib.Variant("(s)", (sender,)), BUS_TIMEOUT_MS, identified,
        )

    def _ask(
        self, sender: str, user: int, action_id: str, details: Mapping[str, str], interactive: bool, done: Done
    ) -> None:
        by_sender, by_user = self._pending[sender], self._pending[user]
        in_all = self._pending.total() // 2
        if by_sender >= PENDING_MAX_BY_SENDER or by_user >= PENDING_MAX_BY_USER or in_all >= PENDING_MAX:
            done(NotAuthorized("too many requests wait for authorization", hint="answer those first"))
            return
        self._pending.update((sender, user))
        cookie = next(self._cookies)
        # A prompt for a caller that is gone is taken back.
        watch = Gio.bus_watch_name_on_connection(
            self._connection, sender, Gio.BusNameWatcherFlags.NONE, None, lambda connection, name: self._cancel(cookie)
        )

        def answered(values: tuple[Any, ...] | None, error: str) -> None:
            Gio.bus_unwatch_name(watch)
            self._pending.subtract((sender, user))
            self._pending = +self._pending  # without those at zero
            done(verdict(values, error, action_id))

        subject = ("system-bus-name", {"name": GLib.Variant("s", sender)})
        flags = ALLOW_USER_INTERACTION if interactive else 0
        arguments = GLib.Variant("((sa{sv})sa{ss}us)", (subject, action_id, dict(details), flags, cookie))
        timeout = PROMPT_TIMEOUT_MS if interactive else BUS_TIMEOUT_MS * 5
        self._call("CheckAuthorization", arguments, timeout, answered)

    def _cancel(self, cookie: str) -> None:
        arguments = GLib.Variant("(s)", (cookie,))
        self._call("CancelCheckAuthorization", arguments, BUS_TIMEOUT_MS, lambda values, error: None)

    def _call(self, method: str, arguments: Any, timeout: int, done: buscall.Done) -> None:
        buscall.call(self._connection, SERVICE, PATH, INTERFACE, method, arguments, timeout, done)


def verdict(values: tuple[Any, ...] | None, error: str, action_id: str) -> UserError | None:
    """Turn polkit's answer into a refusal, None if it agrees."""
    if values is None:
        if error.startswith(ABSENT):
            return NotAuthorized("polkit is not there to ask, so only root may do this", hint="install polkitd")
        return NotAuthorized(f"polkit did not decide on {action_id}: {error}", hint="try again, or as root")
    authorized, challenge, _ = values[0]
    if authorized:
        return None
    if challenge:
        return NotAuthorized(
            f"{action_id} needs authentication", hint="busctl --allow-interactive-authorization=yes, or as root"
        )
    return NotAuthorized(f"{action_id}: not authorized", hint="polkit's rules decide; see polkit(8)")
