# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's end of the reactor: starts it, tells it the policies, hears what was lost."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgpolicy.action import Action
from cgpolicy.error import NotSupported, UserError
from cgpolicy.losses import FileLoss
from cgpolicy.policytable import Entry, PolicyTable

PROGRAM = "cgpolicy-reactor"  # beside the daemon's own

# To read the kernel's type information and arm the probes takes a second, and some on a slow machine.
START_SECONDS = 60.0
SEND_SECONDS = 5  # a reactor that takes no message for so long has died in all but name
STOP_SECONDS = 5.0

MESSAGE_MAX = 65536
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Armed:
    """The probes are in place: the paths (cgpolicyd(8)) that they watch, and what the reactor was refused."""

    paths: tuple[str, ...]
    refused: tuple[str, ...]
    can_panic: bool


@dataclass(frozen=True, slots=True)
class Unarmed:
    """The probes cannot be placed, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fault:
    """Somebody took the probes away; Armed or Unarmed follows."""

    text: str


@dataclass(frozen=True, slots=True)
class Missed:
    """Events of which nothing is known: losses may be among them that nobody has reacted to."""

    events: int


class Ended(UserError):
    """The reactor is no more."""


class Enforcer:
    """A reactor process, and the table of policies that it is told."""

    def __init__(self, root: Path) -> None:
        self.table = PolicyTable(root / "sys/fs/cgroup", self._tell, root / "run/systemd/units")
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self) -> Armed:
        """Start the reactor and return once its probes are in place; raise NotSupported where they cannot be."""
        program = Path(sys.argv[0]).with_name(PROGRAM)
        if not program.exists():
            raise NotSupported(f"no {program}", hint="is cgpolicy installed in full?")
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (self._channel, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            command = [sys.executable, *isolated(), str(program), "--root", str(self._root), str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._channel.settimeout(START_SECONDS)
        try:
            first = message(self._channel.recv(MESSAGE_MAX))
        except (TimeoutError, ConnectionResetError, Ended):
            self.stop()
            raise NotSupported("the reactor did not start", hint="see journalctl -u cgpolicyd") from None
        if isinstance(first, Armed):
            # Not settimeout(), which would make a recv() with MSG_DONTWAIT wait, too.
            self._channel.settimeout(None)
            self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
            return first
        self.stop()
        raise NotSupported(first.reason if isinstance(first, Unarmed) else "the reactor's first word is no answer")

    def fileno(self) -> int:
        assert self._channel is not None
        return self._channel.fileno()

    def _tell(self, cgroup_id: int, entry: Entry | None) -> None:
        """Pass on a cgroup's policy, None if it has none any more; raise Ended."""
        assert self._channel is not None
        said = {"id": cgroup_id, "cgroup": entry.cgroup if entry else "", "action": entry.action if entry else None}
        try:
            self._channel.send(json.dumps(said).encode(), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Ended(f"the reactor takes no message: {error}") from None

    def read(self) -> Iterator[FileLoss | Armed | Unarmed | Fault | Missed]:
        """Yield what the reactor has said, without waiting; raise Ended at its end."""
        assert self._channel is not None
        while True:
            try:
                data = self._channel.recv(MESSAGE_MAX, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            yield message(data)

    def stop(self) -> None:
        """End the reactor and wait until its probes are gone."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def isolated() -> list[str]:
    """Return the options that this interpreter itself was started with, as far as they say where modules come from."""
    return ["-I"] if sys.flags.isolated else []


def message(data: bytes) -> FileLoss | Armed | Unarmed | Fault | Missed:
    """Return what the reactor said; raise Ended for nothing, which is its end."""
    if not data:
        raise Ended("the reactor has ended", hint="see journalctl -u cgpolicyd")
    said: dict[str, Any] = json.loads(data)
    if "loss" in said:
        loss = said["loss"]
        lists = {name: tuple(loss[name]) for name in ("device", "positions", "pfns", "lineage")}
        return FileLoss(**(loss | lists | {"action": Action(loss["action"])}))
    if "armed" in said:
        return Armed(tuple(said["armed"]), tuple(said["refused"]), said["panic"])
    if "fault" in said:
        return Fault(said["fault"])
    if "missed" in said:
        return Missed(said["missed"])
    return Unarmed(f"{said['failed']} ({said['hint']})" if said["hint"] else said["failed"])
