# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reaction of the tracefs backend: kill a cgroup, or panic, as soon as a loss is read.

A process of its own, so that nothing the daemon does stands between an error and the kill; it holds its memory and
a real-time priority, and a descriptor of every cgroup that it may have to kill. The daemon tells it the policies
and hears of the losses through a socket of type SOCK_SEQPACKET, one JSON object a message; its end is the end of
this process, which then takes its probes away.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import errno
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cgpolicy.action import Action
from cgpolicy.cgroupfs import CgroupTree, unit_of_directory
from cgpolicy.error import UserError
from cgpolicy.kprobes import LateLoss, LossProbes, disarm_leftovers
from cgpolicy.losses import POSITIONS_MAX, FileLoss

MESSAGE_MAX = 65536
CHECK_SECONDS = 10.0  # between two looks at whether the probes are still there
TELL_SECONDS = 0.25  # from one time that losses are told of to the next: each message is a record and a signal
POLICIES_MAX = 32  # taken from the daemon at once: a loss does not wait until it has told all of a large host's

# Files told of one by one, of those that the daemon has not been told of yet, and cgroups beyond them. There are more
# in a storm only, while the daemon does not listen: this process must not grow then.
FILES_MAX = 1024
CGROUPS_MAX = 1024

PRIORITY = 10  # of SCHED_FIFO, 1 to 99 (sched(7))
MCL_CURRENT, MCL_FUTURE = 1, 2  # mlockall(2)

# systemd makes this link when an invocation of a unit begins (src/core/unit.c, unit_export_invocation_id()).
INVOCATION_LINK = "run/systemd/units/invocation:{unit}"

# The link's time is that of the last clock tick before it was made; 10 ms are the longest tick that Linux has.
TICK_NS = 10_000_000


class Reaction(enum.StrEnum):
    """What came of a loss whose policy is kill or panic."""

    KILLED = "killed"
    GONE = "nobody left to kill"
    STALE = "not killed: the loss is older than this run of the unit"
    FAILED = "could not be carried out"


@dataclass(slots=True)
class Target:
    """A cgroup with a policy; kill is a descriptor of its cgroup.kill, -1 if it is not to be killed or has none."""

    cgroup: str
    action: Action
    kill: int = -1
    gone: bool = False
    killed_ns: int = 0  # when it was last killed, CLOCK_MONOTONIC

    def close(self) -> None:
        if self.kill >= 0:
            os.close(self.kill)
            self.kill = -1


class Reactor:
    """Knows the policies by cgroup id and acts on losses."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree = CgroupTree(root / "sys/fs/cgroup")
        self._targets: dict[int, Target] = {}
        self._sysrq = open_for_writing(root / "proc/sysrq-trigger")
        self._kmsg = open_for_writing(root / "dev/kmsg")

    @property
    def can_panic(self) -> bool:
        return self._sysrq >= 0

    def set_policy(self, cgroup_id: int, cgroup: str, action: Action | None) -> None:
        """Take a cgroup's policy, None to forget it; a path that leads to another cgroup by now does no harm."""
        before = self._targets.pop(cgroup_id, None)
        if before is not None:
            before.close()
        if action is None or action is Action.CONTINUE:
            return
        target = self._targets[cgroup_id] = Target(cgroup, action)
        if action is Action.KILL:
            target.kill = open_for_writing(self._tree.path(cgroup) / "cgroup.kill")
            # The path may have been made anew since; the id is then another.
            if self._tree.cgroup_id(cgroup) != cgroup_id:
                target.close()
                target.gone = True

    def react(self, loss: LateLoss) -> tuple[Action, str, bool]:
        """Do what the policies say; return the effective action, what came of it, and whether a kill was sent.

        The strictest policy on the path to the root counts, and the highest cgroup that is set to kill is killed,
        as in the kernel's own implementation.
        """
        targets = [self._targets[number] for number in loss.lineage if number in self._targets]
        if any(target.action is Action.PANIC for target in targets):
            self._panic(loss)
            return Action.PANIC, Reaction.FAILED, False
        if not targets:
            return Action.CONTINUE, "", False
        return (Action.KILL, *self._kill(targets[0], loss))

    def _kill(self, target: Target, loss: LateLoss) -> tuple[str, bool]:
        if loss.time_ns <= target.killed_ns:
            return Reaction.KILLED, False
        if target.gone:
            return Reaction.GONE, False
        if self._is_stale(target, loss):
            return Reaction.STALE, False
        now = time.monotonic_ns()
        try:
            os.write(target.kill, b"1")
        except OSError as error:
            # ENOENT before its files are gone: the cgroup is dead already (the kernel's cgroup_kill_write()).
            if error.errno not in (errno.ENODEV, errno.ENOENT):
                return Reaction.FAILED, False
            target.close()
            target.gone = True
            return Reaction.GONE, False
        target.killed_ns = now
        return Reaction.KILLED, True

    def _is_stale(self, target: Target, loss: LateLoss) -> bool:
        """Tell whether the unit's present run began after the loss, in a cgroup that outlived the run before."""
        unit = unit_of_directory(target.cgroup.rpartition("/")[2])
        try:
            began = os.lstat(self._root / INVOCATION_LINK.format(unit=unit)).st_mtime_ns
        except OSError:
            return False  # not a unit of systemd's own, or one without invocations
        now = time.time_ns()
        if began > now:
            return False  # the clock was set back since: the link's time says nothing
        return loss.time_ns + now - time.monotonic_ns() < began + TICK_NS

    def _panic(self, loss: LateLoss) -> None:
        text = (
            f"<0>cgpolicyd: 0x{loss.pfn:x}: dirty page cache lost: dev {loss.device[0]}:{loss.device[1]}"
            f" ino {loss.inode} pos {loss.position} cgroup id {loss.lineage[-1]} action panic\n"
        )
        with contextlib.suppress(OSError):
            os.write(self._kmsg, text.encode())
        with contextlib.suppress(OSError):
            os.write(self._sysrq, b"c")


