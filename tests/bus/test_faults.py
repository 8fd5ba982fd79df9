# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults in the middle of a change: killed at any system call, no space, a file system that turned read-only.

strace(1) makes the kernel do it, so that no step of the daemon or of what lies below it is left out.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cgpolicy.client import NAME
from tests.bus.privatebus import Call, Failed, wait
from tests.bus.world import World, drop_in
from tests.scale import is_full

WEB = "/system.slice/web.service"
SCOPE = "machine-db.scope"
DB = f"/machine.slice/{SCOPE}"
PERSISTENT = "etc/systemd/system/web.service.d/50-cgpolicy.conf"
RUNTIME = "run/systemd/system/web.service.d/50-cgpolicy.conf"
RULE = "etc/cgpolicy/machines/db.conf"

# Whatever changes a file, and opening it.
CALLS = ("?open,openat,mkdir,mkdirat,unlink,unlinkat,rmdir,write,pwrite64,ftruncate,fchmod,fchmodat,fsync,fdatasync,"
         "rename,renameat,renameat2,setxattr,removexattr")
FAILED_CALLS = "openat,mkdir,mkdirat,write,fchmod,fsync,rename,renameat,renameat2,setxattr"


@contextlib.contextmanager
def injected(pid: int, calls: str, fault: str, paths: Sequence[Path] = ()) -> Iterator[None]:
    """Have the kernel inject a fault into system calls of a process meanwhile, of those on some paths if given."""
    command = ["strace", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", f"trace={calls}",
               "-e", f"inject={calls}:{fault}", *(f"--trace-path={path}" for path in paths)]
    with subprocess.Popen(command) as strace:
        try:
            began = time.monotonic()
            while f"TracerPid:\t{strace.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
                assert strace.poll() is None and time.monotonic() - began < 20, "strace does not attach"
                time.sleep(0.001)  # nothing tells of it
            yield
        finally:
            strace.terminate()


@dataclass(frozen=True, slots=True)
class Change:
    """A call, the file that it changes, and the cgroup that it is about; before is what was set, "" for nothing."""

    file: str
    cgroup: str
    before: str
    after: str
    call: Any

    def said(self, world: World) -> tuple[bytes, str]:
        """Return what the file and the cgroup say."""
        path = world.root / self.file
        return path.read_bytes() if path.exists() else b"", world.tree.said(self.cgroup)


def set_unit(action: str, runtime: bool = False) -> Any:
    return ("SetUnitPolicy", "(ssbt)", "web.service", action, runtime, 0)


CHANGES = {
    "set": Change(PERSISTENT, WEB, "", "kill", set_unit("kill")),
    "set another": Change(PERSISTENT, WEB, "kill", "panic", set_unit("panic")),
    "set runtime": Change(RUNTIME, WEB, "", "panic", set_unit("panic", True)),
    "unset": Change(PERSISTENT, WEB, "kill", "", ("UnsetUnitPolicy", "(sbt)", "web.service", False, 0)),
    "set machine": Change(RULE, DB, "kill", "panic", ("SetMachinePolicy", "(sst)", "db", "panic", 0)),
    "unset machine": Change(RULE, DB, "kill", "", ("UnsetMachinePolicy", "(st)", "db", 0)),
}


def prepare(world: World) -> None:
    world.service("web.service")
    world.tree.make(DB)
    world.systemd.add(SCOPE, slice="machine.slice", cgroup=DB)
    world.start()


def has_ended(daemon: subprocess.Popen[bytes], call: Call) -> bool:
    if call.error is not None and call.error.name.endswith(".NoReply"):
        daemon.wait()  # the bus knew before the parent did
    return daemon.poll() is not None or call.answered


