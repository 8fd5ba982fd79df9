# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the reactor does about a loss, on plain files that take the place of cgroup.kill and /proc/sysrq-trigger."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cgpolicy import reactor
from cgpolicy.action import Action
from cgpolicy.error import NotSupported
from cgpolicy.kprobes import LateLoss
from cgpolicy.losses import POSITIONS_MAX
from cgpolicy.reactor import CGROUPS_MAX, FILES_MAX, INVOCATION_LINK, POLICIES_MAX, Outbox, Reaction, Reactor, Service
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


def test_a_clock_that_was_set_back_does_not_make_losses_stale(host: Host) -> None:
    host.set(WEB, Action.KILL)
    host.begin_invocation(seconds_ago=-3600)
    assert host.lose() == (Action.KILL, Reaction.KILLED, True)
    assert host.killed(WEB)


def test_a_cgroup_that_cannot_be_killed_is_not_said_to_be_gone(host: Host) -> None:
    kill = host.tree.path(WEB) / "cgroup.kill"
    kill.unlink()
    host.set(WEB, Action.KILL)
    assert host.lose() == (Action.KILL, Reaction.FAILED, False)
    kill.symlink_to("/dev/full")  # ENOSPC
    host.set(WEB, Action.KILL)
    assert host.lose() == (Action.KILL, Reaction.FAILED, False)


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


@pytest.mark.parametrize(
    ("error", "reaction"),
    [(errno.ENODEV, Reaction.GONE), (errno.ENOENT, Reaction.GONE), (errno.EACCES, Reaction.FAILED)],
)
def test_cgroup_that_is_being_removed_has_nobody_left(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: int, reaction: Reaction
) -> None:
    def refused(descriptor: int, data: bytes) -> int:
        raise OSError(error, os.strerror(error))

    host.set(WEB, Action.KILL)
    monkeypatch.setattr(os, "write", refused)
    assert host.lose(WEB) == (Action.KILL, reaction, False)


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


def test_what_waits_for_the_daemon_does_not_grow_with_a_storm(daemon: Daemon) -> None:
    """Pages of 50,000 files and then of 50,000 cgroups, while the daemon does not listen."""
    while not daemon.outbox.flush():
        daemon.outbox.lost(loss(0), Action.CONTINUE, "", False)
    before = sum(message["loss"]["pages"] for message in daemon.received())
    pages = 50_000
    tracemalloc.start()
    for page in range(pages):
        daemon.outbox.lost(loss(page, inode=1000 + page), Action.KILL, Reaction.GONE, page == 7)
    for page in range(pages):
        other = replace(loss(page), lineage=(3, 1000 + page))
        daemon.outbox.lost(other, Action.KILL, Reaction.KILLED, False)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 8 << 20
    found = []
    while daemon.outbox.flush():
        found += daemon.received()
    found += daemon.received()
    told = [message["loss"] for message in found if message["loss"]["action"] == "kill"]
    assert sum(each["pages"] for each in told) == 2 * pages
    assert sum(each["kills"] for each in told) == 1
    assert len(told) <= FILES_MAX + CGROUPS_MAX + 2
    (one_cgroup,) = [each for each in told if each["cgroup_id"] == 7 and not each["inode"]]
    assert (one_cgroup["device"], one_cgroup["positions"], len(one_cgroup["pfns"])) == ([0, 0], [], POSITIONS_MAX)
    (the_rest,) = [each for each in told if each["cgroup_id"] == 0]
    assert the_rest["lineage"] == []
    assert before


def test_a_loss_charged_to_no_cgroup_is_told_too(daemon: Daemon) -> None:
    daemon.outbox.lost(LateLoss(1, (8, 1), 12, 0, (), 1), Action.CONTINUE, "", False)
    daemon.outbox.flush()
    assert daemon.received()[0]["loss"]["cgroup_id"] == 0


# The main loop ----------------------------------------------------------------------------------


class Probes:
    """In the place of LossProbes: losses come through a pipe, of which one byte is one loss."""

    losses: ClassVar[list[LateLoss]] = []
    fault: ClassVar[str] = ""
    refusal: ClassVar[str] = ""

    def __init__(self, *_: object) -> None:
        self.dropped = self.unattributed = 0
        self.paths = ("P1",)
        self.armed = 0
        self.disarmed = 0
        self._read, self.write = os.pipe()

    def arm(self) -> None:
        if self.refusal:
            raise NotSupported(self.refusal, hint="do something")
        self.armed += 1

    def fileno(self) -> int:
        return self._read

    def read(self) -> list[LateLoss]:
        return [self.losses.pop(0) for _ in os.read(self._read, 100)]

    def faults(self) -> str:
        return self.fault

    def disarm(self) -> None:
        self.disarmed += 1


