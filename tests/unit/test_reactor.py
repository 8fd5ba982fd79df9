# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the reactor does about a loss, on plain files that take the place of cgroup.kill and /proc/sysrq-trigger."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cgpolicy.action import Action
from cgpolicy.kprobes import LateLoss
from cgpolicy.losses import POSITIONS_MAX
from cgpolicy.reactor import INVOCATION_LINK, Outbox, Reaction, Reactor
from tests.unit.plaintree import PlainTree

WEB = "/system.slice/web.service"
PAYLOAD = f"{WEB}/payload"


class Host:
    """A machine in a directory; written() tells what the reactor wrote to a file since the last look."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "sys/fs").mkdir(parents=True)
        self.tree = PlainTree(root / "sys/fs/cgroup")
        for cgroup in ("/system.slice", WEB, PAYLOAD):
            self.tree.make(cgroup)
            (self.tree.path(cgroup) / "cgroup.kill").touch()
        for file in ("proc/sysrq-trigger", "dev/kmsg"):
            (root / file).parent.mkdir()
            (root / file).touch()
        self.reactor = Reactor(root)

    def id(self, cgroup: str) -> int:
        return self.tree.cgroup_id(cgroup)

    def set(self, cgroup: str, action: Action | None) -> None:
        self.reactor.set_policy(self.id(cgroup), cgroup, action)

    def lose(self, cgroup: str = WEB, *, time_ns: int | None = None) -> tuple[Action, str, bool]:
        """Lose a page charged to a cgroup, now or at a time of CLOCK_MONOTONIC."""
        names = [WEB, PAYLOAD] if cgroup == PAYLOAD else [cgroup]
        lineage = (self.id("/system.slice"), *map(self.id, names))
        at = time.monotonic_ns() if time_ns is None else time_ns
        return self.reactor.react(LateLoss(0x1A2B, (8, 1), 12, 4096, lineage, at))

    def begin_invocation(self, *, seconds_ago: float) -> None:
        link = self.root / INVOCATION_LINK.format(unit="web.service")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to("0" * 32)
        moment = time.time_ns() - int(seconds_ago * 1e9)
        os.utime(link, ns=(moment, moment), follow_symlinks=False)

    def written(self, file: Path) -> str:
        text = file.read_text()
        os.truncate(file, 0)
        return text.replace("\0", "")  # written on at the descriptor's own offset

    def killed(self, cgroup: str) -> bool:
        return self.written(self.tree.path(cgroup) / "cgroup.kill") == "1"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_a_policy_nothing_happens(host: Host) -> None:
    assert host.lose() == (Action.CONTINUE, "", False)
    host.set(WEB, Action.CONTINUE)
    assert host.lose() == (Action.CONTINUE, "", False)
    host.set(WEB, Action.KILL)
    assert host.lose("/system.slice") == (Action.CONTINUE, "", False)
    host.set(WEB, None)
    assert host.lose() == (Action.CONTINUE, "", False)
    assert not host.killed(WEB)


def test_the_highest_cgroup_set_to_kill_is_killed(host: Host) -> None:
    for cgroup in (PAYLOAD, WEB):
        host.set(cgroup, Action.KILL)
    assert host.lose(PAYLOAD) == (Action.KILL, Reaction.KILLED, True)
    assert (host.killed(WEB), host.killed(PAYLOAD)) == (True, False)


def test_losses_from_before_the_kill_are_covered_by_it(host: Host) -> None:
    host.set(WEB, Action.KILL)
    before = time.monotonic_ns()
    assert host.lose() == (Action.KILL, Reaction.KILLED, True)
    assert host.killed(WEB)
    assert host.lose(time_ns=before) == (Action.KILL, Reaction.KILLED, False)
    assert not host.killed(WEB)
    assert host.lose() == (Action.KILL, Reaction.KILLED, True)
    assert host.killed(WEB)


def test_a_loss_from_before_this_run_of_the_unit_kills_nobody(host: Host) -> None:
    host.set(WEB, Action.KILL)
    host.begin_invocation(seconds_ago=1)
    assert host.lose(time_ns=time.monotonic_ns() - 2_000_000_000) == (Action.KILL, Reaction.STALE, False)
    assert not host.killed(WEB)
    assert host.lose() == (Action.KILL, Reaction.KILLED, True)
    # The link's time is that of the last tick, up to 10 ms early: so near, the loss counts as the older.
    host.begin_invocation(seconds_ago=0)
    assert host.lose()[1] == Reaction.STALE


def test_the_next_cgroup_of_that_name_is_not_killed(host: Host) -> None:
    host.set(WEB, Action.KILL)
    old = host.id(WEB)
    host.tree.path(WEB).rename(host.root / "old")
    host.tree.make(WEB)
    (host.tree.path(WEB) / "cgroup.kill").touch()
    loss = LateLoss(1, (8, 1), 12, 0, (old,), time.monotonic_ns())
    host.reactor.react(loss)
    assert not host.killed(WEB)
    # Nor if its policy comes when the path leads to another cgroup already.
    host.reactor.set_policy(old, WEB, Action.KILL)
    assert host.reactor.react(loss) == (Action.KILL, Reaction.GONE, False)
    assert not host.killed(WEB)


def test_panic_comes_first_and_says_why(host: Host) -> None:
    host.set(WEB, Action.PANIC)
    host.set(PAYLOAD, Action.KILL)
    host.begin_invocation(seconds_ago=0)
    assert host.lose(PAYLOAD)[0] is Action.PANIC
    assert host.written(host.root / "proc/sysrq-trigger") == "c"
    assert not host.killed(PAYLOAD)
    assert host.written(host.root / "dev/kmsg") == (
        f"<0>cgpolicyd: 0x1a2b: dirty page cache lost: dev 8:1 ino 12 pos 4096 cgroup id {host.id(PAYLOAD)}"
        " action panic\n"
    )


def test_no_way_to_panic_is_known_beforehand(tmp_path: Path, host: Host) -> None:
    assert host.reactor.can_panic
    (host.root / "proc/sysrq-trigger").unlink()
    reactor = Reactor(host.root)
    assert not reactor.can_panic
    reactor.set_policy(7, WEB, Action.PANIC)
    assert reactor.react(LateLoss(1, (8, 1), 12, 0, (7,), 0)) == (Action.PANIC, Reaction.FAILED, False)


def test_descriptors_are_given_back(host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for action in (Action.KILL, Action.KILL, Action.PANIC, Action.KILL, Action.CONTINUE):
        host.set(WEB, action)
    assert len(os.listdir("/proc/self/fd")) == before
    host.reactor.set_policy(2**40, WEB, Action.KILL)  # another cgroup's id
    assert len(os.listdir("/proc/self/fd")) == before


# What the daemon is told -------------------------------------------------------------------------


class Daemon:
    """The daemon's end of the socket."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        self.outbox = Outbox(theirs)
        self.theirs = theirs

    def received(self) -> list[dict[str, Any]]:
        found = []
        while True:
            try:
                found.append(json.loads(self.channel.recv(65536, socket.MSG_DONTWAIT)))
            except BlockingIOError:
                return found


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    made = Daemon()
    yield made
    made.channel.close()
    made.theirs.close()


