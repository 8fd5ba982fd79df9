# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one state machine: what each unit's cgroup should say, what it says, and what is done about a difference.

Knows neither D-Bus nor GLib; the daemon feeds it facts and passes on what it reports.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cgpolicy.action import Action
from cgpolicy.cgroupfs import CgroupTree, Effective, Events, unit_of_directory
from cgpolicy.dropin import with_drop_in
from cgpolicy.error import NotSupported, UserError
from cgpolicy.policyfile import PolicyFiles
from cgpolicy.resolve import UNDECIDED, Decision, SourceKind, resolve
from cgpolicy.setting import UNSET, Setting, read_setting
from cgpolicy.systemd import UnitFacts, find_drop_ins, find_fragment, read_files
from cgpolicy.unitfile import Problem
from cgpolicy.unitname import POLICY_TYPES, ROOT_SLICE, parent_slices, unit_type

# Units kept in mind though PID 1 has unloaded them: it does so with every unit that is stopped and that nothing
# loaded refers to. At the next start a policy that is known already is applied at once.
KEPT_MAX = 1024

# Cgroups whose owner is remembered after they are gone: a loss is read a moment after the kill.
REMEMBERED = 4096


class State(enum.StrEnum):
    """How far a unit's policy has come; see org.cgpolicy1(5)."""

    APPLIED = "applied"
    UNSET = "unset"
    INACTIVE = "inactive"
    NO_CONTROLLER = "no-controller"
    NOT_ENFORCED = "not-enforced"
    DEFAULT = "default"
    FAILED = "failed"


NO_PROBLEMS: frozenset[Problem] = frozenset()
NO_EFFECT = Effective(Action.CONTINUE, "")


@dataclass(slots=True)
class Unit:
    """A unit with what is wanted of it (own, decision) and what is seen (the rest)."""

    facts: UnitFacts
    own: Setting = UNSET
    decision: Decision = UNDECIDED
    state: State = State.INACTIVE
    error: str = ""
    effective: Effective = NO_EFFECT
    cgroup_id: int = 0
    asked: bool = False  # a client wants to know of it
    corrected: bool = False  # put right once in this cgroup; not a second time
    reported: frozenset[Problem] = NO_PROBLEMS
    told: tuple[object, ...] = ()  # visible() when it was last reported
    published: tuple[object, ...] | None = None  # told, as it was on the bus last; kept here for memory's sake

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def configured(self) -> str:
        """The action as shown to people: a slice's is the default for the units below it; "" if unset."""
        if unit_type(self.name) == "slice":
            return self.own.action or ""
        return self.decision.action or ""

    @property
    def source(self) -> tuple[SourceKind, str, int]:
        """Where the configured action is written: kind, file, line."""
        if unit_type(self.name) == "slice" and self.own.action is not None:
            return SourceKind.UNIT_FILE, self.own.path, self.own.line
        return self.decision.kind, self.decision.path, self.decision.line

    def visible(self) -> tuple[object, ...]:
        """What a client can see without reading counters; a change of it is worth a signal."""
        seen = (self.state, self.error, self.effective, self.facts.cgroup, self.cgroup_id)
        return (self.configured, self.source, *seen)


# What a unit shows that does not run and has nothing configured.
PLAIN = ("", (SourceKind.NONE, "", 0), State.UNSET, "", NO_EFFECT, "", 0)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose cgroup an id was: the unit, that very invocation of it, and the cgroup's path."""

    unit: str
    invocation_id: str
    cgroup: str


@dataclass(slots=True)
class Reports:
    """Where the reconciler tells what it saw; the daemon puts D-Bus signals and the journal here."""

    changed: Callable[[Unit], None] = lambda unit: None
    removed: Callable[[str], None] = lambda name: None
    problem: Callable[[str, Problem], None] = lambda name, problem: None
    interference: Callable[[Unit, Action], None] = lambda unit, found: None
    settled: Callable[[Unit], None] = lambda unit: None


