# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reconciler on a temporary tree, with unit files and machine rules of its own; the facts are made by hand."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpolicy import reconciler
from cgpolicy.action import Action
from cgpolicy.cgroupfs import EVENTS_FILE, POLICY_FILE, Effective, Events
from cgpolicy.policyfile import PolicyFiles
from cgpolicy.reconciler import Owner, Reconciler, Reports, State, Unit
from cgpolicy.systemd import UnitFacts
from cgpolicy.unitname import unit_type
from tests.unit.plaintree import PlainTree

UUID = "f7f2a1d0-0c51-4b9e-9d0b-9a8a3c1f2e4d"


class Host:
    """A tree, files, and a reconciler whose reports are kept as text."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = PlainTree(root / "cgroup")
        self.files = PolicyFiles(root / "root")
        self.uuids: dict[str, str] = {}
        self.reports: list[str] = []
        self.start_daemon()

    def start_daemon(self) -> None:
        """Begin with nothing known, as after a crash."""
        self.reconciler = Reconciler(
            self.tree,
            self.files,
            Reports(
                changed=lambda unit: self.reports.append(f"changed {unit.name}"),
                removed=lambda name: self.reports.append(f"removed {name}"),
                problem=lambda name, problem: self.reports.append(f"problem {name}: {problem.message}"),
                interference=lambda unit, found: self.reports.append(f"interference {unit.name}: {found}"),
            ),
            machine_uuid=self.uuids.get,
        )

    def facts(self, name: str, *values: str, slice: str = "system.slice", cgroup: str | None = None) -> UnitFacts:
        """Write a unit's one file, with an assignment of each value, and return what PID 1 would say of it."""
        path = self.root / name
        path.write_text("[X-CgPolicy]\n" + "".join(f"MemoryFailureDirtyAction={value}\n" for value in values))
        if unit_type(name) == "slice":
            parent, _, last = name.removesuffix(".slice").rpartition("-")
            slice = "" if name == "-.slice" else f"{parent}.slice" if parent else "-.slice"
        default = "" if name == "-.slice" else f"/{slice}/{name}".replace("/-.slice", "")
        return UnitFacts(name, "loaded", (str(path),), slice, default if cgroup is None else cgroup)

    def load(self, name: str, *values: str, slice: str = "system.slice", cgroup: str | None = None) -> Unit:
        self.reconciler.load(self.facts(name, *values, slice=slice, cgroup=cgroup))
        return self.reconciler.units[name]

    def take_reports(self) -> list[str]:
        taken, self.reports[:] = list(self.reports), []
        return taken


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


WEB = "/system.slice/web.service"


# States --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "present", "state", "value"),
    [
        (["kill"], "continue", State.APPLIED, "kill"),
        (["kill"], "panic", State.APPLIED, "kill"),
        (["continue"], "kill", State.APPLIED, "continue"),
        ([], "panic", State.UNSET, "panic"),  # nothing configured: never touched
        (["kill", ""], "panic", State.UNSET, "panic"),
        (["kill", "halt"], "continue", State.APPLIED, "kill"),
    ],
)
def test_state_of_a_unit_that_runs(host: Host, values: list[str], present: str, state: State, value: str) -> None:
    host.tree.make(WEB, present)
    host.reconciler.replace_all([host.facts("web.service", *values)])
    unit = host.reconciler.units["web.service"]
    assert (unit.state, unit.error, host.tree.said(WEB)) == (state, "", value)
    assert unit.cgroup_id == host.tree.cgroup_id(WEB)
    assert host.tree.said("/system.slice") == "continue"


@pytest.mark.parametrize("values", [["kill"], []])
@pytest.mark.parametrize("cgroup", ["", WEB])
def test_a_unit_without_a_cgroup_is_inactive(host: Host, values: list[str], cgroup: str) -> None:
    host.tree.make("/system.slice")
    unit = host.load("web.service", *values, cgroup=cgroup)
    assert (unit.state, unit.error, unit.cgroup_id) == (State.INACTIVE if values else State.UNSET, "", 0)
    assert unit.configured == "".join(values)


def test_a_cgroup_without_the_controller_says_the_cure(host: Host) -> None:
    host.tree.make(WEB, None)
    host.reconciler.replace_all([host.facts("web.service", "kill")])
    unit = host.reconciler.units["web.service"]
    assert unit.state is State.NO_CONTROLLER and "MemoryAccounting=yes" in unit.error
    assert not (host.tree.path(WEB) / POLICY_FILE).exists()