def loss(page: int, inode: int = 12) -> LateLoss:
    return LateLoss(0x1000 + page, (8, 1), inode, page * 4096, (3, 7), page)


def test_a_storm_is_told_in_few_messages_with_exact_totals(daemon: Daemon) -> None:
    for page in range(1000):
        daemon.outbox.lost(loss(page), Action.KILL, Reaction.KILLED, page == 0)
    daemon.outbox.lost(loss(0, inode=13), Action.KILL, Reaction.KILLED, False)
    assert not daemon.outbox.flush()
    first, second = (message["loss"] for message in daemon.received())
    assert (first["pages"], first["kills"], first["inode"], first["cgroup_id"]) == (1000, 1, 12, 7)
    assert first["positions"] == [page * 4096 for page in range(POSITIONS_MAX)]
    assert (second["pages"], second["inode"]) == (1, 13)


def test_a_daemon_that_is_slow_misses_nothing(daemon: Daemon) -> None:
    said = 0
    while not daemon.outbox.flush():
        daemon.outbox.lost(loss(said, inode=said), Action.CONTINUE, "", False)
        said += 1
    for page in range(10):
        daemon.outbox.lost(loss(page, inode=0), Action.CONTINUE, "", False)
    assert daemon.outbox.flush()
    found = daemon.received()
    while daemon.outbox.flush():
        found += daemon.received()
    found += daemon.received()
    assert sum(message["loss"]["pages"] for message in found) == said + 10
    assert {message["loss"]["inode"] for message in found} == set(range(said))


def test_a_loss_charged_to_no_cgroup_is_told_too(daemon: Daemon) -> None:
    daemon.outbox.lost(LateLoss(1, (8, 1), 12, 0, (), 1), Action.CONTINUE, "", False)
    daemon.outbox.flush()
    assert daemon.received()[0]["loss"]["cgroup_id"] == 0
