#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""measure REACTION PLAN: lose dirty pages of a unit and print, as a JSON object a line, what became of whom.

PLAN is a JSON object: "events", an array of [path, action, injection, number]; "storm", a number of pages; "panic",
a path, after which there is no further line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.bench.guest.reaction import REACTIONS, Reaction, load_modules
from tests.bench.guest.units import HANDLED, PROGRAMS, STRUCK, Unit, watched
from tests.kernel.guest.pagecache import (
    COMPOUND_HEAD,
    COMPOUND_TAIL,
    HWPOISON_INJECT,
    OLD,
    PAGE,
    KernelLog,
    address_of,
    check,
    file_pfn,
    has_flag,
    is_dirty,
    keep_quiet,
    number_in,
    target,
    wait_for,
)
from tests.vm.guest.scene import must

HERE = Path(__file__).parent
WINDOW_SECONDS = 1.0  # how long a unit that goes on may read what it gets
IDLE_SECONDS = 600.0  # how long a daemon may work off a storm


@dataclass(frozen=True)
class Way:
    """A path on which dirty data is lost (numbers as in the cover letter), and how to get there."""

    kind: str
    how: str
    pages: int  # from one lost page to the next in a file
    losses: int  # in one file


# The first page of a file is not lost: the bystander reads it before the victim has written.
WAYS = {
    "P1": Way("ext4", "write", 2, 1024),
    "P2": Way("vfat", "write", 2, 1024),
    "P3": Way("xfs", "large", 256, 1),
}


