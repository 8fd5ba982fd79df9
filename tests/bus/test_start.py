# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's beginning and end: policies stand before anybody can see it, and after it is gone."""

from __future__ import annotations

from cgpolicy.client import NAME
from tests.bus.privatebus import wait
from tests.bus.world import World

KILL = "MemoryFailureDirtyAction=kill"


def test_policies_stand_before_the_name_is_claimed(world: World) -> None:
    world.service("web.service", KILL)
    world.client().own(NAME)
    daemon = world.launch()
    wait(lambda: daemon.poll() is not None, "the daemon to give up")
    # It never had the name, and the policy is in force.
    assert daemon.returncode == 1
    assert not world.ready
    assert world.tree.said("/system.slice/web.service") == "kill"
