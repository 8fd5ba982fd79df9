# SPDX-License-Identifier: LGPL-2.1-or-later
"""From when a policy holds: services and scopes started many times, on both Debians."""

from __future__ import annotations

import statistics
import subprocess
from typing import Any

import pytest

from tests.scale import scaled
from tests.vm.conftest import SCRIPTS, Guest

pytestmark = pytest.mark.idle

Steps = dict[str, dict[str, Any]]

FIRST = scaled(5, 100)
BY_INOTIFY = scaled(50, 500)
BY_APPLY = scaled(5, 500)
BY_SCOPE = scaled(50, 500)
BY_DELEGATION = scaled(20, 500)
SECONDS = scaled(900, 14400)  # one start takes up to 5 s on a busy host


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def starts(guest: Guest, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    share = tmp_path_factory.mktemp("starts")
    compile_c = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-nostdlib", "-ffreestanding"]
    subprocess.run([*compile_c, "-o", share / "first", SCRIPTS / "first.c"], check=True)
    counts = map(str, (FIRST, BY_INOTIFY, BY_APPLY, BY_SCOPE, BY_DELEGATION))
    told = guest.module("starts", share, *counts, suite=request.param, timeout=SECONDS)
    return {step.pop("step"): step for step in told}


def spread(seconds: list[float]) -> str:
    """Return median, 99th percentile and maximum in milliseconds."""
    ordered = sorted(seconds)
    worst = ordered[min(len(ordered) - 1, round(len(ordered) * 0.99))]
    return " ".join(f"{value * 1000:.2f}" for value in (statistics.median(ordered), worst, ordered[-1]))


def test_without_a_policy(starts: Steps) -> None:
    assert starts["unset"]["reads"] == ["continue"] * 2


@pytest.mark.parametrize(
    ("step", "count"),
    [("first", FIRST), ("inotify", BY_INOTIFY), ("inotify beside Delegate=yes", BY_DELEGATION)],
)
def test_before_the_first_instruction(starts: Steps, step: str, count: int) -> None:
    """What the main process reads with its first system call, in starts one after another on an idle guest.

    "first": systemd has read the unit anew for each. It is a race all the same: a few may be lost, not more.
    """
    reads = starts[step]["reads"]
    print(f"{step}: {reads.count('kill')} of {len(reads)} by inotify alone")
    assert len(reads) == count
    assert set(reads) <= {"kill", "continue"}
    assert reads.count("continue") <= max(1, 0.02 * count)


@pytest.mark.parametrize(("step", "count"), [("scopes", BY_SCOPE), ("scopes beside Delegate=yes", BY_DELEGATION)])
def test_scope_before_its_job_is_done(starts: Steps, step: str, count: int) -> None:
    """A scope of StartTransientUnit, in at least 99 of 100: looked at when JobRemoved has come."""
    seen = starts[step]
    print(f"from mkdir, p50 p99 max in ms: applied {spread(seen['applied'])}, job done {spread(seen['jobs'])}")
    print(f"with their policy when the job was done: {seen['values'].count('kill')} of {len(seen['values'])}")
    assert len(seen["values"]) == count
    assert set(seen["values"]) <= {"kill", "continue"}
    assert seen["values"].count("kill") >= 0.99 * count


def test_apply_without_daemon(starts: Steps) -> None:
    """ExecStartPre=+cgpolicy apply %n needs no daemon, and the start fails where the value cannot be set."""
    assert starts["no daemon"]["reads"] == ["continue"] * 2
    print(f"one start with cgpolicy apply: {starts['apply']['seconds']:.2f} s")
    said = "probe.service: kill, from /etc/systemd/system/probe.service.d/50-policy.conf:2, is in force"
    assert starts["apply"]["reads"] == [said, "kill"] * BY_APPLY
    seen = starts["cannot apply"]
    assert seen["status"] != 0
    (said,) = seen["reads"]
    assert said.startswith("cgpolicy: /bare.slice/probe.service: no memory.failure_dirty_action")
