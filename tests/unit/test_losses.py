# SPDX-License-Identifier: LGPL-2.1-or-later
"""Losses as the kernel's tracepoint prints them, read from a pipe that stands for trace_pipe."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgpolicy.action import Action
from cgpolicy.error import NotSupported
from cgpolicy.losses import BUFFER_KIB, EVENT, Loss, LossReader

SERIES = Path(__file__).resolve().parents[2] / "kernel-patch"
DEFINITION = "TRACE_EVENT(memory_failure_dirty"
PATCHES = [path for path in sorted(SERIES.glob("v*/*.patch")) if DEFINITION in path.read_text()]
FORMAT = "pfn=0x%x dev=%u:%u ino=%u pos=%d cgroup_id=%u action=%s"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.parent.name)
def test_the_patch_prints_what_these_tests_print(patch: Path) -> None:
    event = patch.read_text().partition(DEFINITION)[2]
    printed = re.search(r'TP_printk\("([^"]+)"', event)
    assert printed is not None
    assert re.sub(r"%l+", "%", printed[1]) == FORMAT
    assert re.findall(r'{ FAILURE_DIRTY_\w+, "(\w+)" }', event) == list(Action)


def test_there_is_a_patch_to_compare_with() -> None:
    assert PATCHES


@pytest.fixture
def tracefs(tmp_path: Path) -> Path:
    """Tracefs with an instance that a killed daemon left behind: a plain directory makes no files of its own."""
    instance = tmp_path / "instances/cgpolicy"
    (instance / "events" / EVENT).mkdir(parents=True)
    (tmp_path / "events" / EVENT).mkdir(parents=True)
    for file in ("buffer_size_kb", "buffer_percent", f"events/{EVENT}/enable"):
        (instance / file).write_text("?")
    os.mkfifo(instance / "trace_pipe")
    return tmp_path


class Kernel:
    """The reader, and the end of the pipe that the kernel has."""

    def __init__(self, tracefs: Path) -> None:
        self.reader = LossReader(tracefs)
        self.reader.open()
        self.pipe = os.open(tracefs / "instances/cgpolicy/trace_pipe", os.O_WRONLY)

    def trace(self, *lines: str) -> list[Loss]:
        os.write(self.pipe, "".join(f"{line}\n" for line in lines).encode())
        return self.reader.read()


@pytest.fixture
def kernel(tracefs: Path) -> Iterator[Kernel]:
    kernel = Kernel(tracefs)
    yield kernel
    os.close(kernel.pipe)
    kernel.reader.close()


def line(loss: Loss, task: str = "kworker/0:1-9") -> str:
    """Return an event's line, behind the columns of kernel/trace/trace_output.c."""
    values = (loss.pfn, *loss.device, loss.inode, loss.position, loss.cgroup_id, loss.action)
    return f"{task:>22}       [000] .....    38.012345: memory_failure_dirty: {FORMAT % values}"


LOSS = Loss(0x1A2B3C, (254, 16), 1234, 8192, 4711, Action.KILL)


def losses() -> st.SearchStrategy[Loss]:
    u64 = st.integers(0, 2**64 - 1)
    devices = st.tuples(st.integers(0, 2**12 - 1), st.integers(0, 2**20 - 1))
    return st.builds(Loss, u64, devices, u64, st.integers(-(2**63), 2**63 - 1), u64, st.sampled_from(list(Action)))


def test_a_line_as_the_kernel_prints_it(kernel: Kernel) -> None:
    printed = (
        "     kworker/0:1-9       [000] .....    38.012345: memory_failure_dirty: "
        "pfn=0x1a2b3c dev=254:16 ino=1234 pos=8192 cgroup_id=4711 action=kill"
    )
    assert printed.split() == line(LOSS).split()
    assert kernel.trace(printed) == [LOSS]
    assert kernel.trace() == [] and kernel.reader.dropped == 0


