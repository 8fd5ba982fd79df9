# SPDX-License-Identifier: LGPL-2.1-or-later
"""cgpolicyd as its clients see it (org.cgpolicy1(5)): calls that raise UserError, rows and signals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gi.repository import Gio, GLib

from cgpolicy.error import NoSuchUnit, UserError

NAME = "org.cgpolicy1"
MANAGER_PATH = "/org/cgpolicy1"
MANAGER = f"{NAME}.Manager"
UNIT = f"{NAME}.Unit"
NO_RELOAD = 1  # flag bit 0 of the methods that write: do not ask systemd to reload

# A person may have to find a password first; the daemon itself answers in milliseconds.
TIMEOUT_MILLISECONDS = 300_000

ATTEMPTS = 10  # to catch a unit that systemd unloads between two calls

BY_BUS_NAME = {kind.bus_name: kind for kind in UserError.__subclasses__()}


class NotRunning(UserError):
    """Nobody owns the daemon's name, and the bus could not start one."""


class Unloaded(UserError):
    """The unit's object has left the bus: systemd keeps no unit that nobody needs."""


@dataclass(frozen=True, slots=True)
class UnitRow:
    """A row of ListUnits; configured is "" if nothing is."""

    unit: str
    configured: str
    source: str
    effective: str
    state: str
    path: str


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """A row of Explain."""

    kind: str
    path: str
    line: int
    value: str
    verdict: str


def user_error(failure: GLib.Error) -> UserError:
    """Return a failed call's error as the exception that the daemon raised."""
    name = Gio.DBusError.get_remote_error(failure) or ""
    # Not Gio.DBusError.strip_remote_error(): PyGObject gives it a copy.
    message = str(failure.message).removeprefix(f"GDBus.Error:{name}: ")
    if name.startswith(f"{NAME}.Error."):
        return BY_BUS_NAME.get(name.rpartition(".")[2], UserError)(message)
    if name.rpartition(".")[2] in ("ServiceUnknown", "NameHasNoOwner", "SpawnChildExited", "NoReply"):
        return NotRunning(f"cgpolicyd does not answer: {message}", hint="see systemctl status cgpolicyd")
    if name.rpartition(".")[2] in ("UnknownObject", "UnknownMethod"):
        return Unloaded(message)
    return UserError(message)


class Client:
    """A connection to cgpolicyd on the system bus."""

    def __init__(self) -> None:
        try:
            self._bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
        except GLib.Error as failure:
            raise NotRunning(f"no system bus: {failure.message}", hint="is dbus.service running?") from None

    def _call(self, path: str, interface: str, method: str, arguments: GLib.Variant | None = None) -> Any:
        try:
            answer = self._bus.call_sync(
                NAME, path, interface, method, arguments, None,
                Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION, TIMEOUT_MILLISECONDS,
            )  # fmt: skip
        except GLib.Error as failure:
            raise user_error(failure) from None
        return answer.unpack()

    def _properties(self, path: str, interface: str) -> dict[str, Any]:
        arguments = GLib.Variant("(s)", (interface,))
        (values,) = self._call(path, "org.freedesktop.DBus.Properties", "GetAll", arguments)
        return dict(values)

    def manager(self) -> dict[str, Any]:
        """Return the Manager's properties."""
        return self._properties(MANAGER_PATH, MANAGER)

    def units(self, patterns: Sequence[str] = ()) -> list[UnitRow]:
        """Return the units that match any of the patterns, all without one."""
        (rows,) = self._call(MANAGER_PATH, MANAGER, "ListUnits", GLib.Variant("(as)", (list(patterns),)))
        return [UnitRow(*row) for row in rows]

    def unit(self, name: str) -> dict[str, Any]:
        """Return a unit's properties; raise NoSuchUnit."""
        for _ in range(ATTEMPTS):
            (path,) = self._call(MANAGER_PATH, MANAGER, "GetUnit", GLib.Variant("(s)", (name,)))
            try:
                return self._properties(path, UNIT)
            except Unloaded:  # by systemd, between the two calls; GetUnit has it loaded again
                continue
        raise NoSuchUnit(f"{name}: systemd unloads it again and again", hint="start it first")

    def explain(self, name: str) -> list[CandidateRow]:
        """Return every place that was looked at for a unit's policy."""
        (rows,) = self._call(MANAGER_PATH, MANAGER, "Explain", GLib.Variant("(s)", (name,)))
        return [CandidateRow(*row) for row in rows]

    def set_unit(self, name: str, action: str, *, runtime: bool, flags: int = 0) -> None:
        self._call(MANAGER_PATH, MANAGER, "SetUnitPolicy", GLib.Variant("(ssbt)", (name, action, runtime, flags)))

    def unset_unit(self, name: str, *, runtime: bool, flags: int = 0) -> None:
        self._call(MANAGER_PATH, MANAGER, "UnsetUnitPolicy", GLib.Variant("(sbt)", (name, runtime, flags)))

    def set_machine(self, name: str, action: str) -> None:
        self._call(MANAGER_PATH, MANAGER, "SetMachinePolicy", GLib.Variant("(sst)", (name, action, 0)))

    def unset_machine(self, name: str) -> None:
        self._call(MANAGER_PATH, MANAGER, "UnsetMachinePolicy", GLib.Variant("(st)", (name, 0)))

    def monitor(self, seen: Callable[[str, tuple[Any, ...]], None]) -> None:
        """Pass on the Manager's signals, by name and values, until interrupted or seen() raises."""
        loop = GLib.MainLoop()
        failures: list[Exception] = []

        def on_signal(bus: Any, sender: str, path: str, interface: str, name: str, values: Any) -> None:
            try:
                seen(name, values.unpack())
            except Exception as failure:  # GLib would print it and go on
                failures.append(failure)
                loop.quit()

        self._bus.signal_subscribe(NAME, MANAGER, None, MANAGER_PATH, None, Gio.DBusSignalFlags.NONE, on_signal)
        self.manager()  # starts the daemon, or says why not
        loop.run()
        for failure in failures:
            raise failure
