# SPDX-License-Identifier: GPL-2.0-only
"""The patched kernel, in a guest: every path on which dirty file data is lost, under every action."""

from __future__ import annotations

import itertools
import re

import pytest

from tests.kernel.conftest import KERNELS, OWN_SELFTESTS_OF, Guest, Result
from tests.kernel.guest.cases import CASES, MORE_CASES
from tests.scale import is_debug, is_full, scaled

PANICKED = 99
INJECTIONS = ("inject", "srao", "madvise")


PANICS = {
    "v6.12": [("ext4", "write", "srao", "self"), ("xfs", "large", "inject", "parent")],
    "v7": [("ext4", "large-mmap", "madvise", "parent"), ("vfat", "mmap", "srao", "self")],
}


@pytest.mark.script("matrix", "BASE")
@pytest.mark.parametrize("injection", INJECTIONS)
def test_matrix(guest: Guest, result: Result, injection: str) -> None:
    """The right action, line, counters, trace event and EIO for each file system and way to write."""
    cases = result.objects()
    assert [case for case in cases if "error" in case] == []
    assert len(cases) == 2 * len(matrix(guest.base)) and result.status == 0
    assert {case["fsync"] for case in cases} == {"EIO"}
    assert {case["fate"] for case in cases} == {"dropped", "kept", "unsplit"}


@pytest.mark.script("negatives")
def test_negatives(result: Result) -> None:
    """Under panic, what is no dirty file data changes nothing."""
    assert result.status == 0
    assert len(re.findall("^ok ", result.stdout, re.MULTILINE)) == 12


@pytest.mark.script("hierarchy", "BASE", scaled(500, 10_000))
def test_hierarchy(result: Result) -> None:
    """The file, delegation, hierarchy, groups, counters and the storm: one test function each in it."""
    assert not re.findall("^not ok .*", result.stdout, re.MULTILINE)
    assert result.stdout.startswith(f"1..{len(re.findall('^ok ', result.stdout, re.MULTILINE))}\n")
    assert result.status == 0


@pytest.mark.script("kill", "reread", scaled(10, 100))
@pytest.mark.parametrize("injection", ["inject", "srao"])
def test_no_stale_read(result: Result, injection: str) -> None:
    """A group that is killed reads nothing stale; the control, which goes on, does."""
    assert result.status == 0
    (counts,) = result.objects()
    assert counts["rounds"] == scaled(10, 100) and counts["kill"][0] > 0
    assert counts["kill"][1:] == [0, 0, 0]
    assert min(counts["continue"]) > 0


@pytest.mark.script("kill", "fork", scaled(10, 50), "inject")
def test_no_survivor(result: Result) -> None:
    """A group that forks, clones and moves as fast as it can is killed as a whole."""
    assert result.status == 0
    (counts,) = result.objects()
    assert counts["rounds"] == scaled(10, 50) and counts["forks"] > counts["rounds"] * 300


@pytest.mark.script("selftest")
@pytest.mark.parametrize("name", ["test_failure_dirty", "memory-failure-dirty"])
def test_selftest(result: Result, name: str) -> None:
    """The selftests of the series pass; what may be skipped is the panic, and large folios if readahead built none."""
    skippable = {"test_failure_dirty": 0, "memory-failure-dirty": 3}[name]
    totals = re.search(r"^# Totals: pass:(\d+) fail:0 xfail:0 xpass:0 skip:(\d+) error:0$", result.stdout, re.M)
    assert totals and sum(map(int, totals.groups())) == 6 and int(totals[2]) <= skippable
    assert result.status == 0


def matrix(base: str) -> list[tuple[str, str, str]]:
    return CASES + MORE_CASES[base]


def panics(base: str) -> list[tuple[str, str, str, str]]:
    """Return what is lost under panic: file system, how, injection, and whose the value is.

    A machine each: two of them, or each way to lose a page once on a kernel that checks itself, or all.
    """
    if not is_full() and not is_debug():
        return PANICS[base]
    every, once = itertools.product(matrix(base), INJECTIONS), zip(matrix(base), itertools.cycle(INJECTIONS))
    ways = ((kind, how, injection) for (kind, how, _), injection in (every if is_full() else once))
    return [(*way, where) for way, where in zip(ways, itertools.cycle(("self", "parent")))]


@pytest.mark.parametrize(
    ("guest", "fs", "how", "injection", "where"),
    [(kernel, *case) for kernel in KERNELS for case in panics(kernel.partition("-")[0])],
    indirect=["guest"],
    scope="session",
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


@pytest.mark.skipif(not is_full(), reason="another machine to panic: tests/run --full")
def test_selftest_panics(guest: Guest) -> None:
    """The destructive part of the selftest does what it is for."""
    result = guest.run("destructive")
    assert result.status == PANICKED
    assert "# panic: about to panic\n" in result.stdout
    assert "dirty page cache lost, memory.failure_dirty_action=panic\n" in result.stderr


@pytest.mark.skipif(not is_full(), reason="builds two more kernels: tests/run --full")
def test_own_selftests(guest: Guest) -> None:
    """The kernel's own selftests give the same results with the series and without it."""
    if guest.debug:
        pytest.skip("compared on the kernels that do not check themselves")
    results = {}
    for kind in ("unpatched", "patched"):
        done = guest.run("own", *OWN_SELFTESTS_OF[guest.base], kind=kind)
        results[kind] = {said["name"]: said["results"] for said in done.objects()}
    assert results["patched"] == results["unpatched"]
    assert set(results["patched"]) == set(OWN_SELFTESTS_OF[guest.base])
    assert all(results["patched"].values())
