# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroup file system: memory.failure_dirty_action, its neighbours, and notice of what changes.

Cgroups are named as systemd's ControlGroup property names them: absolute, the root being "".
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cgpolicy.action import Action, strictest
from cgpolicy.error import NotSupported, UserError, WriteFailed

POLICY_FILE = "memory.failure_dirty_action"
EVENTS_FILE = "memory.events"
CONTROL_FILE = "cgroup.subtree_control"

# What this project last wrote, kept on the cgroup itself: it outlives the daemon and goes with the cgroup.
# trusted.* needs CAP_SYS_ADMIN, so an unprivileged owner of a delegated cgroup cannot forge it.
MARK = "trusted.cgpolicy"

# How many of its losses were reported: memory.events tells how many there were.
TOLD = "trusted.cgpolicy.told"

# systemd's own (src/core/cgroup.c, cgroup_xattr_apply()); saves a question to PID 1.
INVOCATION_ID = ("trusted.invocation_id", "user.invocation_id")


@dataclass(frozen=True, slots=True)
class Effective:
    """The action that the kernel takes for a cgroup, and the cgroup on the path to the root whose file says so."""

    action: Action
    cgroup: str


@dataclass(frozen=True, slots=True)
class Events:
    """Counters of memory.events since the cgroup was made, its descendants included."""

    failure_dirty: int = 0  # pages of dirty page cache lost
    failure_dirty_kill: int = 0  # times that this cgroup was killed for it


