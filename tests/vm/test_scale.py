# SPDX-License-Identifier: LGPL-2.1-or-later
"""Thousands of loaded units, a tenth of them with a policy: time, memory, and quiet."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scale import is_full, scaled
from tests.vm.conftest import Guest

pytestmark = pytest.mark.idle

Steps = dict[str, dict[str, Any]]

UNITS = scaled(500, 10000)
SECONDS = scaled(1800, 21600)  # to make and start the units takes most of it
RESIDENT_KIB = 48 << 10  # with all 10,000
CALL_LEAK_BYTES = 512  # PyGObject can lose 2 KiB a call


@pytest.fixture(scope="module")
def scale(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    share = tmp_path_factory.mktemp("scale")
    return {step.pop("step"): step for step in guest.module("scale", share, str(UNITS), timeout=SECONDS)}


def test_ready_as_soon_as_systemctl_has_read_all(scale: Steps) -> None:
    """READY=1 is said, with every policy applied, within the time of systemctl show of the same units."""
    seen = scale["ready"]
    print(f"{seen['loaded']} units: systemctl {seen['show']:.1f} s, READY=1 after {seen['ready']:.1f} s")
    assert (seen["loaded"], seen["policies"]) == (UNITS, UNITS // 10)
    assert seen["applied"] == seen["policies"]
    assert seen["ready"] <= seen["show"]


def test_in_step_after_a_reload(scale: Steps) -> None:
    """All policies are changed and all are applied, from the end of systemd's own reload within the same time."""
    seen = scale["reloaded"]
    print(f"in step {seen['in_step']:.1f} s after daemon-reload was called, which took {seen['reload']:.1f} s")
    assert seen["applied"] == UNITS // 10
    assert seen["in_step"] - seen["reload"] <= seen["show"]


@pytest.mark.parametrize("step", ["ready", "reloaded", "listed"])
def test_resident_memory(scale: Steps, step: str) -> None:
    """Not for a moment is it more."""
    memory = scale[step]["memory"]
    print(f"{step}: {memory['VmRSS']} KiB resident, {memory['VmHWM']} at most")
    assert memory["VmHWM"] <= (RESIDENT_KIB if is_full() else RESIDENT_KIB - 8 * 1024)


def test_calls_leave_nothing_behind(scale: Steps) -> None:
    seen = scale["asked"]
    print(f"{seen['growth']} KiB after {seen['calls']} calls")
    assert seen["growth"] * 1024 <= seen["calls"] * CALL_LEAK_BYTES


def test_no_wakeup_while_nothing_happens(scale: Steps) -> None:
    """No thread of the daemon runs (its context switches, of /proc/PID/task/TID/status) between two of its watchdog's.

    WatchdogSec=5min makes that one wake-up in 150 s.
    """
    assert scale["idle"] == {"seconds": 60, "wakeups": 0, "wakers": []}
