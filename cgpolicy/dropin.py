# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where systemd looks for drop-ins, for a unit that it has not told of yet (unit_file_find_dropin_paths()).

Of a unit that PID 1 knows, its DropInPaths count. But a scope's processes are in its cgroup a tenth of a millisecond
after that has appeared, and PID 1 answers nothing until the scope has been started.
"""

from __future__ import annotations

import os
from pathlib import Path

from cgpolicy.unitname import unit_type

# In order of precedence; systemd.unit(5), "Load path when running in system mode". The generators' are left out:
# what they make belongs to units that have a file.
DIRECTORIES = (
    "etc/systemd/system.control",
    "run/systemd/system.control",
    "run/systemd/transient",
    "etc/systemd/system",
    "etc/systemd/system.attached",
    "run/systemd/system",
    "run/systemd/system.attached",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
)


def names(unit: str) -> list[str]:
    """Return the names whose drop-ins count for a unit that is no instance, the most specific first.

    a-b.scope: itself, a-.scope, scope.
    """
    kind = unit_type(unit)
    found = [unit]
    prefix = unit.removesuffix(f".{kind}")
    while "-" in prefix.rstrip("-"):
        prefix = prefix.rstrip("-").rpartition("-")[0]
        found.append(f"{prefix}-.{kind}")
    return [*found, kind]


def find(unit: str, root: Path = Path("/")) -> tuple[str, ...]:
    """Return a unit's drop-ins in the order in which systemd will read them; a masked one is among them."""
    found: dict[str, str] = {}
    for directory in DIRECTORIES:
        for name in names(unit):
            path = f"{root}/{directory}/{name}.d" if root != Path("/") else f"/{directory}/{name}.d"
            try:
                entries = os.listdir(path)
            except OSError:
                continue
            for entry in entries:
                if entry.endswith(".conf"):
                    found.setdefault(entry, f"{path}/{entry}")
    return tuple(found[entry] for entry in sorted(found, key=os.fsencode))
