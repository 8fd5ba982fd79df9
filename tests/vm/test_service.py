# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service on both Debians: every way to come by a policy, disturbances, losses by the hundred."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.scale import scaled
from tests.vm.conftest import Guest

Steps = dict[str, dict[str, Any]]

PAGES = scaled(20, 200)  # of each of ten files
SECONDS = scaled(1200, 3600)
SYSTEM = "/etc/systemd/system"
KILL = f"{SYSTEM}/special.service.d/50-policy.conf"


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def told(guest: Guest, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    share = tmp_path_factory.mktemp("service")
    steps = guest.module("service", share, str(PAGES), suite=request.param, timeout=SECONDS)
    return {step.pop("step"): step for step in steps}


# Where a policy comes from --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "action", "source", "path"),
    [
        ("root-default.service", "kill", "slice", "-.slice.d/50-policy.conf"),
        ("plain.service", "panic", "slice", "shop.slice"),
        ("special.service", "kill", "unit-file", "special.service.d/50-policy.conf"),
        ("front.service", "continue", "slice", "shop-front.slice"),
        ("back.service", "panic", "slice", "shop.slice"),
        ("tpl@a.service", "continue", "unit-file", "tpl@.service.d/50-policy.conf"),
        ("tpl@b.service", "panic", "unit-file", "tpl@b.service.d/60-policy.conf"),
        ("ear.socket", "panic", "unit-file", "ear.socket.d/50-policy.conf"),
        ("mnt-table.mount", "panic", "unit-file", "mnt-table.mount.d/50-policy.conf"),
        ("var-swapfile.swap", "panic", "unit-file", "var-swapfile.swap.d/50-policy.conf"),
        ("user@0.service", "panic", "unit-file", "user@.service.d/50-policy.conf"),
    ],
)
def test_table(told: Steps, unit: str, action: str, source: str, path: str) -> None:
    """Configured, where that was decided, and what the kernel has; a unit without a cgroup says that it has none."""
    seen = told[unit]
    assert seen["start"] == 0
    assert (seen["MemoryFailureDirtyAction"], seen["Source"]) == (action, source)
    assert seen["SourcePath"] == f"{SYSTEM}/{path}"
    if seen["value"] is None:
        assert unit.endswith((".mount", ".swap"))
        assert seen["State"] == "inactive"
    else:
        assert (seen["value"], seen["State"], seen["EffectiveAction"]) == (action, "applied", action)


def test_slices_bind_nobody(told: Steps) -> None:
    """A slice's setting is written to the units below it and not to the slice."""
    assert set(told["slices"]["own"].values()) == {"continue"}


def test_no_controller(told: Steps) -> None:
    seen = told["bare.service"]
    assert (seen["MemoryFailureDirtyAction"], seen["State"]) == ("kill", "no-controller")
    assert "MemoryAccounting=yes" in seen["LastError"]


def test_moved_unit(told: Steps) -> None:
    """A unit that its file moves keeps its value until its next start, in the other slice."""
    assert told["moved"]["before"] in ("kill", "panic")
    assert (told["moved"]["after"], told["moved"]["SourcePath"]) == ("kill", f"{SYSTEM}/-.slice.d/50-policy.conf")
    gone = told["without root default"]
    assert (gone["after"], gone["MemoryFailureDirtyAction"], gone["State"]) == ("continue", "", "unset")


def test_stricter_above(told: Steps) -> None:
    seen = told["stricter above"]
    assert (seen["value"], seen["MemoryFailureDirtyAction"]) == ("continue", "continue")
    assert seen["EffectiveAction"] == "kill"
    assert seen["EffectiveFrom"].endswith("/shop-front.slice")


def test_interference_is_put_right_and_said(told: Steps) -> None:
    assert told["interference"]["value"] == "kill"
    (line,) = told["interference said"]["lines"]
    assert line.endswith("to continue; put back to kill, once")


@pytest.mark.parametrize(
    ("unit", "action", "path"),
    [
        ("judge-a-b", "kill", "judge-a-.service.d/60-more.conf"),
        ("judge-masked", "continue", "service.d/10-all.conf"),
        ("judge-real", "kill", "judge-alias.service.d/70-alias.conf"),
        ("judge@one", "kill", "judge@.service.d/50-policy.conf"),
        ("judge@two", "", ""),
    ],
)
def test_systemctl_is_the_judge(told: Steps, unit: str, action: str, path: str) -> None:
    """The last assignment that systemctl cat shows is the one in force: masks, prefixes, aliases, templates."""
    seen = told[f"judged {unit}.service"]
    assert seen["systemctl"] == [action, f"{SYSTEM}/{path}" if path else ""]
    assert seen["cgpolicy"] == seen["systemctl"]
    assert seen["value"] == (action or "continue")


# Disturbed ------------------------------------------------------------------------------------


def test_overflow(told: Steps) -> None:
    """Events that the kernel dropped are made up for by a look at everything."""
    assert told["overflow"] == {"before": "continue", "after": "kill"}


def test_bus_restarted(told: Steps) -> None:
    """Without its bus the daemon ends, is started again, and is in step with what changed meanwhile."""
    seen = told["dbus.service restarted"]
    assert (seen["after"], seen["again"], seen["State"]) == ("panic", True, "applied")


def test_lost_after_the_bus_was_restarted(told: Steps) -> None:
    assert told["again"] == {"signalled": 1, "pages": "1", "action": "kill"}


def test_sandbox(told: Steps) -> None:
    match = re.search(r"for cgpolicyd\.service: ([0-9.]+)", told["security"]["text"])
    assert match
    print(f"systemd-analyze security: {match[1]}")
    assert float(match[1]) < 3.0


# Lost -----------------------------------------------------------------------------------------


def test_storm(told: Steps) -> None:
    """Many pages are few records, with exact totals: journal, signal, and the kernel's counter."""
    seen = told["storm"]
    print(f"{seen['total']} pages in {seen['seconds']:.2f} s: {seen['records']} records, {seen['signals']} signals")
    assert seen["total"] == 10 * PAGES - 5
    assert seen["recorded"] == seen["signalled"] == seen["kernel"] == seen["shown"] == seen["total"]
    assert seen["records"] == seen["signals"] <= seen["seconds"] + 3
    assert seen["invocations"] == [seen["invocation"]]


def test_losses_while_the_daemon_is_gone(told: Steps) -> None:
    """Three pages after kill -9 and two after a stop: none is forgotten or told of twice, no counter starts anew."""
    seen = told["restarts"]
    assert (seen["signalled"], seen["kernel"], seen["shown"]) == (5, 5, 5)
    assert seen["unseen"] == [2]  # the trace buffer still had the first three


def test_below_a_unit(told: Steps) -> None:
    seen = told["below"]
    assert (seen["effective"], seen["result"], seen["action"]) == ("kill", "signal", "kill")
    assert seen["cgroup"] == "/system.slice/nest.service/below"
    assert seen["invocation"][0] == seen["invocation"][1]


def test_unit_that_is_gone(told: Steps) -> None:
    seen = told["gone"]
    assert seen["loaded"] == "not-found"
    assert seen["recorded"] == [seen["invocation"]]
