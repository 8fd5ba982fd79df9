# SPDX-License-Identifier: LGPL-2.1-or-later
"""Setting and unsetting by the bus: what is written where, when it counts, and who is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from gi.repository import GLib

from cgpolicy.client import MANAGER, MANAGER_PATH, NAME, UNIT
from tests.bus.privatebus import Failed, Signal, wait
from tests.bus.world import PROPERTIES, World, drop_in, unit_object

WEB = "/system.slice/web.service"
WEB_OBJECT = unit_object("web.service")
PERSISTENT = Path("etc/systemd/system/web.service.d/50-cgpolicy.conf")
RUNTIME = Path("run/systemd/system/web.service.d/50-cgpolicy.conf")
KILL = "MemoryFailureDirtyAction=kill"


def set_property(world: World, value: str) -> None:
    world.root_client.call("Set", "(ssv)", UNIT, "MemoryFailureDirtyAction", GLib.Variant("s", value),
                           path=WEB_OBJECT, interface=PROPERTIES)


def properties_changed(signals: list[Signal], path: str) -> dict[str, object]:
    """Return what PropertiesChanged told of an object, taken together."""
    changed: dict[str, object] = {}
    for signal in signals:
        if signal.name == "PropertiesChanged" and signal.path == path:
            changed |= signal.values[1]
    return changed


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize(("runtime", "path"), [(False, PERSISTENT), (True, RUNTIME)])
def test_set_and_unset(world: World, runtime: bool, path: Path, flags: int) -> None:
    world.service("web.service")
    world.start()
    # systemd is busy from now on: nothing here waits for it.
    world.systemd.holding = True
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "kill", runtime, flags)
    assert world.tree.said(WEB) == "kill"
    assert (world.root / path).read_bytes().endswith(drop_in("kill"))
    assert [other for other in (PERSISTENT, RUNTIME) if (world.root / other).exists()] == [path]
    unit = world.unit("web.service")
    assert (unit["Source"], unit["SourcePath"]) == ("unit-file", str(world.root / path))
    wait(lambda: world.systemd.reloads == 1 - flags, "the reload")
    world.systemd.go_on()

    world.root_client.call("UnsetUnitPolicy", "(sbt)", "web.service", runtime, flags)
    assert world.tree.said(WEB) == "continue"
    assert not (world.root / path).parent.exists()
    wait(lambda: world.systemd.reloads == 2 * (1 - flags), "the reload")
    world.settle()
    assert world.systemd.reloads == 2 * (1 - flags)
    assert world.unit("web.service")["State"] == "unset"


def test_property_sets_and_unsets(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    set_property(world, "panic")
    assert world.tree.said(WEB) == "panic"
    assert (world.root / PERSISTENT).read_bytes().endswith(drop_in("panic"))
    with pytest.raises(Failed) as failed:
        set_property(world, "halt")
    assert failed.value.name == f"{NAME}.Error.InvalidAction"
    assert world.tree.said(WEB) == "panic"
    set_property(world, "")
    assert not (world.root / PERSISTENT).exists()
    # Unset is the daemon's drop-in only: the unit's own file counts again.
    assert world.tree.said(WEB) == "kill"
    set_property(world, "")
    assert world.root_client.get("MemoryFailureDirtyAction", path=WEB_OBJECT, interface=UNIT) == "kill"


def test_signals(world: World) -> None:
    world.service("web.service")
    world.service("other.service")
    world.start()
    listener = world.nobody()
    before = world.unit("web.service")
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "kill", False, 1)
    listener.get("Version")
    assert properties_changed(listener.signals, WEB_OBJECT) == {
        "MemoryFailureDirtyAction": "kill", "Source": "unit-file", "SourcePath": str(world.root / PERSISTENT),
        "SourceLine": 3, "EffectiveAction": "kill", "State": "applied",
    }
    assert properties_changed(listener.signals, MANAGER_PATH) == {"NUnits": 1}
    assert [signal for signal in listener.signals if signal.name == "UnitPolicyChanged"] == [
        Signal("UnitPolicyChanged", MANAGER_PATH, ("web.service", "kill", "kill", "applied"))]

    listener.signals.clear()
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "kill", False, 1)
    listener.get("Version")
    assert listener.signals == []

    world.root_client.call("UnsetUnitPolicy", "(sbt)", "web.service", False, 1)
    listener.get("Version")
    assert world.unit("web.service") == before
    changed = properties_changed(listener.signals, WEB_OBJECT)
    assert changed == {name: before[name] for name in changed}
    assert {signal.path for signal in listener.signals} == {WEB_OBJECT, MANAGER_PATH}


def test_set_without_reload_outlives_what_systemd_says_of_old(world: World) -> None:
    world.service("web.service")
    world.start()
    for action in ("panic", "kill"):
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", action, False, 1)
    # A restart of the unit: PID 1, not reloaded, still lists no drop-in.
    world.systemd.job_removed("web.service")
    world.root_client.call("Reload")
    assert world.systemd.units["web.service"].drop_ins == ()
    assert world.tree.said(WEB) == "kill"
    # Once PID 1 has read it, its list counts again, and nothing else.
    world.systemd.reload()
    world.root_client.call("Reload")
    assert world.tree.said(WEB) == "kill"
    world.systemd.units["web.service"].drop_ins = ()
    world.root_client.call("Reload")
    assert world.tree.said(WEB) == "continue"


@pytest.mark.parametrize(("others", "expected"), [
    # By name, and not by what was written last: 50-cgpolicy.conf among others (systemd.unit(5)).
    ({"etc/10-a.conf": "kill"}, "panic"),
    ({"etc/60-a.conf": "kill"}, "kill"),
    ({"run/10-a.conf": "kill", "run/60-a.conf": "continue"}, "continue"),
    ({"run/50-cgpolicy.conf": "kill"}, "panic"),
])
def test_set_among_other_drop_ins(world: World, others: dict[str, str], expected: str) -> None:
    for name, action in others.items():
        base, _, file = name.partition("/")
        world.write_drop_in("web.service", file, drop_in(action), base)
    world.service("web.service")
    world.start()
    explained = []
    for flags in (1, 0):  # from what the daemon knows itself, and as systemd then says
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", False, flags)
        assert world.tree.said(WEB) == expected
        world.root_client.call("Reload")
        assert world.tree.said(WEB) == expected
        explained.append(world.root_client.call("Explain", "(s)", "web.service"))
    assert explained[0] == explained[1]
    assert [row[3] for row in explained[0] if row[4] == "in force"] == [expected]


def test_set_on_a_slice_is_the_default_of_its_units(world: World) -> None:
    world.service("web.service")
    world.service("own.service", "MemoryFailureDirtyAction=continue")
    world.start()
    world.root_client.call("SetUnitPolicy", "(ssbt)", "system.slice", "panic", False, 0)
    assert world.tree.said(WEB) == "panic"
    assert world.tree.said("/system.slice/own.service") == "continue"
    # Not in the slice's own file, which would bind every unit below.
    assert world.tree.said("/system.slice") == "continue"
    assert world.unit("web.service")["Source"] == "slice"
    assert world.unit("system.slice")["State"] == "default"
    world.root_client.call("UnsetUnitPolicy", "(sbt)", "system.slice", False, 0)
    assert world.tree.said(WEB) == "continue"


def test_runtime_beside_persistent_is_refused(world: World) -> None:
    world.write_drop_in("web.service", "50-cgpolicy.conf", drop_in("kill"))
    world.service("web.service")
    world.start()
    before = world.policy_files()
    with pytest.raises(Failed) as failed:
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", True, 0)
    assert failed.value.name == f"{NAME}.Error.WriteFailed"
    assert str(PERSISTENT) in failed.value.message
    assert world.policy_files() == before


@pytest.mark.parametrize("flags", [0, 1])
def test_unset_uncovers_what_was_hidden(world: World, flags: int) -> None:
    """At once, and not only when systemd has reloaded: in between the unit would be unprotected."""
    world.write_drop_in("web.service", "50-cgpolicy.conf", drop_in("kill"), "run")
    world.service("web.service")
    world.start()
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", False, flags)
    listener = world.nobody()
    world.systemd.holding = True
    world.root_client.call("UnsetUnitPolicy", "(sbt)", "web.service", False, flags)
    assert world.tree.said(WEB) == "kill"
    world.systemd.go_on()
    world.root_client.call("Reload")
    assert world.tree.said(WEB) == "kill"
    assert world.unit("web.service")["SourcePath"] == str(world.root / RUNTIME)
    listener.get("Version")
    assert [signal.values[1] for signal in listener.signals if signal.name == "UnitPolicyChanged"] == ["kill"]


def test_what_systemd_ignores_counts_no_longer_once_it_has_reloaded(world: World) -> None:
    """And what is set after that does: a drop-in that is expected in vain is not in its way."""
    world.service("web.service", KILL)
    world.start()
    find_drop_ins = world.systemd.find_drop_ins
    world.systemd.find_drop_ins = lambda name: ()  # type: ignore[method-assign]  # of a masked unit
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", False, 1)
    assert world.tree.said(WEB) == "panic"
    world.systemd.reload()
    wait(lambda: world.tree.said(WEB) == "kill", "systemd's word to count")
    world.systemd.find_drop_ins = find_drop_ins  # type: ignore[method-assign]
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "continue", False, 0)
    world.settle()
    assert world.tree.said(WEB) == "continue"


def test_what_lies_elsewhere_by_another_name_does_not_stay(world: World) -> None:
    """/lib is /usr/lib by now, and systemd may call it by the other name than we do."""
    (world.root / "lib").symlink_to("usr/lib")
    world.service("web.service")
    uncovered = world.write_drop_in("web.service", "50-cgpolicy.conf", drop_in("kill"), "usr/lib")
    world.systemd.find_drop_ins = lambda name: tuple(  # type: ignore[method-assign]
        [str(path) for path in (world.root / PERSISTENT, uncovered) if path.exists() and name == "web.service"][:1])
    world.start()
    for action in ("panic", "continue"):
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", action, False, 0)
        world.settle()
        assert world.tree.said(WEB) == action
        world.root_client.call("Reload")
        assert world.tree.said(WEB) == action
        world.root_client.call("UnsetUnitPolicy", "(sbt)", "web.service", False, 0)
        world.root_client.call("Reload")
        assert world.tree.said(WEB) == "kill"


def test_drop_in_that_cannot_be_written(world: World) -> None:
    world.service("web.service")
    (world.root / "elsewhere").mkdir()
    directory = (world.root / PERSISTENT).parent
    directory.parent.mkdir(parents=True)
    directory.symlink_to(world.root / "elsewhere")
    world.start()
    with pytest.raises(Failed) as failed:
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "kill", False, 0)
    assert failed.value.name == f"{NAME}.Error.WriteFailed"
    assert list((world.root / "elsewhere").iterdir()) == []
    assert world.tree.said(WEB) == "continue"
    assert world.systemd.reloads == 0


@pytest.mark.parametrize(("machine", "scope"), [
    ("web01", r"machine-qemu\x2d7\x2dweb01.scope"),
    ("db", "machine-db.scope"),
    ("web_01", r"machine-qemu\x2d7\x2dweb01.scope"),  # libvirt's name for it lacks what no host name has
    ("db", "systemd-nspawn@db.service"),
])
def test_machine_rule(world: World, machine: str, scope: str) -> None:
    cgroup = f"/machine.slice/{scope}"
    world.tree.make(cgroup)
    world.systemd.add(scope, slice="machine.slice", cgroup=cgroup)
    world.service("web.service")
    world.start()
    before = world.policy_files()
    world.root_client.call("SetMachinePolicy", "(sst)", machine, "kill", 0)
    rule = world.root / f"etc/cgpolicy/machines/{machine}.conf"
    assert rule.read_bytes().endswith(drop_in("kill"))
    assert world.tree.said(cgroup) == "kill"
    unit = world.unit(scope)
    assert (unit["Source"], unit["SourcePath"], unit["SourceLine"]) == ("machine-name", str(rule), 3)
    world.root_client.call("UnsetMachinePolicy", "(st)", machine, 0)
    assert world.policy_files() == before | {f"sys/fs/cgroup{cgroup}/memory.failure_dirty_action": b"continue"}
    assert world.systemd.reloads == 0  # systemd reads no machine rules


def test_manager_counts_what_failed(world: World) -> None:
    world.service("web.service", action=None)
    world.start()
    listener = world.nobody()
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "kill", False, 1)
    listener.get("Version")
    assert properties_changed(listener.signals, MANAGER_PATH) == {"NUnits": 1, "NFailed": 1}
    unit = world.unit("web.service")
    assert (unit["State"], unit["EffectiveAction"]) == ("no-controller", "continue")
    assert "MemoryAccounting" in unit["LastError"]
    assert listener.call("GetAll", "(s)", MANAGER, interface=PROPERTIES)["NFailed"] == 1


@pytest.mark.parametrize("flags", [0, 1])
def test_by_an_alias_it_is_the_unit_itself(world: World, flags: int) -> None:
    """Two objects for one cgroup would each put right what the other writes, without end."""
    world.service("web.service")
    world.systemd.add("www.service", listed=False, cgroup=WEB)
    world.systemd.aliases["www.service"] = "web.service"
    world.start()
    polkit = world.polkit()
    assert world.root_client.call("GetUnit", "(s)", "www.service") == WEB_OBJECT
    world.nobody().call("SetUnitPolicy", "(ssbt)", "www.service", "kill", False, flags)
    # Also for polkit's rules, which name the unit.
    assert [question.details["unit"] for question in polkit.questions] == ["web.service"]
    world.settle()
    assert world.tree.said(WEB) == "kill"
    assert (world.root / PERSISTENT).read_bytes().endswith(drop_in("kill"))
    assert [row[:2] for row in world.root_client.call("ListUnits", "(as)", ["w*"])] == [("web.service", "kill")]
    world.root_client.call("UnsetUnitPolicy", "(sbt)", "www.service", False, flags)
    world.settle()
    assert world.tree.said(WEB) == "continue"
    assert not (world.root / PERSISTENT).exists()
