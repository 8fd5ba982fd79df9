# SPDX-License-Identifier: LGPL-2.1-or-later
"""The face on the system bus: org.cgpolicy1.Manager and one org.cgpolicy1.Unit object a unit.

pydbus gives the connection, the name and the subscriptions. Its objects answer a call by returning, so that one
polkit prompt would hold up every other client; and it never frees them. These objects are therefore registered on
pydbus's connection with Gio, where an answer can come later and an object can go.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gi.repository import Gio, GLib

from cgpolicy import __version__, buscall
from cgpolicy.action import Action
from cgpolicy.changes import Changes
from cgpolicy.client import MANAGER, MANAGER_PATH, NAME, NO_RELOAD, UNIT
from cgpolicy.enforcement import Enforcement
from cgpolicy.error import NoSuchUnit, NotSupported, UserError
from cgpolicy.heap import give_back_memory, keep_memory_low
from cgpolicy.policyfile import NotDurable, PolicyFiles
from cgpolicy.polkit import Authority
from cgpolicy.rawglib import INVOCATIONS_COUNTED, address, object_unref
from cgpolicy.reconciler import Reconciler, State, Unit
from cgpolicy.setting import read_setting
from cgpolicy.subtree import Subtree
from cgpolicy.systemd import UnitFacts
from cgpolicy.systemd_watch import SystemdWatch
from cgpolicy.unitname import (
    POLICY_TYPES,
    bus_label_escape,
    bus_label_unescape,
    check,
    is_domain,
    machine_name,
    parent_slices,
    unit_type,
)

UNIT_PATH = f"{MANAGER_PATH}/unit/"
PROPERTIES = "org.freedesktop.DBus.Properties"
MACHINE_SLICE = "machine.slice"  # where machines are unless somebody says otherwise (systemd.special(7))
STANDARD_ERROR = "org.freedesktop.DBus.Error."

FAILURES = (State.FAILED, State.NO_CONTROLLER)

# Of one ListUnits call. systemd's own names have 255 characters; a set in a pattern takes more than one for one.
PATTERNS_MAX = 1024
PATTERNS_LENGTH_MAX = 65536

# How long one call may keep the others waiting: 1024 patterns for 10,000 units take seconds.
SLICE_SECONDS = 0.005
SENT_MS = 1000  # by when a long answer has been handed to the bus
FNM_NOESCAPE = 2  # as systemctl's own patterns; glibc's fnmatch.h

# Calls that wait for systemd, or for their turn, at once. A caller need not wait for answers to send more.
WAITING_MAX = 256
WAITING_MAX_BY_SENDER = 64

INTERFACES = Gio.DBusNodeInfo.new_for_xml(Path(__file__).with_name(f"{NAME}.xml").read_text())


class Refused(UserError):
    """A call that is wrong in itself; answered with one of D-Bus's standard errors."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.dbus_name = f"{STANDARD_ERROR}{name}"


def free_after_reply(invocation: Any) -> None:
    """Drop the reference to an answered call that PyGObject leaves behind.

    Every incoming call leaks about 2 KiB otherwise, so that any client could make this process grow.
    """
    if not INVOCATIONS_COUNTED:
        object_unref(address(invocation))


_libc = ctypes.CDLL(None)

def matches(name: str, patterns: list[bytes]) -> bool:
    """Tell whether one of some shell patterns matches a unit's name (fnmatch(3)).

    Not Python's fnmatch: it compiles every pattern and keeps up to 32,768 of them, for whoever sends them.
    """
    return any(_libc.fnmatch(pattern, name.encode(), FNM_NOESCAPE) == 0 for pattern in patterns)


def reply(invocation: Any, value: Any) -> None:
    invocation.return_value(value)
    free_after_reply(invocation)


def reply_error(invocation: Any, error: UserError) -> None:
    name = error.dbus_name if isinstance(error, Refused) else f"{NAME}.Error.{error.bus_name}"
    invocation.return_dbus_error(name, str(error))
    free_after_reply(invocation)


def unit_path(unit: str) -> str:
    """Return the path of a unit's object."""
    return UNIT_PATH + bus_label_escape(unit)


def unit_of_label(label: str) -> str:
    """Return the unit whose object has this label as the last element of its path, "" for a label of none."""
    name = bus_label_unescape(label)
    return name if bus_label_escape(name) == label else ""


# Of org.cgpolicy1.Unit, in the order of flat().
UNIT_PROPERTIES = (
    ("MemoryFailureDirtyAction", "s"),
    ("Source", "s"),
    ("SourcePath", "s"),
    ("SourceLine", "u"),
    ("State", "s"),
    ("LastError", "s"),
    ("EffectiveAction", "s"),
    ("EffectiveFrom", "s"),
    ("ControlGroup", "s"),
    ("ControlGroupId", "t"),
)


