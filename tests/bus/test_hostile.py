# SPDX-License-Identifier: LGPL-2.1-or-later
"""What hostile clients can do to the daemon: nothing, however many calls they make."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.bus.privatebus import wait
from tests.bus.world import PYTHON, World
from tests.scale import scaled

CALLS = scaled(20_000, 200_000)


def run(world: World, *command: str) -> dict[str, Any]:
    """Run a program beside the daemon, while the fakes answer; return what it printed, as JSON."""
    environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": world.address}
    with subprocess.Popen([PYTHON, *command], env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait(lambda: process.poll() is not None, command[0], seconds=900)
        assert process.stdout is not None
        printed = process.stdout.read()
    print(printed)
    assert process.returncode == 0, printed
    found = json.loads(printed)
    assert isinstance(found, dict)
    return found


def test_hostile_calls(world: World) -> None:
    world.service("web.service", "MemoryFailureDirtyAction=kill")
    world.start()
    before = world.policy_files()
    found = run(world, str(Path(__file__).with_name("hostile.py")), "--calls", str(CALLS))
    assert found["calls"] == CALLS
    # Otherwise the generator makes nothing worth refusing.
    assert found["outcomes"]["answer"] > CALLS / 20 and len(found["outcomes"]) > 10
    assert world.is_alive()
    assert world.policy_files() == before
    assert world.systemd.reloads == 0
