# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a unit's drop-ins can be, and which of one name counts (systemd: src/shared/dropin.c; systemd.unit(5)).

Which files a unit has is for systemd to say (DropInPaths). This is for what it has not read yet. Compared with
systemd's own function in tests/unit/test_dropin.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from cgpolicy.unitname import template, unit_type

# Below /, those with precedence first (src/libsystemd/sd-path/path-lookup.c, lookup_paths_init()).
UNIT_DIRECTORIES = (
    "etc/systemd/system.control",
    "run/systemd/system.control",
    "run/systemd/transient",
    "run/systemd/generator.early",
    "etc/systemd/system",
    "etc/systemd/system.attached",
    "run/systemd/system",
    "run/systemd/system.attached",
    "run/systemd/generator",
    "usr/local/lib/systemd/system",
    "lib/systemd/system",
    "usr/lib/systemd/system",
    "run/systemd/generator.late",
)


def names(unit: str) -> Iterator[str]:
    """Yield the names whose .d directories count for a unit, except that of its type: the most specific first."""
    yield unit
    general = template(unit)
    if general is not None:
        yield from names(general)
    stem, _, suffix = unit.rpartition(".")
    prefix, _, instance = stem.partition("@")
    # a-b-c: a-b- and a-; the dash at the end belongs to the prefix. A template's prefixes are those of a plain unit.
    dash = prefix.removesuffix("-").rfind("-")
    if dash > 0:
        yield from names(f"{prefix[:dash]}-{'@' if instance else ''}{instance}.{suffix}")


def directories(unit: str) -> list[str]:
    """Return the directories of a unit's drop-ins, relative to /; of one base name the first one counts."""
    found = [f"{base}/{name}.d" for base in UNIT_DIRECTORIES for name in names(unit)]
    # What is for all units of a type comes last, in whatever directory it is.
    found += [f"{base}/{unit_type(unit)}.d" for base in UNIT_DIRECTORIES]
    return list(dict.fromkeys(found))


def with_drop_in(files: tuple[str, ...], path: str) -> tuple[str, ...]:
    """Return a unit's files with one drop-in more, in the place where systemd will put it.

    Drop-ins are sorted bytewise by their base names, and of one base name only one counts.
    """

    def base(file: str) -> str:
        return file.rpartition("/")[2]

    def is_drop_in(file: str) -> bool:
        return file.rpartition("/")[0].endswith(".d")

    fragment = [file for file in files if not is_drop_in(file)]
    drop_ins = [file for file in files if is_drop_in(file) and base(file) != base(path)]
    return (*fragment, *sorted([*drop_ins, path], key=lambda file: base(file).encode()))
