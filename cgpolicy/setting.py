# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a unit's files say together: [X-CgPolicy] MemoryFailureDirtyAction=."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from cgpolicy.action import Action
from cgpolicy.error import InvalidAction
from cgpolicy.unitfile import Assignment, Problem, parse, shorten

SECTION = "X-CgPolicy"
KEY = "MemoryFailureDirtyAction"


@dataclass(frozen=True, slots=True)
class Trial:
    """One assignment to the key, and what became of it."""

    path: str
    line: int
    value: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Setting:
    """The outcome of a list of files: the action and where it is written, every trial, and what was wrong."""

    action: Action | None = None
    path: str = ""
    line: int = 0
    trials: tuple[Trial, ...] = ()
    problems: tuple[Problem, ...] = ()


UNSET = Setting()


def read_setting(files: Iterable[tuple[str, bytes]]) -> Setting:
    """Read files in systemd's order, the fragment first and then the drop-ins, as (path, content).

    The last assignment wins, an empty one resets, a bad one is a problem and keeps what was before
    (as config_parse_enum() does; systemd: src/shared/conf-parser.h). Nothing is raised on content.
    """
    trials: list[Trial] = []
    problems: list[Problem] = []
    current: Action | None = None
    winner: int | None = None
    for path, content in files:
        parsed = parse(content, path)
        # Of lines in X- sections systemd says nothing, of others it warns itself; a break hides ours as well.
        problems += [problem for problem in parsed.problems if problem.section == SECTION]
        if parsed.broken:
            problems.append(parsed.problems[-1])
        for assignment in parsed.assignments:
            if assignment.section.lower() == SECTION.lower() and assignment.section != SECTION:
                problems.append(misspelled_section(assignment))
            if assignment.section != SECTION:
                continue
            if assignment.key != KEY:
                if not assignment.key.startswith("X-"):
                    problems.append(unknown_key(assignment))
                continue
            previous_winner = winner
            if not assignment.value:
                current, winner, verdict = None, None, "resets to unset"
            else:
                try:
                    current, winner, verdict = Action.parse(assignment.value), len(trials), "in force"
                except InvalidAction:
                    problem = bad_value(assignment, current)
                    problems.append(problem)
                    verdict = f"ignored: {problem.message}"
            if previous_winner is not None and previous_winner != winner:
                verb = "overridden by" if current is not None else "reset by"
                overridden = trials[previous_winner]
                trials[previous_winner] = Trial(
                    overridden.path, overridden.line, overridden.value, f"{verb} {assignment.path}:{assignment.line}"
                )
            trials.append(Trial(assignment.path, assignment.line, assignment.value, verdict))
    path, line = (trials[winner].path, trials[winner].line) if winner is not None else ("", 0)
    return Setting(current, path, line, tuple(trials), in_order(problems))


def in_order(problems: list[Problem]) -> tuple[Problem, ...]:
    """Return the problems without repetition, those of one file by line; files stay in reading order."""
    rank = {problem.path: position for position, problem in reversed(list(enumerate(problems)))}
    return tuple(sorted(dict.fromkeys(problems), key=lambda problem: (rank[problem.path], problem.line)))


def bad_value(assignment: Assignment, kept: Action | None) -> Problem:
    return Problem(
        assignment.path,
        assignment.line,
        f"{KEY}={shorten(assignment.value)}: expected panic, kill or continue; keeping {kept or 'unset'}",
    )


def unknown_key(assignment: Assignment) -> Problem:
    near = difflib.get_close_matches(assignment.key.lower(), [KEY.lower()], n=1, cutoff=0.6)
    advice = f"; did you mean {KEY}=?" if near else f"; the section knows {KEY}= only"
    return Problem(assignment.path, assignment.line, f"unknown key {shorten(assignment.key)}= ignored{advice}")


def misspelled_section(assignment: Assignment) -> Problem:
    return Problem(
        assignment.path, assignment.line, f"section [{assignment.section}] ignored; did you mean [{SECTION}]?"
    )
