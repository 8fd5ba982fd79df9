# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command beside a running daemon: its exit status, and errors as the daemon worded them."""

from __future__ import annotations

import subprocess

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
