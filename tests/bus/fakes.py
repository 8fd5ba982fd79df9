# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cgpolicyd talks to: a systemd with units from a directory, and a polkit that obeys the test."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from gi.repository import Gio, GLib

from cgpolicy.systemd import INTERFACES, MANAGER, MANAGER_PATH, SERVICE, UNIT, unit_path
from cgpolicy.unitname import unit_type
from tests.bus.privatebus import Client

SYSTEMD_XML = f"""<node>
  <interface name="{MANAGER}">
    <method name="Subscribe"/>
    <method name="Reload"/>
    <method name="LoadUnit"><arg type="s" direction="in"/><arg type="o" direction="out"/></method>
    <method name="ListUnitsByPatterns">
      <arg type="as" direction="in"/><arg type="as" direction="in"/><arg type="a(ssssssouso)" direction="out"/>
    </method>
    <signal name="UnitNew"><arg type="s"/><arg type="o"/></signal>
    <signal name="UnitRemoved"><arg type="s"/><arg type="o"/></signal>
    <signal name="JobRemoved"><arg type="u"/><arg type="o"/><arg type="s"/><arg type="s"/></signal>
    <signal name="Reloading"><arg type="b"/></signal>
  </interface>
  <interface name="{UNIT}">
    <property name="LoadState" type="s" access="read"/>
    <property name="FragmentPath" type="s" access="read"/>
    <property name="DropInPaths" type="as" access="read"/>
    <property name="NeedDaemonReload" type="b" access="read"/>
  </interface>
""" + "".join(
    f"""<interface name="{interface}">
    <property name="Slice" type="s" access="read"/>
    <property name="ControlGroup" type="s" access="read"/>
  </interface>"""
    for interface in INTERFACES.values()
) + "</node>"

POLKIT = "org.freedesktop.PolicyKit1"
POLKIT_XML = """<node>
  <interface name="org.freedesktop.PolicyKit1.Authority">
    <method name="CheckAuthorization">
      <arg type="(sa{sv})" direction="in"/><arg type="s" direction="in"/><arg type="a{ss}" direction="in"/>
      <arg type="u" direction="in"/><arg type="s" direction="in"/><arg type="(bba{ss})" direction="out"/>
    </method>
    <method name="CancelCheckAuthorization"><arg type="s" direction="in"/></method>
  </interface>
</node>"""


@dataclass(slots=True)
class FakeUnit:
    """A unit as systemd shows it; drop_ins is what it read when it last loaded its files."""

    name: str
    fragment: str = ""
    slice: str = "system.slice"
    cgroup: str = ""
    load_state: str = "loaded"
    drop_ins: tuple[str, ...] = ()

    def value(self, name: str) -> Any:
        values = {
            "LoadState": ("s", self.load_state),
            "FragmentPath": ("s", self.fragment),
            "DropInPaths": ("as", self.drop_ins),
            "Slice": ("s", self.slice),
            "ControlGroup": ("s", self.cgroup),
        }
        return GLib.Variant(*values[name])


