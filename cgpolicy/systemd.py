# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd's PID 1 says of units (org.freedesktop.systemd1(5)), read with pystemd.

For one look at a time, with or without the daemon; the daemon's own running picture is systemd_watch.py.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cgpolicy.dropin import UNIT_DIRECTORIES, directories
from cgpolicy.error import NotSupported, UserError
from cgpolicy.libsystemd import part
from cgpolicy.policyfile import read_regular
from cgpolicy.setting import SECTION, UNSET, Setting, read_setting
from cgpolicy.unitfile import Problem
from cgpolicy.unitname import POLICY_TYPES, ROOT_SLICE, bus_label_escape, check, template, unit_type

SERVICE = "org.freedesktop.systemd1"
MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"

TRANSIENT = "/run/systemd/transient/"  # gone with the unit

# Most files have no such section, however misspelled, and no line that ends a file for systemd before it is read:
# not valid UTF-8 (said of any that is not ASCII), longer than a mebibyte (or the file is), a header without end.
MENTION = re.compile(SECTION.removeprefix("X-").encode(), re.IGNORECASE)
PLAIN = re.compile(rb"(?:(?:[^\0\r\n\[\x80-\xff][^\0\r\n\x80-\xff]*|\[[^\0\r\n\x80-\xff]*\])?\n)*")

INTERFACES = {kind: f"{SERVICE}.{kind.capitalize()}" for kind in POLICY_TYPES}


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """One unit as PID 1 knows it.

    files: the fragment and then the drop-ins, in the order in which systemd applies them. cgroup: absolute,
    "" while there is none (and "/" never: the root slice's is "" too). slice: "" of the root slice itself.
    """

    name: str
    load_state: str
    files: tuple[str, ...] = ()
    slice: str = ""
    cgroup: str = ""

    @property
    def fragment(self) -> str:
        """The unit's own file, "" if there is none or systemd made it up for a transient unit."""
        first = self.files[0] if self.files else ""
        return "" if first.rpartition("/")[0].endswith(".d") or first.startswith(TRANSIENT) else first

    @property
    def exists(self) -> bool:
        """Tell whether the unit has a file or runs; systemd answers for any valid name, with LoadState=not-found."""
        return self.load_state not in ("not-found", "bad-setting", "error") or bool(self.cgroup)


def unit_path(unit: str) -> str:
    """Return the object path at which PID 1 shows a unit (unit_dbus_path())."""
    return f"{MANAGER_PATH}/unit/{bus_label_escape(unit)}"


def properties(unit: str) -> list[tuple[str, str, str]]:
    """Return the (interface, name, signature) of what UnitFacts needs.

    One Get each: GetAll makes PID 1 collect hundreds of properties and costs several times more than these.
    """
    interface = INTERFACES[unit_type(unit)]
    return [
        (UNIT, "LoadState", "s"),
        (UNIT, "FragmentPath", "s"),
        (UNIT, "DropInPaths", "as"),
        (interface, "Slice", "s"),
        (interface, "ControlGroup", "s"),
    ]


def facts(unit: str, values: dict[str, object]) -> UnitFacts:
    """Make UnitFacts of the values of properties()."""
    fragment, drop_ins = str(values["FragmentPath"]), values["DropInPaths"]
    assert isinstance(drop_ins, list)
    files = [path for path in (fragment, *map(str, drop_ins)) if path]
    parent = str(values["Slice"])
    if unit_type(unit) == "slice" and unit != ROOT_SLICE and not parent:
        parent = ROOT_SLICE
    cgroup = str(values["ControlGroup"])
    load_state = sys.intern(str(values["LoadState"]))  # a few strings for all units
    return UnitFacts(unit, load_state, tuple(files), sys.intern(parent), "" if cgroup == "/" else cgroup)


