# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lose pages of every kind, by every path there is, on a kernel that does not tell; print what the probes say."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cgpolicy.btf import Btf
from cgpolicy.error import UserError
from cgpolicy.kprobes import LEVELS, Event, LateLoss, LossProbes, append, disarm_leftovers
from tests.kernel.guest import negatives
from tests.kernel.guest.pagecache import (
    CGROUPS,
    COMPOUND_HEAD,
    COMPOUND_TAIL,
    HWPOISON,
    PAGE,
    WAIT_SECONDS,
    Cgroup,
    KernelLog,
    Process,
    Target,
    address_of,
    file_pfn,
    has_flag,
    is_dirty,
    keep_quiet,
    libc,
    overwrite,
    pfn_at,
    poison,
    target,
)
from tests.vm.guest.scene import must, run, tell

TRACING = Path("/sys/kernel/tracing")
NAME = "cgpolicy-test"  # not the daemon's
POS = 65 * PAGE  # within a folio, if it is a large one
HUGE = 2 << 20

CASES = (
    ("ext4", "write"),
    ("ext4", "mmap"),
    ("ext4", "large"),
    ("xfs", "write"),
    ("xfs", "large"),
    ("xfs", "pinned"),
    ("vfat", "write"),
    ("bdev", "write"),
    ("bdev", "mmap"),
)

numbers = itertools.count()


class Probes(LossProbes):
    """Remembers the suspects, too."""

    def __init__(self, instance: str = NAME) -> None:
        super().__init__(instance=instance.replace("-", "_"))
        self.suspects: list[Event] = []

    def _parse(self, line: bytes) -> LateLoss | None:
        before = self._suspect
        loss = super()._parse(line)
        if self._suspect is not None and self._suspect is not before:
            self.suspects.append(self._suspect)
        return loss

    def suspected(self) -> list[LateLoss | None]:
        """Return what would have been lost with the suspects since the last call."""
        suspects, self.suspects = self.suspects, []
        assert self._layout
        return [suspect.loss(self._layout) for suspect in suspects]

    def drain(self) -> list[LateLoss]:
        losses: list[LateLoss] = []
        while select.select([self], [], [], 0)[0]:
            losses += self.read()
        return losses

    def leftovers(self) -> list[str]:
        """Return what there is of them in tracefs."""
        lines = (TRACING / "kprobe_events").read_text().splitlines()
        found = [line.split()[0] for line in lines if f"/{self._group}" in line or f":{self._group}/" in line]
        return found + [path.name for path in (TRACING / "instances").glob(self._group)]


# What is lost ---------------------------------------------------------------------------------


def pin(fd: int, pos: int) -> tuple[int, int]:
    """Have a pipe refer to a page of a file, so that its folio cannot be split."""
    pipe = os.pipe()
    os.splice(fd, pipe[1], PAGE, offset_src=pos)
    return pipe


def dirty(process: Process, file: Target, how: str) -> None:
    """Dirty a page and keep it until told to end."""
    fd, mapping = overwrite(file.path, POS, "large" if how == "pinned" else how, file.size)
    pipe = pin(fd, POS) if how == "pinned" else None
    process.tell(str(file_pfn(fd, POS)))
    process.wait_for_order()
    del mapping, pipe


def told(loss: LateLoss) -> dict[str, object]:
    return {
        "pfn": loss.pfn,
        "device": list(loss.device),
        "inode": loss.inode,
        "position": loss.position,
        "lineage": list(loss.lineage),
    }


@contextlib.contextmanager
def victim(file: Target, how: str, cgroup: Cgroup | None) -> Iterator[int]:
    """Have a process of a cgroup hold a dirty page; give its frame."""
    process = Process(cgroup, partial(dirty, file=file, how=how))
    pfn = int(process.hear())
    if not is_dirty(pfn):
        raise SystemExit(f"{how}: the page is not dirty")
    yield pfn
    process.end()