def put_back(world: World, change: Change) -> None:
    """Set what was set before, by the daemon itself."""
    machine = change.file == RULE
    runtime = change.file == RUNTIME
    if change.before:
        call = ("SetMachinePolicy", "(sst)", "db", change.before, 0) if machine else set_unit(change.before, runtime)
    else:
        call = ("UnsetMachinePolicy", "(st)", "db", 0) if machine else (
            "UnsetUnitPolicy", "(sbt)", "web.service", runtime, 0)
    world.root_client.call(*call)
    world.settle()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_killed_at_any_system_call(world: World, change: Change) -> None:
    """Old or new, never half; and the daemon's next start makes one of what the file and the kernel say."""
    prepare(world)
    put_back(world, change)
    old = change.said(world)
    world.root_client.call(*change.call)
    new = change.said(world)
    assert old != new
    seen = set()
    stride = 1 if is_full() or change is CHANGES["set another"] else 3
    step, killed = 1 - stride, True
    while killed:
        step += stride
        put_back(world, change)
        assert change.said(world) == old
        assert world.daemon is not None
        with injected(world.daemon.pid, CALLS, f"signal=KILL:when={step}"):
            call = world.root_client.start(*change.call)
            wait(partial(has_ended, world.daemon, call), "an end")
        killed = world.daemon.poll() is not None
        file, value = change.said(world)
        # No other file is read by anybody, whatever is left of it.
        assert file in (old[0], new[0]) and value in (old[1], new[1]), step
        seen.add((file == new[0], value == new[1]))
        if killed:
            wait(lambda: world.root_client.owner(NAME) is None, f"{NAME} to be free")
            world.start()
        else:
            call.result()
        world.settle()
        assert change.said(world) in (old, new), f"step {step}: {file!r} and {value} before the restart"
        assert change.said(world)[0] == file
    # It was killed before the file was new, and after; otherwise nothing was seen.
    assert step > 4 and {(False, False), (True, True)} <= seen


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EIO] if is_full() else [errno.ENOSPC])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_system_call_that_fails(world: World, change: Change, fault: int) -> None:
    """The caller is told unless all is well, and the daemon stays in step with the file."""
    prepare(world)
    daemon = world.daemon
    assert daemon is not None
    put_back(world, change)
    old = change.said(world)
    world.root_client.call(*change.call)
    new = change.said(world)
    put_back(world, change)
    path = world.root / change.file
    paths = [path, path.parent, path.parent.parent, path.with_name(f".{path.name}.new")]
    failures = 0
    for step in range(1, 16, 1 if is_full() else 2):
        failed: Failed | None = None
        with injected(daemon.pid, FAILED_CALLS, f"error={errno.errorcode[fault]}:when={step}", paths):
            try:
                world.root_client.call(*change.call)
            except Failed as error:
                failed = error
        world.settle()
        if failed is not None:
            failures += 1
            assert failed.name.startswith(f"{NAME}.Error."), failed
            assert "internal error" not in failed.message
        said = change.said(world)
        assert said[0] in (old[0], new[0]) and (failed is not None or said[0] == new[0]), step
        world.root_client.call("Reload")
        assert change.said(world) in (old, new), f"step {step}: {failed}"
        put_back(world, change)
    assert failures
    assert daemon.poll() is None


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """Have a file system of its own at a path meanwhile."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError):
        (path / "filler").write_bytes(b"x" * (1 << 20))


def turn_read_only(path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)


@pytest.mark.parametrize(("spoil", "message"), [(fill, "No space left"), (turn_read_only, "Read-only file system")])
@pytest.mark.parametrize("exists", [False, True])
def test_file_system_that_takes_nothing(
    world: World, spoil: Callable[[Path], None], message: str, exists: bool
) -> None:
    system = world.root / "etc/systemd/system"
    with mounted(system, "size=32k"):
        world.service("web.service")
        if exists:
            world.write_drop_in("web.service", "50-cgpolicy.conf", drop_in("kill"))
            world.systemd.reload()
        world.start()
        spoil(system)
        files = world.policy_files()
        with pytest.raises(Failed, match=message) as failed:
            world.root_client.call(*set_unit("panic"))
        assert failed.value.name == f"{NAME}.Error.WriteFailed"
        assert world.policy_files() == files
        assert world.tree.said(WEB) == ("kill" if exists else "continue")
        assert world.systemd.reloads == int(exists)
        # Nothing is in the way once there is room.
        subprocess.run(["mount", "-o", "remount,rw,size=1m", str(system)], check=True)
        world.root_client.call(*set_unit("panic"))
        assert world.tree.said(WEB) == "panic"
