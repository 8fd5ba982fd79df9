# SPDX-License-Identifier: GPL-2.0-only
"""The patched kernel, in a guest: every path on which dirty file data is lost, under every action."""

from __future__ import annotations

import re

import pytest

from tests.kernel.conftest import Guest, Result

PANICKED = 99


@pytest.mark.script("matrix")
@pytest.mark.parametrize("injection", ["inject", "srao"])
def test_matrix(result: Result, injection: str) -> None:
    """The right action, line, counters, trace event and EIO for each file system and way to write."""
    cases = result.objects()
    assert [case for case in cases if "error" in case] == []
    assert len(cases) == 18 and result.status == 0
    assert {case["fsync"] for case in cases} == {"EIO"}
    assert {case["fate"] for case in cases} == {"dropped", "kept", "unsplit"}


@pytest.mark.script("negatives")
def test_negatives(result: Result) -> None:
    """Under panic, what is no dirty file data changes nothing."""
    assert result.status == 0
    assert len(re.findall("^ok ", result.stdout, re.MULTILINE)) == 11


@pytest.mark.script("hierarchy")
def test_hierarchy(result: Result) -> None:
    """The file, delegation, hierarchy, groups and counters: one test function each in it."""
    assert not re.findall("^not ok .*", result.stdout, re.MULTILINE)
    assert result.stdout.startswith(f"1..{len(re.findall('^ok ', result.stdout, re.MULTILINE))}\n")
    assert result.status == 0


@pytest.mark.script("kill", "reread", "10")
@pytest.mark.parametrize("injection", ["inject", "srao"])
def test_no_stale_read(result: Result, injection: str) -> None:
    """A group that is killed reads nothing stale; the control, which goes on, does."""
    assert result.status == 0
    (counts,) = result.objects()
    assert counts["kill"][0] > 0
    assert counts["kill"][1:] == [0, 0]
    assert counts["continue"][1] > 0 and counts["continue"][2] > 0


@pytest.mark.script("kill", "fork", "20", "inject")
def test_no_survivor(result: Result) -> None:
    """A group that forks, clones and moves as fast as it can is killed as a whole."""
    assert result.status == 0
    (counts,) = result.objects()
    assert counts["rounds"] == 20 and counts["forks"] > 20 * 300


@pytest.mark.script("selftest")
def test_selftest(result: Result) -> None:
    """The selftest of the series passes, with nothing skipped."""
    assert "# Totals: pass:6 fail:0 xfail:0 xpass:0 skip:0 error:0" in result.stdout
    assert result.status == 0


@pytest.mark.parametrize(
    ("fs", "how", "injection", "where"),
    [("ext4", "write", "srao", "self"), ("xfs", "large", "inject", "parent"), ("vfat", "mmap", "srao", "self")],
)
def test_panic(guest: Guest, fs: str, how: str, injection: str, where: str) -> None:
    """The kernel panics with the exact message, and the line that says what was lost comes before it."""
    result = guest.run("panic", fs, how, injection, where)
    assert result.status == PANICKED
    (expected,) = result.objects()
    before, panic, after = result.stderr.partition(
        f"Kernel panic - not syncing: Memory failure: {expected['pfn']}: dirty page cache lost, "
        "memory.failure_dirty_action=panic\n"
    )
    assert panic, "panic for another reason"
    start = f"Memory failure: {expected['pfn']}: dirty page cache lost:"
    lost = [line for line in before.splitlines() if start in line]
    assert len(lost) == 1
    assert f" ino {expected['ino']} pos {expected['pos']} " in lost[0]
    assert lost[0].endswith(f" memcg {expected['memcg']} action panic")
    assert f"{expected['pfn']}: recovery action" not in before + after, "the page was handled before the panic"