class FakeSystemd:
    """org.freedesktop.systemd1: unit files below a root directory; signals only to those who have subscribed."""

    def __init__(self, client: Client, root: Path) -> None:
        self.client = client
        self.root = root
        self.units: dict[str, FakeUnit] = {}
        self.listed: set[str] = set()
        self.aliases: dict[str, str] = {}
        self._objects: dict[str, list[int]] = {}
        self.reloads = 0
        self.gets: Counter[str] = Counter()
        self.subscribed = False
        self.holding = False
        self._held: list[Callable[[], None]] = []
        self._info = Gio.DBusNodeInfo.new_for_xml(SYSTEMD_XML)
        self._register(MANAGER_PATH, MANAGER, self._manager)
        client.own(SERVICE)

    def _register(self, path: str, interface: str, call: Callable[..., None]) -> int:
        # Without getters GDBus hands Properties.Get to the method handler, which can hold it back.
        info = self._info.lookup_interface(interface)
        return int(self.client.connection.register_object(path, info, call, None, None))

    def add(self, name: str, *, listed: bool = True, **values: Any) -> FakeUnit:
        """Make a unit known; one that is not listed is loaded when somebody asks for it."""
        unit = FakeUnit(name, **values)
        unit.drop_ins = self.find_drop_ins(name)
        if listed:
            self.listed.add(name)
        self.take(unit)
        return unit

    def take(self, unit: FakeUnit) -> None:
        """Show a unit on the bus."""
        name = unit.name
        self.units[name] = unit
        for interface in (UNIT, INTERFACES[unit_type(name)]):
            number = self._register(unit_path(name), interface, partial(self._unit, unit))
            self._objects.setdefault(name, []).append(number)

    def forget(self, name: str) -> None:
        """Unload a unit that has no file."""
        self.unit_removed(name)
        del self.units[name]
        for number in self._objects.pop(name):
            self.client.connection.unregister_object(number)

    def find_drop_ins(self, name: str) -> tuple[str, ...]:
        """Return a unit's drop-ins; of one base name the directory with precedence counts (systemd.unit(5))."""
        found: dict[str, str] = {}
        for base in ("run/systemd/system", "etc/systemd/system"):
            found |= {path.name: str(path) for path in (self.root / base / f"{name}.d").glob("*.conf")}
        return tuple(found[name] for name in sorted(found))

    def emit(self, signal: str, signature: str, *values: object) -> None:
        if self.subscribed:
            values_ = GLib.Variant(signature, values)
            self.client.connection.emit_signal(None, MANAGER_PATH, MANAGER, signal, values_)

    def unit_new(self, name: str) -> None:
        self.listed.add(name)
        self.emit("UnitNew", "(so)", name, unit_path(name))

    def unit_removed(self, name: str) -> None:
        self.listed.discard(name)
        self.emit("UnitRemoved", "(so)", name, unit_path(name))

    def job_removed(self, name: str) -> None:
        self.emit("JobRemoved", "(uoss)", 1, f"{MANAGER_PATH}/job/1", name, "done")

    def reload(self) -> None:
        """Do as systemctl daemon-reload does."""
        self.reloads += 1
        self.emit("Reloading", "(b)", True)
        for unit in self.units.values():
            unit.drop_ins = self.find_drop_ins(unit.name)
        self.emit("Reloading", "(b)", False)

    def go_on(self) -> None:
        """Answer what was held back."""
        self.holding = False
        held, self._held = self._held, []
        for answer in held:
            answer()

    @property
    def held(self) -> int:
        return len(self._held)

    def _manager(
        self, connection: Any, sender: str, path: str, interface: str, method: str, arguments: Any, invocation: Any
    ) -> None:
        if method == "Subscribe":
            self.subscribed = True
            invocation.return_value(None)
        elif method == "LoadUnit":
            # PID 1 makes a unit for any name that it is asked about; an alias leads to the unit itself.
            (name,) = arguments.unpack()
            invocation.return_value(GLib.Variant("(o)", (unit_path(self.aliases.get(name, name)),)))
        elif method == "Reload":
            self.reload()
            invocation.return_value(None)
        else:
            _, patterns = arguments.unpack()
            rows = [(name, name, "loaded", "active", "running", "", unit_path(name), 0, "", "/")
                    for name in sorted({*self.listed, "basic.target", "sys-module-fuse.s.target"})
                    if any(fnmatchcase(name, pattern) for pattern in patterns)]
            invocation.return_value(GLib.Variant("(a(ssssssouso))", (rows,)))

    def _unit(
        self, unit: FakeUnit, connection: Any, sender: str, path: str, interface: str, method: str, arguments: Any,
        invocation: Any,
    ) -> None:
        _, name = arguments.unpack()

        def answer() -> None:
            self.gets[unit.name] += 1
            if name == "NeedDaemonReload":
                value = GLib.Variant("b", self.find_drop_ins(unit.name) != unit.drop_ins)
            else:
                value = unit.value(name)
            invocation.return_value(GLib.Variant("(v)", (value,)))
            if unit.name not in self.listed:
                # PID 1 loads a unit to answer for it, and unloads it again.
                self.emit("UnitNew", "(so)", unit.name, unit_path(unit.name))
                self.emit("UnitRemoved", "(so)", unit.name, unit_path(unit.name))

        if self.holding:
            self._held.append(answer)
        else:
            answer()


