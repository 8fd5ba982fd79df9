# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a line of the tracepoint to the signal DirtyDataLost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpolicy.client import MANAGER_PATH
from tests.bus.privatebus import Client, Signal, wait
from tests.bus.world import World

WEB = "/system.slice/web.service"
KILL = "MemoryFailureDirtyAction=kill"


class Tracefs:
    """A directory that passes for tracefs; its trace_pipe is a FIFO."""

    def __init__(self, root: Path) -> None:
        instance = root / "sys/kernel/tracing/instances/cgpolicy"
        for events in (instance / "events", root / "sys/kernel/tracing/events"):
            (events / "ras/memory_failure_dirty").mkdir(parents=True)
        for file in ("buffer_size_kb", "buffer_percent", "events/ras/memory_failure_dirty/enable"):
            (instance / file).touch()
        self.enabled = instance / "events/ras/memory_failure_dirty/enable"
        os.mkfifo(instance / "trace_pipe")
        self._pipe = os.open(instance / "trace_pipe", os.O_RDWR)

    def lose(self, *lines: str) -> None:
        """Report pages in one piece."""
        columns = "     kworker/0:1-11      [000] .....    42.000000: memory_failure_dirty: "
        os.write(self._pipe, "".join(f"{columns}{line}\n" for line in lines).encode())

    def close(self) -> None:
        os.close(self._pipe)


@pytest.fixture
def tracefs(world: World) -> Iterator[Tracefs]:
    made = Tracefs(world.root)
    yield made
    made.close()


def losses(client: Client, count: int) -> list[Signal]:
    """Wait for a number of DirtyDataLost."""
    found: list[Signal] = []

    def enough() -> bool:
        found[:] = [signal for signal in client.signals if signal.name == "DirtyDataLost"]
        return len(found) >= count

    wait(enough, "DirtyDataLost")
    return found


def test_pages_of_one_file_are_one_signal(world: World, tracefs: Tracefs) -> None:
    world.service("web.service", KILL)
    world.start()
    assert tracefs.enabled.read_text() == "1"
    cgroup_id = world.unit("web.service")["ControlGroupId"]
    listener = world.nobody()
    line = f"pfn=0x{{pfn:x}} dev=8:1 ino={{ino}} pos={{pos}} cgroup_id={cgroup_id} action=kill"
    tracefs.lose(
        line.format(pfn=0x1000, ino=12, pos=0), line.format(pfn=0x1001, ino=12, pos=4096),
        "no line of ours", line.format(pfn=0x2000, ino=13, pos=8192),
    )
    first, second = losses(listener, 2)
    assert first.path == MANAGER_PATH
    unit, cgroup, identity, action, pages, detail = first.values
    assert (unit, cgroup, identity, action, pages) == ("web.service", WEB, cgroup_id, "kill", 2)
    assert detail == {
        "Device": (8, 1), "Inode": 12, "Positions": [0, 4096], "PageFrames": [0x1000, 0x1001], "InvocationID": "",
        "Enforcement": "synchronous", "Reaction": "",
    }
    assert (second.values[4], second.values[5]["Inode"]) == (1, 13)


def test_loss_is_its_cgroups_also_when_that_is_gone_or_below_a_unit(world: World, tracefs: Tracefs) -> None:
    world.service("web.service", KILL)
    world.tree.make(f"{WEB}/payload")
    world.start()
    listener = world.nobody()
    ids = [world.tree.path(cgroup).stat().st_ino for cgroup in (f"{WEB}/payload", WEB)]
    line = "pfn=0x1 dev=8:1 ino=1 pos=0 cgroup_id={} action=kill"
    tracefs.lose(line.format(ids[0]))
    losses(listener, 1)
    with world.paused():
        world.tree.remove(WEB)
    world.settle()
    tracefs.lose(line.format(ids[1]))
    losses(listener, 2)
    tracefs.lose(line.format(2**40))
    found = losses(listener, 3)
    assert [signal.values[:3] for signal in found] == [
        ("web.service", f"{WEB}/payload", ids[0]), ("web.service", WEB, ids[1]), ("", "", 2**40)]


def test_what_a_killed_daemon_had_not_read_is_told_by_the_next(world: World, tracefs: Tracefs) -> None:
    """It waits until the next one knows the units and is on the bus."""
    world.service("web.service", KILL)
    listener = world.nobody()
    cgroup_id = world.tree.cgroup_id(WEB)
    tracefs.lose(f"pfn=0x1000 dev=8:1 ino=12 pos=0 cgroup_id={cgroup_id} action=kill")
    world.systemd.holding = True
    world.launch()
    wait(lambda: tracefs.enabled.read_text() == "1" and bool(world.systemd.held), "the questions")
    world.systemd.go_on()
    (loss,) = losses(listener, 1)
    assert loss.values[:5] == ("web.service", WEB, cgroup_id, "kill", 1)


def test_storm_is_reported_whole_in_few_signals(world: World, tracefs: Tracefs) -> None:
    world.service("web.service", KILL)
    world.start()
    cgroup_id = world.unit("web.service")["ControlGroupId"]
    listener = world.nobody()
    with world.paused():
        for batch in range(4):
            tracefs.lose(*(
                f"pfn=0x{page:x} dev=8:1 ino=12 pos={page * 4096} cgroup_id={cgroup_id} action=kill"
                for page in range(batch * 100, batch * 100 + 100)
            ))
    (signal,) = losses(listener, 1)
    assert signal.values[4] == 400
    assert signal.values[5]["Positions"] == [page * 4096 for page in range(64)]


def test_a_storm_in_many_files_is_told_of_together(world: World, tracefs: Tracefs) -> None:
    """The first file at once, the others a second later in one signal, with their number and all their pages."""
    world.service("web.service", KILL)
    world.start()
    cgroup_id = world.unit("web.service")["ControlGroupId"]
    listener = world.nobody()
    for file in range(20):
        tracefs.lose(*(
            f"pfn=0x{file}{page} dev=8:1 ino={file} pos={page * 4096} cgroup_id={cgroup_id} action=kill"
            for page in range(3)
        ))
    first, rest = (signal.values for signal in losses(listener, 2))
    assert (first[4], first[5]["Inode"], first[5].get("Files")) == (3, 0, None)
    assert (rest[4], rest[5]["Inode"], rest[5]["Files"]) == (57, 1, 19)


def test_what_the_kernel_counted_and_nobody_saw_is_told_of_once(world: World, tracefs: Tracefs) -> None:
    world.service("web.service", KILL)
    for cgroup in ("/system.slice", WEB):
        (world.tree.path(cgroup) / "memory.events").write_text("failure_dirty 7\nfailure_dirty_kill 1\n")
    listener = world.nobody()
    world.start()
    (signal,) = losses(listener, 1)
    assert signal.values[:2] == ("web.service", WEB)
    assert signal.values[4] == 7
    assert "Inode" not in signal.values[5]
    # Another daemon knows of those, and of one that has come since.
    world.kill()
    for cgroup in ("/system.slice", WEB):
        (world.tree.path(cgroup) / "memory.events").write_text("failure_dirty 8\nfailure_dirty_kill 1\n")
    world.start()
    assert losses(listener, 2)[1].values[4] == 1
