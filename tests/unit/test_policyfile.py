# SPDX-License-Identifier: LGPL-2.1-or-later
"""Drop-ins and machine rules: whole or not at all, and nobody else's file is touched."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpolicy.action import Action
from cgpolicy.error import InvalidMachineName, InvalidUnitName, UserError, WriteFailed
from cgpolicy.policyfile import PolicyFiles
from cgpolicy.setting import read_setting
from cgpolicy.systemd import read_files

UUID = "f7f2a1d0-0c51-4b9e-9d0b-9a8a3c1f2e4d"
PERSISTENT = "etc/systemd/system/web.service.d/50-cgpolicy.conf"
RUNTIME = "run/systemd/system/web.service.d/50-cgpolicy.conf"
RULE = "etc/cgpolicy/machines/db.conf"

Write = Callable[[PolicyFiles, Action], object]
Remove = Callable[[PolicyFiles], object]

# Everything that writes: the file, and how it is written and removed.
KINDS: dict[str, tuple[str, Write, Remove]] = {
    "persistent": (
        PERSISTENT,
        lambda files, action: files.write_unit("web.service", action, runtime=False),
        lambda files: files.remove_unit("web.service", runtime=False),
    ),
    "runtime": (
        RUNTIME,
        lambda files, action: files.write_unit("web.service", action, runtime=True),
        lambda files: files.remove_unit("web.service", runtime=True),
    ),
    "machine": (
        RULE,
        lambda files, action: files.write_machine("db", action),
        lambda files: files.remove_machine("db"),
    ),
}

every_kind = pytest.mark.parametrize(("name", "write", "remove"), KINDS.values(), ids=KINDS.keys())


@pytest.fixture
def files(tmp_path: Path) -> PolicyFiles:
    return PolicyFiles(tmp_path)


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below a directory with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def action_of(path: Path) -> Action | None:
    return read_setting([(str(path), path.read_bytes())]).action


# What is written -----------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("action", list(Action))
def test_what_is_written_reads_back_and_goes_again(
    files: PolicyFiles, name: str, write: Write, remove: Remove, action: Action
) -> None:
    path = files.root / name
    assert remove(files) is None
    assert write(files, Action.CONTINUE) == write(files, action) == path
    assert list(tree(files.root)) == [name]
    setting = read_setting([(name, path.read_bytes())])
    assert (setting.action, setting.problems) == (action, ())
    assert remove(files) == path
    assert tree(files.root) == {} and remove(files) is None


@every_kind
def test_everybody_may_read_it_whatever_the_umask(
    files: PolicyFiles, name: str, write: Write, remove: Remove
) -> None:
    before = os.umask(0o077)
    try:
        write(files, Action.KILL)
    finally:
        os.umask(before)
    assert stat.S_IMODE((files.root / name).stat().st_mode) == 0o644


def test_the_directory_goes_with_its_last_file(files: PolicyFiles) -> None:
    directory = files.write_unit("web.service", Action.KILL, runtime=False).parent
    (directory / "10-admin.conf").touch()
    files.remove_unit("web.service", runtime=False)
    assert [path.name for path in directory.iterdir()] == ["10-admin.conf"]
    files.write_unit("web.service", Action.KILL, runtime=False)
    (directory / "10-admin.conf").unlink()
    files.remove_unit("web.service", runtime=False)
    assert not directory.exists()


def test_runtime_is_refused_where_persistent_would_hide_it(files: PolicyFiles) -> None:
    files.write_unit("web.service", Action.KILL, runtime=True)
    files.write_unit("web.service", Action.PANIC, runtime=False)
    before = tree(files.root)
    with pytest.raises(WriteFailed, match=f"{PERSISTENT} takes precedence .*unset it first"):
        files.write_unit("web.service", Action.CONTINUE, runtime=True)
    assert tree(files.root) == before
    files.remove_unit("web.service", runtime=False)
    assert list(tree(files.root)) == [RUNTIME]
    files.write_unit("web.service", Action.CONTINUE, runtime=True)
    # One for all services is the last to count, in whatever directory it is.
    (files.root / "etc/systemd/system/service.d").mkdir()
    (files.root / "etc/systemd/system/service.d/50-cgpolicy.conf").touch()
    files.write_unit("web.service", Action.KILL, runtime=True)


# Whole or not at all -------------------------------------------------------------------------------

CALLS = ("mkdir", "open", "unlink", "fchmod", "fsync", "rename", "rmdir")


@contextlib.contextmanager
def fault_at(number: int | None, fault: Callable[[], None]) -> Iterator[list[str]]:
    """Call fault instead of the call of that number among those of CALLS; yield the names of the calls made."""
    made: list[str] = []

    def wrap(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            made.append(name)
            if len(made) - 1 == number:
                fault()
            return call(*arguments, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield made


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def calls_of(root: Path, prepare: Callable[[PolicyFiles], object], act: Callable[[PolicyFiles], object]) -> list[str]:
    """Return the calls that an act makes, below a root of its own."""
    files = PolicyFiles(root)
    prepare(files)
    with fault_at(None, fail) as made:
        act(files)
    return made


def nothing(files: PolicyFiles) -> None:
    pass


@every_kind
@pytest.mark.parametrize("old", [None, Action.CONTINUE])
def test_a_call_that_fails_leaves_old_or_new_and_says_which(
    tmp_path: Path, name: str, write: Write, remove: Remove, old: Action | None
) -> None:
    def prepare(files: PolicyFiles) -> object:
        return write(files, old) if old else None

    calls = calls_of(tmp_path / "dry", prepare, lambda files: write(files, Action.PANIC))
    # What is renamed is on the disk before, and so is the renaming when the write is said to have succeeded.
    assert [call for call in calls if call in ("fsync", "rename")] == ["fsync", "rename", "fsync"]
    for number, call in enumerate(calls):
        files = PolicyFiles(tmp_path / f"{number}-{call}")
        prepare(files)
        before = tree(files.root)
        with fault_at(number, fail):
            try:
                write(files, Action.PANIC)
            except WriteFailed as error:
                assert "Input/output error" in error.message
                changed = error.hint != "nothing was changed"
            else:
                assert call in ("mkdir", "unlink")  # done otherwise: by mkdir's parents
                changed = True
        assert (tree(files.root) != before) == changed, call
        if changed:
            assert list(tree(files.root)) == [name] and action_of(files.root / name) is Action.PANIC
        write(files, Action.KILL)
        assert list(tree(files.root)) == [name] and action_of(files.root / name) is Action.KILL


@every_kind
def test_a_removal_that_fails_leaves_the_file_or_not_and_says_which(
    tmp_path: Path, name: str, write: Write, remove: Remove
) -> None:
    def prepare(files: PolicyFiles) -> object:
        return write(files, Action.KILL)

    for number, call in enumerate(calls_of(tmp_path / "dry", prepare, remove)):
        files = PolicyFiles(tmp_path / f"{number}-{call}")
        prepare(files)
        with fault_at(number, fail):
            try:
                remove(files)
            except WriteFailed as error:
                gone = error.hint != "nothing was changed"
            else:
                assert call == "rmdir"  # an empty directory says nothing
                gone = True
        assert list(tree(files.root)) == ([] if gone else [name]), call


def killed_at(number: int, act: Callable[[], object]) -> None:
    """Do something in a process that ends, as by SIGKILL, in place of the call of that number."""
    child = os.fork()
    if not child:
        with fault_at(number, lambda: os._exit(9)):
            act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@every_kind
@pytest.mark.parametrize("old", [None, Action.CONTINUE])
def test_a_crash_leaves_old_or_new_and_the_next_write_tidies_up(
    tmp_path: Path, name: str, write: Write, remove: Remove, old: Action | None
) -> None:
    def prepare(files: PolicyFiles) -> object:
        return write(files, old) if old else None

    calls = calls_of(tmp_path / "dry", prepare, lambda files: write(files, Action.PANIC))
    outcomes = []
    for number in range(len(calls)):
        files = PolicyFiles(tmp_path / str(number))
        prepare(files)
        killed_at(number, partial(write, files, Action.PANIC))
        # systemd reads *.conf only.
        assert {path for path in tree(files.root) if path.endswith(".conf")} <= {name}
        outcomes.append(action_of(files.root / name) if (files.root / name).exists() else None)
        write(files, Action.KILL)
        assert list(tree(files.root)) == [name] and action_of(files.root / name) is Action.KILL
    assert outcomes == [old] * (len(calls) - 1) + [Action.PANIC]  # the last call is fsync of the directory


@every_kind
def test_a_full_disk_keeps_the_old_file(files: PolicyFiles, name: str, write: Write, remove: Remove) -> None:
    write(files, Action.KILL)
    before = tree(files.root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(WriteFailed, match=f"{name}: File too large .nothing was changed"):
            write(files, Action.PANIC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(files.root) == before


def test_no_descriptor_stays_open(files: PolicyFiles) -> None:
    def act(files: PolicyFiles) -> None:
        with contextlib.suppress(WriteFailed):
            files.write_machine("db", Action.KILL)
            files.remove_machine("db")

    before = os.listdir("/proc/self/fd")
    for number in range(len(calls_of(files.root / "dry", nothing, act))):
        with fault_at(number, fail):
            act(files)
    assert os.listdir("/proc/self/fd") == before


# Nobody else's -------------------------------------------------------------------------------------


def attempts(files: PolicyFiles, write: Write, remove: Remove) -> list[Callable[[], object]]:
    return [partial(write, files, Action.PANIC), partial(remove, files)]


@every_kind
@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_for_a_directory_is_refused(
    files: PolicyFiles, name: str, write: Write, remove: Remove, dangling: bool
) -> None:
    elsewhere, directory = files.root / "elsewhere", (files.root / name).parent
    if not dangling:
        elsewhere.mkdir()
        (elsewhere / Path(name).name).write_text("[X-CgPolicy]\nMemoryFailureDirtyAction=kill\n")
    directory.parent.mkdir(parents=True)
    directory.symlink_to(elsewhere)
    before = tree(files.root)
    for attempt in attempts(files, write, remove):
        with pytest.raises(WriteFailed, match=str(directory)):
            attempt()
    assert tree(files.root) == before and directory.is_symlink()


@every_kind
def test_a_symbolic_link_for_the_file_is_replaced_and_not_followed(
    files: PolicyFiles, name: str, write: Write, remove: Remove
) -> None:
    target, path = files.root / "target", files.root / name
    target.write_text("[X-CgPolicy]\nMemoryFailureDirtyAction=continue\n")
    for leftover in (path, path.with_name(f".{path.name}.new")):
        path.parent.mkdir(parents=True, exist_ok=True)
        leftover.symlink_to(target)
        write(files, Action.KILL)
        assert not path.is_symlink() and action_of(path) is Action.KILL
        assert action_of(target) is Action.CONTINUE
        remove(files)


@every_kind
@pytest.mark.parametrize(
    "content",
    [
        "[Service]\nRestart=no\n",
        "[X-CgPolicy]\nMemoryFailureDirtyAction=kill\nX-Note=mine\n",
        "[X-CgPolicy]\nMemoryFailureDirtyAction=kill\n[Unit]\nAfter=x\n",
        "[x-cgpolicy]\nMemoryFailureDirtyAction=kill\n",
        "[X-CgPolicy]\n[broken\n",
    ],
)
def test_a_file_that_says_more_is_left_alone(
    files: PolicyFiles, name: str, write: Write, remove: Remove, content: str
) -> None:
    path = files.root / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    for attempt in attempts(files, write, remove):
        with pytest.raises(WriteFailed, match=f"{name} says more than .*edit it by hand"):
            attempt()
        assert path.read_text() == content


@every_kind
def test_a_fifo_in_the_place_of_the_file_keeps_nobody_waiting(
    files: PolicyFiles, name: str, write: Write, remove: Remove
) -> None:
    path = files.root / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert files.machine_rule("db") is None
    write(files, Action.KILL)
    assert action_of(path) is Action.KILL


@every_kind
def test_a_file_without_end_is_left_alone(files: PolicyFiles, name: str, write: Write, remove: Remove) -> None:
    path = files.root / name
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, 1 << 40)
    for attempt in attempts(files, write, remove):
        with pytest.raises(WriteFailed, match="says more than"):
            attempt()
    assert path.stat().st_size == 1 << 40
    assert read_files([str(path)]).problems[0].message == "larger than 16 MiB; ignored"


@every_kind
def test_a_directory_in_the_place_of_the_file_is_left_alone(
    files: PolicyFiles, name: str, write: Write, remove: Remove
) -> None:
    (files.root / name / "inside").mkdir(parents=True)
    for attempt in attempts(files, write, remove):
        with pytest.raises(WriteFailed, match="nothing was changed"):
            attempt()
    assert (files.root / name / "inside").is_dir() and tree(files.root) == {}


# Names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["", "web", "../web.service", "a/b.service", "web.service/..", "web\n.service"])
def test_a_bad_unit_name_writes_nothing(files: PolicyFiles, unit: str) -> None:
    for runtime in (False, True):
        with pytest.raises(InvalidUnitName):
            files.write_unit(unit, Action.KILL, runtime=runtime)
        with pytest.raises(InvalidUnitName):
            files.remove_unit(unit, runtime=runtime)
    assert list(files.root.iterdir()) == []


@pytest.mark.parametrize("machine", [UUID, UUID.upper(), UUID.replace("-", ""), UUID.replace("-", "").upper()])
def test_every_spelling_of_a_uuid_is_one_rule(files: PolicyFiles, machine: str) -> None:
    path = files.write_machine(machine, Action.KILL)
    assert path == files.root / f"etc/cgpolicy/machines/{UUID}.conf"
    assert files.machine_rule(UUID) == (str(path), path.read_bytes())
    assert files.remove_machine(UUID.upper()) == path


@pytest.mark.parametrize("machine", ["web01", "web-01.example", "Win_10+x:@2", "9", "a" * 200, "g" * 32, "x" * 36,
                                     "0123456789_abcdef_0123456789_abc"])
def test_a_machine_name_is_its_file_name(files: PolicyFiles, machine: str) -> None:
    assert files.machine_rule(machine) is None
    assert files.write_machine(machine, Action.KILL).name == f"{machine}.conf"
    rule = files.machine_rule(machine)
    assert rule is not None and read_setting([rule]).action is Action.KILL


BAD_MACHINES = ["", ".", "..", ".db", "a..b", "a/b", "../db", "-db", "a b", "a\n", "a\0", "\u00e9", "a" * 201,
                " 0123456789abcdef0123456789abcde"]


@pytest.mark.parametrize("machine", BAD_MACHINES)
def test_a_bad_machine_name_is_refused_and_has_no_rule(files: PolicyFiles, machine: str) -> None:
    with pytest.raises(InvalidMachineName) as caught:
        files.write_machine(machine, Action.KILL)
    assert "machinectl" in str(caught.value)
    with pytest.raises(InvalidMachineName):
        files.remove_machine(machine)
    assert files.machine_rule(machine) is None
    assert list(files.root.iterdir()) == []


@given(st.text())
def test_a_machine_name_never_leaves_its_directory(machine: str) -> None:
    try:
        name = PolicyFiles().check_machine(machine)
    except UserError:
        return
    assert name.endswith(".conf") and "/" not in name and not name.startswith(".") and len(os.fsencode(name)) <= 255
