# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon shows, to whom, and what it makes of calls that are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
from gi.repository import GLib

from cgpolicy import __version__
from cgpolicy.client import MANAGER, MANAGER_PATH, NAME, UNIT
from tests.bus.privatebus import Client, Failed
from tests.bus.world import PROPERTIES, World, drop_in, unit_object
from vm.host import TREE

STANDARD = "org.freedesktop.DBus.Error."
ERROR = f"{NAME}.Error."
WEB_OBJECT = unit_object("web.service")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Provide a machine with a running daemon that no test of this module changes."""
    world = World(tmp_path_factory.mktemp("world"))
    try:
        world.service("web.service", "MemoryFailureDirtyAction=kill")
        world.service("plain.service")
        world.service("web-front.service", cgroup="")
        world.systemd.add("user.slice", slice="-.slice", fragment=world.write_fragment(
            "user.slice", "MemoryFailureDirtyAction=panic"))
        world.systemd.add("ghost.service", listed=False, load_state="not-found", slice="")
        world.systemd.add("late.service", listed=False, fragment=world.write_fragment(
            "late.service", "MemoryFailureDirtyAction=kill"))
        world.write_drop_in("foreign.service", "50-cgpolicy.conf", drop_in("kill") + b"[Service]\nNice=1\n")
        world.service("foreign.service")
        world.start()
        yield world
    finally:
        world.close()


@pytest.fixture(scope="module")
def nobody(shared: World) -> Client:
    return shared.nobody()


@pytest.mark.parametrize(("path", "interface"), [(MANAGER_PATH, MANAGER), (WEB_OBJECT, UNIT)])
def test_introspection_is_the_installed_xml(nobody: Client, path: str, interface: str) -> None:
    def meaning(element: ElementTree.Element) -> object:
        return element.tag, element.attrib, [meaning(child) for child in element]

    def described(node: str) -> object:
        found = ElementTree.fromstring(node).find(f"interface[@name='{interface}']")
        assert found is not None
        found[:] = sorted(found, key=lambda member: member.tag)  # GDBus has the properties last
        return meaning(found)

    shown = nobody.call("Introspect", path=path, interface="org.freedesktop.DBus.Introspectable")
    assert described(shown) == described((TREE / "cgpolicy" / f"{NAME}.xml").read_text())


def test_manager_properties(nobody: Client) -> None:
    assert nobody.call("GetAll", "(s)", MANAGER, interface=PROPERTIES) == {
        "Version": __version__, "Backend": "kernel", "Enforcement": "synchronous", "EnforcementDetail": "",
        "NUnits": 3, "NFailed": 0,
    }


def test_unit_properties(shared: World) -> None:
    cgroup = "/system.slice/web.service"
    (shared.tree.path(cgroup) / "memory.events").write_text("oom 3\nfailure_dirty 5\nfailure_dirty_kill 2\n")
    assert shared.unit("web.service") == {
        "Id": "web.service",
        "MemoryFailureDirtyAction": "kill",
        "Source": "unit-file",
        "SourcePath": str(shared.root / "usr/lib/systemd/system/web.service"),
        "SourceLine": 4,
        "EffectiveAction": "kill",
        "EffectiveFrom": cgroup,
        "ControlGroup": cgroup,
        "ControlGroupId": shared.tree.path(cgroup).stat().st_ino,
        "State": "applied",
        "LastError": "",
        "FailureDirty": 5,
        "FailureDirtyKill": 2,
    }


@pytest.mark.parametrize(("patterns", "expected"), [
    ([], ["-.slice", "foreign.service", "machine.slice", "plain.service", "system.slice", "user.slice",
          "web-front.service", "web.service"]),
    (["web.service"], ["web.service"]),
    (["web*"], ["web-front.service", "web.service"]),
    (["*.slice", "p?ain.service"], ["-.slice", "machine.slice", "plain.service", "system.slice", "user.slice"]),
    (["[vw]eb.service", "web.service"], ["web.service"]),
    (["Web.service", "web", "*.target"], []),
    (["[[:alpha:]]lain.service", "w\\eb.service", ""], ["plain.service"]),
    (["[", "[]", "[a", "[z-a]*", "\u00e9*", "*" * 1000 + "n.service"], ["foreign.service", "plain.service"]),
])
def test_list_units_by_patterns(nobody: Client, patterns: list[str], expected: list[str]) -> None:
    assert [row[0] for row in nobody.call("ListUnits", "(as)", patterns)] == expected


def test_rows_of_list_units(nobody: Client) -> None:
    assert nobody.call("ListUnits", "(as)", ["web*.service", "user.slice"]) == [
        ("user.slice", "panic", "unit-file", "continue", "default", unit_object("user.slice")),
        ("web-front.service", "", "unset", "continue", "unset", unit_object("web-front.service")),
        ("web.service", "kill", "unit-file", "kill", "applied", WEB_OBJECT),
    ]


def test_get_unit_loads_what_systemd_has_not_loaded(shared: World, nobody: Client) -> None:
    assert nobody.call("ListUnits", "(as)", ["late.service"]) == []
    path = nobody.call("GetUnit", "(s)", "late.service")
    assert path == unit_object("late.service")
    assert nobody.get("MemoryFailureDirtyAction", path=path, interface=UNIT) == "kill"
    assert nobody.get("State", path=path, interface=UNIT) == "inactive"
    shared.systemd.unit_removed("late.service")
    shared.settle()
    assert nobody.get("State", path=path, interface=UNIT) == "inactive"


MANY = [f"{number}.service" for number in range(1025)]

WRONG_CALLS = [
    # method, signature, values, error; as root, whom nothing else would stop
    ("SetUnitPolicy", "(ssbt)", ("web.service", "halt", False, 0), f"{ERROR}InvalidAction"),
    ("SetUnitPolicy", "(ssbt)", ("web.service", "", False, 0), f"{ERROR}InvalidAction"),
    ("SetUnitPolicy", "(ssbt)", ("web.service", "Kill", False, 0), f"{ERROR}InvalidAction"),
    ("SetUnitPolicy", "(ssbt)", ("web.service", "kill\n", False, 0), f"{ERROR}InvalidAction"),
    ("SetUnitPolicy", "(ssbt)", ("web", "panic", False, 0), f"{ERROR}InvalidUnitName"),
    ("SetUnitPolicy", "(ssbt)", ("", "panic", False, 0), f"{ERROR}InvalidUnitName"),
    ("SetUnitPolicy", "(ssbt)", ("../../etc/passwd.service", "panic", False, 0), f"{ERROR}InvalidUnitName"),
    ("SetUnitPolicy", "(ssbt)", ("a" * 300 + ".service", "panic", False, 0), f"{ERROR}InvalidUnitName"),
    ("SetUnitPolicy", "(ssbt)", ("w\u00e9b.service", "panic", False, 0), f"{ERROR}InvalidUnitName"),
    ("SetUnitPolicy", "(ssbt)", ("ghost.service", "panic", False, 0), f"{ERROR}NoSuchUnit"),
    ("SetUnitPolicy", "(ssbt)", ("unheard-of.service", "panic", False, 0), f"{ERROR}NoSuchUnit"),
    ("SetUnitPolicy", "(ssbt)", ("basic.target", "panic", False, 0), f"{ERROR}NotSupported"),
    ("SetUnitPolicy", "(ssbt)", ("backup.timer", "panic", True, 0), f"{ERROR}NotSupported"),
    ("SetUnitPolicy", "(ssbt)", ("web.service", "panic", False, 2), f"{STANDARD}InvalidArgs"),
    ("SetUnitPolicy", "(ssbt)", ("web.service", "panic", False, 2**63), f"{STANDARD}InvalidArgs"),
    ("SetUnitPolicy", "(ssbt)", ("foreign.service", "panic", False, 0), f"{ERROR}WriteFailed"),
    ("UnsetUnitPolicy", "(sbt)", ("foreign.service", False, 0), f"{ERROR}WriteFailed"),
    ("UnsetUnitPolicy", "(sbt)", ("ghost.service", False, 0), f"{ERROR}NoSuchUnit"),
    ("UnsetUnitPolicy", "(sbt)", ("web", False, 0), f"{ERROR}InvalidUnitName"),
    ("UnsetUnitPolicy", "(sbt)", ("web.service", False, 4), f"{STANDARD}InvalidArgs"),
    ("SetMachinePolicy", "(sst)", ("db", "halt", 0), f"{ERROR}InvalidAction"),
    ("SetMachinePolicy", "(sst)", ("../db", "kill", 0), f"{ERROR}InvalidMachineName"),
    ("SetMachinePolicy", "(sst)", ("", "kill", 0), f"{ERROR}InvalidMachineName"),
    ("SetMachinePolicy", "(sst)", ("db", "kill", 8), f"{STANDARD}InvalidArgs"),
    ("UnsetMachinePolicy", "(st)", ("a/b", 0), f"{ERROR}InvalidMachineName"),
    ("GetUnit", "(s)", ("ghost.service",), f"{ERROR}NoSuchUnit"),
    ("GetUnit", "(s)", ("basic.target",), f"{ERROR}NotSupported"),
    ("Explain", "(s)", ("no suffix",), f"{ERROR}InvalidUnitName"),
    ("ListUnits", "(as)", (MANY,), f"{STANDARD}LimitsExceeded"),
    ("ListUnits", "(as)", (["*" * 70_000],), f"{STANDARD}LimitsExceeded"),
    ("SetUnitPolicy", "(ssbt)", ("\1" * (16 << 20), "kill", False, 0), f"{ERROR}InvalidUnitName"),
    ("SetUnitPolicy", "(ssbt)", ("web.service", "\1" * (16 << 20), False, 0), f"{ERROR}InvalidAction"),
    ("SetMachinePolicy", "(sst)", ("\1" * (16 << 20), "kill", 0), f"{ERROR}InvalidMachineName"),
    # Not the signature of the method, and no such thing at all
    ("SetUnitPolicy", "(ss)", ("web.service", "panic"), f"{STANDARD}InvalidArgs"),
    ("SetUnitPolicy", "(ssbts)", ("web.service", "panic", False, 0, ""), f"{STANDARD}InvalidArgs"),
    ("SetUnitPolicy", "(ssbi)", ("web.service", "panic", False, 0), f"{STANDARD}InvalidArgs"),
    ("ListUnits", "()", (), f"{STANDARD}InvalidArgs"),
    ("Reload", "(s)", ("now",), f"{STANDARD}InvalidArgs"),
    ("Halt", "()", (), f"{STANDARD}UnknownMethod"),
]


@pytest.mark.parametrize(("method", "signature", "values", "error"), WRONG_CALLS)
def test_wrong_call_has_its_error_and_changes_nothing(
    shared: World, method: str, signature: str, values: tuple[object, ...], error: str
) -> None:
    before, reloads = shared.policy_files(), shared.systemd.reloads
    with pytest.raises(Failed) as failed:
        shared.root_client.call(method, signature, *values)
    assert failed.value.name == error
    assert 0 < len(failed.value.message) < 3000 and "Traceback" not in failed.value.message
    assert shared.is_alive()
    assert shared.policy_files() == before
    assert shared.systemd.reloads == reloads


@pytest.mark.parametrize(("path", "method", "signature", "values", "error"), [
    (WEB_OBJECT, "Set", "(ssv)", (UNIT, "State", ("s", "applied")), "InvalidArgs"),
    (WEB_OBJECT, "Set", "(ssv)", (UNIT, "Nice", ("s", "applied")), "InvalidArgs"),
    (WEB_OBJECT, "Set", "(ssv)", (UNIT, "MemoryFailureDirtyAction", ("u", 2)), "InvalidArgs"),
    (WEB_OBJECT, "Set", "(ss)", (UNIT, "MemoryFailureDirtyAction"), "UnknownMethod"),
    (WEB_OBJECT, "Get", "(ss)", (UNIT, "Nice"), "InvalidArgs"),
    (WEB_OBJECT, "Get", "(ss)", (MANAGER, "Version"), "InvalidArgs"),
    (MANAGER_PATH, "Set", "(ssv)", (MANAGER, "NUnits", ("u", 0)), "InvalidArgs"),
    (MANAGER_PATH, "Set", "(ssv)", (MANAGER, "Version", ("s", "9")), "InvalidArgs"),
    (unit_object("unheard-of.service"), "GetAll", "(s)", (UNIT,), "UnknownMethod"),
])
def test_wrong_property_call(
    shared: World, path: str, method: str, signature: str, values: tuple[Any, ...], error: str
) -> None:
    before = shared.policy_files()
    with pytest.raises(Failed) as failed:
        shared.root_client.call(method, signature, *variants(values), path=path, interface=PROPERTIES)
    assert failed.value.name == f"{STANDARD}{error}"
    assert shared.is_alive()
    assert shared.policy_files() == before


def variants(values: tuple[Any, ...]) -> list[Any]:
    return [GLib.Variant(*value) if isinstance(value, tuple) else value for value in values]