def test_a_kernel_without_the_file_enforces_nothing_until_it_has_it(host: Host) -> None:
    (host.tree.root / WEB.lstrip("/")).mkdir(parents=True)
    host.reconciler.replace_all([host.facts("web.service", "kill"), host.facts("other.service")])
    units = host.reconciler.units
    assert [units[name].state for name in ("web.service", "other.service")] == [State.NOT_ENFORCED, State.UNSET]
    assert units["web.service"].configured == "kill" and units["web.service"].effective.action is Action.CONTINUE
    host.tree.say("/system.slice", "continue")
    host.tree.say(WEB, "continue")
    host.reconciler.sweep()
    assert units["web.service"].state is State.APPLIED and host.tree.said(WEB) == "kill"


def test_what_the_kernel_refuses_is_a_failure_until_it_does_not(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.tree.make(WEB)

    def refuse(descriptor: int, data: bytes) -> int:
        host.tree.say(WEB, "continue")  # the kernel keeps the old value
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        unit = host.load("web.service", "panic")
        assert unit.state is State.FAILED and "Operation not permitted" in unit.error
        assert (host.tree.said(WEB), host.tree.marked(WEB)) == ("continue", None)
    host.reconciler.sweep()
    assert (unit.state, unit.error, host.tree.said(WEB)) == (State.APPLIED, "", "panic")


def test_a_controller_that_goes_and_comes_back_is_nobodys_interference(host: Host) -> None:
    host.tree.make(WEB)
    unit = host.load("web.service", "kill")
    for _ in range(3):
        host.tree.say(WEB, "panic")  # this is, and is put right once
        host.reconciler.cgroup_written(WEB)
        (host.tree.path(WEB) / POLICY_FILE).unlink()
        host.reconciler.controllers_changed("/system.slice")
        assert unit.state is State.NO_CONTROLLER
        host.tree.say(WEB, "continue")  # as css_reset() leaves it
        host.reconciler.controllers_changed("/system.slice")
        assert (unit.state, host.tree.said(WEB)) == (State.APPLIED, "kill")
    found = [report for report in host.reports if report.startswith("interference")]
    assert found == ["interference web.service: panic"] * 3


# Slices --------------------------------------------------------------------------------------------

PAYROLL = "/a.slice/a-b.slice/payroll.service"


@pytest.mark.parametrize(
    ("root", "outer", "inner", "own", "action", "source"),
    [
        ("panic", "", "", "", "panic", "-.slice"),
        ("panic", "kill", "", "", "kill", "a.slice"),
        ("panic", "kill", "continue", "", "continue", "a-b.slice"),
        ("panic", "kill", "continue", "kill", "kill", "payroll.service"),
        ("", "", "", "", "", ""),
    ],
)
def test_the_nearest_slice_is_the_default(
    host: Host, root: str, outer: str, inner: str, own: str, action: str, source: str
) -> None:
    host.tree.make(PAYROLL)
    wanted = {"-.slice": root, "a.slice": outer, "a-b.slice": inner}
    # The unit first: its slices are not yet known then.
    unit = host.load("payroll.service", own, slice="a-b.slice", cgroup=PAYROLL)
    for name, value in wanted.items():
        cgroup = {"-.slice": "", "a.slice": "/a.slice", "a-b.slice": "/a.slice/a-b.slice"}[name]
        assert host.load(name, value, cgroup=cgroup).state is (State.DEFAULT if value else State.UNSET)
    assert unit.configured == action and Path(unit.source[1]).name == source
    assert (unit.state, host.tree.said(PAYROLL)) == ((State.APPLIED, action) if action else (State.UNSET, "continue"))
    # The slices' own files would bind every unit below.
    assert host.tree.said("/a.slice") == host.tree.said("/a.slice/a-b.slice") == "continue"
    slices = [host.reconciler.units[name] for name in wanted]
    assert [unit.configured for unit in slices] == list(wanted.values())


def test_another_default_reaches_the_units_below_and_no_other(host: Host) -> None:
    for cgroup in (PAYROLL, WEB):
        host.tree.make(cgroup)
    host.reconciler.replace_all([
        host.facts("-.slice"), host.facts("a.slice", "kill"), host.facts("web.service"),
        host.facts("payroll.service", slice="a-b.slice", cgroup=PAYROLL),
    ])
    assert host.tree.said(PAYROLL) == "kill"
    host.take_reports()
    host.load("a.slice", "panic")
    assert host.tree.said(PAYROLL) == "panic" and host.tree.said(WEB) == "continue"
    assert host.take_reports() == ["changed a.slice", "changed payroll.service"]
    host.load("-.slice", "kill")
    assert host.tree.said(PAYROLL) == "panic" and host.tree.said(WEB) == "kill"
    host.load("a.slice")
    assert host.tree.said(PAYROLL) == "kill"
    host.load("-.slice")
    assert host.tree.said(PAYROLL) == host.tree.said(WEB) == "continue"


def test_a_unit_that_moves_gets_the_default_of_its_new_slice(host: Host) -> None:
    host.tree.make(WEB)
    host.tree.make("/a.slice")
    host.reconciler.replace_all([
        host.facts("system.slice", "kill"), host.facts("a.slice", "panic"), host.facts("web.service"),
    ])
    assert host.tree.said(WEB) == "kill"
    host.tree.remove(WEB)
    host.reconciler.cgroup_removed("/system.slice", "web.service")
    host.tree.make("/a.slice/web.service")
    unit = host.load("web.service", slice="a.slice")
    assert (unit.state, host.tree.said("/a.slice/web.service")) == (State.APPLIED, "panic")
    assert unit.facts.cgroup == "/a.slice/web.service" and Path(unit.source[1]).name == "a.slice"


# Machine rules -------------------------------------------------------------------------------------

SCOPE = r"machine-qemu\x2d7\x2dweb01.scope"


def test_machine_rules_by_uuid_and_by_name(host: Host) -> None:
    cgroup = f"/machine.slice/{SCOPE}"
    host.tree.make(cgroup)
    rule = host.files.write_machine("web01", Action.KILL)
    unit = host.load(SCOPE, slice="machine.slice")
    assert (host.tree.said(cgroup), unit.source) == ("kill", ("machine-name", str(rule), 3))
    rule = host.files.write_machine(UUID, Action.PANIC)
    host.uuids[SCOPE] = UUID
    host.reconciler.look_again(SCOPE)
    assert (host.tree.said(cgroup), unit.source) == ("panic", ("machine-uuid", str(rule), 3))
    host.load(SCOPE, "continue", slice="machine.slice")
    assert (host.tree.said(cgroup), unit.source[0]) == ("continue", "unit-file")
    host.reconciler.look_again("gone.scope")


def test_a_machine_rule_follows_the_machine_to_its_next_scope(host: Host) -> None:
    host.files.write_machine("web01", Action.KILL)
    for number in (7, 8):
        name = rf"machine-qemu\x2d{number}\x2dweb01.scope"
        host.tree.make(f"/machine.slice/{name}")
        host.reconciler.cgroup_created("/machine.slice", name)
        host.load(name, slice="machine.slice", cgroup="")
        assert host.tree.said(f"/machine.slice/{name}") == "kill"


# Cgroups that come and go --------------------------------------------------------------------------


def test_a_restart_is_applied_from_what_is_known(host: Host) -> None:
    host.tree.make(WEB)
    unit = host.load("web.service", "kill")
    before = unit.cgroup_id
    host.tree.remove(WEB)
    host.reconciler.cgroup_removed("/system.slice", "web.service")
    assert (unit.state, unit.cgroup_id) == (State.INACTIVE, 0)
    host.tree.make(WEB)
    host.reconciler.cgroup_created("/system.slice", "web.service")
    assert (unit.state, host.tree.said(WEB)) == (State.APPLIED, "kill")
    host.tree.renew(WEB)  # gone and there again before anybody looked
    host.reconciler.cgroup_removed("/system.slice", "web.service")
    assert (unit.state, host.tree.said(WEB)) == (State.APPLIED, "kill")
    assert unit.cgroup_id == host.tree.cgroup_id(WEB) and before
    assert host.take_reports() == ["changed web.service"] * 4


def test_a_first_start_is_known_before_systemd_tells_of_it(host: Host) -> None:
    host.tree.make("/system.slice")
    host.load("_x.service", "kill", cgroup="")
    host.tree.make("/system.slice/__x.service")
    host.reconciler.cgroup_created("/system.slice", "__x.service")  # escaped: begins with _
    assert host.tree.said("/system.slice/__x.service") == "kill"


def test_a_cgroup_of_an_unknown_unit_is_kept_for_it(host: Host) -> None:
    host.tree.make("/system.slice/new.service")
    host.reconciler.cgroup_created("/system.slice", "new.service")
    assert host.load("new.service", "kill", cgroup="").facts.cgroup == "/system.slice/new.service"
    assert host.tree.said("/system.slice/new.service") == "kill"
    host.tree.remove("/system.slice/new.service")
    host.reconciler.cgroup_removed("/system.slice", "new.service")
    assert host.load("new.service", "kill", cgroup="").state is State.INACTIVE


@pytest.mark.parametrize(
    ("drop_ins", "wanted"),
    [
        ({}, "continue"),
        ({"etc/systemd/system/scope.d/50.conf": "kill"}, "kill"),
        ({"etc/systemd/system/machine-.scope.d/50.conf": "kill"}, "kill"),
        # Of one base name the directory with precedence counts, and then the more specific; what is for all
        # scopes comes last in any case.
        ({"etc/systemd/system/machine-.scope.d/50.conf": "kill",
          "run/systemd/system/machine-a.scope.d/50.conf": "panic"}, "kill"),
        ({"etc/systemd/system/scope.d/50.conf": "kill",
          "run/systemd/system/machine-a.scope.d/50.conf": "panic"}, "panic"),
        ({"etc/systemd/system/scope.d/50.conf": "kill",
          "etc/systemd/system/machine-.scope.d/50.conf": "panic"}, "panic"),
        ({"etc/systemd/system/scope.d/60.conf": "kill",
          "etc/systemd/system/machine-.scope.d/50.conf": "panic"}, "kill"),
        ({"etc/systemd/system/service.d/50.conf": "kill"}, "continue"),
        ({"etc/cgpolicy/machines/a.conf": "kill"}, "kill"),
        ({"etc/systemd/system/machine.slice": "kill"}, "kill"),
    ],
)
def test_a_scope_never_seen_gets_its_value_before_pid_1_has_spoken(
    host: Host, drop_ins: dict[str, str], wanted: str
) -> None:
    for name, action in drop_ins.items():
        path = host.files.root / name
        path.parent.mkdir(parents=True)
        path.write_text(f"[X-CgPolicy]\nMemoryFailureDirtyAction={action}\n")
    host.tree.make("/machine.slice/machine-a.scope")
    fragment = str(host.files.root / "etc/systemd/system/machine.slice")
    host.reconciler.replace_all([UnitFacts("machine.slice", "loaded", (fragment,), "-.slice", "/machine.slice")])
    host.reconciler.cgroup_created("/machine.slice", "machine-a.scope")
    assert host.tree.said("/machine.slice/machine-a.scope") == wanted


def test_news_of_a_unit_are_newer_than_a_picture_that_was_begun_before(host: Host) -> None:
    """PID 1's list may be older than what it said of single units before all of them were read."""
    host.reconciler.replace_all([host.facts("old.service"), host.facts("db.service", "kill")])
    host.take_reports()
    host.reconciler.picture_begun()
    host.reconciler.load(host.facts("new.service", "kill"))
    host.reconciler.load(host.facts("db.service", "panic"))
    host.reconciler.unload("old.service")
    before = host.take_reports()
    host.reconciler.replace_all([
        host.facts("old.service"), UnitFacts("db.service", "loaded", (), "system.slice", "/system.slice/db.service")
    ])
    assert before[-1] == "removed old.service" and host.take_reports() == []
    assert {name: unit.configured for name, unit in host.reconciler.units.items()} == {
        "db.service": "panic", "new.service": "kill"
    }
    host.reconciler.replace_all([])
    assert host.reconciler.units == {}


def test_units_that_are_gone_are_forgotten(host: Host) -> None:
    host.reconciler.replace_all([host.facts("web.service", "kill"), host.facts("db.service")])
    host.take_reports()
    host.reconciler.replace_all([host.facts("db.service")])
    host.reconciler.load(UnitFacts("db.service", "not-found"))
    host.reconciler.remove("db.service")
    assert host.take_reports() == ["removed web.service", "removed db.service"] and host.reconciler.units == {}


# What others do ------------------------------------------------------------------------------------


def test_a_foreign_write_is_put_right_once(host: Host) -> None:
    host.tree.make(WEB)
    unit = host.load("web.service", "kill")
    host.take_reports()
    host.tree.say(WEB, "continue")
    host.reconciler.cgroup_written(WEB)
    assert host.take_reports() == ["interference web.service: continue"]
    assert (unit.state, host.tree.said(WEB)) == (State.APPLIED, "kill")
    host.tree.say(WEB, "panic")
    host.reconciler.cgroup_written(WEB)
    host.reconciler.sweep()
    assert host.take_reports() == ["changed web.service"]
    assert unit.state is State.FAILED and "changed to panic by somebody else again" in unit.error
    assert host.tree.said(WEB) == "panic" and unit.effective.action is Action.PANIC
    host.reconciler.reread("web.service")  # the next cgpolicy set
    assert (unit.state, unit.error, host.tree.said(WEB)) == (State.APPLIED, "", "kill")


def test_a_foreign_write_in_a_new_cgroup_is_put_right_again(host: Host) -> None:
    host.tree.make(WEB)
    unit = host.load("web.service", "kill")
    for _ in range(3):
        host.tree.say(WEB, "continue")
        host.reconciler.cgroup_written(WEB)
        assert (unit.state, host.tree.said(WEB)) == (State.APPLIED, "kill")
        host.tree.renew(WEB)
        host.reconciler.cgroup_created("/system.slice", "web.service")


def test_another_policy_is_not_taken_for_interference(host: Host) -> None:
    host.tree.make(WEB)
    for value in ("kill", "panic", "continue", "kill"):
        assert host.load("web.service", value).state is State.APPLIED and host.tree.said(WEB) == value
    assert set(host.take_reports()) == {"changed web.service"}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(("found", "left"), [("kill", "continue"), ("panic", "panic"), ("continue", "continue")])
def test_what_was_set_is_taken_back_when_unset(host: Host, restarted: bool, found: str, left: str) -> None:
    host.tree.make(WEB)
    host.load("web.service", "kill")
    host.tree.say(WEB, found)
    if restarted:
        host.start_daemon()
    unit = host.load("web.service")
    assert (unit.state, unit.configured, host.tree.said(WEB)) == (State.UNSET, "", left)
    host.tree.say(WEB, "kill")  # somebody else's from now on
    host.reconciler.sweep()
    assert host.tree.said(WEB) == "kill"


@pytest.mark.parametrize(
    ("above", "own", "effective"),
    [
        ("continue", "kill", Effective(Action.KILL, WEB)),
        ("kill", "kill", Effective(Action.KILL, WEB)),
        ("panic", "kill", Effective(Action.PANIC, "/system.slice")),
        ("kill", "continue", Effective(Action.KILL, "/system.slice")),
        ("panic", "", Effective(Action.PANIC, "/system.slice")),
    ],
)
def test_an_ancestor_may_be_stricter(host: Host, above: str, own: str, effective: Effective) -> None:
    host.tree.make(WEB)
    unit = host.load("web.service", own)
    host.take_reports()
    host.tree.say("/system.slice", above)
    host.reconciler.sweep()
    assert unit.effective == effective and unit.configured == own
    assert host.tree.said("/system.slice") == above
    assert host.take_reports() == (["changed web.service"] if effective.cgroup != WEB else [])


# What is told --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["web.service", "a.slice"])
def test_what_a_client_can_see_is_told_when_it_changes(host: Host, name: str) -> None:
    host.load(name)
    host.take_reports()
    for values, cgroup in ((["kill"], ""), (["kill"], "/x"), (["kill"], ""), (["panic"], ""), (["kill", "panic"], "")):
        host.load(name, *values, cgroup=cgroup)
        assert host.take_reports() == [f"changed {name}"], (values, cgroup)


def test_nothing_new_is_nothing_told(host: Host) -> None:
    host.tree.make(WEB)
    host.load("web.service", "kill")
    assert host.take_reports() == ["changed web.service"]
    host.load("web.service", "kill")
    host.reconciler.sweep()
    host.reconciler.cgroup_written(WEB)
    host.reconciler.replace_all([host.facts("web.service", "kill")])
    assert host.take_reports() == []


def test_a_problem_is_told_once_until_it_was_away(host: Host) -> None:
    message = "MemoryFailureDirtyAction=halt: expected panic, kill or continue; keeping unset"
    host.load("web.service", "halt")
    host.reconciler.sweep()
    assert host.take_reports() == [f"problem web.service: {message}", "changed web.service"]
    host.load("web.service")
    host.load("web.service", "halt")
    assert host.take_reports() == [f"problem web.service: {message}"]


def test_a_problem_of_a_slice_is_the_slices_and_one_of_a_rule_the_machines(host: Host) -> None:
    path = host.files.write_machine("web01", Action.KILL)
    path.write_text("[X-CgPolicy]\nMemoryFailureDirtyAction=halt\n")
    host.reconciler.replace_all([
        host.facts("machine.slice", "halt"), host.facts(SCOPE, slice="machine.slice"),
    ])
    problems = [report.partition(": ")[0] for report in host.take_reports() if report.startswith("problem")]
    assert problems == ["problem machine.slice", f"problem {SCOPE}"]


# Whose loss it was ---------------------------------------------------------------------------------


def test_a_cgroup_is_its_units_also_after_it_is_gone(host: Host) -> None:
    host.tree.make(WEB)
    host.load("web.service", cgroup="")  # PID 1 notes the invocation a moment after it made the cgroup
    host.reconciler.cgroup_created("/system.slice", "web.service")
    os.setxattr(host.tree.path(WEB), "trusted.invocation_id", b"a" * 32)
    host.load("web.service")
    number = host.tree.cgroup_id(WEB)
    expected = Owner("web.service", "a" * 32, WEB)
    assert host.reconciler.owner((number,)) == expected
    host.tree.renew(WEB)
    host.reconciler.cgroup_created("/system.slice", "web.service")
    host.reconciler.remove("web.service")
    assert host.reconciler.owner((number,)) == expected


def test_a_cgroup_below_is_its_units_and_one_of_nobody_nobodys(host: Host) -> None:
    payload = f"{WEB}/payload/worker"
    for cgroup in (payload, "/system.slice/stray/below", "/elsewhere"):
        host.tree.make(cgroup)
    os.setxattr(host.tree.path(WEB), "trusted.invocation_id", b"a" * 32)
    host.reconciler.replace_all([host.facts("system.slice", cgroup="/system.slice"), host.facts("web.service")])

    def owner(cgroup: str) -> Owner | None:
        return host.reconciler.owner((host.tree.cgroup_id(cgroup),))

    assert owner(payload) == Owner("web.service", "a" * 32, payload)
    assert owner("/system.slice/stray/below") == Owner("", "", "/system.slice/stray/below")
    assert owner("/elsewhere") == Owner("", "", "/elsewhere")
    assert host.reconciler.owner((0,)) is None
    assert host.reconciler.owner(()) is None


def test_only_so_many_are_remembered(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "REMEMBERED", 3)
    host.tree.make(WEB)
    host.load("web.service")
    numbers = []
    kept = []
    for turn in range(5):
        numbers.append(host.tree.cgroup_id(WEB))
        kept.append(host.tree.path(WEB).rename(host.root / str(turn)))  # so that no inode number comes twice
        host.tree.make(WEB)
        host.reconciler.cgroup_created("/system.slice", "web.service")
    assert [host.reconciler.owner((number,)) is not None for number in numbers] == [False, False, False, True, True]


def test_counters_are_the_cgroups(host: Host) -> None:
    host.tree.make(WEB)
    (host.tree.path(WEB) / EVENTS_FILE).write_text("failure_dirty 3\nfailure_dirty_kill 1\n")
    assert host.reconciler.events(host.load("web.service")) == Events(3, 1)
    assert host.reconciler.events(host.load("web.service", cgroup="")) == Events()


# Whatever happens ----------------------------------------------------------------------------------

UNITS = {"web.service": "a.slice", "db.service": "a-b.slice", "job.service": "a-b.slice"}
SLICES = {"-.slice": "", "a.slice": "/a.slice", "a-b.slice": "/a.slice/a-b.slice"}
NAMES = st.sampled_from([*UNITS, *SLICES])
STEPS = st.lists(
    st.tuples(st.just("set"), NAMES, st.sampled_from(["", *Action]))
    | st.tuples(st.sampled_from(["start", "stop", "restart"]), st.sampled_from(sorted(UNITS)), st.just(""))
    | st.tuples(st.sampled_from(["crash", "up"]), st.just(""), st.just("")),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=80)
def test_every_running_unit_says_what_its_files_say_while_the_daemon_runs(steps: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        host = Host(Path(directory))
        wanted = dict.fromkeys([*UNITS, *SLICES], "")
        running: set[str] = set()
        up = True
        host.tree.make("/a.slice/a-b.slice")

        def cgroup(name: str) -> str:
            return SLICES[name] if name in SLICES else f"{SLICES[UNITS[name]]}/{name}"

        def facts(name: str) -> UnitFacts:
            there = cgroup(name) if name in SLICES or name in running else ""
            return host.facts(name, wanted[name], slice=UNITS.get(name, ""), cgroup=there)

        def expected(name: str) -> str:
            slices = ["a-b.slice", "a.slice", "-.slice"][UNITS[name] == "a.slice":]
            return next((value for value in map(wanted.get, [name, *slices]) if value), "continue")

        host.reconciler.replace_all([facts(name) for name in wanted])
        for step, name, value in [*steps, ("up", "", "")]:
            if step == "set":
                wanted[name] = value
                told = facts(name)
                if up:
                    host.reconciler.load(told)
            if step in ("stop", "restart") and name in running:
                host.tree.remove(cgroup(name))
                running.remove(name)
                if up:
                    host.reconciler.cgroup_removed(SLICES[UNITS[name]], name)
            if step in ("start", "restart") and name not in running:
                host.tree.make(cgroup(name))
                running.add(name)
                if up:
                    host.reconciler.cgroup_created(SLICES[UNITS[name]], name)
            if step == "crash":
                up = False
            if step == "up" and not up:
                up = True
                host.start_daemon()
                host.reconciler.replace_all([facts(name) for name in wanted])
            if up:
                assert {name: host.tree.said(cgroup(name)) for name in running} == {
                    name: expected(name) for name in running
                }
                assert {unit.state for unit in host.reconciler.units.values()} <= {
                    State.APPLIED, State.UNSET, State.INACTIVE, State.DEFAULT,
                }
        assert host.tree.said("/a.slice") == host.tree.said("/a.slice/a-b.slice") == "continue"
        assert not [report for report in host.reports if report.startswith(("interference", "problem"))]


# What systemd unloads ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fragment", "action", "asked", "kept"),
    [
        ("web.service", "web.service", "kill", False, True),
        ("web.service", "web.service", "", False, False),
        ("web.service", "web.service", "", True, True),
        ("web.service", "", "kill", True, False),
        ("web@1.service", "web@.service", "kill", False, False),
        ("web@1.service", "web@.service", "kill", True, True),
    ],
)
def test_what_can_start_again_is_kept(
    host: Host, name: str, fragment: str, action: str, asked: bool, kept: bool
) -> None:
    """Kept is what has a policy or was asked for, and a file to be started from; at its start nobody is asked."""
    path = host.root / (fragment or "gone.service")
    if fragment:
        path.touch()
    drop_in = host.root / f"{name}.d/a.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f"[X-CgPolicy]\nMemoryFailureDirtyAction={action}\n")
    host.reconciler.load(UnitFacts(name, "loaded", (str(path), str(drop_in)), "system.slice"))
    host.reconciler.units[name].asked = asked
    host.reconciler.unload(name)
    assert (name in host.reconciler.units) == kept
    host.tree.make(f"/system.slice/{name}")
    host.reconciler.cgroup_created("/system.slice", name)
    assert host.tree.said(f"/system.slice/{name}") == (action if kept and action else "continue")


def test_only_so_many_are_kept(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgpolicy.reconciler.KEPT_MAX", 2)
    for number in range(4):
        host.load(f"{number}.service", "kill")
        host.reconciler.unload(f"{number}.service")
    assert sorted(host.reconciler.units) == ["2.service", "3.service"]
    # One that is loaded again is not among those who make room.
    host.load("2.service", "kill")
    host.load("4.service", "kill")
    for name in ("4.service", "3.service"):
        host.reconciler.unload(name)
    assert sorted(host.reconciler.units) == ["2.service", "3.service", "4.service"]
