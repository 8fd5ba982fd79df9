# SPDX-License-Identifier: LGPL-2.1-or-later
"""What somebody without privileges tries beside asking: names, signals, links, the environment. Nothing changes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from gi.repository import GLib

from cgpolicy.client import MANAGER, MANAGER_PATH, NAME, UNIT
from cgpolicy.systemd import MANAGER as SYSTEMD_MANAGER
from cgpolicy.systemd import MANAGER_PATH as SYSTEMD_PATH
from cgpolicy.systemd import SERVICE as SYSTEMD
from tests.bus.fakes import MACHINE1, MACHINE1_PATH
from tests.bus.privatebus import BUS, NOBODY, Failed, wait
from tests.bus.world import PYTHON, World, drop_in, unit_object
from vm.host import TREE

WEB = "/system.slice/web.service"
KILL = "MemoryFailureDirtyAction=kill"


def seen(world: World) -> tuple[object, ...]:
    """Return all that could have changed."""
    return world.policy_files(), world.unit("web.service"), world.root_client.call("ListUnits", "(as)", [])


@pytest.mark.parametrize("name", [NAME, SYSTEMD, MACHINE1, "org.freedesktop.PolicyKit1"])
def test_no_name_is_to_be_had(world: World, name: str) -> None:
    """Who had polkit's name would be asked whether he may."""
    with pytest.raises(Failed) as failed:
        world.nobody().call("RequestName", "(su)", name, 0, **BUS)
    assert failed.value.name == "org.freedesktop.DBus.Error.AccessDenied"


