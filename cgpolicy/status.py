# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an operator sees: the tree of units, tables, and colours. Text out, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cgpolicy.client import UnitRow

STRENGTH = {
    "synchronous": "the kernel acts before the data is gone",
    "late": "this kernel lacks memory.failure_dirty_action; kill and panic come some time after the data is "
    "gone, stale reads can get out meanwhile",
    "none": "policies are resolved and shown, NOT enforced",
}

BAD_STATES = ("failed", "no-controller", "not-enforced")

RED, YELLOW, GREEN, BOLD, PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[1m", "\x1b[0m"
ACTION_COLOURS = {"panic": RED, "kill": YELLOW, "continue": GREEN}


@dataclass(frozen=True, slots=True)
class Paint:
    """Colours, or none."""

    on: bool

    def __call__(self, text: str, colour: str) -> str:
        return f"{colour}{text}{PLAIN}" if self.on and colour and text.strip() else text

    def cell(self, text: str, width: int, colour: str = "") -> str:
        """Pad first: escape sequences have no width."""
        return self(text.ljust(width), colour)


def enforcement(manager: dict[str, Any], paint: Paint) -> str:
    """Say in one line how strong the guarantee is on this kernel."""
    backend, strength = manager["Backend"], manager["Enforcement"]
    said = STRENGTH.get(strength, strength)
    colour = {"synchronous": GREEN, "late": YELLOW}.get(strength, RED)
    detail = f"; {manager['EnforcementDetail']}" if manager["EnforcementDetail"] else ""
    return f"{paint(f'Enforcement: {strength}', colour)} (backend {backend}): {said}{detail}"


def decided_by(properties: dict[str, Any]) -> str:
    """Say where a unit's policy is written."""
    if not properties["SourcePath"]:
        return "nothing configured"
    note = {"slice": " (slice)", "machine-name": " (machine)", "machine-uuid": " (machine)"}
    return f"{properties['SourcePath']}:{properties['SourceLine']}{note.get(properties['Source'], '')}"


def outcome(properties: dict[str, Any]) -> str:
    """Say what happens to a unit when its dirty page cache is lost, and who says so if not the unit itself."""
    configured, effective = properties["MemoryFailureDirtyAction"], properties["EffectiveAction"]
    state, own = properties["State"], properties["ControlGroup"]
    if state == "default":
        return f"default of its units: {configured}"
    if state == "inactive":
        return f"{configured}, once it runs"
    if state == "not-enforced":
        return f"continue (wants {configured})"
    if properties["EffectiveFrom"] not in ("", own):
        return f"{effective} (by {properties['EffectiveFrom']})"
    if configured and effective != configured:
        return f"{effective} (wants {configured})"
    return str(effective)


def of_interest(row: UnitRow) -> bool:
    """Tell whether a unit differs from what happens where nothing is configured."""
    return bool(row.configured) or row.effective != "continue" or row.state in BAD_STATES


@dataclass(slots=True)
class Node:
    """A place in the tree of control groups; properties None where it only leads to others."""

    name: str
    properties: dict[str, Any] | None = None
    children: dict[str, Node] = field(default_factory=dict)


def tree(units: Iterable[dict[str, Any]]) -> Node:
    """Arrange units by their control groups; those that do not run stand below their names alone."""
    root = Node("-.slice")
    for unit in units:
        node = root
        if unit["Id"] != root.name:
            for step in [step for step in unit["ControlGroup"].split("/") if step][:-1]:
                node = node.children.setdefault(step, Node(step))
            node = node.children.setdefault(unit["Id"], Node(unit["Id"]))
        node.properties = unit
    return root


def walk(node: Node, indent: str = "", branch: str = "") -> Iterable[tuple[str, Node]]:
    """Yield each node's line of the tree, slices after the units beside them."""
    yield branch + node.name, node
    children = sorted(node.children.values(), key=lambda child: (child.name.endswith(".slice"), child.name))
    for child in children:
        last = child is children[-1]
        yield from walk(child, indent + ("  " if last else "│ "), indent + ("└─" if last else "├─"))


def render_status(manager: dict[str, Any], units: Sequence[dict[str, Any]], others: int, paint: Paint) -> str:
    """Return the status screen: enforcement, the tree, what is wrong, and how many units have nothing configured."""
    lines = [enforcement(manager, paint), ""]
    rows = []
    for label, node in walk(tree(units)):
        shown = node.properties
        if shown is None:
            rows.append((label, "", "", ""))
        else:
            rows.append((label, outcome(shown), decided_by(shown), shown["State"]))
    lines += table(("UNIT", "IF ITS DATA IS LOST", "DECIDED BY", "STATE"), rows, paint)
    lines += [paint(f"{unit['Id']}: {unit['LastError']}", RED) for unit in units if unit["LastError"]]
    if others:
        lines += ["", f"{others} more units have nothing configured: continue (cgpolicy status --all)"]
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], paint: Paint) -> list[str]:
    """Return a table's lines, with colours for actions and for states that are bad."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [paint("  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True)).rstrip(), BOLD)]
    for row in rows:
        cells = [paint.cell(cell, width, colour_of(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def colour_of(cell: str) -> str:
    if cell in BAD_STATES:
        return RED
    words = cell.replace(",", "").split()
    return ACTION_COLOURS.get(words[0], "") if words else ""


def render_unit(properties: dict[str, Any], manager: dict[str, Any]) -> str:
    """Return one unit in full."""
    cgroup = properties["ControlGroup"]
    effective = properties["EffectiveAction"]
    if properties["EffectiveFrom"] not in ("", cgroup):
        effective += f", as {properties['EffectiveFrom']} says"
    fields = {
        "Configured": properties["MemoryFailureDirtyAction"] or "-",
        "Decided by": decided_by(properties),
        "Effective": effective,
        "State": properties["State"] + (f": {properties['LastError']}" if properties["LastError"] else ""),
        "Control group": f"{cgroup} (id {properties['ControlGroupId']})" if cgroup else "-",
        "Lost so far": f"{properties['FailureDirty']} pages, killed {properties['FailureDirtyKill']} times",
        "Enforcement": f"{manager['Enforcement']} (backend {manager['Backend']})",
    }
    return "\n".join([properties["Id"], *(f"{name:>15}: {value}" for name, value in fields.items())])