@dataclass(slots=True)
class Reconciler:
    """Holds every loaded unit and keeps the cgroup files in step with what the units' files say."""

    tree: CgroupTree
    files: PolicyFiles
    reports: Reports = field(default_factory=Reports)
    machine_uuid: Callable[[str], str | None] = lambda unit: None
    machine_registered: Callable[[str], str | None] = lambda unit: None  # under what name, with machined
    units: dict[str, Unit] = field(default_factory=dict)
    supported: bool = True
    _created: dict[str, str] = field(default_factory=dict)
    _guessed: set[str] = field(default_factory=set)  # units of which PID 1 has said nothing yet
    _ahead: dict[str, str] = field(default_factory=dict)  # drop-ins of ours that PID 1 has not read yet, by unit
    _superseded: dict[str, str] = field(default_factory=dict)  # those of _ahead that it is reading just now
    _kept: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _owners: OrderedDict[int, Owner] = field(default_factory=OrderedDict)
    _newer: set[str] | None = None  # units of which there was news since the picture that is awaited was begun

    # What comes in ----------------------------------------------------------------------------

    def picture_begun(self) -> None:
        """Note that a complete picture is being taken: news that come before it is there are newer than it is."""
        self._newer = set()

    def replace_all(self, units: Iterable[UnitFacts]) -> None:
        """Take a complete picture, as at the start and after systemd has reloaded."""
        self.supported = self.tree.is_supported()
        newer, self._newer = self._newer or set(), None
        fresh = {facts.name: facts for facts in units if facts.name not in newer}
        self._guessed.difference_update(fresh)
        for name in [name for name in self.units if name not in fresh and name not in newer]:
            self.remove(name)
        for facts in fresh.values():
            self._store(self._completed(facts))
        for unit in list(self.units.values()):
            self._settle(unit)

    def _is_news(self, name: str) -> None:
        if self._newer is not None:
            self._newer.add(name)

    def load(self, facts: UnitFacts) -> None:
        """Take one unit's facts, new or read again."""
        self._is_news(facts.name)
        self._guessed.discard(facts.name)
        if not facts.exists:
            self.remove(facts.name)
            return
        self._kept.pop(facts.name, None)
        self._take(self._completed(facts))

    def unload(self, name: str) -> None:
        """Note that PID 1 has unloaded a unit; one that can be started again and has been of interest is kept."""
        self._is_news(name)
        self._guessed.discard(name)
        unit = self.units.get(name)
        if unit is None or not self._may_return(unit):
            self.remove(name)
            return
        self._kept[name] = None
        self._kept.move_to_end(name)
        if len(self._kept) > KEPT_MAX:
            # Those first that are kept only because some client, whoever it is, has asked for them.
            asked = (other for other in self._kept if not self._is_waited_for(self.units[other]))
            self.remove(next(asked, next(iter(self._kept))))
        if not self.tree.exists(unit.facts.cgroup):
            unit.facts = replace(unit.facts, cgroup="")
        self._settle(unit)

    def _may_return(self, unit: Unit) -> bool:
        return (unit.asked or self._is_waited_for(unit)) and Path(unit.facts.fragment).is_file()

    def _is_waited_for(self, unit: Unit) -> bool:
        # Instances of a template, one for each connection for example, are not all waited for.
        return bool(unit.configured) and Path(unit.facts.fragment).name == unit.name

    def kept(self, loaded: Iterable[str]) -> list[str]:
        """Return the units with a policy that are kept though PID 1 has unloaded them; it has loaded these."""
        for name in loaded:
            self._kept.pop(name, None)
        return [name for name in self._kept if self.units[name].configured]

    def remove(self, name: str) -> None:
        """Forget a unit."""
        self._created.pop(name, None)
        self._guessed.discard(name)
        self._ahead.pop(name, None)
        self._kept.pop(name, None)
        if self.units.pop(name, None) is not None:
            self.reports.removed(name)

    def cgroup_created(self, parent: str, directory: str) -> None:
        """Apply to a cgroup that has just appeared in a slice, from what is known, without asking anybody."""
        name, cgroup = unit_of_directory(directory), f"{parent}/{directory}"
        self._created[name] = cgroup
        unit = self.units.get(name)
        if unit is not None:
            unit.facts = replace(unit.facts, cgroup=cgroup)
            self._settle(unit)
            return
        self.remember(name, cgroup)
        kind, fragment = unit_type(name), find_fragment(name, self.files.root)
        if kind in ("scope", "slice") or (fragment and kind in POLICY_TYPES):
            # Not loaded until now, as every unit before its first start that nothing refers to, or transient: what
            # can be told without PID 1, until it answers.
            self._is_news(name)
            self._guessed.add(name)
            files = (*([fragment] if fragment else []), *find_drop_ins(name, self.files.root))
            slice_ = unit_of_directory(parent.rpartition("/")[2]) or ROOT_SLICE
            self._take(UnitFacts(name, "loaded", files, slice_, cgroup))

    def cgroup_removed(self, parent: str, directory: str) -> None:
        """Note that a unit has lost its cgroup: it ended, or is on its way to a new one."""
        name, cgroup = unit_of_directory(directory), f"{parent}/{directory}"
        if self._created.get(name) == cgroup:
            del self._created[name]
        if name in self._guessed:
            self.remove(name)  # perhaps no unit at all; PID 1's answer brings it back
        else:
            self.cgroup_written(cgroup)

    def controllers_changed(self, slice_cgroup: str) -> None:
        """Look again at the units of a slice whose cgroup.subtree_control was written.

        Only at those with a policy: systemd writes these files of all slices when a unit with Delegate= comes or
        goes, and whoever starts meanwhile waits for the end of this.
        """
        for unit in list(self.units.values()):
            if unit.decision.action is not None and unit.facts.cgroup.rpartition("/")[0] == slice_cgroup:
                self._settle(unit)

    def cgroup_written(self, cgroup: str) -> None:
        """Compare a cgroup and those below, whom its file binds, with what they should say: somebody wrote it."""
        name, below = unit_of_directory(cgroup.rpartition("/")[2]), f"{cgroup}/"
        if unit_type(name) != "slice":
            # Named after its unit, and no other unit's cgroup lies in it.
            unit = self.units.get(name)
            if unit is not None and unit.facts.cgroup == cgroup:
                self._settle(unit)
            return
        for unit in list(self.units.values()):
            if unit.facts.cgroup == cgroup or unit.facts.cgroup.startswith(below):
                self._settle(unit)

    def look_again(self, name: str) -> None:
        """Decide anew for one unit, of which something else has become known."""
        if name in self.units:
            self._settle(self.units[name])

    def reread(self, name: str) -> Unit:
        """Read a unit's files anew, and forgive earlier interference."""
        unit = self.units[name]
        unit.corrected = False
        self._take(unit.facts)
        return unit

    def drop_in_written(self, name: str, path: str) -> None:
        """Let a drop-in count that was just written, of which PID 1 will know only when it has reloaded."""
        if name in self.units:
            facts = self.units[name].facts
            if self._ahead.get(name) != path:
                self._ahead.pop(name, None)
            if path not in facts.files:
                self._ahead[name] = path
                self.units[name].facts = replace(facts, files=with_drop_in(facts.files, path))
            self.reread(name)

    def systemd_reloads(self) -> None:
        """Note that PID 1 begins to read all files: what is there now it will know."""
        self._superseded = dict(self._ahead)

    def systemd_reloaded(self) -> None:
        """Let PID 1 have the last word about the drop-ins that were there when it began to read."""
        for name, path in self._superseded.items():
            if self._ahead.get(name) == path:
                del self._ahead[name]
        self._superseded = {}

    def expect_drop_in(self, name: str, path: str) -> None:
        """Let a drop-in count that an earlier process wrote and of which PID 1 does not know yet."""
        self._ahead[name] = path

    def drop_in_removed(self, name: str, path: str, uncovered: str | None = None) -> None:
        """Let a drop-in no longer count that was just removed, but the one that it had hidden, if any."""
        if self._ahead.get(name) == path:
            del self._ahead[name]
        if name in self.units:
            facts = self.units[name].facts
            files = tuple(file for file in facts.files if file != path)
            if uncovered is not None:
                self._ahead[name] = uncovered
                files = with_drop_in(files, uncovered)
            self.units[name].facts = replace(facts, files=files)
            self.reread(name)

    def sweep(self) -> None:
        """Look at everything: for events that were lost, and for certainty."""
        self.supported = self.tree.is_supported()
        for unit in list(self.units.values()):
            self._settle(unit)

    # What is known ----------------------------------------------------------------------------

    def units_below(self, slice_name: str) -> Iterator[Unit]:
        """Yield the units for which a slice is on the path to the root slice."""
        for unit in list(self.units.values()):
            if unit.facts.slice and slice_name in parent_slices(unit.facts.slice):
                yield unit

    def owner(self, lineage: Sequence[int]) -> Owner | None:
        """Return whose cgroup this is or lately was; a cgroup below a unit's belongs to the unit.

        lineage holds its id and those of the cgroups above it as far as they are known, its own last.
        """
        if lineage and lineage[-1] in self._owners:
            return self._owners[lineage[-1]]
        cgroup = self.tree.find(lineage[-1]) if lineage else None
        for number in reversed(lineage):
            known = self._owners.get(number)
            if known is not None and unit_type(known.unit) != "slice":
                return replace(known, cgroup=cgroup or "")
        above = cgroup or ""
        by_cgroup = {unit.facts.cgroup: unit for unit in self.units.values() if unit.facts.cgroup}
        while above:
            unit = by_cgroup.get(above)
            if unit is not None and unit_type(unit.name) != "slice":
                return Owner(unit.name, self.tree.invocation_id(above), cgroup or "")
            above = above.rpartition("/")[0]
        return Owner("", "", cgroup) if cgroup else None

    def events(self, unit: Unit) -> Events:
        """Return the kernel's loss counters of a unit's present cgroup."""
        return self.tree.events(unit.facts.cgroup) if unit.facts.cgroup else Events()

    # The machine ------------------------------------------------------------------------------

    def _store(self, facts: UnitFacts) -> Unit:
        unit = self.units.get(facts.name)
        if unit is None:
            unit = self.units[facts.name] = Unit(facts)
        unit.facts = facts
        unit.own = read_files(facts.files)
        return unit

    def _take(self, facts: UnitFacts) -> None:
        """Store one unit, and settle it and those to which its setting passes on."""
        default_before = self.units[facts.name].own.action if facts.name in self.units else None
        unit = self._store(facts)
        self._settle(unit)
        if unit_type(facts.name) == "slice" and unit.own.action != default_before:
            for other in self.units_below(facts.name):
                self._settle(other)

    def _completed(self, facts: UnitFacts) -> UnitFacts:
        """Add to what PID 1 said what it could not know yet: a cgroup seen to appear, a drop-in just written."""
        if not facts.cgroup and self.tree.exists(self._created.get(facts.name, "")):
            facts = replace(facts, cgroup=self._created[facts.name])
        path = self._ahead.get(facts.name)
        if path is None:
            return facts
        if path in facts.files:
            del self._ahead[facts.name]
            return facts
        return replace(facts, files=with_drop_in(facts.files, path))

    def _rules(self, name: str) -> tuple[Setting | None, Setting | None]:
        """Return what the rules of the machine that a unit runs say, by UUID and by name."""
        number = self.machine_uuid(name)
        rules = (
            self.files.machine_rule(number) if number else None,
            self.files.machine_rule_of(name, self.machine_registered(name)),
        )
        by_uuid, by_name = (read_setting([rule]) if rule else None for rule in rules)
        return by_uuid, by_name

    def _settle(self, unit: Unit) -> None:
        """Decide, apply, look, and report if anything that a client can see is different."""
        by_uuid, by_name = self._rules(unit.name)
        slices = [
            (name, self.units[name].own)
            for name in (parent_slices(unit.facts.slice) if unit.facts.slice else [])
            if name in self.units and self.units[name].own is not UNSET
        ]
        if unit.own is UNSET and not (by_uuid or by_name or slices):
            unit.decision = UNDECIDED
        else:
            unit.decision = resolve(
                unit.name, unit.own, machine_uuid=by_uuid, machine_name=by_name, slices=slices
            )
        problems = [problem for setting in (unit.own, by_uuid, by_name) if setting for problem in setting.problems]
        for problem in problems:
            if problem not in unit.reported:
                self.reports.problem(unit.name, problem)
        unit.reported = frozenset(problems) if problems else NO_PROBLEMS
        self._apply(unit)
        self.reports.settled(unit)
        unit.effective = self.tree.effective(unit.facts.cgroup) if unit.cgroup_id else NO_EFFECT
        visible = unit.visible()
        if visible != unit.told:
            # Most of many units look alike: one tuple for all of them.
            unit.told = PLAIN if visible == PLAIN else visible
            self.reports.changed(unit)

    def _apply(self, unit: Unit) -> None:
        cgroup_id = self.tree.cgroup_id(unit.facts.cgroup) if unit.facts.cgroup else 0
        if cgroup_id != unit.cgroup_id:
            unit.cgroup_id, unit.corrected = cgroup_id, False
        if cgroup_id:
            self._remember(unit)
        unit.error = ""
        try:
            unit.state = self._write_difference(unit)
        except NotSupported as error:
            # The file was there a moment ago: the unit stops, or the controller was turned off.
            unit.state = State.NO_CONTROLLER if self.tree.exists(unit.facts.cgroup) else State.INACTIVE
            unit.error = str(error) if unit.state is State.NO_CONTROLLER else ""
        except UserError as error:
            unit.state, unit.error = State.FAILED, str(error)

    def _write_difference(self, unit: Unit) -> State:
        """Bring a cgroup's file in line with the decision and return what the unit's state then is."""
        wanted, cgroup = unit.decision.action, unit.facts.cgroup
        if unit_type(unit.name) == "slice" and unit.own.action is not None:
            unset: State = State.DEFAULT
        else:
            unset = State.UNSET
        if not unit.cgroup_id:
            return unset if wanted is None else State.INACTIVE
        if not self.supported:
            return unset if wanted is None else State.NOT_ENFORCED
        found = self.tree.read_action(cgroup)
        ours = self.tree.marked(cgroup)
        if wanted is None:
            # Nothing configured: not touched, unless it was configured before.
            if ours is not None:
                if found == ours:
                    self.tree.write_action(cgroup, Action.CONTINUE)
                self.tree.mark(cgroup, None)
            return unset
        if found is None:
            # The kernel forgets the value with the controller; when both come back nobody has interfered.
            if ours is not None:
                self.tree.mark(cgroup, None)
            unit.corrected = False
            unit.error = f"{cgroup} has no memory controller; set MemoryAccounting=yes for it and its slice"
            return State.NO_CONTROLLER
        if found != wanted:
            if ours == wanted:
                if unit.corrected:
                    unit.error = f"{cgroup}: changed to {found} by somebody else again; cgpolicy set puts it right"
                    return State.FAILED
                unit.corrected = True
                self.reports.interference(unit, found)
            self.tree.write_action(cgroup, wanted)
        if ours != wanted:
            self.tree.mark(cgroup, wanted)
        return State.APPLIED

    def remember(self, name: str, cgroup: str, below: str = "") -> bool:
        """Note whose a unit's cgroup is, or one below it; tell whether its InvocationID is known.

        systemd notes that a moment after it has made the cgroup. The cgroup may be gone when a loss of it is read.
        """
        number = self.tree.cgroup_id(below or cgroup)
        invocation = self.tree.invocation_id(cgroup)
        if number:
            self._note(number, Owner(name, invocation, below or cgroup))
        return bool(invocation) or not number

    def _remember(self, unit: Unit) -> None:
        # Every time: systemd notes the InvocationID a moment after it has made the cgroup.
        self._note(unit.cgroup_id, Owner(unit.name, self.tree.invocation_id(unit.facts.cgroup), unit.facts.cgroup))

    def _note(self, number: int, owner: Owner) -> None:
        self._owners[number] = owner
        self._owners.move_to_end(number)
        while len(self._owners) > max(REMEMBERED, 2 * len(self.units)):
            self._owners.popitem(last=False)
