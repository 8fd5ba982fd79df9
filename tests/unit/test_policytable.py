# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of policies beside a hierarchy without memory.failure_dirty_action."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cgpolicy import policytable
from cgpolicy.action import Action
from cgpolicy.cgroupfs import Effective, Events
from cgpolicy.error import NotSupported
from cgpolicy.policyfile import PolicyFiles
from cgpolicy.policytable import CHARGED_FILE, Entry, PolicyTable
from cgpolicy.reconciler import Reconciler, State
from cgpolicy.systemd import UnitFacts
from tests.unit.plaintree import PlainTree

WEB = "/system.slice/web.service"


class Stock:
    """A hierarchy of a stock kernel, and what the enforcer was told."""

    def __init__(self, root: Path) -> None:
        self.plain = PlainTree(root)
        self.told: list[tuple[int, Entry | None]] = []
        self.table = PolicyTable(root, lambda number, entry: self.told.append((number, entry)))

    def make(self, cgroup: str) -> int:
        for above in (cgroup.rpartition("/")[0], cgroup):
            if above and not self.plain.path(above).exists():
                self.plain.make(above, action=None)
                (self.plain.path(above) / CHARGED_FILE).touch()
        return self.table.cgroup_id(cgroup)


@pytest.fixture
def stock(tmp_path: Path) -> Stock:
    return Stock(tmp_path / "cgroup")


def test_a_policy_is_kept_and_told_once(stock: Stock) -> None:
    number = stock.make(WEB)
    assert stock.table.read_action(WEB) is Action.CONTINUE
    for _ in range(2):
        stock.table.write_action(WEB, Action.KILL)
    assert stock.table.read_action(WEB) is Action.KILL
    assert stock.table.marked(WEB) is Action.KILL
    assert stock.told == [(number, Entry(WEB, Action.KILL))]
    stock.table.mark(WEB, None)
    assert stock.table.read_action(WEB) is Action.CONTINUE
    assert stock.told[1:] == [(number, None)]


def test_a_new_cgroup_of_the_same_name_has_no_policy(stock: Stock) -> None:
    stock.make(WEB)
    stock.table.write_action(WEB, Action.KILL)
    stock.plain.path(WEB).rename(stock.plain.root / "old")  # kept: else its inode could be used again
    stock.make(WEB)
    assert stock.table.read_action(WEB) is Action.CONTINUE
    assert stock.table.marked(WEB) is None


def test_the_strictest_on_the_path_counts(stock: Stock) -> None:
    stock.make(WEB)
    stock.make(f"{WEB}/payload")
    stock.table.write_action(WEB, Action.PANIC)
    stock.table.write_action(f"{WEB}/payload", Action.KILL)
    assert stock.table.effective(f"{WEB}/payload") == Effective(Action.PANIC, WEB)


@pytest.mark.parametrize("gone", [True, False])
def test_where_memory_is_not_charged_no_policy_can_stand(stock: Stock, gone: bool) -> None:
    if not gone:
        stock.make(WEB)
        (stock.plain.path(WEB) / CHARGED_FILE).unlink()
    assert stock.table.read_action(WEB) is None
    with pytest.raises(NotSupported, match=CHARGED_FILE):
        stock.table.write_action(WEB, Action.KILL)
    assert stock.told == []


def test_panic_needs_a_way_to_panic(stock: Stock) -> None:
    stock.make(WEB)
    stock.table.can_panic = False
    with pytest.raises(NotSupported, match="sysrq"):
        stock.table.write_action(WEB, Action.PANIC)
    stock.table.write_action(WEB, Action.KILL)


def test_losses_are_counted_on_the_cgroup(stock: Stock) -> None:
    stock.make(WEB)
    assert stock.table.events(WEB) == Events()
    stock.table.count(WEB, 3, 1)
    again = PolicyTable(stock.table.root, lambda number, entry: None)
    again.count(WEB, 2, 0)
    assert again.events(WEB) == Events(5, 1)
    os.setxattr(stock.plain.path(WEB), policytable.COUNTERS, b"no number")
    assert again.events(WEB) == Events()
    again.count("/gone", 1, 1)


def test_of_cgroups_that_are_gone_the_older_are_forgotten(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policytable, "GONE_MAX", 2)
    stock.table._prune_at = 4
    numbers = []
    for turn in range(4):
        numbers.append(stock.make(WEB))
        stock.table.write_action(WEB, Action.KILL)
        stock.plain.path(WEB).rename(stock.plain.root / str(turn))
    assert not [number for number, entry in stock.told if entry is None]
    stock.make(WEB)
    stock.table.write_action(WEB, Action.KILL)
    assert [number for number, entry in stock.told if entry is None] == numbers[:2]


def test_the_reconciler_works_on_it_as_on_the_kernels_files(stock: Stock, tmp_path: Path) -> None:
    number = stock.make(WEB)
    fragment = tmp_path / "web.service"
    fragment.write_text("[X-CgPolicy]\nMemoryFailureDirtyAction=kill\n")
    reconciler = Reconciler(stock.table, PolicyFiles(tmp_path / "root"))
    facts = UnitFacts("web.service", "loaded", (str(fragment),), "system.slice", WEB)
    reconciler.replace_all([facts])
    unit = reconciler.units["web.service"]
    assert (unit.state, unit.effective) == (State.APPLIED, Effective(Action.KILL, WEB))

    fragment.write_text("")
    reconciler.reread("web.service")
    assert unit.state is State.UNSET
    assert stock.told == [(number, Entry(WEB, Action.KILL)), (number, Entry(WEB, Action.CONTINUE)), (number, None)]

    fragment.write_text("[X-CgPolicy]\nMemoryFailureDirtyAction=kill\n")
    stock.table.enforced = False
    reconciler.sweep()
    reconciler.reread("web.service")
    assert reconciler.units["web.service"].state is State.NOT_ENFORCED
