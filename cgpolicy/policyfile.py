# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files that this project writes: drop-ins and machine rules, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from cgpolicy.action import Action
from cgpolicy.dropin import directories
from cgpolicy.error import InvalidMachineName, WriteFailed, quoted
from cgpolicy.setting import KEY, SECTION
from cgpolicy.unitfile import parse
from cgpolicy.unitname import check, is_domain, is_valid, machine_name

DROP_IN = "50-cgpolicy.conf"
PERSISTENT = Path("etc/systemd/system")
RUNTIME = Path("run/systemd/system")
MACHINES = Path("etc/cgpolicy/machines")

# Not ending in .conf, so that systemd does not read what a crash left half-written.
TEMPORARY = ".{name}.new"

# machine_name_is_valid() of systemd (src/basic/hostname-util.c) is a host name; libvirt's names may have more.
MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@:-]{0,199}")

# Not all that uuid.UUID() takes: it would make white space and underscores part of a number.
UUID = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

HEADER = "# Written by cgpolicy; \"cgpolicy unset\" removes it. See cgpolicy(5).\n"


FILE_MAX = 16 << 20  # bytes; of what systemd's users write, a thousand times as much as there ever was


# What can be replaced without a look at what it says, or keeps its place by itself.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)


def read_regular(path: str | Path) -> bytes:
    """Read a file; raise OSError also where it is none, or too large: a link can lead to what has no end.

    A unit directory may hold links into directories of users. A FIFO there would keep the daemon waiting.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(FILE_MAX + 1)
    if len(data) > FILE_MAX:
        raise OSError(errno.EFBIG, f"larger than {FILE_MAX >> 20} MiB", str(path))
    return data


class NotDurable(WriteFailed):
    """A change of the file at path that stands, but may not outlast a loss of power."""

    def __init__(self, path: Path, message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.path = path


class PolicyFiles:
    """Below a root directory that is / but in tests. Every OSError becomes WriteFailed, which says what stands."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def write_unit(self, unit: str, action: Action, *, runtime: bool) -> Path:
        """Write a unit's drop-in and return its path.

        Raises WriteFailed also if a file of that name exists that says more than this one would, and if it would
        not count because there is one of the same name with precedence (systemd.unit(5)).
        """
        path = self.root / (RUNTIME if runtime else PERSISTENT) / f"{check(unit)}.d" / DROP_IN
        hiding = self.counts_now(unit, before=path.parent)
        if hiding is not None:
            raise WriteFailed(
                f"{hiding} takes precedence over {path}",
                hint="set it without runtime, or unset it first" if runtime else "remove or rename that file",
            )
        self._refuse_foreign(path)
        self._write(path, action)
        return path

    def remove_unit(self, unit: str, *, runtime: bool) -> Path | None:
        """Remove a unit's drop-in, and its directory if nothing else is in there; return what was removed."""
        path = self.root / (RUNTIME if runtime else PERSISTENT) / f"{check(unit)}.d" / DROP_IN
        self._refuse_foreign(path)
        if not self._remove(path):
            return None
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        return path

    def counts_now(self, unit: str, *, before: Path | None = None) -> Path | None:
        """Return the drop-in of our file's name that counts for a unit as the files are, whoever wrote it.

        before: look only in the directories that have precedence over this one.
        """
        for directory in directories(unit):
            if self.root / directory == before:
                break
            # Not with Path, which takes longer than the kernel: there are a hundred directories and more.
            path = f"{self.root}/{directory}/{DROP_IN}"
            if os.path.lexists(path):
                return Path(path)
        return None

    def written_units(self) -> Iterator[tuple[str, str]]:
        """Yield unit and path of the drop-ins that write_unit() has made, of one unit the one that counts."""
        seen = set()
        for base in (PERSISTENT, RUNTIME):
            try:
                paths = sorted((self.root / base).glob(f"*.d/{DROP_IN}"))
            except OSError:  # a directory that cannot be read is no reason not to start
                continue
            for path in paths:
                unit = path.parent.name.removesuffix(".d")
                try:
                    ours = read_regular(path).startswith(HEADER.encode())
                except OSError:
                    continue
                if is_valid(unit) and ours and unit not in seen:
                    seen.add(unit)
                    yield unit, str(path)

    def check_machine(self, machine: str) -> str:
        """Return the file name of a machine's rule; raise InvalidMachineName."""
        if UUID.fullmatch(machine):
            return f"{uuid.UUID(machine)}.conf"
        if not MACHINE.fullmatch(machine) or ".." in machine:
            raise InvalidMachineName(
                f"{quoted(machine)} is no machine name",
                hint="expected a name as machinectl or virsh lists it, or a UUID",
            )
        return f"{machine}.conf"

    def write_machine(self, machine: str, action: Action) -> Path:
        """Write a machine's rule and return its path."""
        path = self.root / MACHINES / self.check_machine(machine)
        self._refuse_foreign(path)
        self._write(path, action)
        return path

    def remove_machine(self, machine: str) -> Path | None:
        """Remove a machine's rule; return its path if there was one."""
        path = self.root / MACHINES / self.check_machine(machine)
        self._refuse_foreign(path)
        return path if self._remove(path) else None

    def machine_rule_of(self, unit: str, registered: str | None = None) -> tuple[str, bytes] | None:
        """Return path and content of the rule by name for the machine that a unit runs, None if there is none."""
        name = machine_name(unit, registered)
        if name is None:
            return None
        rule = self.machine_rule(name)
        if rule is not None:
            return rule
        try:
            files = sorted(os.listdir(self.root / MACHINES))
        except OSError:
            return None
        domains = (file.removesuffix(".conf") for file in files if file.endswith(".conf"))
        return next((self.machine_rule(domain) for domain in domains if is_domain(domain, unit)), None)

    def machine_rule(self, machine: str) -> tuple[str, bytes] | None:
        """Return path and content of the rule for a machine's name or UUID, None if there is none."""
        try:
            path = self.root / MACHINES / self.check_machine(machine)
            return str(path), read_regular(path)
        except (InvalidMachineName, OSError):
            return None

    def _refuse_foreign(self, path: Path) -> None:
        """Raise WriteFailed if a file holds what its author would miss: sections or keys other than ours."""
        try:
            content = read_regular(path)
        except OSError as error:
            if error.errno in NO_FILE:
                return
            if error.errno != errno.EFBIG:
                raise WriteFailed(f"{path}: {error.strerror}", hint="nothing was changed") from None
            content = b"["  # says more, whatever it is
        parsed = parse(content, str(path))
        if parsed.broken or any((a.section, a.key) != (SECTION, KEY) for a in parsed.assignments):
            raise WriteFailed(f"{path} says more than {KEY}=", hint="edit it by hand, or move the rest elsewhere")

    def _write(self, path: Path, action: Action) -> None:
        content = f"{HEADER}[{SECTION}]\n{KEY}={action}\n".encode()
        temporary = TEMPORARY.format(name=path.name)
        with self._directory(path, make=True) as directory:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=directory)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(temporary, flags, 0o644, dir_fd=directory)
                try:
                    with open(descriptor, "wb") as file:
                        os.fchmod(file.fileno(), 0o644)
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                    os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=directory)
                    raise
            except OSError as error:
                raise WriteFailed(f"{path}: {error.strerror}", hint="nothing was changed") from None
            self._sync(directory, path, "the new file stands, but may not outlast a loss of power")

    def _remove(self, path: Path) -> bool:
        try:
            with self._directory(path, make=False) as directory:
                os.unlink(path.name, dir_fd=directory)
                self._sync(directory, path, "it is removed, but may be back after a loss of power")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise WriteFailed(f"{path}: {error.strerror}", hint="nothing was changed") from None
        return True

    def _sync(self, directory: int, path: Path, hint: str) -> None:
        try:
            os.fsync(directory)
        except OSError as error:
            raise NotDurable(path, f"{path.parent}: {error.strerror}", hint=hint) from None

    @contextlib.contextmanager
    def _directory(self, path: Path, *, make: bool) -> Iterator[int]:
        """Open the directory of a file, which must not be a symbolic link; raise FileNotFoundError unless made."""
        try:
            if make:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not make:
                raise
            raise WriteFailed(f"{path.parent}: {error.strerror}", hint="nothing was changed") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)
