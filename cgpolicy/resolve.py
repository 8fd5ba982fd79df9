# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which policy a unit gets, and why: the order of cgpolicy(5), first hit wins."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from cgpolicy.action import Action
from cgpolicy.setting import Setting
from cgpolicy.unitfile import Problem
from cgpolicy.unitname import POLICY_TYPES, unit_type


class SourceKind(enum.StrEnum):
    """Where a policy can come from, in order of precedence."""

    UNIT_FILE = "unit-file"
    MACHINE_UUID = "machine-uuid"
    MACHINE_NAME = "machine-name"
    SLICE = "slice"
    NONE = "unset"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One assignment that was looked at, and why it won or lost; a row of Explain."""

    kind: SourceKind
    path: str
    line: int
    value: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The policy of a unit; action None means that the kernel's file is not touched."""

    action: Action | None = None
    kind: SourceKind = SourceKind.NONE
    path: str = ""
    line: int = 0
    candidates: tuple[Candidate, ...] = ()
    problems: tuple[Problem, ...] = ()


UNDECIDED = Decision()


def resolve(
    unit: str,
    own: Setting,
    *,
    machine_uuid: Setting | None = None,
    machine_name: Setting | None = None,
    slices: Sequence[tuple[str, Setting]] = (),
) -> Decision:
    """Decide for one unit from its own files, its machine's rules and the slices around it, nearest first.

    A slice's setting is the default of the units below it. It is not written to the slice's own cgroup, where
    it would bind every unit below (the kernel takes the strictest on the path) and make kill take them all.
    """
    kind = unit_type(unit)
    sources = [(SourceKind.UNIT_FILE, own, "")]
    if machine_uuid is not None:
        sources.append((SourceKind.MACHINE_UUID, machine_uuid, ""))
    if machine_name is not None:
        sources.append((SourceKind.MACHINE_NAME, machine_name, ""))
    sources += [(SourceKind.SLICE, setting, f" (default of {name})") for name, setting in slices]

    problems = tuple(problem for _, setting, _ in sources for problem in setting.problems)
    candidates: list[Candidate] = []
    winner: tuple[SourceKind, Setting] | None = None
    for source, setting, note in sources:
        for trial in setting.trials:
            verdict = trial.verdict
            if (trial.path, trial.line) == (setting.path, setting.line) and setting.action is not None:
                if kind not in POLICY_TYPES:
                    verdict = f"ignored: a {kind} unit has no control group"
                elif winner is not None:
                    verdict = f"lost: {winner[0]} {winner[1].path}:{winner[1].line} comes first"
                elif kind == "slice":
                    verdict = "default of the units in this slice"
                else:
                    verdict = "in force"
            candidates.append(Candidate(source, trial.path, trial.line, trial.value, verdict + note))
        if winner is None and setting.action is not None:
            winner = source, setting
    if winner is None or kind not in POLICY_TYPES or kind == "slice":
        return Decision(candidates=tuple(candidates), problems=problems)
    source, setting = winner
    return Decision(setting.action, source, setting.path, setting.line, tuple(candidates), problems)