def open_for_writing(path: Path) -> int:
    """Return a descriptor, -1 where there is no such file or it is refused."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


Key = tuple[tuple[int, ...], tuple[int, int], int, Action, str]  # lineage, device, inode, action, reaction
NO_FILE: tuple[tuple[int, int], int] = ((0, 0), 0)  # in the place of device and inode: several files


class Outbox:
    """What the daemon is to be told and has not taken yet: in a storm, few messages with exact totals."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._waiting: list[dict[str, Any]] = []
        self._losses: dict[Key, FileLoss] = {}

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._losses

    @property
    def is_urgent(self) -> bool:
        """Tell whether there is something else than losses."""
        return bool(self._waiting)

    def tell(self, message: dict[str, Any]) -> None:
        self._waiting.append(message)

    def lost(self, loss: LateLoss, action: Action, reaction: str, killed: bool) -> None:
        """Add one page to what is to be told of its file."""
        key, of_file = self._key(loss, action, reaction)
        known = self._losses.get(key)
        if known is None:
            lineage, device, inode, *_ = key
            known = FileLoss(
                cgroup_id=lineage[-1] if lineage else 0,
                device=device,
                inode=inode,
                action=action,
                pages=0,
                positions=(),
                pfns=(),
                lineage=lineage,
                reaction=reaction,
            )
        more = len(known.pfns) < POSITIONS_MAX
        self._losses[key] = replace(
            known,
            pages=known.pages + 1,
            kills=known.kills + killed,
            positions=(*known.positions, loss.position) if more and of_file else known.positions,
            pfns=(*known.pfns, loss.pfn) if more else known.pfns,
        )

    def _key(self, loss: LateLoss, action: Action, reaction: str) -> tuple[Key, bool]:
        """Return what a page is told of with, and whether that is its file: else its cgroup, or all that is left."""
        key: Key = (loss.lineage, loss.device, loss.inode, action, reaction)
        if key in self._losses or len(self._losses) < FILES_MAX:
            return key, True
        key = (loss.lineage, *NO_FILE, action, reaction)
        if key in self._losses or len(self._losses) < FILES_MAX + CGROUPS_MAX:
            return key, False
        return ((), *NO_FILE, action, reaction), False

    def flush(self) -> bool:
        """Send what the daemon takes without being waited for; return whether something is left."""
        while self._waiting or self._losses:
            message = self._waiting[0] if self._waiting else {"loss": asdict(next(iter(self._losses.values())))}
            try:
                self._channel.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return True
            if self._waiting:
                del self._waiting[0]
            else:
                del self._losses[next(iter(self._losses))]
        return False


def be_quick() -> list[str]:
    """Keep the memory, take a real-time priority, collect no garbage; return what was refused."""
    refused = []
    gc.collect()
    gc.freeze()
    gc.disable()
    if ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_FUTURE) != 0:
        refused.append("memory not locked")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    except OSError:
        refused.append("no real-time priority")
    return refused


