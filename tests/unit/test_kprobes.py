# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events as the kernel prints them, and what keeps a kernel from having probes, on plain files."""

from __future__ import annotations

import gc
import mmap
import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgpolicy.error import NotSupported
from cgpolicy.kprobes import BDI_CAP_WRITEBACK, LateLoss, LossProbes

PAGES, MEMORY, DIRTY_FLAG, PAGE_SIZE = 0xFFFFEA0000000000, 0xFFFF888000001000, 1 << 4, 64


class Layout:
    """What of the kernel's layout is needed to read an event."""

    page_size = PAGE_SIZE
    dirty = DIRTY_FLAG


class Kernel:
    """The probes, and the end of the pipe that the kernel has."""

    def __init__(self) -> None:
        self.probes = LossProbes()
        reads, self.pipe = os.pipe()
        os.set_blocking(reads, False)
        self.probes._pipe = reads
        self.probes._layout = Layout()  # type: ignore[assignment]

    def trace(self, *lines: str) -> list[LateLoss]:
        os.write(self.pipe, "".join(f"{line}\n" for line in lines).encode())
        return self.probes.read()

    def close(self) -> None:
        os.close(self.pipe)
        os.close(self.probes._pipe)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


def line(event: str = "dirty", task: str = "kworker/0:1-9", pfn: int = 0x1A2B, **other: Any) -> str:
    """Return an event's line, as trace_output.c prints it."""
    fields = {
        "page": PAGES + pfn * PAGE_SIZE, "link": 0, "base": PAGES, "memory": MEMORY, "flags": DIRTY_FLAG,
        "mapping": 0xFFFF888012345678, "index": 5, "ino": 12, "rdev": 0, "dev": 8 << 20 | 1, "magic": 0xEF53,
        "bdi": BDI_CAP_WRITEBACK, "charge": 0xFFFF888000003000, "memcg": 0xFFFF888000003000, "ss": MEMORY,
        "level": 2, "id": 77, "a1": 3, "a2": 77, "a3": 0,
    }  # fmt: skip
    decimal = {"index", "ino", "rdev", "dev", "level", "id", "a1", "a2", "a3"}
    text = " ".join(f"{name}={value if name in decimal else hex(value)}" for name, value in (fields | other).items())
    return f"{task:>22}       [000] .....    38.012345: {event}: (me_pagecache_dirty+0x0/0x1e0) {text}"


def outcome(pfn: int = 0x1A2B) -> str:
    said = f"pfn {pfn:#x}: recovery action for unsplit thp: Ignored"
    return f"           kworker/0:1-9       [001] .....    38.012399: memory_failure_event: {said}"


LOSS = LateLoss(0x1A2B, (8, 1), 12, 5 * mmap.PAGESIZE, (3, 77), 38_012_345_000)


def test_a_dirty_page(kernel: Kernel) -> None:
    assert kernel.trace(line()) == [LOSS]


@pytest.mark.parametrize(
    "other",
    [
        {"mapping": 0},
        {"mapping": 0xFFFF888012345679},  # anonymous
        {"bdi": 0},  # shmem
    ],
)
def test_what_has_no_backing_store_is_no_loss(kernel: Kernel, other: dict[str, Any]) -> None:
    assert kernel.trace(line(**other)) == []
    assert kernel.probes.unattributed == 0


def test_a_suspect_is_a_loss_if_the_page_was_given_up_and_dirty(kernel: Kernel) -> None:
    assert kernel.trace(line("collect"), outcome()) == [LOSS]
    assert kernel.trace(line("collect", flags=0), outcome()) == []
    assert kernel.trace(line("collect"), outcome(0x1A2C)) == []
    assert kernel.trace(outcome()) == []
    assert kernel.trace(line("collect"), line(pfn=7)) == [replace(LOSS, pfn=7)]
    assert kernel.trace(outcome()) == []


# A process names itself (prctl(2), PR_SET_NAME): 15 bytes of anything but NUL.
@pytest.mark.parametrize(
    "comm", ["a b: c", "] 1.000000: x:", "] 1.000000: d: ", "x\ny", "\n\n", "LOST 9 EVENTS\n", "page=0x7 ino=9"]
)
def test_no_name_of_a_process_makes_or_hides_a_loss(kernel: Kernel, comm: str) -> None:
    assert kernel.trace(line(task=f"{comm}-4711")) == [LOSS]


@given(comm=st.binary(max_size=15).filter(lambda name: 0 not in name))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_process_calls_itself(kernel: Kernel, comm: bytes) -> None:
    before, _, after = line(task="COMM-4711").encode().partition(b"COMM")
    os.write(kernel.pipe, before + comm + after + b"\n")
    assert kernel.probes.read() == [LOSS]