def lose(probes: Probes, kind: str, how: str, injection: str) -> None:
    top = Cgroup(f"kprobes{next(numbers)}")
    owner = Cgroup("owner", top)
    sub = Cgroup("sub", owner, controllers="")  # where processes are, and no charges
    log = KernelLog()
    with target(kind) as file, victim(file, how, sub) as pfn:
        large = has_flag(pfn, COMPOUND_HEAD, COMPOUND_TAIL)
        probes.drain()
        probes.suspected()
        before = time.monotonic_ns()
        poison(pfn, injection)
        after = time.monotonic_ns()
        line = log.wait(rf"Memory failure: {pfn:#x}: (recovery action for|unhandlable)")
        losses = probes.drain()
        stat = file.path.stat()
        expected = {
            "pfn": pfn,
            "device": [os.major(file.device), os.minor(file.device)],
            "inode": losses[0].inode if kind == "bdev" and losses else stat.st_ino,
            "position": POS,
            "lineage": [top.id, owner.id],
        }
        tell(
            step=f"{kind} {how} {injection}",
            fate=line.partition("recovery action for ")[2],
            large=large,
            expected=expected,
            losses=[told(loss) for loss in losses],
            in_time=all(before - 1000 <= loss.time_ns <= after for loss in losses),
            suspected=[told(loss) if loss else None for loss in probes.suspected()],
        )
    log.close()


# What is not ----------------------------------------------------------------------------------


def huge_anonymous() -> tuple[int, object]:
    """Return a page of a large anonymous folio that cannot be split."""
    memory = mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = b"x" * 2 * HUGE
    address = (address_of(memory) + HUGE - 1) // HUGE * HUGE + 7 * PAGE
    pipe = os.pipe()
    vector = (ctypes.c_size_t * 2)(address, PAGE)
    if libc.vmsplice(pipe[1], vector, 1, 0) != PAGE:
        raise SystemExit("vmsplice")
    return pfn_at(address), (memory, pipe)


def huge_tmpfs() -> tuple[int, object]:
    """Return a page of a large folio of tmpfs that cannot be split."""
    directory = Path("/mnt/tmpfs")
    directory.mkdir(exist_ok=True)
    must("mount", "-t", "tmpfs", "-o", "huge=always", "none", str(directory))
    fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * 2 * HUGE)
    pfn = file_pfn(fd, POS)
    return pfn, (fd, pin(fd, POS))


def clean_pinned() -> tuple[int, object]:
    """Return a page of a clean large folio that cannot be split."""
    with target("xfs") as file:
        fd, _ = overwrite(file.path, POS, "large", file.size)
        os.fsync(fd)
        return file_pfn(fd, POS), (fd, pin(fd, POS))


def spare(probes: Probes, make: Callable[[], tuple[int, object]], injection: str) -> None:
    process = Process(Cgroup(f"kprobes{next(numbers)}"), partial(negatives.body, make=make))
    pfn = int(process.hear())
    large = has_flag(pfn, COMPOUND_HEAD, COMPOUND_TAIL)
    if injection != "itself":
        poison(pfn, injection)
    tell(
        step=f"{make.__name__} {injection}",
        poisoned=has_flag(pfn, HWPOISON),
        large=large,
        losses=[told(loss) for loss in probes.drain()],
    )
    process.end()
    if make is negatives.hugetlbfs:
        Path("/proc/sys/vm/nr_hugepages").write_text("0")


# Cgroups --------------------------------------------------------------------------------------


def deep(probes: Probes) -> None:
    """Lose a page of a cgroup that is deeper than events tell."""
    for step, depth in (("at the limit", LEVELS), ("below the limit", LEVELS + 3)):
        path = [Cgroup(f"kprobes{next(numbers)}")]
        while len(path) < depth:
            path.append(Cgroup("below", path[-1]))
        with target("ext4") as file, victim(file, "write", path[-1]) as pfn:
            poison(pfn, "inject")
        tell(step=step, ids=[cgroup.id for cgroup in path], lineages=[loss.lineage for loss in probes.drain()])