class Service:
    """The reactor's main loop, from arming the probes to the daemon's end."""

    def __init__(self, root: Path, channel: socket.socket) -> None:
        self._channel = channel
        self._reactor = Reactor(root)
        self._probes = LossProbes(root / "sys/kernel/tracing", root / "sys/kernel/btf/vmlinux")
        self._outbox = Outbox(channel)
        self._poll = select.poll()
        self._trace = -1
        self._refused: list[str] = []
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._tell_at = 0.0  # when losses may be told of again (time.monotonic())
        self._missed = 0  # events, of which the daemon was told

    def run(self) -> None:
        """Serve until the daemon closes its end; leave no probe behind."""
        try:
            self._arm()
            self._refused = be_quick()
            self._poll.register(self._channel, select.POLLIN)
            self._tell_armed()
            while self._turn():
                pass
        finally:
            self._probes.disarm()

    def _arm(self) -> None:
        try:
            self._probes.arm()
        except UserError as error:
            self._outbox.tell({"failed": error.message, "hint": error.hint or ""})
            return
        self._trace = self._probes.fileno()
        self._poll.register(self._trace, select.POLLIN)

    def _tell_armed(self) -> None:
        if self._trace >= 0:
            paths = list(self._probes.paths)
            self._outbox.tell({"armed": paths, "refused": self._refused, "panic": self._reactor.can_panic})

    def _turn(self) -> bool:
        """Wait for something and see to it; return False when the daemon has gone."""
        now, full = time.monotonic(), False
        if self._outbox.is_urgent or (not self._outbox.is_empty and now >= self._tell_at):
            try:
                full = self._outbox.flush()
            except (BrokenPipeError, ConnectionResetError):
                return False
            self._tell_at = now + TELL_SECONDS
        self._poll.modify(self._channel, select.POLLIN | (select.POLLOUT if full else 0))
        until = self._check_at if self._outbox.is_empty or full else min(self._check_at, self._tell_at)
        # Never less than a millisecond: poll() counts in whole ones.
        ready = dict(self._poll.poll(max(until - now, 0.001) * 1000))
        if self._trace in ready:
            self._see_losses()
        if ready.get(self._channel.fileno(), 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
            if not self._hear():
                return False
        if time.monotonic() >= self._check_at:
            self._check()
            self._check_at = time.monotonic() + CHECK_SECONDS
        return True

    def _see_losses(self) -> None:
        for loss in self._probes.read():
            self._outbox.lost(loss, *self._reactor.react(loss))

    def _hear(self) -> bool:
        for _ in range(POLICIES_MAX):
            try:
                data = self._channel.recv(MESSAGE_MAX, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not data:
                return False
            message = json.loads(data)
            action = Action(message["action"]) if message["action"] else None
            self._reactor.set_policy(message["id"], message["cgroup"], action)
        return True

    def _check(self) -> None:
        """See whether events were missed, and whether somebody has taken the probes away; put them back."""
        missed = self._probes.dropped + self._probes.unattributed - self._missed
        if missed:
            self._missed += missed
            self._outbox.tell({"missed": missed})
        fault = self._probes.faults() if self._trace >= 0 else "not armed"
        if not fault:
            return
        if self._trace >= 0:
            self._outbox.tell({"fault": fault})
            self._poll.unregister(self._trace)
            self._trace = -1
        self._probes.disarm()
        self._arm()
        gc.collect()  # what was read to arm; in cycles, if that failed
        self._tell_armed()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the reactor at the other end of a socket; return its exit status."""
    parser = argparse.ArgumentParser(prog="cgpolicy-reactor", description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("/"), help="directory that stands for / (tests)")
    parser.add_argument("--disarm", action="store_true", help="only take away the probes that a killed one left")
    parser.add_argument("channel", type=int, nargs="?", help="descriptor of the socket to cgpolicyd")
    options = parser.parse_args(arguments)
    if options.disarm:
        try:
            disarm_leftovers(options.root / "sys/kernel/tracing")
        except UserError as error:
            print(f"cgpolicy-reactor: {error}", file=sys.stderr)
            return 1
        return 0
    if options.channel is None:
        parser.error("cgpolicyd starts this program; by hand only --disarm is of use")
    # systemd stops all processes of the service, a terminal's Ctrl-C goes to the daemon, too, and that ends this one
    # by closing the socket: it must not take an orderly end for a reactor that has failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    Service(options.root, socket.socket(fileno=options.channel)).run()
    return 0