@dataclass(frozen=True, slots=True)
class Question:
    """What polkit was asked."""

    sender: str
    action_id: str
    details: dict[str, str]
    flags: int
    cookie: str
    invocation: Any

    def answer(self, authorized: bool, challenge: bool = False) -> None:
        self.invocation.return_value(GLib.Variant("((bba{ss}))", ((authorized, challenge, {}),)))


class FakePolkit:
    """org.freedesktop.PolicyKit1: allow, deny, challenge (says that a password is needed) or hang."""

    def __init__(self, client: Client, answer: str = "allow") -> None:
        self.client = client
        self.answer = answer
        self.questions: list[Question] = []
        self.cancelled: list[str] = []
        info = Gio.DBusNodeInfo.new_for_xml(POLKIT_XML).interfaces[0]
        client.connection.register_object("/org/freedesktop/PolicyKit1/Authority", info, self._call, None, None)
        client.own(POLKIT)

    def _call(
        self, connection: Any, sender: str, path: str, interface: str, method: str, arguments: Any, invocation: Any
    ) -> None:
        if method == "CancelCheckAuthorization":
            self.cancelled.append(arguments.unpack()[0])
            invocation.return_value(None)
            return
        (kind, subject), action_id, details, flags, cookie = arguments.unpack()
        assert kind == "system-bus-name"
        question = Question(subject["name"], action_id, details, flags, cookie, invocation)
        self.questions.append(question)
        if self.answer != "hang":
            question.answer(self.answer == "allow", self.answer == "challenge")


MACHINE1 = "org.freedesktop.machine1"
MACHINE1_PATH = "/org/freedesktop/machine1"
MACHINE1_XML = f"""<node>
  <interface name="{MACHINE1}.Manager">
    <method name="ListMachines"><arg type="a(ssso)" direction="out"/></method>
    <signal name="MachineNew"><arg type="s"/><arg type="o"/></signal>
  </interface>
  <interface name="{MACHINE1}.Machine">
    <property name="Id" type="ay" access="read"/>
    <property name="Unit" type="s" access="read"/>
  </interface>
</node>"""


class FakeMachined:
    """org.freedesktop.machine1, with the machines that a test adds."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._rows: list[tuple[str, str, str, str]] = []
        self._info = Gio.DBusNodeInfo.new_for_xml(MACHINE1_XML)
        self._register(MACHINE1_PATH, "Manager", self._list, None)
        client.own(MACHINE1)

    def _register(self, path: str, interface: str, call: Any, get: Any) -> None:
        info = self._info.lookup_interface(f"{MACHINE1}.{interface}")
        self.client.connection.register_object(path, info, call, get, None)

    def add(self, name: str, unit: str, number: uuid.UUID) -> None:
        path = f"{MACHINE1_PATH}/machine/_{len(self._rows)}"
        values = {"Id": GLib.Variant("ay", number.bytes), "Unit": GLib.Variant("s", unit)}
        self._register(path, "Machine", None, lambda *arguments: values[arguments[-1]])
        self._rows.append((name, "vm", "libvirt-qemu", path))
        self.client.connection.emit_signal(
            None, MACHINE1_PATH, f"{MACHINE1}.Manager", "MachineNew", GLib.Variant("(so)", (name, path)))

    def _list(self, *arguments: Any) -> None:
        arguments[-1].return_value(GLib.Variant("(a(ssso))", (self._rows,)))