def rootless(probes: Probes) -> None:
    """Lose a page that is charged to the root."""

    class Root(Cgroup):
        def __init__(self) -> None:
            self.path = CGROUPS

    with target("ext4") as file, victim(file, "write", Root()) as pfn:
        poison(pfn, "inject")
    tell(step="root", lineages=[loss.lineage for loss in probes.drain()])


def removed(probes: Probes) -> None:
    """Lose a page whose cgroup has gone."""
    top = Cgroup(f"kprobes{next(numbers)}")
    gone = Cgroup("gone", top)
    ids = [top.id, gone.id]
    with target("ext4") as file:
        with victim(file, "write", gone) as pfn:
            pass
        gone.path.rmdir()
        poison(pfn, "inject")
    tell(step="removed", ids=ids, lineages=[loss.lineage for loss in probes.drain()])


# The probes themselves ------------------------------------------------------------------------


def lose_one(probes: Probes) -> list[LateLoss]:
    with target("ext4") as file, victim(file, "write", None) as pfn:
        poison(pfn, "inject")
    return probes.drain()


def measure() -> None:
    """Tell how long it takes to read BTF and to arm."""
    times = [time.monotonic()]
    types = Btf.read()
    times.append(time.monotonic())
    probes = Probes("cgpolicy-measure")
    probes.arm()
    times.append(time.monotonic())
    probes.disarm()
    times.append(time.monotonic())
    read, arm, disarm = (round(b - a, 2) for a, b in itertools.pairwise(times))
    tell(step="times", types=len(types._starts), read=read, arm=arm, disarm=disarm)  # noqa: SLF001


def hit(process: Process, pfn: int) -> None:
    poison(pfn, "inject")


