# SPDX-License-Identifier: GPL-2.0-only
"""The units of the comparison: a victim whose page is lost, and a bystander that reads the same page."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.kernel.guest.pagecache import PAGE, WAIT_SECONDS, wait_for
from tests.vm.guest.scene import CGROUPS, call, must, property_of, run, service, setting

PROGRAMS = Path("/usr/local/bin")
BEFORE, STRUCK, HANDLED = range(3)  # phases, as victim.c has them


class Counters:
    """What victim.c counts, in memory that outlives it."""

    FORMAT = "=9Q"
    NAMES = ("phase", "pos", "ready", "before", "struck", "handled", "stale", "failed", "last_stale")

    def __init__(self, name: str) -> None:
        self.path = Path("/dev/shm", name)
        self.path.write_bytes(bytes(PAGE))
        with open(self.path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), PAGE)

    def read(self) -> dict[str, int]:
        return dict(zip(self.NAMES, struct.unpack_from(self.FORMAT, self.memory), strict=True))

    def __getitem__(self, name: str) -> int:
        return self.read()[name]

    def __setitem__(self, name: str, value: int) -> None:
        # One aligned store: the processes are looking at it.
        memoryview(self.memory).cast("Q")[self.NAMES.index(name)] = value

    def clear(self) -> None:
        self.memory[: struct.calcsize(self.FORMAT)] = bytes(struct.calcsize(self.FORMAT))


@dataclass(frozen=True)
class Unit:
    """A service that runs victim.c, with a policy."""

    name: str
    action: str

    @cached_property
    def counters(self) -> Counters:
        return Counters(self.name)

    @property
    def id(self) -> str:
        return f"{self.name}.service"

    @property
    def cgroup(self) -> Path:
        return CGROUPS / "system.slice" / self.id

    def define(self) -> None:
        """Write its files; systemd is not told."""
        command = f"{PROGRAMS}/victim $HOW $FILE $WHERE {self.counters.path}"
        more = f"Type=exec\nEnvironmentFile=/run/{self.name}.env\n[Unit]\nStartLimitIntervalSec=0\n"
        service(self.name, run=command, more=more, drop_in=setting(self.action))

    def tell(self, how: str, file: Path, where: int) -> None:
        """Say what it is to do when it is started."""
        Path(f"/run/{self.name}.env").write_text(f"HOW={how}\nFILE={file}\nWHERE={where}\n")
        self.counters.clear()

    def start(self, how: str, file: Path, where: int) -> None:
        """Start it, once it is gone, and return when all its processes do what they have to."""
        self.tell(how, file, where)
        systemd = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
        call(*systemd, "org.freedesktop.systemd1.Manager.StartUnit", self.id, "replace")
        wait_for(lambda: self.counters["ready"] == 1, f"{self.id} ready")

    def stop(self) -> None:
        must("systemctl", "stop", self.id)
        run("systemctl", "reset-failed", self.id)  # one that has not failed may not be loaded any more

    def pids(self) -> list[int]:
        try:
            return sorted(map(int, (self.cgroup / "cgroup.procs").read_text().split()))
        except FileNotFoundError:
            return []

    def is_active(self) -> bool:
        return bool(property_of(self.id, "Unit", "ActiveState") == "active")

    def result(self) -> str:
        return str(property_of(self.id, "Service", "Result"))


class Deaths:
    """Waits, with real-time priority, for the end of the processes of a unit."""

    def __init__(self, unit: Unit) -> None:
        self.process = subprocess.Popen(
            [PROGRAMS / "deaths", *map(str, unit.pids())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout
        self.stdout = self.process.stdout.fileno()
        if not self.readable(WAIT_SECONDS) or os.read(self.stdout, 100) != b"ready\n":
            raise AssertionError(f"{unit.id}: nobody watches it")

    def readable(self, seconds: float) -> bool:
        return bool(select.select([self.stdout], [], [], seconds)[0])

    def wait(self, seconds: float) -> int | None:
        """Return when the last process ended, in ns of CLOCK_MONOTONIC; nothing if one is left in the end."""
        if not self.readable(seconds):
            return None
        _, last = os.read(self.stdout, 100).split()
        return int(last)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def watched(unit: Unit) -> Iterator[Deaths]:
    deaths = Deaths(unit)
    try:
        yield deaths
    finally:
        deaths.close()
