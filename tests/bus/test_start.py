# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's beginning and end: policies stand before anybody can see it, and after it is gone."""

from __future__ import annotations

import signal

import pytest

from cgpolicy.client import NAME
from tests.bus.privatebus import wait
from tests.bus.world import World, drop_in

CONTINUE, KILL, PANIC = (f"MemoryFailureDirtyAction={action}" for action in ("continue", "kill", "panic"))
WEB = "/system.slice/web.service"


def test_policies_stand_before_the_name_is_claimed(world: World) -> None:
    world.service("web.service", KILL)
    world.client().own(NAME)
    daemon = world.launch()
    wait(lambda: daemon.poll() is not None, "the daemon to give up")
    # It never had the name, and the policy is in force.
    assert daemon.returncode == 1
    assert not world.ready
    assert world.tree.said(WEB) == "kill"


def test_name_and_readiness_wait_for_systemd(world: World) -> None:
    world.service("web.service", KILL)
    world.systemd.holding = True
    world.launch()
    wait(lambda: world.systemd.held, "the daemon to read units")
    assert world.root_client.owner(NAME) is None
    assert not world.ready
    world.systemd.go_on()
    wait(lambda: world.ready, "READY=1")
    assert world.root_client.owner(NAME) is not None
    assert world.tree.said(WEB) == "kill"


def test_end_leaves_policies_in_force(world: World) -> None:
    world.service("web.service", KILL)
    daemon = world.start()
    daemon.send_signal(signal.SIGTERM)
    wait(lambda: daemon.poll() is not None, "the daemon to end")
    assert daemon.returncode == 0
    assert world.tree.said(WEB) == "kill"


@pytest.mark.parametrize(("before", "after", "found", "expected"), [
    (KILL, KILL, "kill", "kill"),
    (KILL, PANIC, "kill", "panic"),
    (KILL, CONTINUE, "kill", "continue"),
    pytest.param(KILL, "", "kill", "continue", id="unset meanwhile: what the daemon wrote is taken back"),
    pytest.param(KILL, "", "panic", "panic", id="unset meanwhile: what somebody else wrote is not"),
    pytest.param("", "", "panic", "panic", id="never set: not touched"),
    pytest.param(KILL, KILL, "continue", "kill", id="lost"),
])
def test_kill_and_restart_converges(world: World, before: str, after: str, found: str, expected: str) -> None:
    world.service("web.service", before)
    world.start()
    world.kill()
    world.write_fragment("web.service", after)
    world.tree.say(WEB, found)
    world.start()
    assert world.tree.said(WEB) == expected
    assert world.unit("web.service")["EffectiveAction"] == expected


def test_half_written_drop_in_of_a_crash_counts_for_nothing(world: World) -> None:
    # The file's name is that which the daemon gives to what it has not finished yet.
    half = world.write_drop_in("web.service", ".50-cgpolicy.conf.new", b"[X-CgPol")
    world.write_drop_in("web.service", "50-cgpolicy.conf", drop_in("kill"))
    world.service("web.service")
    world.start()
    assert world.tree.said(WEB) == "kill"
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", False, 0)
    assert world.tree.said(WEB) == "panic"
    assert not half.exists()


def test_kernel_without_the_file_is_not_enforced(world: World) -> None:
    world.service("web.service", KILL, action=None)
    for slice_ in ("system.slice", "machine.slice"):
        (world.tree.path(slice_) / "memory.failure_dirty_action").unlink()
    world.start()
    assert world.root_client.get("Backend") == "none"
    assert world.root_client.get("Enforcement") == "none"
    # Why, and what would help.
    why = world.root_client.get("EnforcementDetail")
    assert str(why).endswith("tracing is no tracefs (systemctl start sys-kernel-tracing.mount)")
    assert world.unit("web.service")["State"] == "not-enforced"
    assert world.unit("web.service")["EffectiveAction"] == "continue"
    assert not (world.tree.path(WEB) / "memory.failure_dirty_action").exists()


@pytest.mark.parametrize("flags", [0, 1])
def test_what_was_set_counts_after_a_crash_though_systemd_has_not_read_it(world: World, flags: int) -> None:
    world.service("web.service", KILL)
    world.service("other.service", KILL)
    world.start()
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", False, flags)
    world.settle()
    world.kill()
    world.systemd.units["web.service"].drop_ins = ()  # as if the daemon had been killed just before the reload
    world.write_drop_in("other.service", "50-cgpolicy.conf", drop_in("panic"))  # by hand: counts when systemd says so
    world.start()
    assert world.tree.said(WEB) == "panic"
    assert world.tree.said("/system.slice/other.service") == "kill"
    assert world.unit("web.service")["SourcePath"].endswith("etc/systemd/system/web.service.d/50-cgpolicy.conf")
    world.systemd.reload()
    wait(lambda: world.tree.said("/system.slice/other.service") == "panic", "what systemd then says")
    assert world.tree.said(WEB) == "panic"


def test_drop_in_that_systemd_knows_and_ignores_does_not_count(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", False, 0)
    world.kill()
    world.systemd.units["web.service"].drop_ins = ()
    world.systemd.find_drop_ins = lambda name: ()  # type: ignore[method-assign]  # a masked unit has none
    world.start()
    assert world.tree.said(WEB) == "kill"
