# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command beside a running daemon: its exit status, and errors as the daemon worded them."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading

import pytest

from tests.bus.privatebus import wait
from tests.bus.world import PYTHON, World
from vm.host import TREE


def command(world: World, *arguments: str) -> tuple[int, str, str]:
    """Run cgpolicy; the fakes answer meanwhile."""
    process = subprocess.Popen(
        [PYTHON, str(TREE / "units" / "cgpolicy"), *arguments], text=True,
        env={"DBUS_SYSTEM_BUS_ADDRESS": world.address, "PYTHONPATH": str(TREE)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    wait(lambda: process.poll() is not None, "the command to end")
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


@pytest.mark.parametrize(("arguments", "status", "stderr"), [
    (["show", "web"], 0, ""),
    (["set", "web", "kill"], 0, ""),
    (["show", "ghost"], 4, "cgpolicy: ghost.service: systemd has no such unit (see systemctl list-unit-files)\n"),
    (["set", "basic.target", "kill"], 1, "cgpolicy: basic.target: a target unit has no control group\n"),
])
def test_command(world: World, arguments: list[str], status: int, stderr: str) -> None:
    world.service("web.service")
    world.systemd.add("ghost.service", load_state="not-found", listed=False)
    world.start()
    assert command(world, *arguments)[::2] == (status, stderr)
    expected = "kill" if arguments == ["set", "web", "kill"] else "continue"
    assert world.tree.said("/system.slice/web.service") == expected


def test_status_shows_what_is_configured(world: World) -> None:
    """The first line says how strong it is, then each unit with a policy: outcome, file and line, state."""
    world.service("web.service", "MemoryFailureDirtyAction=kill")
    world.service("plain.service")
    later = world.write_fragment("later.service", "MemoryFailureDirtyAction=panic")
    world.systemd.add("later.service", fragment=later)
    world.start()
    status, out, err = command(world)
    assert (status, err) == (0, "")
    first, _, _, *tree = out.splitlines()
    assert first == "Enforcement: synchronous (backend kernel): the kernel acts before the data is gone"
    lines = {name: " ".join(rest) for name, *rest in (line.strip("├─└│ ").split() for line in tree if line)}
    fragments = world.root / "usr/lib/systemd/system"
    assert lines["web.service"] == f"kill {fragments}/web.service:4 applied"
    assert lines["later.service"] == f"panic, once it runs {fragments}/later.service:4 inactive"
    assert "plain.service" not in lines
    assert "plain.service" in command(world, "status", "--all")[1]


@pytest.mark.parametrize("arguments", [["--json", "list"], ["list", "--json"]])
def test_json_before_or_after_the_command(world: World, arguments: list[str]) -> None:
    world.service("web.service", "MemoryFailureDirtyAction=kill")
    world.start()
    status, out, _ = command(world, *arguments)
    assert status == 0
    assert json.loads(out) == [
        {
            "unit": "web.service", "configured": "kill", "source": "unit-file", "effective": "kill",
            "state": "applied",
        }
    ]


@pytest.mark.parametrize(("arguments", "reason"), [
    (["set", "web", "halt"], "invalid choice: 'halt'"),
    (["set", "kill"], "set needs a UNIT or --machine NAME"),
    (["set", "--machine", "web01", "--runtime", "kill"], "--machine goes with no UNIT"),
    (["show", "no unit"], "'no unit' is no valid unit name"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
])
def test_usage(world: World, arguments: list[str], reason: str) -> None:
    """A wrong command line is status 2 and changes nothing."""
    world.service("web.service")
    world.start()
    before = world.policy_files()
    status, out, err = command(world, *arguments)
    assert (status, out) == (2, "")
    assert reason in err
    assert world.policy_files() == before


def test_machine_rule(world: World) -> None:
    world.start()
    before = world.policy_files()
    assert command(world, "set", "--machine", "web01", "kill")[:2] == (0, "machine web01: kill\n")
    assert set(world.policy_files()) - set(before) == {"etc/cgpolicy/machines/web01.conf"}
    assert command(world, "--quiet", "unset", "--machine", "web01")[:2] == (0, "")
    assert world.policy_files() == before


def test_without_daemon(world: World) -> None:
    """Nobody to ask is status 1 with the next step, and doctor names it among the rest."""
    status, _, err = command(world, "status")
    assert status == 1
    assert err.startswith("cgpolicy: cgpolicyd does not answer: ")
    assert "(see systemctl status cgpolicyd)" in err
    status, out, _ = command(world, "--json", "doctor")
    assert status == 1
    assert json.loads(out)[-1]["cure"] == "see systemctl status cgpolicyd"


def test_monitor_ends_with_its_reader(world: World) -> None:
    world.service("web.service")
    world.start()
    process = subprocess.Popen(
        [PYTHON, str(TREE / "units" / "cgpolicy"), "--json", "monitor"], stdout=subprocess.PIPE,
        env={"DBUS_SYSTEM_BUS_ADDRESS": world.address, "PYTHONPATH": str(TREE)},
    )
    assert process.stdout
    lines: list[bytes] = []
    reader = threading.Thread(target=lambda: lines.append(process.stdout.readline() if process.stdout else b""))
    reader.start()
    actions = itertools.cycle(["kill", "continue"])

    def heard() -> bool:
        """Make signals until the monitor has come to listen."""
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", next(actions), True, 1)
        return not reader.is_alive()

    wait(heard, "a line of the monitor")
    assert json.loads(lines[0])["signal"] == "UnitPolicyChanged"
    process.stdout.close()

    def ended() -> bool:
        world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", next(actions), True, 1)
        return process.poll() is not None

    wait(ended, "the monitor to end")
    assert process.returncode == 1
