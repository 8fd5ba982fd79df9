#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Lose pages that are no dirty file data, with panic set: nothing may happen, and nothing be counted."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.kernel.guest.pagecache import (
    HWPOISON,
    NEW,
    OLD,
    PAGE,
    SWAPCACHE,
    Cgroup,
    KernelLog,
    Process,
    Trace,
    address_of,
    check,
    file_pfn,
    has_flag,
    is_dirty,
    is_present,
    keep_quiet,
    overwrite,
    pfn_at,
    poison,
    target,
)

HUGE = 2 << 20
MADV_PAGEOUT, MADV_SOFT_OFFLINE = 21, 101


def anonymous() -> tuple[int, object]:
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * PAGE
    return pfn_at(address_of(memory)), memory


def shared_anonymous() -> tuple[int, object]:
    memory = mmap.mmap(-1, PAGE)
    memory[:] = b"x" * PAGE
    return pfn_at(address_of(memory)), memory


def tmpfs() -> tuple[int, object]:
    fd = os.open(f"/dev/shm/{os.getpid()}", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * PAGE)
    return file_pfn(fd, 0), fd


def memfd() -> tuple[int, object]:
    fd = os.memfd_create("guest-ram")
    os.write(fd, b"x" * PAGE)
    return file_pfn(fd, 0), fd


def hugetlbfs() -> tuple[int, object]:
    Path("/proc/sys/vm/nr_hugepages").write_text("4")
    directory = Path("/mnt/huge")
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "hugetlbfs", "none", directory], check=True)
    fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, HUGE)
    memory = mmap.mmap(fd, HUGE)
    memory[:1] = b"x"
    return pfn_at(address_of(memory)), memory


def clean() -> tuple[int, object]:
    with target("ext4") as file:
        fd = os.open(file.path, os.O_RDWR)
        check(OLD, os.pread(fd, 1, 0), "contents")
        pfn = file_pfn(fd, 0)
        check(False, is_dirty(pfn), "page dirty")
        return pfn, fd


def written_back() -> tuple[int, object]:
    with target("ext4") as file:
        fd, _ = overwrite(file.path, 0, "write", file.size)
        os.fsync(fd)
        return file_pfn(fd, 0), fd


def soft_offlined() -> tuple[int, object]:
    with target("ext4") as file:
        fd, mapping = overwrite(file.path, 0, "mmap", file.size)
        assert mapping
        pfn = pfn_at(address_of(mapping))
        check(True, is_dirty(pfn), "page dirty")
        mapping.madvise(MADV_SOFT_OFFLINE)  # moves the data to another page
        check(NEW, os.pread(fd, 1, 0), "contents")
        return pfn, mapping


def swap_cache() -> tuple[int, object]:
    """Return a page that was read back from swap for one of two processes that own it: the cache keeps it."""
    swap = Path("/var/tmp/swap")
    with open(swap, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 << 20)
    swap.chmod(0o600)
    subprocess.run(["mkswap", swap], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", swap], check=True)
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * PAGE
    address = address_of(memory)
    for _ in range(100):
        memory.madvise(MADV_PAGEOUT)
        if not is_present(address):
            break
        time.sleep(0.05)
    check(False, is_present(address), "page present")
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # until the other process is gone
        os._exit(0)
    check(b"x", memory[:1], "contents after having been swapped out")
    pfn = pfn_at(address)
    check(True, has_flag(pfn, SWAPCACHE), "page in the swap cache")
    return pfn, (memory, writer)


def body(process: Process, make: Callable[[], tuple[int, object]]) -> None:
    pfn, keep = make()
    process.tell(str(pfn))
    process.wait_for_order()
    del keep


def main() -> None:
    keep_quiet()
    trace = Trace()
    injected = (anonymous, shared_anonymous, tmpfs, memfd, hugetlbfs, clean, written_back, swap_cache)
    cases = [(make, "inject") for make in injected]
    cases += [(make, "srao") for make in (anonymous, tmpfs, clean)]
    cases.append((soft_offlined, "itself"))
    for number, (make, how) in enumerate(cases):
        owner = Cgroup(f"negative{number}")
        owner.action = "panic"
        log = KernelLog()
        process = Process(owner, partial(body, make=make))
        pfn = int(process.hear())
        if how != "itself":
            poison(pfn, how)
        check(True, has_flag(pfn, HWPOISON), f"{make.__name__}: page poisoned")
        check((0, 0), owner.losses(), f"{make.__name__}: counters")
        check([], log.lost(), f"{make.__name__}: kernel's lines")
        check([], trace.read(), f"{make.__name__}: trace events")
        if make is hugetlbfs:
            Path("/proc/sys/vm/nr_hugepages").write_text("0")
        print(f"ok {make.__name__} {how}", flush=True)


if __name__ == "__main__":
    main()