def test_signals_of_others_are_not_believed(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    before, gets, nobody = seen(world), world.systemd.gets.copy(), world.nobody()
    for path, interface, signal, values in [
        (SYSTEMD_PATH, SYSTEMD_MANAGER, "UnitRemoved", GLib.Variant("(so)", ("web.service", "/"))),
        (SYSTEMD_PATH, SYSTEMD_MANAGER, "UnitNew", GLib.Variant("(so)", ("web.service", "/"))),
        (SYSTEMD_PATH, SYSTEMD_MANAGER, "JobRemoved", GLib.Variant("(uoss)", (1, "/", "web.service", "done"))),
        (SYSTEMD_PATH, SYSTEMD_MANAGER, "Reloading", GLib.Variant("(b)", (True,))),
        (MACHINE1_PATH, f"{MACHINE1}.Manager", "MachineNew", GLib.Variant("(so)", ("db", "/"))),
        ("/org/freedesktop/DBus", BUS["interface"], "NameOwnerChanged", GLib.Variant("(sss)", (SYSTEMD, "", ":1.1"))),
        (MANAGER_PATH, MANAGER, "UnitPolicyChanged", GLib.Variant("(ssss)", ("web.service", "", "", ""))),
    ]:
        nobody.connection.emit_signal(None, path, interface, signal, values)
        nobody.connection.emit_signal(world.root_client.owner(NAME), path, interface, signal, values)
    nobody.get("Version")
    world.settle()
    assert seen(world) == before and world.systemd.gets == gets
    # Nor has any client taken them for the daemon's.
    assert world.root_client.signals == []


def test_activation_gets_no_environment_of_others(world: World) -> None:
    with pytest.raises(Failed) as failed:
        world.nobody().call("UpdateActivationEnvironment", "(a{ss})", {"PYTHONPATH": "/tmp"}, **BUS)
    assert failed.value.name == "org.freedesktop.DBus.Error.AccessDenied"


@pytest.mark.parametrize("program", ["cgpolicy", "cgpolicyd", "cgpolicy-reactor"])
def test_environment_of_the_caller_has_no_say(tmp_path: Path, program: str) -> None:
    """A program that root runs in somebody's directory, with somebody's variables, imports nothing from there."""
    (tmp_path / "argparse.py").write_text("import os; os.write(1, b'mine')\n")
    (tmp_path / "cgpolicy").mkdir()
    (tmp_path / "cgpolicy/__init__.py").write_text("import os; os.write(1, b'mine')\n")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "argparse.py"), "HOME": str(tmp_path)}
    text = (TREE / "units" / program).read_text()
    interpreter = text.partition("\n")[0].removeprefix("#!").split()
    ran = subprocess.run(
        [*interpreter, str(TREE / "units" / program), "--help"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, check=False)
    assert interpreter == [PYTHON, "-I"] and b"mine" not in ran.stdout


@pytest.mark.parametrize("target", ["directory", "file"])
def test_links_into_somebodys_directory(world: World, target: str) -> None:
    """An administrator linked a drop-in, or a directory of them, to where a user writes: nothing is written there."""
    home = world.root / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    victim = home / "victim"
    victim.write_bytes(drop_in("continue"))
    os.chown(victim, NOBODY, NOBODY)
    directory = world.root / "etc/systemd/system/web.service.d"
    if target == "directory":
        directory.parent.mkdir(parents=True)
        directory.symlink_to(home)
        (home / "50-cgpolicy.conf").symlink_to(victim)
    else:
        directory.mkdir(parents=True)
        (directory / "50-cgpolicy.conf").symlink_to(victim)
        (directory / ".50-cgpolicy.conf.new").symlink_to(victim)
    world.service("web.service", KILL)
    world.start()
    content, owner = victim.read_bytes(), victim.stat().st_uid
    try:
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", False, 0)
    except Failed as error:
        assert target == "directory" and error.name == f"{NAME}.Error.WriteFailed"
    else:
        assert world.tree.said(WEB) == "panic"
    assert (victim.read_bytes(), victim.stat().st_uid) == (content, owner)
    assert sorted(path.name for path in home.iterdir()) == sorted(
        ["victim", *(["50-cgpolicy.conf"] if target == "directory" else [])])


def test_what_one_client_can_make_the_daemon_hold(world: World) -> None:
    """Objects of units that systemd loads for whoever asks: so many and no more, and none instead of others."""
    world.service("web.service", KILL)
    world.service("stopped.service", KILL, cgroup="")
    fragment = world.write_fragment("job@.service", KILL)
    for number in range(1200):
        world.systemd.add(f"job@{number}.service", listed=False, fragment=fragment)
    world.start()
    world.systemd.unit_removed("stopped.service")
    nobody = world.nobody()
    for first in range(0, 1200, 40):
        calls = [nobody.start("GetUnit", "(s)", f"job@{number}.service") for number in range(first, first + 40)]
        for call in calls:
            call.result()
    world.settle()
    units = [row[0] for row in nobody.call("ListUnits", "(as)", ["job@*"])]
    assert len(units) == 1023 and "job@1199.service" in units and "job@0.service" not in units
    assert nobody.get("State", path=unit_object("job@1199.service"), interface=UNIT) == "inactive"
    assert world.unit("web.service")["State"] == "applied"
    # A list of what matches a thousand patterns takes long; nobody waits for it.
    patterns = [f"*[!-~]*{number}*x" for number in range(1024)]
    slow = nobody.start("ListUnits", "(as)", patterns)
    for _ in range(3):
        world.root_client.get("Version")
    assert not slow.answered
    assert slow.result() == ([],)
    # What was stopped and has a policy still gets it at once.
    world.systemd.holding = True
    with world.paused():
        world.tree.make("/system.slice/stopped.service")
    world.settle()
    assert world.tree.said("/system.slice/stopped.service") == "kill"


def test_one_client_has_few_calls_that_wait(world: World) -> None:
    world.service("web.service", KILL)
    world.systemd.add("late.service", listed=False, fragment=world.write_fragment("late.service"))
    world.start()
    world.systemd.holding = True
    first, second = world.nobody(), world.nobody()
    calls = [first.start("GetUnit", "(s)", "late.service") for _ in range(70)]
    wait(lambda: sum(call.answered for call in calls) == 6, "the surplus to be refused")
    refused = [call.error.name for call in calls if call.error is not None]
    assert refused == ["org.freedesktop.DBus.Error.LimitsExceeded"] * 6
    # What is known is told all the same, and others may wait as well.
    assert first.call("GetUnit", "(s)", "web.service") == unit_object("web.service")
    other = second.start("GetUnit", "(s)", "late.service")
    world.settle()
    assert not other.answered
    world.systemd.go_on()
    waited = [*(call for call in calls if call.error is None), other]
    assert {call.result() for call in waited} == {(unit_object("late.service"),)}
