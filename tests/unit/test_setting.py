# SPDX-License-Identifier: LGPL-2.1-or-later
"""[X-CgPolicy] MemoryFailureDirtyAction= over a list of files: last wins, empty resets, bad keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpolicy.action import Action
from cgpolicy.setting import Setting, read_setting

KILL, PANIC, CONTINUE = Action.KILL, Action.PANIC, Action.CONTINUE


def assign(*values: str) -> str:
    return "[X-CgPolicy]\n" + "".join(f"MemoryFailureDirtyAction={value}\n" for value in values)


def read(*contents: str | bytes) -> Setting:
    """Read contents as the files 1.conf, 2.conf and so on."""
    return read_setting(
        (f"{number}.conf", content.encode() if isinstance(content, str) else content)
        for number, content in enumerate(contents, 1)
    )


@pytest.mark.parametrize(
    ("files", "action", "path", "line"),
    [
        ([], None, "", 0),
        ([""], None, "", 0),
        (["[Service]\nMemoryFailureDirtyAction=kill\n"], None, "", 0),
        ([assign("kill")], KILL, "1.conf", 2),
        ([assign("kill", "panic")], PANIC, "1.conf", 3),
        ([assign("panic"), assign("continue")], CONTINUE, "2.conf", 2),
        ([assign("panic"), ""], PANIC, "1.conf", 2),
        ([assign("panic"), assign("")], None, "", 0),
        ([assign("panic"), assign(""), assign("kill")], KILL, "3.conf", 2),
        ([assign("panic"), assign("halt")], PANIC, "1.conf", 2),
        ([assign("panic", "", "halt")], None, "", 0),
        ([assign("kill"), "[Unit]\nDescription=web\n" + assign("panic")], PANIC, "2.conf", 4),
        ([assign("kill") + "[Unit]\n" + assign("panic")], PANIC, "1.conf", 5),
        (["[X-CgPolicy]\n  MemoryFailureDirtyAction \t=  kill  \n"], KILL, "1.conf", 2),
        (["[X-CgPolicy]\nMemoryFailureDirtyAction=\\\n# why\n  kill\n"], KILL, "1.conf", 4),
        ([assign("kill") + "[broken\n" + assign("panic")], KILL, "1.conf", 2),
        ([b"\xff\n" + assign("panic").encode(), assign("kill")], KILL, "2.conf", 2),
    ],
)
def test_outcome(files: list[str | bytes], action: Action | None, path: str, line: int) -> None:
    setting = read(*files)
    assert (setting.action, setting.path, setting.line) == (action, path, line)


@pytest.mark.parametrize("value", ["Kill", "KILL", "kill;", "'kill'", "1", "yes", "kill panic", "default"])
def test_only_the_words_themselves_count(value: str) -> None:
    setting = read(assign("continue", value))
    assert setting.action is CONTINUE
    assert [str(problem) for problem in setting.problems] == [
        f"1.conf:3: MemoryFailureDirtyAction={value}: expected panic, kill or continue; keeping continue"
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (assign("halt"), "2: MemoryFailureDirtyAction=halt: expected panic, kill or continue; keeping unset"),
        (
            "[X-CgPolicy]\nMemoryFailureDirtyAktion=kill\n",
            "2: unknown key MemoryFailureDirtyAktion= ignored; did you mean MemoryFailureDirtyAction=?",
        ),
        (
            "[X-CgPolicy]\nRestart=always\n",
            "2: unknown key Restart= ignored; the section knows MemoryFailureDirtyAction= only",
        ),
        (
            "[X-cgpolicy]\nMemoryFailureDirtyAction=kill\n",
            "2: section [X-cgpolicy] ignored; did you mean [X-CgPolicy]?",
        ),
        ("[X-CgPolicy]\nMemoryFailureDirtyAction kill\n", "2: no = in line: MemoryFailureDirtyAction kill"),
        ("[X-CgPolicy]\n=kill\n", "2: no key before ="),
        ("[Unit]\n[broken\n", "2: section header without ]: [broken; the file is ignored from here on"),
        ("[Unit]\nnothing\n[broken\n", "3: section header without ]: [broken; the file is ignored from here on"),
        ("[X-CgPolicy]\n[broken\n", "2: section header without ]: [broken; the file is ignored from here on"),
    ],
)
def test_problem_says_where_what_and_the_next_step(content: str, problem: str) -> None:
    setting = read(content)
    assert [str(found) for found in setting.problems] == [f"1.conf:{problem}"]
    assert setting.action is None


@pytest.mark.parametrize(
    "content",
    [
        "[Service]\nExecStart=/bin/true\nNonsense=1\n",  # systemd's own to judge
        "no section=1\n[Unit]\nno equals sign\n",  # of these systemd warns itself
        "[X-Other]\nMemoryFailureDirtyAction=halt\n",
        "[X-CgPolicy]\nX-Note=halt\n",
    ],
)
def test_what_is_not_ours_is_no_problem(content: str) -> None:
    assert read(content) == Setting()


def test_problems_stand_in_reading_order() -> None:
    bad = "[X-cgpolicy]\na=1\n[X-CgPolicy]\nb=2\nMemoryFailureDirtyAction=halt\n"
    assert [(problem.path, problem.line) for problem in read(bad, bad + "[x\n").problems] == [
        ("1.conf", 2), ("1.conf", 4), ("1.conf", 5), ("2.conf", 2), ("2.conf", 4), ("2.conf", 5), ("2.conf", 6),
    ]


def test_a_problem_is_told_once_of_a_file_that_is_read_twice() -> None:
    file = "1.conf", assign("halt").encode()
    assert len(read_setting([file, file]).problems) == 1


def test_every_assignment_says_what_became_of_it() -> None:
    setting = read(assign("kill", "panic"), assign("halt", ""), assign("continue", "kill"))
    assert [(f"{trial.path}:{trial.line}", trial.value, trial.verdict) for trial in setting.trials] == [
        ("1.conf:2", "kill", "overridden by 1.conf:3"),
        ("1.conf:3", "panic", "reset by 2.conf:3"),
        (
            "2.conf:2", "halt",
            "ignored: MemoryFailureDirtyAction=halt: expected panic, kill or continue; keeping panic",
        ),
        ("2.conf:3", "", "resets to unset"),
        ("3.conf:2", "continue", "overridden by 3.conf:3"),
        ("3.conf:3", "kill", "in force"),
    ]


VALUES = st.sampled_from(["continue", "kill", "panic", "", "halt", "Panic"])


@given(files=st.lists(st.lists(VALUES, max_size=4), max_size=4))
def test_last_good_assignment_wins_and_only_that_is_in_force(files: list[list[str]]) -> None:
    values = [value for file in files for value in file]
    good = [value for value in values if value in ("", *Action)]
    setting = read(*(assign(*file) for file in files))
    assert (setting.action or "") == (good[-1] if good else "")
    assert [trial.value for trial in setting.trials] == values
    in_force = [(t.path, t.line, t.value) for t in setting.trials if t.verdict == "in force"]
    assert in_force == ([(setting.path, setting.line, setting.action)] if setting.action else [])
    assert len(setting.problems) == len(values) - len(good)


@given(content=st.binary() | st.lists(st.sampled_from([b"[X-CgPolicy]", b"\n", b"MemoryFailureDirtyAction=", b"kill",
                                                       b"[", b"\\\n", b"\xff", b"\0", b"=", b"k"])).map(b"".join))
def test_no_content_raises(content: bytes) -> None:
    setting = read(content)
    assert (setting.action is None) == (setting.line == 0)
