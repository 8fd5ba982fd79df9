# SPDX-License-Identifier: LGPL-2.1-or-later
"""From what the guests have said to the figures of the comparison, and a table of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Times:
    """A distribution, in milliseconds."""

    median: float
    p99: float
    maximum: float

    def __str__(self) -> str:
        return " / ".join(f"{value:.1f}" for value in (self.median, self.p99, self.maximum))


def times(values: Iterable[float | None]) -> Times | None:
    """Return the distribution of the values that are there; the 99th percentile by the nearest rank."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return Times(statistics.median(ordered), ordered[math.ceil(len(ordered) * 0.99) - 1], ordered[-1])


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of the events of one kind under one variant.

    as_configured: events after which the victim was dead by SIGKILL, or alive, as its action says.
    bystander: events that ended the bystander. stale_events: events with a stale read; stale: stale reads.
    served: reads of the page, begun after the error was handled, that got what had been written: on P2 and P3 the
    page stays in the cache. ended: from the error to the death of the victim's last process. trigger: from the error
    to the first instruction of rasdaemon's script.
    """

    variant: str
    path: str
    action: str
    injection: str
    events: int
    errors: int
    as_configured: int
    bystander: int
    stale_events: int
    stale: int
    last_stale: Times | None
    served: int
    ended: Times | None
    trigger: Times | None


def figures(events: Sequence[dict[str, Any]]) -> list[Figures]:
    """Return the figures of each kind of event, in the order of their first event."""
    kinds = dict.fromkeys(
        tuple(event[name] for name in ("variant", "path", "action", "injection")) for event in events
    )
    found = []
    for variant, path, action, injection in kinds:
        kind = (variant, path, action, injection)
        mine = [
            event for event in events if (event["variant"], event["path"], event["action"], event["injection"]) == kind
        ]
        good = [event for event in mine if "error" not in event]
        wanted = "success" if action == "continue" else "signal"
        found.append(
            Figures(
                variant,
                path,
                action,
                injection,
                len(mine),
                len(mine) - len(good),
                sum(event["result"] == wanted for event in good),
                sum(event["bystander_hit"] for event in good),
                sum(event["stale"] > 0 for event in good),
                sum(event["stale"] for event in good),
                times(event["last_stale_ms"] for event in good),
                sum(event["served"] for event in good) if path != "P1" else 0,
                times(event["ended_ms"] for event in good),
                times(event.get("trigger_ms") for event in good),
            )
        )
    return found


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows below a heading as a Markdown table, aligned for those who read it as text."""
    cells = [[str(cell) if cell is not None else "-" for cell in row] for row in [heading, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths))
    return "".join(f"{line} |\n" if number != 1 else f"{line}|\n" for number, line in enumerate(lines))


def report(results: dict[str, Any]) -> str:
    """Return the tables: the guests, the events, the panics, the storms."""
    parts = []
    rows: list[list[object]] = [
        [name, about["kernel"], about["cpus"], " ".join(f"{key}={value}" for key, value in about["about"].items())]
        for name, about in results["guests"].items()
    ]
    parts.append(table(["variant", "kernel", "CPUs", "says of itself"], rows))
    rows = []
    for row in figures(results["events"]):
        stale = f"{row.stale_events}: {row.stale}" if row.path == "P1" else None
        served = None if row.path == "P1" else row.served
        rows.append(
            [
                row.variant,
                row.path,
                row.action,
                row.injection,
                f"{row.as_configured}/{row.events - row.errors}",
                row.bystander,
                stale,
                served,
                row.ended,
                row.trigger,
            ]
        )
    heading = ["variant", "path", "action", "error by", "as configured", "innocents", "stale (events: reads)"]
    parts.append(table([*heading, "bad page read", "dead after ms", "trigger after ms"], rows))
    if results["panics"]:
        rows = [[panic["variant"], panic["path"], panic["outcome"]] for panic in results["panics"]]
        parts.append(table(["variant", "path", "panic"], rows))
    if results["storms"]:
        rows = [
            [
                storm["variant"],
                storm["pages"],
                f"{storm['seconds']:.1f}",
                None if storm["ended_ms"] is None else f"{storm['ended_ms']:.1f}",
                storm["kills"],
                "hit" if storm["second_hit"] else "alive",
                "hit" if storm["bystander_hit"] else "alive",
                storm["reported"],
                "not through" if storm["backlog_seconds"] is None else f"{storm['backlog_seconds']:.1f}",
            ]
            for storm in results["storms"]
        ]
        heading = ["variant", "pages", "storm s", "dead after ms", "kills", "restarted unit", "bystander"]
        parts.append(table([*heading, "pages reported", "backlog s"], rows))
    failed = [event for event in results["events"] if "error" in event]
    parts += [f"error: {event['variant']} {event['path']} {event['action']}: {event['error']}\n" for event in failed]
    return "\n".join(parts)


def as_objects(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results with the figures that they come to, for JSON."""
    return {**results, "figures": [asdict(row) for row in figures(results["events"])]}
