# SPDX-License-Identifier: LGPL-2.1-or-later
"""PID 1's units as they come and go: asynchronous reads and systemd's own signals, on the daemon's bus connection."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

from gi.repository import GLib

from cgpolicy import buscall
from cgpolicy.systemd import MANAGER, MANAGER_PATH, SERVICE, UNIT, UnitFacts, facts, properties, unit_path
from cgpolicy.unitname import POLICY_TYPES, bus_label_unescape, unit_type

# Calls under way at once; the bus allows 128 replies to be pending for a connection (dbus-daemon(1), system.conf).
WINDOW = 64

# Many units are listed in parts that differ in how the names end (before the suffix; fnmatch(3)): the list of 10,000
# takes 13 MiB, and numbers or hexadecimal digits tell so many apart. Not few, since each part waits for whatever
# PID 1 does before. Mount, scope, service, slice, socket, swap begin with m or s.
PARTS = tuple(f"*{last}.[ms]*" for last in ("[01]", "[23]", "[45]", "[67]", "[89]", "[!0-9]"))
MANY = 1000

# PID 1 answers nothing while it reloads, which takes seconds on a host with many units.
TIMEOUT_MS = 120_000

# An announcement so soon after a read is put off: it was made by the read if the unit is unloaded right after it.
ECHO_MS = 100

Values = tuple[Any, ...] | None  # of an answer; None instead of an error
Answered = Callable[[Values], None]
Ask = Callable[[Callable[[Any], None]], None]  # sends a question; what it is given takes the answer
Read = Callable[[UnitFacts | None], None]
NOTHING: Mapping[str, object] = MappingProxyType({})


class SystemdWatch:
    """Tells of units that are loaded, changed or gone.

    loaded: a unit's facts are new or may have changed. removed: PID 1 has unloaded it. reloads: it begins (True) to
    read all files, or has. refresh: everything has to be read again (it has reloaded, or was executed anew).
    """

    def __init__(
        self, bus: Any, *, loaded: Callable[[UnitFacts], None], removed: Callable[[str], None],
        reloads: Callable[[bool], None], refresh: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._loaded = loaded
        self._removed = removed
        self._reloads = reloads
        self._refresh = refresh
        self._queue: deque[tuple[Ask, Callable[[Any], None]]] = deque()
        self._under_way = 0
        self._reading: dict[str, list[Read]] = {}
        self._again: dict[str, list[Read]] = {}
        self._reload_wanted = False
        self._reloading = False
        # PID 1 takes all units away and makes them anew when it reloads. From then on until they are listed,
        # its signals about single units are noise: whoever listens would read everything twice more.
        self._anew = 0
        self._listed = 0
        self._loaded_before = 0  # how many units were listed last
        # A question about a unit makes PID 1 load it, announce it, and unload it if nobody needs it. To ask again
        # because of that announcement would never end.
        self._ended: OrderedDict[str, float] = OrderedDict()  # when a unit was read last
        self._echoes: dict[str, int] = {}

    def start(self) -> None:
        """Subscribe to systemd's signals, which it does not send before somebody has (org.freedesktop.systemd1(5))."""
        for signal, handler in (
            ("UnitNew", self._unit_new),
            ("UnitRemoved", self._unit_removed),
            ("JobRemoved", self._job_removed),
            ("Reloading", self._systemd_reloading),
        ):
            self._bus.subscribe(
                sender=SERVICE, iface=MANAGER, signal=signal, object=MANAGER_PATH, signal_fired=partial(strip, handler)
            )
        self._bus.subscribe(
            sender="org.freedesktop.DBus", iface="org.freedesktop.DBus", signal="NameOwnerChanged", arg0=SERVICE,
            signal_fired=partial(strip, self._systemd_owner),
        )
        self._call(MANAGER_PATH, MANAGER, "Subscribe", None, lambda values: None)

    def list_units(self, done: Callable[[dict[str, str] | None], None]) -> None:
        """Hand over the loaded units that can have a policy with their LoadState, None if PID 1 does not answer."""
        parts = [[pattern] for pattern in PARTS] if self._loaded_before > MANY else [list(PARTS)]
        self._list_part(iter(parts), self._anew, {}, done)

    def _list_part(
        self, parts: Iterator[list[str]], asked: int, units: dict[str, str],
        done: Callable[[dict[str, str] | None], None],
    ) -> None:
        patterns = next(parts, None)
        if patterns is None:
            self._loaded_before = len(units)
            done(units or None)
            return

        def listed(rows: Iterable[tuple[str, ...]] | None) -> None:
            self._listed = asked  # of the other parts, too: they are asked for later than this
            if rows is None:
                done(None)
                return
            units.update((name, sys.intern(state)) for name, state in rows if unit_type(name) in POLICY_TYPES)
            buscall.after(0, go_on)  # without the answer

        def go_on() -> bool:
            self._list_part(parts, asked, units, done)
            return False

        lists: tuple[list[str], ...] = ([], patterns)
        buscall.table(
            self._bus.con, SERVICE, MANAGER_PATH, MANAGER, "ListUnitsByPatterns", lists, (0, 2), TIMEOUT_MS, listed
        )

    def read_all(self, units: Mapping[str, str], done: Callable[[list[UnitFacts]], None]) -> None:
        """Read many units whose LoadState is known; done comes once, with those that could be read.

        What the cgroup file system tells of all at once is not asked for: ControlGroup is left "".
        """
        _Round(self.read, units, done).begin(WINDOW)

    def find(self, name: str, done: Callable[[str | None], None]) -> None:
        """Hand over the name under which PID 1 keeps a unit, another one if this is an alias; None if it cannot."""

        def loaded(values: Values) -> None:
            label = values[0].rpartition("/")[2] if values is not None else ""
            done(bus_label_unescape(label) or None)

        ask = partial(self._call, MANAGER_PATH, MANAGER, "LoadUnit", GLib.Variant("(s)", (name,)))
        self._queue.append((ask, loaded))
        self._pump()

    def read(self, unit: str, done: Read, known: Mapping[str, object] = NOTHING) -> None:
        """Read one unit but for what is known, PID 1 loading it if need be; done gets None if that failed."""
        if unit in self._reading:
            # What is under way may already be old: answer with a read that starts later.
            self._again.setdefault(unit, []).append(done)
            return
        self._reading[unit] = [done]
        self._begin(unit, known)

    def outdated(self, units: list[str], done: Callable[[set[str]], None]) -> None:
        """Hand over which of some loaded units have files that PID 1 has not read since they were changed."""
        found: set[str] = set()
        missing = len(units)
        if not units:
            done(found)

        def one(unit: str, values: Values) -> None:
            nonlocal missing
            missing -= 1
            if values is not None and values[0]:
                found.add(unit)
            if not missing:
                done(found)

        for unit in units:
            arguments = GLib.Variant("(ss)", (UNIT, "NeedDaemonReload"))
            ask = partial(self._call, unit_path(unit), buscall.PROPERTIES, "Get", arguments)
            self._queue.append((ask, partial(one, unit)))
        self._pump()

    def reload(self) -> None:
        """Ask systemd to reload its configuration, without waiting; requests made meanwhile become one."""
        if self._reloading:
            self._reload_wanted = True
            return
        self._reloading = True

        def reloaded(values: Values) -> None:
            self._reloading = False
            if self._reload_wanted:
                self._reload_wanted = False
                self.reload()

        self._call(MANAGER_PATH, MANAGER, "Reload", None, reloaded)

    def _begin(self, unit: str, known: Mapping[str, object]) -> None:
        values = dict(known)
        wanted = [(interface, name) for interface, name, _ in properties(unit) if name not in known]
        complete = len(values) + len(wanted)
        failed = False

        def got(name: str, value: object) -> None:
            nonlocal failed
            if value is None:
                failed = True
            values[name] = value
            if len(values) == complete:
                self._finish(unit, None if failed else facts(unit, values))

        path = unit_path(unit)
        for interface, name in wanted:
            ask = partial(buscall.get, self._bus.con, SERVICE, path, interface, name, TIMEOUT_MS)
            self._queue.append((ask, partial(got, name)))
        self._pump()

    def _finish(self, unit: str, result: UnitFacts | None) -> None:
        waiting = self._reading.pop(unit)
        now = time.monotonic()
        self._ended[unit] = now
        self._ended.move_to_end(unit)
        while now - next(iter(self._ended.values())) > ECHO_MS / 1000:
            self._ended.popitem(last=False)
        if unit in self._again:
            self._reading[unit] = self._again.pop(unit)
            self._begin(unit, NOTHING)
        for done in waiting:
            done(result)

    def _pump(self) -> None:
        while self._queue and self._under_way < WINDOW:
            ask, done = self._queue.popleft()
            self._under_way += 1

            def answered(value: Any, done: Callable[[Any], None] = done) -> None:
                self._under_way -= 1
                done(value)
                self._pump()

            ask(answered)

    def _call(self, path: str, interface: str, method: str, arguments: Any, done: Answered) -> None:
        # Of an error nothing is said: the unit went away meanwhile, or PID 1 is being executed anew, and a signal
        # tells what is next.
        buscall.call(
            self._bus.con, SERVICE, path, interface, method, arguments, TIMEOUT_MS, lambda values, error: done(values)
        )

    def _counts(self, unit: str) -> bool:
        """Tell whether a signal about a unit is news of one that can have a policy."""
        return self._listed == self._anew and unit_type(unit) in POLICY_TYPES

    def _reread(self, unit: str) -> None:
        if self._counts(unit):
            self.read(unit, lambda result: self._loaded(result) if result is not None else None)

    def _unit_new(self, unit: str, path: str) -> None:
        if unit in self._reading or unit in self._echoes or not self._counts(unit):
            return
        if time.monotonic() - self._ended.get(unit, 0.0) > ECHO_MS / 1000:
            self._reread(unit)
            return

        def no_echo() -> bool:
            del self._echoes[unit]
            self._reread(unit)
            return False

        self._echoes[unit] = buscall.after(ECHO_MS, no_echo)

    def _unit_removed(self, unit: str, path: str) -> None:
        if unit in self._echoes:
            buscall.cancel(self._echoes.pop(unit))
        if self._counts(unit):
            self._removed(unit)

    def _job_removed(self, number: int, path: str, unit: str, result: str) -> None:
        # A job's end is when a unit's cgroup has come or gone for sure.
        self._reread(unit)

    def _systemd_reloading(self, active: bool) -> None:
        # FragmentPath and DropInPaths never appear in PropertiesChanged.
        self._anew += 1
        self._reloads(active)
        if not active:
            self._refresh()

    def _systemd_owner(self, name: str, old: str, new: str) -> None:
        if new:
            # A new bus client: subscriptions are gone with the old one (daemon-reexec).
            self._call(MANAGER_PATH, MANAGER, "Subscribe", None, lambda values: self._refresh())


class _Round:
    """Reads many units, some at a time: what is to be asked of 10,000 takes 20 MiB, which Python would not give back.

    Not functions that refer to each other: Python would find such a circle, and all that it holds, only after a while.
    """

    def __init__(
        self, read: Callable[[str, Read, Mapping[str, object]], None], units: Mapping[str, str],
        done: Callable[[list[UnitFacts]], None],
    ) -> None:
        self._read = read
        self._waiting = iter(units.items())
        self._missing = len(units)
        self._done = done
        self._found: list[UnitFacts] = []

    def begin(self, count: int) -> None:
        """Begin to read so many more."""
        if not self._missing:
            self._done(self._found)
        for name, load_state in islice(self._waiting, count):
            self._read(name, self._one, {"LoadState": load_state, "ControlGroup": ""} if load_state else {})

    def _one(self, unit: UnitFacts | None) -> None:
        self._missing -= 1
        if unit is not None:
            self._found.append(unit)
        self.begin(1)


def strip(handler: Callable[..., None], sender: str, path: str, interface: str, signal: str, values: Any) -> None:
    """Pass only a signal's values on."""
    handler(*values)
