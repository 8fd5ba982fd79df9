#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""kill reread|fork ROUNDS inject|srao: no stale read by a group that is killed, and no survivor of it.

rereader and forkbomb are beside this file, compiled by the host. Prints one JSON object.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.kernel.guest.pagecache import (
    OLD,
    PAGE,
    Cgroup,
    KernelLog,
    Process,
    check,
    file_pfn,
    filesystem,
    keep_quiet,
    overwrite,
    poison,
    target,
    wait_for,
)

HERE = Path(__file__).parent
POS = 5 * PAGE
READERS = 8
STALE_SECONDS = 3.0  # how long a group that goes on may read


class Counters:
    """Numbers in shared memory that a program counts up."""

    def __init__(self, name: str, number: int) -> None:
        self.path = Path("/dev/shm", name)
        with open(self.path, "wb") as file:
            file.truncate(PAGE)
        with open(self.path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), PAGE)
        self.format = f"={number}Q"

    def read(self) -> tuple[int, ...]:
        return struct.unpack_from(self.format, self.memory)


def program(name: str, *arguments: object) -> list[str]:
    return [str(HERE / name), *map(str, arguments)]


def execute(process: Process, arguments: list[str]) -> None:
    os.execv(arguments[0], arguments)


def above(counters: Counters, number: int) -> bool:
    return counters.read()[0] > number


def empty(cgroup: Cgroup) -> bool:
    return not cgroup.populated()


def all_read(counters: Counters) -> bool:
    """Tell whether each of the readers has read the page, some of them often."""
    fresh, *_ = counters.read()
    return fresh > 200 and min(counters.read()[4:]) > 0


def reread(rounds: int, injection: str) -> dict[str, object]:
    """Count the stale reads of groups that are killed, and of one that goes on: the control."""
    total: dict[str, list[int]] = {}
    filesystem("ext4")
    for action, number in [("continue", 0), *(("kill", number) for number in range(rounds))]:
        owner = Cgroup(f"{action}-{injection}{number}")
        owner.action = action
        counters = Counters(f"{action}{number}", 4 + READERS)
        with target("ext4") as file:
            arguments = program("rereader", file.path, POS, counters.path)
            process = Process(owner, partial(execute, arguments=arguments))
            wait_for(partial(all_read, counters), "readers running")
            fd = os.open(file.path, os.O_RDONLY)
            pfn = file_pfn(fd, POS)
            check((0, 0, 0), counters.read()[1:4], "stale reads before")
            log = KernelLog()
            poison(pfn, injection)
            # "Failed" only says that a reader was about to copy from the page when it was dropped.
            log.wait(rf"{pfn:#x}: recovery action for dirty LRU page: (Recovered|Failed)")
            if action == "kill":
                check(9, process.wait(), "wait status")
                wait_for(partial(empty, owner), "all gone")
                check(OLD, os.pread(fd, 1, POS), "what the file would have said")
            else:
                time.sleep(STALE_SECONDS)
                check(True, process.alive(), "process that goes on")
                owner.kill()
                process.wait()
                wait_for(partial(empty, owner), "all gone")
            os.close(fd)
            log.close()
        sums = total.setdefault(action, [0, 0, 0, 0])
        total[action] = [old + new for old, new in zip(sums, counters.read()[:4], strict=True)]
        counters.path.unlink()
    return {"rounds": rounds, "injection": injection, **total}


def fork(rounds: int, injection: str) -> dict[str, object]:
    """Kill groups that fork and move as fast as they can; look for survivors."""
    forks = 0
    filesystem("ext4")
    for number in range(rounds):
        owner = Cgroup(f"bomb{number}", controllers="+memory +pids")
        (owner.path / "pids.max").write_text("100")
        owner.action = "kill"
        groups = [Cgroup(f"part{part}", owner, controllers="") for part in range(4)]
        counters = Counters(f"forks{number}", 1)
        with target("ext4") as file:

            def body(
                process: Process, path: Path = file.path, group: Cgroup = owner, part: Cgroup = groups[0]
            ) -> None:
                group.join()
                fd, _ = overwrite(path, POS, "write", 0)
                process.tell(str(file_pfn(fd, POS)))
                part.join()
                process.wait_for_order()

            process = Process(None, body)
            pfn = int(process.hear())
            arguments = program("forkbomb", counters.path, *(group.path for group in groups))
            bomb = Process(groups[1], partial(execute, arguments=arguments))
            wait_for(partial(above, counters, 300), "forking")
            poison(pfn, injection)
            # SIGKILL is pending for all: what is left only has to die.
            wait_for(partial(empty, owner), f"round {number}: all gone")
            check(9, process.wait(), "wait status")
            bomb.wait()
            check((1, 1), owner.losses(), "counters")
            after = counters.read()[0]
            forks += after
            check(True, empty(owner), "still nobody")
            check(after, counters.read()[0], "forks since")
    return {"rounds": rounds, "forks": forks, "injection": injection}


def main() -> None:
    what, rounds, injection = sys.argv[1:]
    keep_quiet()
    subprocess.run(["dmesg", "-n", "1"], check=True)
    print(json.dumps({"reread": reread, "fork": fork}[what](int(rounds), injection)), flush=True)


main()
