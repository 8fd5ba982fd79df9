# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order of precedence: unit's files, machine rule by UUID, by name, nearest slice, unset."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpolicy.action import Action, strictest
from cgpolicy.error import InvalidAction
from cgpolicy.resolve import Decision, SourceKind, resolve
from cgpolicy.setting import UNSET, Setting, read_setting
from cgpolicy.unitname import UNIT_TYPES


def setting(path: str, *values: str) -> Setting:
    lines = "".join(f"MemoryFailureDirtyAction={value}\n" for value in values)
    return read_setting([(path, f"[X-CgPolicy]\n{lines}".encode())])


# In order of precedence, with the keyword that takes it.
SOURCES = [
    SourceKind.UNIT_FILE,
    SourceKind.MACHINE_UUID,
    SourceKind.MACHINE_NAME,
    "near.slice",
    "far.slice",
]


def decide(present: set[str], unit: str = "machine-db.scope", actions: dict[str, str] | None = None) -> Decision:
    """Resolve with a setting in each of the sources that are present, its path being the source's name."""
    made = {
        source: setting(source, (actions or {}).get(source, "kill")) if source in present else UNSET
        for source in SOURCES
    }
    return resolve(
        unit, made[SourceKind.UNIT_FILE],
        machine_uuid=made[SourceKind.MACHINE_UUID],
        machine_name=made[SourceKind.MACHINE_NAME],
        slices=[(name, made[name]) for name in ("near.slice", "far.slice")],
    )


SUBSETS = [set(chosen) for count in range(6) for chosen in itertools.combinations(SOURCES, count)]


@pytest.mark.parametrize("present", SUBSETS, ids=lambda present: "+".join(sorted(present)) or "nothing")
def test_first_hit_wins_and_the_others_lost_to_it(present: set[str]) -> None:
    decision = decide(present)
    ranked = [source for source in SOURCES if source in present]
    if not ranked:
        assert decision == Decision()
        return
    kind = SourceKind.SLICE if ranked[0].endswith(".slice") else ranked[0]
    assert (decision.action, decision.kind, decision.path, decision.line) == (Action.KILL, kind, ranked[0], 2)
    assert [candidate.path for candidate in decision.candidates] == ranked
    notes = {source: f" (default of {source})" if source.endswith(".slice") else "" for source in ranked}
    assert [candidate.verdict for candidate in decision.candidates] == [
        f"in force{notes[ranked[0]]}",
        *(f"lost: {kind} {ranked[0]}:2 comes first{notes[source]}" for source in ranked[1:]),
    ]


@given(st.dictionaries(st.sampled_from(SOURCES), st.sampled_from(list(Action)), min_size=1))
def test_precedence_does_not_ask_how_strict_an_action_is(actions: dict[str, str]) -> None:
    decision = decide(set(actions), actions=actions)
    assert decision.action == next(actions[source] for source in SOURCES if source in actions)


def test_a_reset_falls_through_to_the_next_source() -> None:
    decision = resolve(
        "web.service", setting("web.conf", "panic", ""), slices=[("web.slice", setting("slice.conf", "kill"))]
    )
    assert (decision.action, decision.kind) == (Action.KILL, SourceKind.SLICE)
    assert [(row.kind, row.path, row.line, row.value, row.verdict) for row in decision.candidates] == [
        ("unit-file", "web.conf", 2, "panic", "reset by web.conf:3"),
        ("unit-file", "web.conf", 3, "", "resets to unset"),
        ("slice", "slice.conf", 2, "kill", "in force (default of web.slice)"),
    ]


def test_a_value_overridden_within_its_source_keeps_that_verdict() -> None:
    decision = resolve("web.service", setting("web.conf", "kill"), slices=[("-.slice", setting("s", "kill", "panic"))])
    assert [row.verdict for row in decision.candidates[1:]] == [
        "overridden by s:3 (default of -.slice)",
        "lost: unit-file web.conf:2 comes first (default of -.slice)",
    ]


@pytest.mark.parametrize("kind", sorted(UNIT_TYPES))
def test_types_that_have_a_cgroup_take_a_policy(kind: str) -> None:
    decision = resolve(f"x.{kind}", setting("x.conf", "panic"), slices=[("-.slice", setting("root.conf", "kill"))])
    if kind in ("service", "scope", "socket", "mount", "swap"):
        assert (decision.action, decision.path) == (Action.PANIC, "x.conf")
        return
    assert (decision.action, decision.kind, decision.path) == (None, SourceKind.NONE, "")
    if kind != "slice":
        assert {row.verdict.partition(" (")[0] for row in decision.candidates} == {
            f"ignored: a {kind} unit has no control group"
        }


def test_a_slice_gets_no_action_and_says_what_its_setting_is_for() -> None:
    decision = resolve("a-b.slice", setting("own", "kill"), slices=[("a.slice", setting("above", "panic"))])
    assert decision.action is None
    assert [row.verdict for row in decision.candidates] == [
        "default of the units in this slice",
        "lost: unit-file own:2 comes first (default of a.slice)",
    ]
    decision = resolve("a-b.slice", UNSET, slices=[("a.slice", setting("above", "panic"))])
    assert [row.verdict for row in decision.candidates] == ["default of the units in this slice (default of a.slice)"]


@pytest.mark.parametrize("rule", [["halt"], ["halt", "kill"]])
def test_problems_of_every_source_come_along(rule: list[str]) -> None:
    decision = resolve(
        "machine-db.scope", setting("own", "halt"), machine_uuid=setting("uuid", *rule),
        machine_name=setting("name", "halt"), slices=[("-.slice", setting("root", "halt"))],
    )
    assert [problem.path for problem in decision.problems] == ["own", "uuid", "name", "root"]
    assert (decision.action == "kill") == ("kill" in rule)


@pytest.mark.parametrize(
    ("path_to_root", "action"),
    [
        ([], "continue"), (["continue"], "continue"), (["kill", "continue"], "kill"), (["continue", "kill"], "kill"),
        (["kill", "panic", "continue"], "panic"), (["panic", "kill"], "panic"),
    ],
)
def test_strictest_on_the_path(path_to_root: list[str], action: str) -> None:
    assert strictest(map(Action, path_to_root)) == action


@pytest.mark.parametrize("text", ["", "Kill", " kill", "kill\n", "default"])
def test_no_other_word_is_an_action(text: str) -> None:
    with pytest.raises(InvalidAction, match="expected panic, kill or continue"):
        Action.parse(text)