def flat(visible: Any) -> tuple[Any, ...]:
    """Return what Unit.visible() holds as the values of UNIT_PROPERTIES."""
    configured, (kind, path, line), state, error, effective, cgroup, cgroup_id = visible
    return configured, kind, path, line, state, error, effective.action, effective.cgroup, cgroup, cgroup_id


class BusFace:
    """Publishes a reconciler, and carries out what clients ask and may."""

    def __init__(
        self, bus: Any, reconciler: Reconciler, watch: SystemdWatch, authority: Authority, files: PolicyFiles,
        refresh: Callable[[Callable[[], None]], None], enforcement: Callable[[], Enforcement],
    ) -> None:
        keep_memory_low()
        self._connection = bus.con
        self._reconciler = reconciler
        self._watch = watch
        self._authority = authority
        self._files = files
        self._changes = Changes()
        self._refresh = refresh
        self._enforcement = enforcement
        self._manager_last: dict[str, Any] = {}
        self._waiting: Counter[str] = Counter()
        self._counted: dict[str, tuple[str, ...]] = {}  # as what each unit is counted
        self._counts: Counter[str] = Counter()
        self._telling = False
        self._connection.register_object(
            MANAGER_PATH, INTERFACES.lookup_interface(MANAGER), self._manager_call, self._manager_property, None
        )
        self._objects = Subtree(
            bus.con, UNIT_PATH.rstrip("/"), INTERFACES.lookup_interface(UNIT),
            exists=lambda label: unit_of_label(label) in reconciler.units,
            labels=lambda: map(bus_label_escape, reconciler.units),
            call=self._unit_call,
        )
        for unit in reconciler.units.values():
            unit.published = unit.told
            self._count(unit.name, unit)
        self._manager_last = self._manager_changing()

    def close(self) -> None:
        """Complete the changes that were accepted, and have their answers sent."""
        self._changes.close()
        with contextlib.suppress(GLib.Error):  # if the bus is gone
            self._connection.flush_sync(None)

    # What others see --------------------------------------------------------------------------

    def _count(self, name: str, unit: Unit | None) -> None:
        """Count a unit as what it is now. To count all of them at each change takes too long with thousands."""
        self._counts.subtract(self._counted.pop(name, ()))
        if unit is not None and (unit.configured or unit.state in FAILURES):
            kinds = {"configured": bool(unit.configured), "failed": unit.state in FAILURES}
            self._counted[name] = tuple(kind for kind, so in kinds.items() if so)
            self._counts.update(self._counted[name])

    def unit_changed(self, unit: Unit) -> None:
        """Tell what changed of a unit, if it is not new."""
        known, unit.published = unit.published, unit.told
        self._count(unit.name, unit)
        changed = self._unit_changing(unit, known) if known is not None else {}
        if changed:
            self._emit(unit_path(unit.name), PROPERTIES, "PropertiesChanged",
                       GLib.Variant("(sa{sv}as)", (UNIT, changed, [])))
        if known is not None or unit.configured:
            self._emit(MANAGER_PATH, MANAGER, "UnitPolicyChanged", GLib.Variant(
                "(ssss)", (unit.name, unit.configured, str(unit.effective.action), str(unit.state))))
        self._manager_changed()

    def unit_removed(self, name: str) -> None:
        """Note that a unit's object is gone."""
        self._count(name, None)
        self._manager_changed()

    def data_lost(
        self, unit: str, cgroup: str, cgroup_id: int, action: str, pages: int, detail: dict[str, Any]
    ) -> None:
        """Send DirtyDataLost; detail's values are variants."""
        self._emit(MANAGER_PATH, MANAGER, "DirtyDataLost",
                   GLib.Variant("(sststa{sv})", (unit, cgroup, cgroup_id, action, pages, detail)))

    def manager_changed(self) -> None:
        """Tell what changed of the Manager's properties, the backend for one."""
        self._manager_changed()

    def _emit(self, path: str, interface: str, signal: str, values: Any) -> None:
        self._connection.emit_signal(None, path, interface, signal, values)

    def _manager_changing(self) -> dict[str, Any]:
        enforcement = self._enforcement()
        return {
            "Backend": GLib.Variant("s", enforcement.backend),
            "Enforcement": GLib.Variant("s", enforcement.strength),
            "EnforcementDetail": GLib.Variant("s", enforcement.detail),
            "NUnits": GLib.Variant("u", self._counts["configured"]),
            "NFailed": GLib.Variant("u", self._counts["failed"]),
        }

    def _manager_changed(self) -> None:
        """Tell soon what changed, once for all units that change together."""
        if not self._telling:
            self._telling = True
            buscall.after(0, self._tell_manager)

    def _tell_manager(self) -> bool:
        self._telling = False
        now = self._manager_changing()
        changed = {name: value for name, value in now.items() if value != self._manager_last.get(name)}
        self._manager_last = now
        if changed:
            self._emit(MANAGER_PATH, PROPERTIES, "PropertiesChanged",
                       GLib.Variant("(sa{sv}as)", (MANAGER, changed, [])))
        return False

    def _manager_property(self, connection: Any, sender: str, path: str, interface: str, name: str) -> Any:
        if name == "Version":
            return GLib.Variant("s", __version__)
        return self._manager_changing()[name]

    def _unit_changing(self, unit: Unit, since: tuple[object, ...] | None = None) -> dict[str, Any]:
        """Return the properties that change; given what was published, those only that are different now."""
        before = flat(since) if since else None
        return {
            name: GLib.Variant(signature, now)
            for position, now in enumerate(flat(unit.visible()))
            for name, signature in UNIT_PROPERTIES[position : position + 1]
            if before is None or now != before[position]
        }

    def _unit_properties(self, unit: Unit) -> dict[str, Any]:
        events = self._reconciler.events(unit)
        return {
            "Id": GLib.Variant("s", unit.name),
            **self._unit_changing(unit),
            "FailureDirty": GLib.Variant("t", events.failure_dirty),
            "FailureDirtyKill": GLib.Variant("t", events.failure_dirty_kill),
        }

    # What others ask --------------------------------------------------------------------------

    def _manager_call(
        self, connection: Any, sender: str, path: str, interface: str, method: str, arguments: Any, invocation: Any
    ) -> None:
        methods: dict[str, Callable[..., None]] = {
            "SetUnitPolicy": self._set_unit,
            "UnsetUnitPolicy": self._unset_unit,
            "SetMachinePolicy": self._set_machine,
            "UnsetMachinePolicy": self._unset_machine,
            "GetUnit": self._get_unit,
            "ListUnits": self._list_units,
            "Explain": self._explain,
            "Reload": self._reload,
        }
        self._guarded(invocation, methods[method], invocation, *arguments.unpack())

    def _unit_call(self, label: str, method: str, arguments: Any, invocation: Any) -> None:
        """Answer Properties.Get, GetAll and Set: the interface has no methods, and one property to be written."""
        name, (_, *words) = unit_of_label(label), arguments.unpack()

        def answer() -> None:
            if name not in self._reconciler.units:
                raise NoSuchUnit(f"{name} is gone")
            values = self._unit_properties(self._reconciler.units[name])
            if method == "Get":
                reply(invocation, GLib.Variant("(v)", (values[words[0]],)))
            else:
                reply(invocation, GLib.Variant("(a{sv})", (values,)))

        if method != "Set":
            self._guarded(invocation, answer)
        elif not words[1]:
            self._guarded(invocation, self._unset_unit, invocation, name, False, 0)
        else:
            self._guarded(invocation, self._set_unit, invocation, name, words[1], False, 0)

    def _guarded(self, invocation: Any, step: Callable[..., None], *arguments: Any) -> None:
        """Run one step of a call; whatever goes wrong becomes its answer, and the daemon lives on."""
        try:
            step(*arguments)
        except UserError as error:
            reply_error(invocation, error)
        except Exception as error:
            reply_error(invocation, UserError(f"internal error: {error}", hint="see journalctl -u cgpolicyd"))
            raise

    def _authorized(
        self, invocation: Any, verb: str, unit: str, action: str, then: Callable[[], None], *, panic: bool = False
    ) -> None:
        """Go on with then() once polkit agrees, which may take as long as a person takes."""
        action_id = f"{NAME}.{'set-panic' if panic else 'set-policy'}"
        flags = invocation.get_message().get_flags()
        interactive = bool(flags & Gio.DBusMessageFlags.ALLOW_INTERACTIVE_AUTHORIZATION)

        def answered(error: UserError | None) -> None:
            if error is not None:
                reply_error(invocation, error)
            else:
                self._guarded(invocation, then)

        details = {"unit": unit, "action": action, "verb": verb}
        self._authority.check(invocation.get_sender(), action_id, details, interactive, answered)

    def _change(
        self, invocation: Any, verb: str, unit: str, action: str, now: Callable[[], str],
        write: Callable[[], Path | None], written: Callable[[Path | None], None],
    ) -> None:
        """Once polkit agrees have a file written in its turn, go on with its path (None: nothing changed), and answer.

        To take a panic away (now() tells what is configured) needs as much as to arm one, also if it was armed
        while a person was asked about less.
        """
        panic = Action.PANIC in (action, now())

        def authorized() -> None:
            done = self._wait(invocation)

            def begin() -> None:
                if not panic and now() == Action.PANIC:
                    done()
                    self._change(invocation, verb, unit, action, now, write, written)
                else:
                    self._changes.write(write, finish)

            def finish(result: Callable[[], Path | None]) -> None:
                done()
                self._guarded(invocation, answer, result)

            self._changes.add(partial(self._guarded, invocation, begin))

        def answer(result: Callable[[], Path | None]) -> None:
            try:
                path = result()
            except NotDurable as error:
                written(error.path)
                raise
            written(path)
            reply(invocation, None)

        self._authorized(invocation, verb, unit, action, authorized, panic=panic)

    def _wait(self, invocation: Any) -> Callable[[], None]:
        """Count a call among those that wait; return what ends that. Raises Refused for one too many."""
        sender = invocation.get_sender()
        if self._waiting[sender] >= WAITING_MAX_BY_SENDER or self._waiting.total() >= WAITING_MAX:
            raise Refused("LimitsExceeded", "too many calls wait for an answer; take those first")
        self._waiting[sender] += 1

        def done() -> None:
            self._waiting[sender] -= 1
            if not self._waiting[sender]:
                del self._waiting[sender]

        return done

    def _with_unit(self, invocation: Any, name: str, then: Callable[[Unit], None]) -> None:
        """Go on with a unit that exists and can have a policy, loading it if need be; by an alias, too."""
        if unit_type(check(name)) not in POLICY_TYPES:
            raise NotSupported(f"{name}: a {unit_type(name)} unit has no control group")
        units = self._reconciler.units
        if name in units:
            then(units[name])
            return
        done = self._wait(invocation)

        def missing() -> None:
            done()
            error = NoSuchUnit(f"{name}: systemd has no such unit", hint="see systemctl list-unit-files")
            reply_error(invocation, error)

        def found(own_name: str | None) -> None:
            if own_name is None:
                missing()
            elif own_name in units:
                done()
                self._guarded(invocation, then, units[own_name])
            else:
                self._watch.read(own_name, loaded)

        def loaded(facts: UnitFacts | None) -> None:
            if facts is None or not facts.exists:
                missing()
                return
            done()
            self._reconciler.load(facts)
            units[facts.name].asked = True
            self._guarded(invocation, then, units[facts.name])

        self._watch.find(name, found)

    def _set_unit(self, invocation: Any, name: str, word: str, runtime: bool, flags: int) -> None:
        action = Action.parse(word)
        check_flags(flags)

        def ask(unit: Unit) -> None:
            own_name = unit.name  # not an alias, which polkit's rules need not know

            def written(path: Path | None) -> None:
                self._reconciler.drop_in_written(own_name, str(path))
                self._reload_systemd(flags)

            self._change(invocation, "set", own_name, action, partial(self._configured, own_name),
                         partial(self._files.write_unit, own_name, action, runtime=runtime), written)

        self._with_unit(invocation, name, ask)

    def _unset_unit(self, invocation: Any, name: str, runtime: bool, flags: int) -> None:
        check_flags(flags)

        def ask(unit: Unit) -> None:
            own_name = unit.name

            def removed(path: Path | None) -> None:
                if path is not None:
                    uncovered = self._files.counts_now(own_name)
                    self._reconciler.drop_in_removed(own_name, str(path), str(uncovered) if uncovered else None)
                self._reload_systemd(flags)

            self._change(invocation, "unset", own_name, "", partial(self._configured, own_name),
                         partial(self._files.remove_unit, own_name, runtime=runtime), removed)

        self._with_unit(invocation, name, ask)

    def _configured(self, name: str) -> str:
        """Return the action that setting a unit's own would replace; a slice passes on that of those around it."""
        # Not of a Unit taken before polkit was asked: the unit may have been unloaded and loaded again since.
        units = self._reconciler.units
        if unit_type(name) != "slice":
            return units[name].configured if name in units else ""
        defaults = [units[slice_].configured for slice_ in parent_slices(name) if slice_ in units]
        return next(filter(None, defaults), "")

    def _reload_systemd(self, flags: int) -> None:
        if not flags & NO_RELOAD:
            self._watch.reload()

    def _set_machine(self, invocation: Any, machine: str, word: str, flags: int) -> None:
        action = Action.parse(word)
        check_flags(flags)
        self._files.check_machine(machine)
        self._change(invocation, "set", machine, action, partial(self._machine_configured, machine),
                     partial(self._files.write_machine, machine, action), self._machine_rule_changed)

    def _unset_machine(self, invocation: Any, machine: str, flags: int) -> None:
        check_flags(flags)
        self._files.check_machine(machine)
        self._change(invocation, "unset", machine, "", partial(self._machine_configured, machine),
                     partial(self._files.remove_machine, machine), self._machine_rule_changed)

    def _machine_rule_changed(self, path: Path | None) -> None:
        self._reconciler.sweep()

    def _machine_configured(self, machine: str) -> str:
        """Return the action that a machine's rule would replace, panic if that is one of several."""
        rule, key = self._files.machine_rule(machine), self._files.check_machine(machine).removesuffix(".conf")
        found = {read_setting([rule]).action or "" if rule else "", self._configured(MACHINE_SLICE)}
        found |= {
            unit.configured for unit in self._reconciler.units.values()
            if self._runs(unit.name, key)
        }
        return Action.PANIC if Action.PANIC in found else ""

    def _runs(self, unit: str, machine: str) -> bool:
        """Tell whether a rule for a machine of this name or UUID is about a unit."""
        name = machine_name(unit, self._reconciler.machine_registered(unit))
        return machine in (name, self._reconciler.machine_uuid(unit)) or is_domain(machine, unit)

    def _get_unit(self, invocation: Any, name: str) -> None:
        def answer(unit: Unit) -> None:
            reply(invocation, GLib.Variant("(o)", (unit_path(unit.name),)))

        self._with_unit(invocation, name, answer)

    def _list_units(self, invocation: Any, patterns: list[str]) -> None:
        if len(patterns) > PATTERNS_MAX or sum(map(len, patterns)) > PATTERNS_LENGTH_MAX:
            limits = f"at most {PATTERNS_MAX} patterns of {PATTERNS_LENGTH_MAX} characters together"
            raise Refused("LimitsExceeded", f"{limits} in one call")
        encoded = [pattern.encode() for pattern in patterns]
        units = self._reconciler.units
        names = iter(sorted(units))
        rows = GLib.VariantBuilder(GLib.VariantType("a(ssssso)"))

        def go_on() -> bool:
            """Look at some more units; return whether there are others."""
            until = time.monotonic() + SLICE_SECONDS
            for name in names:
                if name in units and (not patterns or matches(name, encoded)):
                    rows.add_value(row(units[name]))
                if time.monotonic() > until:
                    return True
            reply(invocation, GLib.Variant.new_tuple(rows.end()))
            return False

        if go_on():
            done = self._wait(invocation)

            def sent() -> bool:
                give_back_memory()
                return False

            def again() -> bool:
                more = go_on()
                if not more:
                    done()
                    buscall.after(SENT_MS, sent)
                return more

            buscall.after(0, again)

    def _explain(self, invocation: Any, name: str) -> None:
        def answer(unit: Unit) -> None:
            rows = [(str(c.kind), c.path, c.line, c.value, c.verdict) for c in unit.decision.candidates]
            rows += [("problem", each.path, each.line, "", each.message) for each in unit.decision.problems]
            rows += self._stricter(unit)
            reply(invocation, GLib.Variant("(a(ssuss))", (rows,)))

        self._with_unit(invocation, name, answer)

    def _stricter(self, unit: Unit) -> list[tuple[str, str, int, str, str]]:
        """Return a row of Explain for each cgroup above a unit's whose own value is stricter than the unit's."""
        effective = unit.effective
        rows = []
        for cgroup, action in self._reconciler.tree.above(unit.facts.cgroup):
            if cgroup == effective.cgroup:
                verdict = f"effective: stricter than the unit's own, by {cgroup}"
            else:
                verdict = f"stricter than the unit's own, but {effective.cgroup} decides"
            rows.append(("cgroup", cgroup, 0, str(action), verdict))
        return rows

    def _reload(self, invocation: Any) -> None:
        self._authorized(invocation, "reload", "", "", lambda: self._refresh(lambda: reply(invocation, None)))


def row(unit: Unit) -> Any:
    """Return a unit's row of ListUnits."""
    kind, _, _ = unit.source
    effective = str(unit.effective.action)
    words = unit.name, unit.configured, str(kind), effective, str(unit.state), unit_path(unit.name)
    value = GLib.Variant("(ssssso)", words)
    value.get_data()  # has it serialized: of 10,000 units the strings themselves would take 10 MiB
    return value


def check_flags(flags: int) -> None:
    if flags & ~NO_RELOAD:
        raise Refused("InvalidArgs", f"unknown flags {flags:#x}; bit 0: do not ask systemd to reload")