def wakes(probes: Probes) -> None:
    """Wait for single events, as the reactor does."""
    delays = []
    for _ in range(5):
        with target("ext4") as file, victim(file, "write", None) as pfn:
            probes.drain()
            process = Process(None, partial(hit, pfn=pfn))
            if not select.select([probes], [], [], WAIT_SECONDS)[0]:
                raise SystemExit("a loss wakes nobody")
            woken = time.monotonic_ns()
            (loss,) = probes.read()
            delays.append((woken - loss.time_ns) // 1000)
            process.end()
    tell(step="wakes", microseconds=delays)


def storm(probes: Probes, pages: int = 400) -> None:
    """Lose many pages before anybody reads."""
    with target("ext4", pages * PAGE) as file:
        fd = os.open(file.path, os.O_RDWR)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for page in range(pages):
            os.pwrite(fd, b"B", page * PAGE)
        frames = [file_pfn(fd, page * PAGE) for page in range(pages)]
        probes.drain()
        dropped = probes.dropped
        begin = time.monotonic()
        for pfn in frames:
            with contextlib.suppress(OSError), open("/sys/kernel/debug/hwpoison/corrupt-pfn", "w") as file_:
                file_.write(hex(pfn))
        poisoned = time.monotonic()
        losses = probes.drain()
        tell(
            step="storm",
            right=[loss.pfn for loss in losses] == frames,
            dropped=probes.dropped - dropped,
            poison_us=round((poisoned - begin) / pages * 1e6),
            read_us=round((time.monotonic() - poisoned) / pages * 1e6),
        )
        os.close(fd)


def holder(process: Process) -> None:
    Probes("cgpolicy-held").arm()
    process.tell("armed")
    process.wait_for_order()


def taken_over() -> None:
    """Take over from a process that was killed, but not from one that runs."""
    process = Process(None, holder)
    process.hear()
    probes = Probes("cgpolicy-held")
    refusal = ""
    try:
        probes.arm()
    except UserError as error:
        refusal = str(error)
    held = probes.leftovers()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = probes.leftovers()
    probes.arm()
    losses = len(lose_one(probes))
    probes.disarm()
    probes.disarm()
    tell(step="taken over", refusal=refusal, held=held, left=left, losses=losses, after=probes.leftovers())
    process = Process(None, holder)
    process.hear()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    disarm_leftovers(instance="cgpolicy_held")
    tell(step="leftovers", after=probes.leftovers())


def disturbed() -> None:
    """See what the probes say when others meddle with them."""
    probes = Probes("cgpolicy-disturbed")
    instance = TRACING / "instances/cgpolicy_disturbed"
    probes.arm()
    events = sorted((instance / "events/cgpolicy_disturbed").glob("*/enable"))
    (outcome,) = instance.glob("events/*/memory_failure_event/filter")
    meddling: list[tuple[Path, str]] = [(path, "0") for path in events]
    meddling += [(instance / "tracing_on", "0"), (outcome, "0"), (Path("/proc/sys/kernel/ftrace_enabled"), "0")]
    faults = {"": probes.faults()}
    losses = {}
    for path, value in meddling:
        before = path.read_text().strip()
        try:
            path.write_text(value)
        except OSError as error:
            if (path.name, error.errno) != ("ftrace_enabled", errno.ENOTSUP):
                raise
            continue  # newer kernels do not let it be switched off
        faults[str(path)] = probes.faults()
        losses[str(path)] = len(lose_one(probes))
        probes.disarm()
        if path.name == "ftrace_enabled":
            path.write_text(before)
        probes.arm()
    faults["again"] = probes.faults()
    losses["again"] = len(lose_one(probes))
    # Who has the name of a probe can enable it elsewhere, and others can have a probe in the same place.
    kprobes = TRACING / "kprobe_events"
    append(kprobes, "p:other/dirty me_pagecache_dirty")
    for group in ("other", "cgpolicy_disturbed"):
        (TRACING / "events" / group / "enable").write_text("1")
    losses["with another"] = len(lose_one(probes))
    try:
        kprobes.write_text("")
        emptied = True
    except OSError:
        emptied = False
    faults["emptied"] = probes.faults()
    probes.disarm()
    after = probes.leftovers()
    others = kprobes.read_text().splitlines()
    (TRACING / "events/other/enable").write_text("0")
    append(kprobes, "-:other/dirty")
    tell(step="disturbed", faults=faults, losses=losses, emptied=emptied, after=after, others=others)


def main() -> None:
    for module in ("hwpoison-inject", "loop", "xfs", "vfat", "nls_ascii", "nls_cp437"):
        status, _, error = run("modprobe", module)
        if status:
            print(error, file=sys.stderr)
    keep_quiet()
    tell(step="kernel", release=os.uname().release)
    measure()
    probes = Probes()
    probes.check()
    probes.arm()
    tell(step="armed", paths=probes.paths, probes=probes.leftovers(), faults=probes.faults())
    wanted = set(sys.argv[1:])
    if not wanted or "losses" in wanted:
        for injection in ("inject", "srao"):
            for kind, how in CASES:
                lose(probes, kind, how, injection)
    if not wanted or "negatives" in wanted:
        injected = (
            negatives.anonymous,
            negatives.shared_anonymous,
            negatives.tmpfs,
            negatives.memfd,
            negatives.hugetlbfs,
            negatives.clean,
            negatives.written_back,
            huge_anonymous,
            huge_tmpfs,
            clean_pinned,
        )
        for make in injected:
            spare(probes, make, "inject")
        for make in (negatives.anonymous, negatives.tmpfs, negatives.clean):
            spare(probes, make, "srao")
        spare(probes, negatives.soft_offlined, "itself")
    if not wanted or "others" in wanted:
        deep(probes)
        rootless(probes)
        removed(probes)
        wakes(probes)
        storm(probes)
        taken_over()
        disturbed()
    tell(step="end", unattributed=probes.unattributed, dropped=probes.dropped, faults=probes.faults())
    probes.disarm()
    tell(step="disarmed", after=probes.leftovers())


if __name__ == "__main__":
    main()
