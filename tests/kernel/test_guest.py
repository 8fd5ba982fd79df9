# SPDX-License-Identifier: GPL-2.0-only
"""The patched kernel, in a guest: every path on which dirty file data is lost, under every action."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.kernel.conftest import Guest

PANICKED = 99


@pytest.mark.parametrize("injection", ["inject", "srao"])
def test_matrix(guest: Guest, injection: str) -> None:
    """The right action, line, counters, trace event and EIO for each file system and way to write."""
    result = guest.run("matrix", injection)
    cases = result.objects()
    assert [case for case in cases if "error" in case] == []
    assert len(cases) == 18 and result.status == 0
    assert {case["fsync"] for case in cases} == {"EIO"}
    assert {case["fate"] for case in cases} == {"dropped", "kept", "unsplit"}


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


def test_negatives(guest: Guest) -> None:
    """Under panic, what is no dirty file data changes nothing."""
    result = guest.run("negatives")
    assert result.status == 0
    assert len(re.findall("^ok ", result.stdout, re.MULTILINE)) == 11


def test_hierarchy(guest: Guest) -> None:
    """The file, delegation, hierarchy, groups and counters: one test function each in it."""
    result = guest.run("hierarchy")
    assert not re.findall("^not ok .*", result.stdout, re.MULTILINE)
    assert len(re.findall("^ok ", result.stdout, re.MULTILINE)) == 14
    assert result.status == 0


@pytest.mark.parametrize("injection", ["inject", "srao"])
def test_no_stale_read(guest: Guest, injection: str) -> None:
    """A group that is killed reads nothing stale; the control, which goes on, does."""
    (counts,) = result_of(guest, "reread", "10", injection)
    assert counts["kill"][0] > 0
    assert counts["kill"][1:] == [0, 0]
    assert counts["continue"][1] > 0 and counts["continue"][2] > 0


def test_no_survivor(guest: Guest) -> None:
    """A group that forks, clones and moves as fast as it can is killed as a whole."""
    (counts,) = result_of(guest, "fork", "20", "inject")
    assert counts["rounds"] == 20 and counts["forks"] > 20 * 300


def result_of(guest: Guest, *arguments: str) -> list[dict[str, Any]]:
    result = guest.run("kill", *arguments)
    assert result.status == 0
    return result.objects()
