# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dirty page cache that was lost, page by page: the tracepoint ras:memory_failure_dirty.

A tracefs instance of our own keeps clear of whoever else traces on this host.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cgpolicy.action import Action
from cgpolicy.error import NotSupported

EVENT = "ras/memory_failure_dirty"

# Format of the tracepoint (kernel: include/ras/ras_event.h), behind ftrace's own columns.
LINE = re.compile(
    rb"memory_failure_dirty: pfn=0x(?P<pfn>[0-9a-f]+) dev=(?P<major>\d+):(?P<minor>\d+) ino=(?P<ino>\d+)"
    rb" pos=(?P<pos>-?\d+) cgroup_id=(?P<cgroup_id>\d+) action=(?P<action>[a-z]+)"
)
DROPPED = re.compile(rb"LOST (\d+) EVENTS")

BUFFER_KIB = 256  # a CPU; about 4,000 events until they are read

# Pages of one file, lost together, are told of together, and at most so many of them one by one.
POSITIONS_MAX = 64


@dataclass(frozen=True, slots=True)
class Loss:
    """One lost page: position is its offset in the file in bytes, cgroup_id the cgroup charged for it."""

    pfn: int
    device: tuple[int, int]
    inode: int
    position: int
    cgroup_id: int
    action: Action


@dataclass(frozen=True, slots=True)
class FileLoss:
    """Pages of one file that a cgroup lost together: positions (bytes) and page frames of the first of them.

    In a storm of which the reporter could not keep all, pages of several files: device, inode and position unknown.
    lineage holds the ids of the charged cgroup and of those above it, as far as the reporter knows them, the
    charged one last. reaction is "" where the kernel itself acted.
    """

    cgroup_id: int
    device: tuple[int, int]
    inode: int
    action: Action
    pages: int
    positions: tuple[int, ...]
    pfns: tuple[int, ...]
    lineage: tuple[int, ...]
    reaction: str = ""
    files: int = 1  # more if those of several files are told of together: device, inode and positions are the first's
    kills: int = 0  # times that the reaction was carried out for them


def by_file(losses: Iterable[Loss]) -> list[FileLoss]:
    """Put pages of one file together that one cgroup lost."""
    groups: dict[tuple[int, tuple[int, int], int, Action], list[Loss]] = {}
    for loss in losses:
        groups.setdefault((loss.cgroup_id, loss.device, loss.inode, loss.action), []).append(loss)
    return [
        FileLoss(
            *key,
            pages=len(group),
            positions=tuple(loss.position for loss in group[:POSITIONS_MAX]),
            pfns=tuple(loss.pfn for loss in group[:POSITIONS_MAX]),
            lineage=(key[0],),
        )
        for key, group in groups.items()
    ]


class LossReader:
    """Reads losses as they happen; dropped counts those that came too fast for the trace buffer."""

    def __init__(self, tracefs: Path = Path("/sys/kernel/tracing"), instance: str = "cgpolicy") -> None:
        self._tracefs = tracefs
        self._instance = tracefs / "instances" / instance
        self._pipe = -1
        self._rest = b""
        self.dropped = 0

    def is_supported(self) -> bool:
        """Tell whether the kernel has the tracepoint, and so memory.failure_dirty_action."""
        return (self._tracefs / "events" / EVENT).is_dir()

    def open(self) -> None:
        """Make the instance and begin to listen; raise NotSupported with the cure if that cannot be."""
        if not (self._tracefs / "events").is_dir():
            raise NotSupported(f"{self._tracefs} is no tracefs", hint="systemctl start sys-kernel-tracing.mount")
        if not self.is_supported():
            raise NotSupported(f"the kernel has no tracepoint {EVENT}", hint="see kernel-patch/")
        try:
            # One that a killed daemon left behind is taken over.
            self._instance.mkdir(exist_ok=True)
            self._write("buffer_size_kb", str(BUFFER_KIB))
            # Wake at the first event, not when a share of the buffer is full (kernel 6.1 and later).
            with contextlib.suppress(FileNotFoundError):
                self._write("buffer_percent", "0")
            self._write(f"events/{EVENT}/enable", "1")
            self._pipe = os.open(self._instance / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise NotSupported(f"cannot trace: {error}", hint="is the kernel locked down?") from None

    def _write(self, file: str, text: str) -> None:
        descriptor = os.open(self._instance / file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def fileno(self) -> int:
        return self._pipe

    def read(self) -> list[Loss]:
        """Return what has come since the last call, without waiting."""
        losses: list[Loss] = []
        while True:
            try:
                data = os.read(self._pipe, 65536)
            except BlockingIOError:
                break
            if not data:
                break
            *lines, self._rest = (self._rest + data).split(b"\n")
            losses += [loss for loss in map(self._parse, lines) if loss is not None]
        return losses

    def _parse(self, line: bytes) -> Loss | None:
        dropped = DROPPED.search(line)
        if dropped:
            self.dropped += int(dropped[1])
        match = LINE.search(line)
        if match is None or match["action"].decode() not in list(Action):
            return None
        return Loss(
            pfn=int(match["pfn"], 16),
            device=(int(match["major"]), int(match["minor"])),
            inode=int(match["ino"]),
            position=int(match["pos"]),
            cgroup_id=int(match["cgroup_id"]),
            action=Action(match["action"].decode()),
        )

    def close(self) -> None:
        """Stop listening and remove the instance."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        with contextlib.suppress(OSError):
            self._instance.rmdir()
