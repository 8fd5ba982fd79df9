# SPDX-License-Identifier: LGPL-2.1-or-later
"""UUIDs and names of virtual machines and containers, from systemd-machined (org.freedesktop.machine1(5))."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from gi.repository import GLib

from cgpolicy import buscall
from cgpolicy.systemd_watch import strip

SERVICE = "org.freedesktop.machine1"
MANAGER_PATH = "/org/freedesktop/machine1"
MANAGER = f"{SERVICE}.Manager"
MACHINE = f"{SERVICE}.Machine"
TIMEOUT_MS = 10_000


class MachineWatch:
    """Knows which unit runs which machine, by UUID, as long as machined runs; never starts it."""

    def __init__(self, bus: Any, changed: Callable[[str], None]) -> None:
        self._bus = bus
        self._changed = changed
        self._uuids: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def start(self) -> None:
        """Subscribe, and read the machines that run already."""
        self._bus.subscribe(
            sender=SERVICE, iface=MANAGER, signal="MachineNew", object=MANAGER_PATH,
            signal_fired=partial(strip, self._new),
        )

        def listed(values: tuple[Any, ...] | None, error: str) -> None:
            for name, _, _, path in values[0] if values is not None else []:
                self._new(name, path)

        self._call(MANAGER_PATH, MANAGER, "ListMachines", None, listed)

    def uuid(self, unit: str) -> str | None:
        """Return the UUID of the machine that a unit runs, lower case with hyphens, None if it has none."""
        return self._uuids.get(unit)

    def name(self, unit: str) -> str | None:
        """Return what machined calls the machine that a unit runs, None if it knows none."""
        return self._names.get(unit)

    def forget(self, unit: str) -> None:
        """Drop what is known of a unit that is gone."""
        self._uuids.pop(unit, None)
        self._names.pop(unit, None)

    def _new(self, name: str, path: str) -> None:
        def got(values: tuple[Any, ...] | None, error: str) -> None:
            machine = values[0] if values is not None else {}  # it is gone again
            number, unit = bytes(machine.get("Id", b"")), machine.get("Unit", "")
            if not unit:
                return
            self._names[unit] = name
            if len(number) == 16 and any(number):
                self._uuids[unit] = str(uuid.UUID(bytes=number))
            self._changed(unit)

        self._call(path, "org.freedesktop.DBus.Properties", "GetAll", GLib.Variant("(s)", (MACHINE,)), got)

    def _call(self, path: str, interface: str, method: str, arguments: Any, done: buscall.Done) -> None:
        buscall.call(
            self._bus.con, SERVICE, path, interface, method, arguments, TIMEOUT_MS, done, start_service=False
        )