class CgroupTree:
    """A mounted cgroup v2 hierarchy.

    links: where systemd keeps a link for each unit that runs, whose target is the InvocationID; None not to look.
    """

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), links: Path | None = None) -> None:
        self.root = root
        self._links = links

    def path(self, cgroup: str) -> Path:
        """Return the directory of a cgroup."""
        return self.root / cgroup.lstrip("/")

    def is_unified(self) -> bool:
        """Tell whether this is a cgroup v2 hierarchy with the memory controller (cgroup.controllers of the root)."""
        try:
            return "memory" in (self.root / "cgroup.controllers").read_text().split()
        except OSError:
            return False

    def is_supported(self) -> bool:
        """Tell whether the kernel has memory.failure_dirty_action; the root cgroup itself never has."""
        return any(True for _ in self.root.glob(f"*/{POLICY_FILE}"))

    def exists(self, cgroup: str) -> bool:
        return bool(cgroup) and self.path(cgroup).is_dir()

    def read_action(self, cgroup: str) -> Action | None:
        """Return a cgroup's own value, None where it has no such file (gone, or without the memory controller).

        Raises UserError on a word that a later kernel may have.
        """
        path = self.path(cgroup) / POLICY_FILE
        try:
            word = path.read_bytes().strip().decode(errors="replace")
        except OSError:
            # ENODEV: removed between open and read.
            return None
        try:
            return Action(word)
        except ValueError:
            raise UserError(f"{path}: unknown action {word[:40]!r}, left as it is", hint="update cgpolicy") from None

    def write_action(self, cgroup: str, action: Action) -> None:
        """Set a cgroup's own value; raise NotSupported without the file and WriteFailed if the kernel refuses."""
        path = self.path(cgroup) / POLICY_FILE
        try:
            # Not Path.write_text(): it would create a plain file where the kernel has none. O_TRUNC as a shell's >,
            # so that a tree of plain files will do for tests.
            descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise NotSupported(
                f"{cgroup or '/'}: no {POLICY_FILE}",
                hint="the cgroup is gone, lacks the memory controller (MemoryAccounting=yes), or the kernel the patch",
            ) from None
        except OSError as error:
            raise WriteFailed(f"{path}: {error.strerror}") from None
        try:
            os.write(descriptor, action.encode())
        except OSError as error:
            raise WriteFailed(f"{path}: {error.strerror}", hint=f"while writing {action}") from None
        finally:
            os.close(descriptor)

    def mark(self, cgroup: str, action: Action | None) -> None:
        """Note on the cgroup what was last applied to it, None for nothing; a cgroup that is gone needs no note."""
        with contextlib.suppress(OSError):
            if action is None:
                os.removexattr(self.path(cgroup), MARK)
            else:
                os.setxattr(self.path(cgroup), MARK, action.encode())

    def marked(self, cgroup: str) -> Action | None:
        """Return what mark() noted."""
        try:
            return Action(os.getxattr(self.path(cgroup), MARK).decode())
        except (OSError, ValueError):
            return None

    def told(self, cgroup: str) -> int:
        """Return how many lost pages of a unit's cgroup have been reported, by this daemon or one before it."""
        try:
            return int(os.getxattr(self.path(cgroup), TOLD))
        except (OSError, ValueError):
            return 0

    def add_told(self, cgroup: str, pages: int) -> None:
        """Note that so many lost pages more have been reported; a cgroup that is gone needs no note."""
        with contextlib.suppress(OSError):
            os.setxattr(self.path(cgroup), TOLD, b"%d" % (self.told(cgroup) + pages))

    def lost(self) -> dict[str, int]:
        """Return the cgroups of units that have lost pages and how many (memory.events), descendants included."""
        found: dict[str, int] = {}
        pending = [""]
        while pending:
            parent = pending.pop()
            for directory in self.children(parent):
                cgroup = f"{parent}/{directory}"
                pages = self.events(cgroup).failure_dirty
                if pages and directory.endswith(".slice"):
                    pending.append(cgroup)
                elif pages:
                    found[cgroup] = pages
        return found

    def cgroup_id(self, cgroup: str) -> int:
        """Return the kernel's id of a cgroup, 0 if it is gone; on 64 bit it is the directory's inode number."""
        try:
            return self.path(cgroup).stat().st_ino
        except OSError:
            return 0

    def invocation_id(self, cgroup: str) -> str:
        """Return the unit's InvocationID as systemd noted it on the cgroup, "" if it did not."""
        for name in INVOCATION_ID:
            with contextlib.suppress(OSError):
                return os.getxattr(self.path(cgroup), name).decode(errors="replace")
        if self._links is not None:
            # A scope's cgroup can be there before its run has an id, and systemd does not come back to it.
            with contextlib.suppress(OSError):
                return os.readlink(self._links / f"invocation:{unit_of_directory(cgroup.rpartition('/')[2])}")
        return ""

    def effective(self, cgroup: str) -> Effective:
        """Return the strictest value on the path to the root, of equals the nearest (the kernel's rule)."""
        values: list[tuple[str, Action]] = []
        while cgroup.strip("/"):
            with contextlib.suppress(UserError):
                action = self.read_action(cgroup)
                if action is not None:
                    values.append((cgroup, action))
            cgroup = cgroup.rpartition("/")[0]
        action = strictest(value for _, value in values)
        return Effective(action, next((name for name, value in values if value == action), ""))

    def above(self, cgroup: str) -> list[tuple[str, Action]]:
        """Return the cgroups above one whose own value is stricter than its own, nearest first, with their values."""
        found = []
        own = Action.CONTINUE
        with contextlib.suppress(UserError):
            own = self.read_action(cgroup) or own
        while (cgroup := cgroup.rpartition("/")[0]).strip("/"):
            with contextlib.suppress(UserError):
                action = self.read_action(cgroup)
                if action is not None and action.strictness > own.strictness:
                    found.append((cgroup, action))
        return found

    def events(self, cgroup: str) -> Events:
        """Return a cgroup's loss counters, zeros where there are none."""
        try:
            lines = (self.path(cgroup) / EVENTS_FILE).read_text().splitlines()
        except OSError:
            return Events()
        values = dict(line.split() for line in lines if len(line.split()) == 2)
        return Events(int(values.get("failure_dirty", 0)), int(values.get("failure_dirty_kill", 0)))

    def children(self, cgroup: str) -> list[str]:
        """Return the names of the cgroups directly below one."""
        try:
            with os.scandir(self.path(cgroup)) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return []

    def units(self) -> dict[str, str]:
        """Return the cgroup of every unit that has one, the root slice excepted.

        A unit's cgroup lies in its slice's and is named after it (unit_default_cgroup_path() in systemd's
        src/core/cgroup.c); what lies below a unit that is no slice is that unit's own business.
        """
        found: dict[str, str] = {}
        pending = [""]
        while pending:
            parent = pending.pop()
            for directory in self.children(parent):
                name, cgroup = unit_of_directory(directory), f"{parent}/{directory}"
                found[name] = cgroup
                if name.endswith(".slice"):
                    pending.append(cgroup)
        return found

    def find(self, cgroup_id: int) -> str | None:
        """Return the cgroup with an id, None if there is none any more; walks the whole hierarchy."""
        pending = [""]
        while pending:
            cgroup = pending.pop()
            for name in self.children(cgroup):
                child = f"{cgroup}/{name}"
                if self.cgroup_id(child) == cgroup_id:
                    return child
                pending.append(child)
        return None


