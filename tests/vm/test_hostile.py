# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hostile calls to the service as installed, on both Debians: real PID 1, bus and polkit."""

from __future__ import annotations

import json

import pytest

from tests.scale import scaled
from tests.vm.conftest import Guest
from vm.host import TREE

CALLS = scaled(2_000, 200_000)
SECONDS = scaled(600, 7200)


@pytest.mark.parametrize("suite", ["trixie", "bookworm"])
def test_hostile_calls(guest: Guest, suite: str) -> None:
    """hostile.py says itself what is wrong: an end, an answer that is missing or improper, memory."""
    command = ("/usr/bin/python3", "/mnt/share/hostile.py", "--calls", str(CALLS))
    done = guest.run(*command, suite=suite, share=TREE / "tests/bus", timeout=SECONDS)
    assert done.status == 0
    found = json.loads(done.stdout)
    print(f"{suite}: {CALLS} calls, {found['growth_kib']} KiB")
    assert found["calls"] == CALLS
    assert found["outcomes"]["answer"] > CALLS / 20 and len(found["outcomes"]) > 10
