# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units that come and go, many of them: each gets its policy, and nothing of it stays in memory."""

from __future__ import annotations

from tests.bus.hostile import GROWTH_MAX_KIB, peak_kib, resident_kib
from tests.bus.privatebus import wait
from tests.bus.world import World
from tests.scale import scaled

ROUNDS = scaled(1_500, 200_000)
AT_ONCE = 50
WARM_UP = scaled(500, 20_000)  # the first tenth: what is remembered on purpose fills up, and the heap finds its size


def come_and_go(world: World, first: int) -> None:
    """Have transient services appear, see that they get their slice's policy, and have them disappear."""
    names = [f"run-{number}.service" for number in range(first, first + AT_ONCE)]
    for name in names:
        # Half of them are known to systemd first, the others by their cgroup.
        for step in (0, 1) if len(name) % 2 else (1, 0):
            if step:
                world.tree.make(f"/system.slice/{name}")
            else:
                world.systemd.add(name, cgroup=f"/system.slice/{name}")
                world.systemd.unit_new(name)
    missing = list(names)

    def all_said() -> bool:
        while missing and world.tree.said(f"/system.slice/{missing[-1]}") == "kill":
            missing.pop()
        return not missing

    wait(all_said, "the policies")
    for name in names:
        world.tree.remove(f"/system.slice/{name}")
        world.systemd.job_removed(name)
        world.systemd.forget(name)


def test_units_that_come_and_go(world: World) -> None:
    fragment = world.write_fragment("system.slice", "MemoryFailureDirtyAction=kill")
    world.systemd.units["system.slice"].fragment = fragment
    daemon = world.start()
    resident = []
    for first in range(0, WARM_UP + ROUNDS, AT_ONCE):
        if first >= WARM_UP and (first - WARM_UP) % max(AT_ONCE, ROUNDS // 10 // AT_ONCE * AT_ONCE) == 0:
            world.settle()
            resident.append(resident_kib(daemon.pid))
        come_and_go(world, first)
    world.settle()
    wait(lambda: len(world.root_client.call("ListUnits", "(as)", [])) == 3, "the units to be forgotten")
    resident.append(resident_kib(daemon.pid))
    print(f"{ROUNDS} rounds, resident KiB: {resident}")
    assert resident[-1] - resident[0] < GROWTH_MAX_KIB
    assert world.root_client.get("NUnits") == 1


UNITS = scaled(600, 10_000)


def test_what_is_read_anew(world: World) -> None:
    """What was known of all units before goes when they are read again, and takes no room beside it for long."""
    for number in range(UNITS):
        world.service(f"bulk-{number:05}.service", cgroup="")
    daemon = world.start()
    resident = []
    for _ in range(8):
        world.root_client.call("Reload")
        resident.append(resident_kib(daemon.pid))
    world.root_client.call("ListUnits", "(as)", [])
    resident.append(resident_kib(daemon.pid))
    peak = peak_kib(daemon.pid)
    print(f"{UNITS} units read eight times and listed, resident KiB: {resident}, {peak} at most")
    assert resident[-1] - resident[1] < UNITS // 2
    assert peak - resident[1] < UNITS // 2