class Places:
    """Where to lose the next page on a path: files full of OLD, one place in them after another."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.generator = self.run()

    def run(self) -> Iterator[tuple[Path, int]]:
        size = (self.way.losses + 1) * self.way.pages * PAGE
        with target(self.way.kind, size) as first:
            for number in count():
                file = first.path.with_name(f"file{number}") if number else first.path
                if number:
                    fill(file, size)
                for loss in range(self.way.losses):
                    yield file, (loss * self.way.pages + self.way.pages // 2) * PAGE

    def next(self) -> tuple[Path, int]:
        return next(self.generator)


def fill(path: Path, size: int) -> None:
    """Write a file full of OLD, and have nothing of it in the page cache."""
    with open(path, "wb") as file:
        file.write(OLD * size)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class MachineCheck:
    """The port to the host, as vm-mce uses it, held open: a program's start would count as time to react."""

    def __init__(self) -> None:
        lock = open("/run/lock/vm-mce", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.lock = lock
        ports = Path("/sys/class/virtio-ports").iterdir()
        (name,) = (port.name for port in ports if (port / "name").read_text().strip() == "cgpolicy.mce")
        self.fd = os.open(f"/dev/{name}", os.O_RDWR)

    def raise_at(self, address: int) -> None:
        os.write(self.fd, b"%#x\n" % address)
        check(b"ok\n", os.read(self.fd, 4096), "machine check")


class Bench:
    def __init__(self, reaction: Reaction) -> None:
        self.reaction = reaction
        self.injector = os.open(HWPOISON_INJECT, os.O_WRONLY)
        self.machine_check = MachineCheck()
        self.places = {path: Places(way) for path, way in WAYS.items()}
        self.bystander = Unit("bystander", "kill")
        self.victims = {action: Unit(f"victim-{action}", action) for action in ("continue", "kill", "panic")}
        self.storm_unit = Unit("storm", "kill")
        for unit in self.units:
            unit.define()
        must("systemctl", "daemon-reload")
        self.about = reaction.start(self.units)
        self.followed: Path | None = None
        self.following: list[int] = []

    @property
    def units(self) -> list[Unit]:
        return [self.bystander, self.storm_unit, *self.victims.values()]

    def inject(self, pfn: int) -> None:
        # EBUSY only says that the page could not be isolated.
        with contextlib.suppress(OSError):
            os.write(self.injector, b"%#x" % pfn)

    def follow(self, file: Path, pos: int) -> None:
        """Have the bystander, which wrote nothing and touched nothing first, read a page of a file."""
        if file != self.followed or self.bystander.pids() != self.following:
            self.bystander.stop()
            self.bystander.start("follow", file, 0)
            self.reaction.wait_until_armed(self.bystander)
            self.followed, self.following = file, self.bystander.pids()
        self.bystander.counters["pos"] = pos
        before = self.bystander.counters["before"]
        wait_for(lambda: self.bystander.counters["before"] > before, "bystander reading what was written")

    def bystander_hit(self) -> bool:
        return self.bystander.pids() != self.following

    def event(self, path: str, action: str, injection: str) -> dict[str, object]:
        """Lose one page."""
        victim, way = self.victims[action], WAYS[path]
        file, pos = self.places[path].next()
        victim.start(way.how, file, pos)
        wait_for(lambda: victim.counters["before"] > 10, "victim reading what it has written")
        self.reaction.wait_until_armed(victim)
        self.follow(file, pos)
        fd = os.open(file, os.O_RDONLY)
        pfn = file_pfn(fd, pos)
        os.close(fd)
        check(True, is_dirty(pfn), "page dirty")
        check(path == "P3", has_flag(pfn, COMPOUND_HEAD, COMPOUND_TAIL), "page in a large folio")
        check(victim.cgroup.stat().st_ino, kpagecgroup(pfn), "cgroup that is charged")
        check(0, victim.counters["stale"], "stale reads before")
        log = KernelLog()
        with watched(victim) as deaths:
            victim.counters["phase"] = STRUCK
            wait_for(lambda: victim.counters["struck"] > 1000, "victim reading as fast as it can")
            start = time.monotonic_ns()
            if injection == "srao":
                self.machine_check.raise_at(pfn * PAGE)
                log.wait(rf"Memory failure: {pfn:#x}: (recovery action for|unhandlable)")
            else:
                self.inject(pfn)
            handled = time.monotonic_ns()
            victim.counters["phase"] = HANDLED
            if action == "continue":
                ended = deaths.wait(WINDOW_SECONDS)
            else:
                ended = self.reaction.wait(pfn, deaths)
        seen = victim.counters.read()
        told = self.reaction.seen(pfn)
        if "trigger_started" in told:
            told["trigger_ms"] = float(str(told.pop("trigger_started"))) * 1000 - start / 1e6
            told["trigger_ended_ms"] = float(str(told.pop("trigger_ended"))) * 1000 - start / 1e6
        log.close()
        hit = self.bystander_hit()
        wait_for(lambda: victim.is_active() == (ended is None), "systemd knowing what became of the unit")
        result = victim.result()
        if ended is None:
            victim.stop()
        return {
            "path": path,
            "action": action,
            "injection": injection,
            "result": result,
            "ended_ms": None if ended is None else (ended - start) / 1e6,
            "handled_ms": (handled - start) / 1e6,
            "bystander_hit": hit,
            "stale": seen["stale"],
            "last_stale_ms": (seen["last_stale"] - start) / 1e6 if seen["stale"] else None,
            "served": seen["handled"],
            **told,
        }

    def storm(self, pages: int) -> dict[str, object]:
        """Lose many dirty pages of a unit, one after another, and start the unit again meanwhile."""
        unit = self.storm_unit
        with target("ext4", pages * PAGE) as file:
            fill(file.path, pages * PAGE)
            unit.start("storm", file.path, pages)
            self.reaction.wait_until_armed(unit)
            self.follow(file.path, 0)
            pfns = file_pfns(file.path, pages)
            reported = self.reaction.reported()
            with watched(unit) as deaths:
                began = time.monotonic_ns()
                for pfn in pfns[: pages // 2]:
                    self.inject(pfn)
                ended = deaths.wait(0)
                # The second invocation reads all over the file; what it gets there is clean.
                unit.tell("wander", file.path, pages)
                restart = subprocess.Popen(["systemctl", "restart", unit.id])
                for pfn in pfns[pages // 2 :]:
                    self.inject(pfn)
                end = time.monotonic_ns()
                check(0, restart.wait(), "restart")
            wait_for(lambda: unit.counters["ready"] == 1 or not unit.pids(), "second invocation running or killed")
            second = unit.pids()
            idle = self.reaction.wait_until_idle(IDLE_SECONDS)
            return {
                "pages": pages,
                "seconds": (end - began) / 1e9,
                "ended_ms": None if ended is None else (ended - began) / 1e6,
                "backlog_seconds": None if idle is None else max(0.0, idle - end / 1e9),
                "reported": self.reaction.reported() - reported,
                "kills": killed(unit),
                "second_hit": not second or unit.pids() != second,
                "bystander_hit": self.bystander_hit(),
            }


def killed(unit: Unit) -> int:
    """Return how many invocations of a unit were ended by SIGKILL."""
    messages = must("journalctl", "-o", "cat", "_PID=1", f"UNIT={unit.id}").splitlines()
    return sum("Main process exited, code=killed, status=9/KILL" in message for message in messages)


def kpagecgroup(pfn: int) -> int:
    with open("/proc/kpagecgroup", "rb", buffering=0) as file:
        return number_in(file.fileno(), pfn)


def file_pfns(path: Path, pages: int) -> list[int]:
    """Return the page frame numbers of a file's first pages, mapped for that moment only."""
    with open(path, "r+b") as file, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        with mmap.mmap(file.fileno(), pages * PAGE) as memory:
            for number in range(pages):
                memory[number * PAGE]
            start = address_of(memory) // PAGE
            table = os.pread(pagemap.fileno(), pages * 8, start * 8)
    entries = memoryview(table).cast("Q")
    return [entry & ((1 << 55) - 1) for entry in entries]


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    name, text = sys.argv[1:]
    plan = json.loads(text)
    load_modules()
    keep_quiet()
    subprocess.run(["dmesg", "-n", "1"], check=True)
    for program in ("victim", "deaths"):
        (PROGRAMS / program).write_bytes((HERE / program).read_bytes())
        (PROGRAMS / program).chmod(0o755)
    bench = Bench(REACTIONS[name]())
    say(about=bench.about, kernel=os.uname().release, cpus=os.cpu_count())
    for path, action, injection, number in plan["events"]:
        for _ in range(number):
            try:
                say(event=bench.event(path, action, injection))
            except AssertionError as error:
                say(event={"path": path, "action": action, "injection": injection, "error": str(error)})
    if plan["storm"]:
        say(storm=bench.storm(plan["storm"]))
    if plan["panic"]:
        say(event=bench.event(plan["panic"], "panic", "inject"))


main()