def unit_of_directory(name: str) -> str:
    """Return the unit that systemd means by a cgroup directory's name (cg_unescape(): a leading _ is dropped)."""
    return name.removeprefix("_")


def is_of_slices(cgroup: str) -> bool:
    """Tell whether a cgroup is the root's or a slice's that lies in slices only, so that units' are in it."""
    return all(name.endswith(".slice") for name in cgroup.split("/")[1:])


def unit_cgroup(cgroup: str) -> str:
    """Return the cgroup of the unit in whose this one lies, itself if it is one."""
    while not is_of_slices(cgroup.rpartition("/")[0]):
        cgroup = cgroup.rpartition("/")[0]
    return cgroup


IN_MODIFY = 0x2
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_Q_OVERFLOW = 0x4000
IN_ONLYDIR = 0x1000000
IN_ISDIR = 0x40000000
EVENT = struct.Struct("iIII")  # inotify(7): wd, mask, cookie, length of the name


@dataclass(frozen=True, slots=True)
class Made:
    """A cgroup has appeared."""

    parent: str
    name: str


@dataclass(frozen=True, slots=True)
class Removed:
    """A cgroup has gone."""

    parent: str
    name: str


@dataclass(frozen=True, slots=True)
class Written:
    """A program wrote to a file of a cgroup, perhaps this one."""

    cgroup: str
    file: str


@dataclass(frozen=True, slots=True)
class Overflow:
    """Events were dropped: everything has to be looked at."""


class CgroupWatch:
    """inotify on cgroups: children that come and go, and single files that programs write.

    Single files and not whole directories, since the kernel notifies memory.events up to a hundred times a second.
    Watches are removed by hand when a cgroup goes: kernfs keeps inode and watch until then.
    """

    def __init__(self, tree: CgroupTree) -> None:
        self.tree = tree
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise NotSupported(f"inotify: {os.strerror(ctypes.get_errno())}", hint="see fs.inotify.max_user_instances")
        self._descriptors: dict[str, dict[str, int]] = {}  # by cgroup and file, "" being the directory
        self._watched: dict[int, tuple[str, str]] = {}

    def fileno(self) -> int:
        return self._fd

    def add_children(self, cgroup: str) -> bool:
        """Watch for cgroups made and removed in this one; return whether that is new."""
        return self._add(cgroup, "", IN_CREATE | IN_DELETE | IN_ONLYDIR)

    def add_file(self, cgroup: str, file: str) -> bool:
        """Watch for writes to a file; return whether that is new."""
        return self._add(cgroup, file, IN_MODIFY)

    def _add(self, cgroup: str, file: str, mask: int) -> bool:
        if file in self._descriptors.get(cgroup, {}):
            return False
        path = self.tree.path(cgroup) / file if file else self.tree.path(cgroup)
        descriptor = self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        if descriptor < 0:
            return False  # gone again, or the file is not there: its parent's events tell when it is
        self._descriptors.setdefault(cgroup, {})[file] = descriptor
        self._watched[descriptor] = cgroup, file
        return True

    def drop(self, cgroup: str) -> None:
        """Give up the watches of a cgroup and of those below it."""
        below = f"{cgroup}/"
        for name in [name for name in self._descriptors if name == cgroup or name.startswith(below)]:
            for descriptor in self._descriptors.pop(name).values():
                del self._watched[descriptor]
                self._libc.inotify_rm_watch(self._fd, descriptor)

    def read(self) -> Iterator[Made | Removed | Written | Overflow]:
        """Yield what has happened since the last call, without waiting."""
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return
            position = 0
            while position < len(data):
                descriptor, mask, _, length = EVENT.unpack_from(data, position)
                position += EVENT.size
                name = os.fsdecode(data[position : position + length].rstrip(b"\0"))
                position += length
                if mask & IN_Q_OVERFLOW:
                    yield Overflow()
                    continue
                cgroup, file = self._watched.get(descriptor, ("", ""))
                if mask & IN_CREATE and mask & IN_ISDIR and descriptor in self._watched:
                    yield Made(cgroup, name)
                elif mask & IN_DELETE and mask & IN_ISDIR and descriptor in self._watched:
                    yield Removed(cgroup, name)
                elif mask & IN_MODIFY and file:
                    yield Written(cgroup, file)

    def close(self) -> None:
        os.close(self._fd)