class Loop:
    """A reactor whose turns are the test's, and the daemon's end of its socket."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reactor, "LossProbes", Probes)
        self.host = host
        self.channel, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.service = Service(host.root, self.theirs)
        self.probes: Any = self.service._probes
        self.service._arm()
        self.service._poll.register(self.theirs, select.POLLIN)

    def turn(self) -> bool:
        return self.service._turn()

    def set(self, number: int, cgroup: str, action: str) -> None:
        self.channel.send(json.dumps({"id": number, "cgroup": cgroup, "action": action}).encode())

    def lose(self, cgroup: str) -> None:
        lineage = (self.host.id("/system.slice"), self.host.id(cgroup))
        self.probes.losses.append(LateLoss(1, (8, 1), 12, 0, lineage, time.monotonic_ns()))
        os.write(self.probes.write, b".")

    def told(self) -> list[dict[str, Any]]:
        found = []
        while select.select([self.channel], [], [], 0)[0]:
            found.append(json.loads(self.channel.recv(65536)))
        return found

    def is_due(self) -> None:
        self.service._check_at = time.monotonic()


@pytest.fixture
def loop(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    made = Loop(host, monkeypatch)
    yield made
    made.channel.close()
    made.theirs.close()


def test_a_loss_is_reacted_to_although_the_daemon_has_much_to_say(loop: Loop) -> None:
    loop.set(loop.host.id(WEB), WEB, "kill")
    assert loop.turn()
    for number in range(4 * POLICIES_MAX):
        loop.set(2**40 + number, PAYLOAD, "kill")
    loop.lose(WEB)
    assert loop.turn()
    assert loop.host.killed(WEB)
    loop.lose(WEB)  # while three quarters are still to be heard
    assert loop.turn()
    assert loop.host.killed(WEB)
    assert len(loop.service._reactor._targets) == 1 + 2 * POLICIES_MAX


def test_the_probes_are_looked_after_although_there_is_always_something_to_do(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probes, "fault", "gone")
    loop.set(1, WEB, "kill")
    assert loop.turn()
    assert loop.probes.armed == 1
    loop.is_due()
    loop.set(1, WEB, "kill")
    assert loop.turn()
    assert loop.probes.armed == 2
    monkeypatch.setattr(Probes, "fault", "")
    loop.is_due()
    assert loop.turn()
    assert [next(iter(said)) for said in loop.told()] == ["fault", "armed"]


def test_probes_that_cannot_be_put_back_are_tried_again(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probes, "fault", "gone")
    monkeypatch.setattr(Probes, "refusal", "taken")
    for _ in range(2):
        loop.is_due()
        assert loop.turn()
    monkeypatch.setattr(Probes, "refusal", "")
    loop.is_due()
    assert loop.turn()
    loop.is_due()
    assert loop.turn()
    said = loop.told()
    assert [next(iter(each)) for each in said][:4] == ["fault", "failed", "failed", "armed"]
    assert said[1] == {"failed": "taken", "hint": "do something"}


def test_events_that_were_missed_are_reported_once(loop: Loop) -> None:
    loop.probes.dropped, loop.probes.unattributed = 5, 2
    for _ in range(2):
        loop.is_due()
        assert loop.turn()
    loop.probes.dropped = 6
    loop.is_due()
    assert loop.turn()
    loop.is_due()
    assert loop.turn()
    assert loop.told() == [{"missed": 7}, {"missed": 1}]


def test_losses_one_after_the_other_are_told_of_together(loop: Loop) -> None:
    for _ in range(200):
        loop.lose(WEB)
        assert loop.turn()
    loop.service._check_at = time.monotonic() + 1
    found = loop.told()
    assert 1 <= len(found) < 50  # the first at once, and some on a slow machine
    while sum(message["loss"]["pages"] for message in found) < 200:
        assert loop.turn()  # comes back when it is time to tell, although nothing happens
        found += loop.told()
    assert found[0]["loss"]["pages"] == 1
    assert loop.service._outbox.is_empty


def test_a_daemon_that_does_not_listen_is_waited_for_asleep(loop: Loop) -> None:
    loop.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    for number in range(200):
        loop.service._outbox.tell({"fault": f"{number}"})
    assert not loop.service._outbox.is_empty
    loop.service._check_at = time.monotonic() + 0.3
    used = time.process_time()
    assert loop.turn()
    assert time.process_time() - used < 0.2
    found: list[dict[str, Any]] = []
    while len(found) < 200:
        found += loop.told()
        loop.is_due()  # else it would wait for this very test to listen
        assert loop.turn()
    assert [message["fault"] for message in found[:200]] == [f"{number}" for number in range(200)]


def test_the_daemons_end_is_the_end(loop: Loop) -> None:
    loop.channel.close()
    assert not loop.turn()


def test_the_daemons_end_is_the_end_although_it_has_not_been_told_all(loop: Loop) -> None:
    loop.lose(WEB)
    loop.service._see_losses()
    loop.channel.close()
    assert not loop.turn()


def test_nobody_can_ask_for_more_than_disarming_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reactor.main([])
    assert "only --disarm" in capsys.readouterr().err
