# SPDX-License-Identifier: LGPL-2.1-or-later
"""The figures of the comparison, from events that a guest could have told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.compare import VARIANTS, main
from tests.bench.figures import Times, figures, report, times


def event(**other: Any) -> dict[str, Any]:
    known = {
        "variant": "tracefs", "path": "P1", "action": "kill", "injection": "inject", "result": "signal",
        "ended_ms": 5.0, "handled_ms": 1.0, "bystander_hit": False, "stale": 0, "last_stale_ms": None, "served": 0,
    }  # fmt: skip
    return known | other


def test_a_distribution() -> None:
    assert times([None, None]) is None
    assert times([float(value) for value in range(1, 201)] + [None]) == Times(100.5, 198.0, 200.0)
    assert times([7.0]) == Times(7.0, 7.0, 7.0)


def test_events_of_a_kind_are_counted_together() -> None:
    events = [
        event(),
        event(stale=3, last_stale_ms=2.0),
        event(result="success", ended_ms=None),
        event(bystander_hit=True),
        event() | {"error": "it went wrong"},
        event(action="continue", result="success", ended_ms=None, stale=9, last_stale_ms=900.0),
    ]
    killed, spared = figures(events)
    assert (killed.events, killed.errors, killed.as_configured, killed.bystander) == (5, 1, 3, 1)
    assert (killed.stale_events, killed.stale, killed.ended) == (1, 3, Times(5.0, 5.0, 5.0))
    assert (spared.as_configured, spared.stale, spared.ended) == (1, 9, None)


def test_runs_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for variant in ("tracefs", "nothing"):
        about = {"about": {"backend": "none"}, "kernel": "6.12", "cpus": 2}
        part = {"guests": {variant: about}, "events": [event(variant=variant)]}
        files.append(tmp_path / variant)
        files[-1].write_text(json.dumps(part | {"storms": [], "panics": [], "failures": []}))
    assert main(["--read", *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert said.count("| P1   | kill ") == 2
    assert said.startswith("| variant | kernel")


def test_what_failed_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    failed = {"guests": {}, "events": [event(error="no")], "storms": [], "panics": [], "failures": [{"status": 125}]}
    (tmp_path / "failed").write_text(json.dumps(failed))
    assert main(["--read", str(tmp_path / "failed")]) == 1
    assert "error: tracefs P1 kill: no" in capsys.readouterr().out


def test_two_hundred_events_are_compared() -> None:
    for name in ("kernel", "tracefs"):
        kills = [number for path, action, _, number in VARIANTS[name].plan if (path, action) == ("P1", "kill")]
        assert sum(kills) >= 200


def test_a_report_without_events_is_no_error() -> None:
    assert "variant" in report({"guests": {}, "events": [], "storms": [], "panics": []})