def read_files(paths: Iterable[str]) -> Setting:
    """Read the setting out of unit files; one that cannot be read says nothing (a mask is empty, a race is gone)."""
    files = []
    too_large = []
    for path in paths:
        try:
            content = read_regular(path)
        except OSError as error:
            if error.errno == errno.EFBIG:
                too_large.append(Problem(path, 0, f"{error.strerror}; ignored"))
            continue
        if MENTION.search(content) or len(content) >= 1 << 20 or not PLAIN.fullmatch(content):
            files.append((path, content))
    setting = read_setting(files) if files else UNSET
    return replace(setting, problems=(*setting.problems, *too_large)) if too_large else setting


def find_drop_ins(unit: str, root: Path = Path("/")) -> tuple[str, ...]:
    """Return a unit's drop-ins in the order in which systemd will read them; a masked one is among them.

    Of a unit that PID 1 knows, its DropInPaths count. But a scope's processes are in its cgroup a tenth of a
    millisecond after that has appeared, and PID 1 answers nothing until the scope has been started.
    """
    found: dict[str, str] = {}
    base = str(root).rstrip("/")
    for directory in directories(unit):
        path = f"{base}/{directory}"
        try:
            entries = os.listdir(path)
        except OSError:
            continue
        for entry in entries:
            if entry.endswith(".conf"):
                found.setdefault(entry, f"{path}/{entry}")
    return tuple(found[entry] for entry in sorted(found, key=os.fsencode))


def find_fragment(unit: str, root: Path = Path("/")) -> str:
    """Return the file that systemd will take a unit from, "" if there is none: its own, or else its template's.

    For find_drop_ins()' reason. An alias's file is found, but of what it is an alias is left to PID 1.
    """
    base = str(root).rstrip("/")
    names = [name for name in (unit, template(unit)) if name]
    paths = (f"{base}/{directory}/{name}" for name in names for directory in UNIT_DIRECTORIES)
    return next(filter(os.path.lexists, paths), "")


class SystemdManager:
    """A connection to PID 1 by the system bus, for programs that ask and end."""

    def __init__(self) -> None:
        # Here and not above: most who import this module do not ask PID 1 this way.
        self._failed = part("dbusexc").DBusBaseError
        self._bus = part("dbuslib").DBus()
        try:
            self._bus.open()
        except self._failed as error:
            raise UserError(f"no system bus to reach systemd by: {error}", hint="is dbus.service running?") from None

    def close(self) -> None:
        self._bus.close()

    def _get(self, path: str, interface: str, name: str, signature: str) -> object:
        try:
            value = self._bus.get_property(
                SERVICE.encode(), path.encode(), interface.encode(), name.encode(), signature.encode()
            )
        except self._failed as error:
            raise UserError(f"systemd does not tell {name}: {error}", hint="this needs systemd as PID 1") from None
        if isinstance(value, list):
            return [item.decode() for item in value]
        return value.decode() if isinstance(value, bytes) else value

    def version(self) -> str:
        """Return systemd's version as it prints it itself."""
        return str(self._get(MANAGER_PATH, MANAGER, "Version", "s"))

    def unit(self, name: str) -> UnitFacts:
        """Return the facts of a unit, which PID 1 loads for it; raise InvalidUnitName, NotSupported by type."""
        if unit_type(check(name)) not in POLICY_TYPES:
            raise NotSupported(f"{name}: a {unit_type(name)} unit has no control group")
        path = unit_path(name)
        return facts(name, {prop: self._get(path, interface, prop, sig) for interface, prop, sig in properties(name)})

    def loaded_units(self) -> list[str]:
        """Return the names of the loaded units that can have a policy."""
        rows = self._bus.call_method(SERVICE.encode(), MANAGER_PATH.encode(), MANAGER.encode(), b"ListUnits", []).body
        names = [row[0].decode() for row in rows]
        return sorted(name for name in names if unit_type(name) in POLICY_TYPES)

    def unit_files_of_all(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each loaded unit that can have a policy, with its files in order."""
        for name in self.loaded_units():
            yield name, list(self.unit(name).files)
