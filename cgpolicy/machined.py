# SPDX-License-Identifier: LGPL-2.1-or-later
"""UUIDs of virtual machines and containers, from systemd-machined (org.freedesktop.machine1(5))."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from gi.repository import Gio, GLib

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

    def start(self) -> None:
        """Subscribe, and read the machines that run already."""
        self._bus.subscribe(
            sender=SERVICE, iface=MANAGER, signal="MachineNew", object=MANAGER_PATH,
            signal_fired=partial(strip, self._new),
        )

        def listed(reply: Any) -> None:
            for name, _, _, path in reply.unpack()[0] if reply is not None else []:
                self._new(name, path)

        self._call(MANAGER_PATH, MANAGER, "ListMachines", None, listed)

    def uuid(self, unit: str) -> str | None:
        """Return the UUID of the machine that a unit runs, lower case with hyphens, None if it has none."""
        return self._uuids.get(unit)

    def forget(self, unit: str) -> None:
        """Drop what is known of a unit that is gone."""
        self._uuids.pop(unit, None)

    def _new(self, name: str, path: str) -> None:
        def got(reply: Any) -> None:
            values = reply.unpack()[0] if reply is not None else {}
            number, unit = bytes(values.get("Id", b"")), values.get("Unit", "")
            if unit and len(number) == 16 and any(number):
                self._uuids[unit] = str(uuid.UUID(bytes=number))
                self._changed(unit)

        self._call(path, "org.freedesktop.DBus.Properties", "GetAll", GLib.Variant("(s)", (MACHINE,)), got)

    def _call(self, path: str, interface: str, method: str, arguments: Any, done: Callable[[Any], None]) -> None:
        def answered(connection: Any, result: Any) -> None:
            try:
                reply = connection.call_finish(result)
            except GLib.Error:
                reply = None  # machined is not there, or the machine is gone again
            done(reply)

        self._bus.con.call(
            SERVICE, path, interface, method, arguments, None, Gio.DBusCallFlags.NO_AUTO_START, TIMEOUT_MS, None,
            answered,
        )