GARBAGE = [
    "dirty: () page=007",
    "",
    "] 1.000000: dirty: ",
    line().replace("page=0x", "page=0x0x"),
    line().replace("ino=12", "ino=012"),
    line().replace("level=2", "level=-1"),
    line().replace("level=2", "level=2000000000"),
    line().replace(" a2=77", ""),
    line(ss=1),
    line(charge=0xFFFF888000003001),
    line(page=PAGES + 1),
    line(page=PAGES - PAGE_SIZE),
    line(link=0xFFFFEA0000000001),
    line().partition(" memcg=")[0],
    "\x00" * 100,
    outcome().replace("0x1a2b", "0"),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_passed_over(kernel: Kernel, garbage: str) -> None:
    """It is no loss of a page that was not named, and what follows is understood."""
    (found,) = [loss for loss in kernel.trace(garbage, line(pfn=7)) if loss.pfn == 7]
    assert found.lineage == (3, 77)


@given(garbage=st.binary(max_size=200), cut=st.integers(0, 300), text=st.sampled_from(GARBAGE))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_garbage_ends_the_reader(kernel: Kernel, garbage: bytes, cut: int, text: str) -> None:
    os.write(kernel.pipe, b"\n" + text.encode()[:cut] + garbage + text.encode()[cut:] + b"\n" + line(pfn=7).encode())
    os.write(kernel.pipe, b"\n")
    assert kernel.probes.read()[-1].pfn == 7


def test_what_the_kernel_dropped_is_counted(kernel: Kernel) -> None:
    assert kernel.trace("CPU:0 [LOST 12 EVENTS]", line()) == [LOSS]
    assert kernel.probes.dropped == 12


def test_reading_a_storm_leaves_nothing_behind(kernel: Kernel) -> None:
    """The reactor collects no garbage, so there must be none: 100,000 pages through the parser."""
    lines = [line(pfn=number, ino=number) for number in range(100)]
    gc.collect()
    gc.disable()
    try:
        kernel.trace(*lines)
        tracemalloc.start()
        for _ in range(1000):
            assert len(kernel.trace(*lines)) == len(lines)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert gc.collect() < 100
    finally:
        gc.enable()
    assert grown < 1 << 20


# What keeps a kernel from having them -----------------------------------------------------------


class Host:
    """The files of a machine, as far as the probes look at them, all in order but for BTF."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("sys/kernel/tracing/kprobe_events", "")
        (root / "sys/kernel/tracing/events").mkdir()
        self.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
        self.write("proc/sys/kernel/ftrace_enabled", "1\n")
        self.write("sys/kernel/debug/kprobes/enabled", "1\n")
        self.write("proc/kallsyms", "")

    def write(self, file: str, text: str | bytes) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def refusal(self) -> str:
        probes = LossProbes(self.root / "sys/kernel/tracing", self.root / "sys/kernel/btf/vmlinux", root=self.root)
        with pytest.raises(NotSupported) as refused:
            probes.check()
        assert refused.value.hint, "no cure"
        return str(refused.value)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_kernel_without_btf(host: Host) -> None:
    assert "CONFIG_DEBUG_INFO_BTF" in host.refusal()


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb", b"x" * 1000, b"\x9f\xeb\x01\x00" + b"\xff" * 100])
def test_damaged_btf(host: Host, data: bytes) -> None:
    host.write("sys/kernel/btf/vmlinux", data)
    assert "malformed BTF" in host.refusal()


def test_btf_of_another_kernel(host: Host) -> None:
    strings = b"\0"
    header = b"\x9f\xeb\x01\x00" + b"".join(
        number.to_bytes(4, "little") for number in (24, 0, 0, 0, len(strings))
    )  # fmt: skip
    host.write("sys/kernel/btf/vmlinux", header + strings)
    assert host.refusal().startswith("the kernel has no struct page")


def test_a_kernel_that_is_locked_down(host: Host) -> None:
    host.write("sys/kernel/security/lockdown", "none integrity [confidentiality]\n")
    assert host.refusal() == "the kernel is locked down (boot with lockdown=integrity or none)"


def test_no_tracefs(host: Host) -> None:
    (host.root / "sys/kernel/tracing").rename(host.root / "away")
    assert host.refusal().endswith("is no tracefs (systemctl start sys-kernel-tracing.mount)")
    (host.root / "sys/kernel/tracing").mkdir()
    assert host.refusal().endswith("is no tracefs (systemctl start sys-kernel-tracing.mount)")


def test_a_kernel_without_kprobe_events(host: Host) -> None:
    (host.root / "sys/kernel/tracing/kprobe_events").unlink()
    assert "CONFIG_KPROBE_EVENTS" in host.refusal()


@pytest.mark.parametrize(
    ("switch", "said"),
    [
        ("proc/sys/kernel/ftrace_enabled", "kernel.ftrace_enabled is 0 (sysctl kernel.ftrace_enabled=1)"),
        ("sys/kernel/debug/kprobes/enabled", "kprobes are disabled (echo 1 > "),
    ],
)
def test_probes_that_are_switched_off(host: Host, switch: str, said: str) -> None:
    host.write(switch, "0\n")
    assert host.refusal().startswith(said)
