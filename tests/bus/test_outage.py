# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon depends on breaks off: the bus, systemd's signals, inotify's queue. Afterwards all is in step."""

from __future__ import annotations

from pathlib import Path

from cgpolicy.client import NAME
from cgpolicy.systemd import SERVICE
from tests.bus.privatebus import wait
from tests.bus.world import World, drop_in

CONTINUE, KILL, PANIC = (f"MemoryFailureDirtyAction={action}" for action in ("continue", "kill", "panic"))
WEB = "/system.slice/web.service"


def test_bus_that_restarts(world: World) -> None:
    """The daemon ends, so that systemd starts it again (Restart=always); what the kernel was told stands meanwhile."""
    world.service("web.service", KILL)
    world.service("other.service")
    daemon = world.start()
    world.root_client.call("SetUnitPolicy", "(ssbt)", "other.service", "panic", False, 1)
    world.restart_bus()
    wait(lambda: daemon.poll() is not None, "the daemon to end")
    assert world.tree.said(WEB) == "kill"
    # Changes that nobody tells of.
    world.write_fragment("web.service", PANIC)
    world.tree.say("/system.slice/other.service", "continue")
    world.start()
    assert world.tree.said(WEB) == "panic"
    assert world.tree.said("/system.slice/other.service") == "panic"
    assert {row[4] for row in world.nobody().call("ListUnits", "(as)", ["*.service"])} == {"applied"}


def test_bus_that_restarts_in_the_middle_of_a_change(world: World) -> None:
    world.write_drop_in("web.service", "50-cgpolicy.conf", drop_in("kill"))
    world.service("web.service")
    daemon = world.start()
    polkit, nobody = world.polkit("hang"), world.nobody()
    nobody.start("SetUnitPolicy", "(ssbt)", "web.service", "continue", False, 0, interactive=True)
    wait(lambda: polkit.questions, "the question")
    world.restart_bus()
    wait(lambda: daemon.poll() is not None, "the daemon to end")
    world.start()
    # The answer was never given.
    assert world.tree.said(WEB) == "kill"
    assert world.unit("web.service")["State"] == "applied"


def test_systemd_executed_anew_while_units_come_and_go(world: World) -> None:
    """Signals of that time are lost: nobody was subscribed."""
    world.service("web.service", KILL)
    world.service("old.service", KILL)
    world.start()
    world.systemd.subscribed = False
    world.systemd.client.release(SERVICE)
    world.service("new.service", PANIC)
    with world.paused():
        world.tree.remove("/system.slice/old.service")
    Path(world.systemd.units["old.service"].fragment).unlink()
    world.systemd.units["old.service"].load_state = "not-found"
    world.systemd.units["old.service"].cgroup = ""
    world.systemd.listed.discard("old.service")
    world.write_fragment("web.service", CONTINUE)
    world.systemd.client.own(SERVICE)
    wait(lambda: world.tree.said("/system.slice/new.service") == "panic", "the new unit's policy")
    wait(lambda: world.tree.said(WEB) == "continue", "the changed policy")
    world.settle()
    assert [row[0] for row in world.root_client.call("ListUnits", "(as)", ["*.service"])] == [
        "new.service", "web.service"]


def test_queue_of_inotify_that_overflows(world: World) -> None:
    names = [f"late{number}.service" for number in range(20)]
    for name in names:
        world.service(name, KILL, cgroup="")
    world.service("web.service", KILL)
    world.start()
    length = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with world.paused():
        for _ in range(length // 2 + 1):
            # Two different events in turn: equal ones are made one.
            (world.tree.path("/system.slice") / "a").mkdir()
            (world.tree.path("/system.slice") / "a").rmdir()
        # Of these nothing is told any more.
        for name in names:
            world.tree.make(f"/system.slice/{name}")
            world.systemd.units[name].cgroup = f"/system.slice/{name}"
        world.tree.say(WEB, "continue")
    wait(lambda: {world.tree.said(f"/system.slice/{name}") for name in names} == {"kill"}, "the policies")
    wait(lambda: world.tree.said(WEB) == "kill", "the policy to be put back")
    assert world.root_client.owner(NAME) is not None
    assert world.root_client.get("NFailed") == 0