@given(sent=st.lists(losses(), max_size=6), cuts=st.lists(st.integers(0, 1000), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_the_bytes_come_each_loss_is_read_once(kernel: Kernel, sent: list[Loss], cuts: list[int]) -> None:
    data = "".join(f"{line(loss)}\n" for loss in sent).encode()
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    got: list[Loss] = []
    for start, end in zip([0, *ends], ends, strict=False):
        os.write(kernel.pipe, data[start:end])
        got += kernel.reader.read()
    assert got == sent


@pytest.mark.parametrize(
    "other",
    [
        "",
        "# tracer: nop",
        line(LOSS).replace("memory_failure_dirty", "memory_failure_event"),
        line(LOSS).replace("action=kill", "action=0x3"),
        line(LOSS).replace("action=kill", "action=reboot"),
        line(LOSS).replace("pfn=0x1a2b3c ", ""),
        "\ufffd" * 40,
    ],
)
def test_other_lines_are_passed_over(kernel: Kernel, other: str) -> None:
    assert kernel.trace(other, line(LOSS), other, line(LOSS, task="a b: c-1")) == [LOSS, LOSS]


def test_what_the_kernel_dropped_is_counted(kernel: Kernel) -> None:
    assert kernel.trace("CPU:0 [LOST 12 EVENTS]", line(LOSS), "CPU:1 [LOST 30 EVENTS]") == [LOSS]
    assert kernel.reader.dropped == 42


def test_a_loss_wakes_who_waits(kernel: Kernel) -> None:
    assert not select.select([kernel.reader], [], [], 0)[0]
    os.write(kernel.pipe, f"{line(LOSS)}\n".encode())
    assert select.select([kernel.reader], [], [], 0)[0]
    assert kernel.reader.read() == [LOSS]
    assert not select.select([kernel.reader], [], [], 0)[0]


def test_the_instance_is_set_up(tracefs: Path, kernel: Kernel) -> None:
    instance = tracefs / "instances/cgpolicy"
    assert (instance / "buffer_size_kb").read_text() == str(BUFFER_KIB)
    assert (instance / "buffer_percent").read_text()[:1] == "0"
    assert (instance / f"events/{EVENT}/enable").read_text() == "1"


def test_a_kernel_without_buffer_percent_will_do(tracefs: Path) -> None:
    (tracefs / "instances/cgpolicy/buffer_percent").unlink()
    kernel = Kernel(tracefs)
    assert kernel.trace(line(LOSS)) == [LOSS]
    os.close(kernel.pipe)
    kernel.reader.close()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("events", "is no tracefs .systemctl start sys-kernel-tracing.mount"),
        (f"events/{EVENT}", "the kernel has no tracepoint ras/memory_failure_dirty .see kernel-patch/"),
        (f"instances/cgpolicy/events/{EVENT}/enable", "cannot trace: .*No such file"),
        ("instances/cgpolicy/trace_pipe", "cannot trace: .*No such file"),
    ],
)
def test_why_there_is_no_tracing(tracefs: Path, missing: str, message: str) -> None:
    (tracefs / missing).rename(tracefs / "away")
    before = os.listdir("/proc/self/fd")
    reader = LossReader(tracefs)
    with pytest.raises(NotSupported, match=message):
        reader.open()
    reader.close()
    assert os.listdir("/proc/self/fd") == before


def test_closing_may_be_repeated(tracefs: Path) -> None:
    before = os.listdir("/proc/self/fd")
    reader = LossReader(tracefs)
    reader.open()
    reader.close()
    assert os.listdir("/proc/self/fd") == before
    reader.close()


def test_closing_removes_the_instance(tracefs: Path) -> None:
    reader = LossReader(tracefs, "empty")
    with pytest.raises(NotSupported):
        reader.open()  # an instance without files: on tracefs the kernel makes them
    assert (tracefs / "instances/empty").is_dir()
    reader.close()
    assert not (tracefs / "instances/empty").exists()
