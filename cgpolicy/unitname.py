# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names of systemd units, as systemd judges and escapes them (src/basic/unit-name.c, src/basic/bus-label.c)."""

from __future__ import annotations

import re
import string

from cgpolicy.error import InvalidUnitName, quoted

UNIT_TYPES = frozenset(
    "service socket target device mount automount swap timer path slice scope".split()
)

# Types with a control group of their own, in which X-CgPolicy counts.
POLICY_TYPES = frozenset("service scope slice socket mount swap".split())

ROOT_SLICE = "-.slice"

NAME_MAX = 255  # bytes, as the kernel's file names
VALID_CHARS = frozenset(string.ascii_letters + string.digits + ":-_.\\")
ESCAPED = re.compile(rb"\\x([0-9a-fA-F]{2})")

LABEL_ESCAPED = re.compile(r"[^A-Za-z0-9]|^[0-9]")

# libvirt: <driver>-<id>-<name> (virDomainDriverGenerateMachineName()); the id changes at every start.
LIBVIRT_MACHINE = re.compile(r"((?:qemu|lxc|ch|xen)(?:-embed-[0-9a-f]{8})?-\d+-)(.+)", re.DOTALL)
LIBVIRT_NAME_MAX = 64  # of all of it

# Units that run the machine of their instance's name: --machine=%i.
SPAWN = re.compile(r"systemd-(?:nspawn|vmspawn)@(.+)\.service")


def is_valid(name: str) -> bool:
    """Tell whether this is a plain, template or instance unit name (unit_name_is_valid(), UNIT_NAME_ANY)."""
    stem, dot, suffix = name.rpartition(".")
    if not dot or not stem or suffix not in UNIT_TYPES or len(name) > NAME_MAX:  # in bytes: VALID_CHARS are ASCII
        return False
    # Only the first @ separates; more of them belong to the instance.
    return not stem.startswith("@") and all(char in VALID_CHARS or char == "@" for char in stem)


def check(name: str) -> str:
    """Return the name if it is a valid unit name, else raise InvalidUnitName."""
    if not is_valid(name):
        raise InvalidUnitName(f"{quoted(name)} is no valid unit name", hint="expected a name like postgresql.service")
    return name


def mangle(name: str) -> str:
    """Return what a person typed as a unit name: without a known suffix it means a service.

    Raises InvalidUnitName. Unlike systemctl this escapes nothing: a path is not a unit name here.
    """
    if not is_valid(name) and is_valid(f"{name}.service"):
        return f"{name}.service"
    return check(name)


def unit_type(name: str) -> str:
    """Return the suffix of a unit name, without the dot."""
    return name.rpartition(".")[2]


def template(name: str) -> str | None:
    """Return foo@.service of foo@bar.service, None of a name that is no instance."""
    stem, _, suffix = name.rpartition(".")
    prefix, at, instance = stem.partition("@")
    return f"{prefix}@.{suffix}" if at and instance else None


def escape(text: str) -> str:
    """Escape any text for use in a unit name (unit_name_escape())."""
    out = []
    for position, byte in enumerate(text.encode(errors="surrogateescape")):
        char = chr(byte)
        if char == "/":
            out.append("-")
        elif char in "-\\" or char not in VALID_CHARS or (char == "." and position == 0):
            out.append(f"\\x{byte:02x}")
        else:
            out.append(char)
    return "".join(out)


def unescape(text: str) -> str:
    """Undo escape() (unit_name_unescape()); an incomplete \\x stands for itself."""
    data = text.encode(errors="surrogateescape").replace(b"-", b"/")
    return ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), data).decode(errors="surrogateescape")


def parent_slices(name: str) -> list[str]:
    """Return a slice and those it lies in, nearest first: a-b.slice, a.slice, -.slice (slice_build_parent_slice())."""
    if name == ROOT_SLICE:
        return [ROOT_SLICE]
    words = name.removesuffix(".slice").split("-")
    return [f"{'-'.join(words[:count])}.slice" for count in range(len(words), 0, -1)] + [ROOT_SLICE]


def registered_name(unit: str) -> str | None:
    """Return the name under which machined knows the machine that a unit runs, as far as the unit's name tells."""
    spawn = SPAWN.fullmatch(unit)
    if spawn:
        return spawn[1]
    if not unit.startswith("machine-") or not unit.endswith(".scope"):
        return None
    return unescape(unit.removeprefix("machine-").removesuffix(".scope")) or None


def machine_name(unit: str, registered: str | None = None) -> str | None:
    """Return the name of the virtual machine or container that a unit runs, None of another unit.

    machine-qemu\\x2d7\\x2dweb01.scope is libvirt's domain web01, machine-db.scope a machine that registered
    as db, systemd-nspawn@db.service one that will (systemd-machined(8)). registered: what machined calls the machine,
    if that is known.
    """
    name = registered_name(unit) or registered
    libvirt = LIBVIRT_MACHINE.fullmatch(name or "")
    return libvirt[2] if libvirt else name


def is_domain(domain: str, unit: str) -> bool:
    """Tell whether a unit runs libvirt's domain of this name.

    Of characters that host names have not, such as _, libvirt leaves nothing in the machine's name
    (virDomainMachineNameAppendValid()), and it cuts what is long.
    """
    libvirt = LIBVIRT_MACHINE.fullmatch(registered_name(unit) or "")
    if not libvirt:
        return False
    name = re.sub(r"[^A-Za-z0-9.-]", "", domain).lstrip(".-")
    name = re.sub(r"([.-])[.-]+", r"\1", name)
    return f"{libvirt[1]}{name}"[:LIBVIRT_NAME_MAX].rstrip(".-") == libvirt[0]


def bus_label_escape(text: str) -> str:
    """Escape any text for use as one element of an object path (bus_label_escape())."""
    data = text.encode(errors="surrogateescape")
    return LABEL_ESCAPED.sub(lambda match: f"_{ord(match[0]):02x}", data.decode("latin-1")) or "_"


def bus_label_unescape(label: str) -> str:
    """Undo bus_label_escape()."""
    if label == "_":
        return ""
    data = re.sub(rb"_([0-9a-fA-F]{2})", lambda match: bytes([int(match[1], 16)]), label.encode())
    return data.decode(errors="surrogateescape")
