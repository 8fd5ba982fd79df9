# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults in the middle of a change: killed at any system call, no space, a file system read-only by now, a slow disk.

strace(1) makes the kernel do it, so that no step of the daemon or of what lies below it is left out.
"""

from __future__ import annotations

import contextlib
import errno
import re
import subprocess
import time
from collections import Counter
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

MAIN_LOOP, WRITER = 0, 1  # of threads()


def threads(daemon: subprocess.Popen[bytes]) -> list[int]:
    """Return the threads that run the daemon's code, that of the main loop first; the others are GLib's."""
    found = sorted(int(task.name) for task in Path(f"/proc/{daemon.pid}/task").iterdir())
    names = {thread: Path(f"/proc/{thread}/comm").read_text() for thread in found}
    return [thread for thread in found if names[thread] == names[daemon.pid]]


@contextlib.contextmanager
def traced(pids: Sequence[int], calls: str, *options: str, paths: Sequence[Path] = ()) -> Iterator[None]:
    """Have strace attached to threads meanwhile, for some system calls, of those on some paths if given."""
    command = ["strace", "-qq", *(f"--attach={thread}" for thread in pids), f"--trace={calls}", *options,
               *(f"--trace-path={path}" for path in paths)]
    with subprocess.Popen(command) as strace:
        try:
            began = time.monotonic()
            for thread in pids:
                while f"TracerPid:\t{strace.pid}\n" not in Path(f"/proc/{thread}/status").read_text():
                    assert strace.poll() is None and time.monotonic() - began < 20, "strace does not attach"
                    time.sleep(0.001)  # nothing tells of it
            yield
        finally:
            strace.terminate()


def injected(
    pids: Sequence[int], calls: str, fault: str, paths: Sequence[Path] = ()
) -> contextlib.AbstractContextManager[None]:
    """Have the kernel inject a fault into system calls of threads meanwhile."""
    return traced(pids, calls, "--output=/dev/null", f"--inject={calls}:{fault}", paths=paths)


@dataclass(frozen=True, slots=True)
class Point:
    """A system call of a change: the thread's place in threads(), the call's name, and how many there were of it.

    strace counts those of each thread and each name by themselves.
    """

    thread: int
    name: str
    count: int


def points(world: World, calls: str, act: Callable[[], object], paths: Sequence[Path] = ()) -> list[Point]:
    """Return the system calls that the daemon makes while something is done, each thread's in order."""
    assert world.daemon is not None
    pids = threads(world.daemon)
    log = world.root / "strace"
    with traced(pids, calls, f"--output={log}", paths=paths):
        act()
        world.settle()
    begun: Counter[tuple[int, str]] = Counter()
    found = []
    for pid, name in re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE):
        begun[int(pid), name] += 1
        found.append(Point(pids.index(int(pid)), name, begun[int(pid), name]))
    return sorted(found, key=lambda point: point.thread)


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


def lives(world: World) -> bool:
    """Tell whether the daemon answers, strace being gone: it may have been killed only after its last answer."""
    assert world.daemon is not None
    try:
        world.root_client.get("Version")
    except Failed:
        world.daemon.wait()
        return False
    return True


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
    world.root_client.call(*change.call)  # makes directories that stay
    new = change.said(world)
    put_back(world, change)
    calls = points(world, CALLS, lambda: world.root_client.call(*change.call))
    assert old != new
    writing = [point for point in calls if point.thread == WRITER]
    assert {"fsync", "renameat" if change.after else "unlinkat"} <= {point.name for point in writing}
    stride = 1 if is_full() or change is CHANGES["set another"] else 5
    seen = set()
    for point in writing + [point for point in calls if point.thread == MAIN_LOOP][::stride]:
        put_back(world, change)
        assert change.said(world) == old
        assert world.daemon is not None
        pid = threads(world.daemon)[point.thread]
        with injected([pid], point.name, f"signal=KILL:when={point.count}"):
            call = world.root_client.start(*change.call)
            wait(partial(has_ended, world.daemon, call), "an end")
        killed = not lives(world)
        assert killed or point.thread == MAIN_LOOP, point  # which wakes others up a varying number of times
        if killed and not world.tree.said(change.cgroup):
            world.tree.say(change.cgroup, old[1])  # unlike a plain file, that of a cgroup is never empty
        file, value = change.said(world)
        # No other file is read by anybody, whatever is left of it.
        assert file in (old[0], new[0]) and value in (old[1], new[1]), point
        seen.add((point.thread, file == new[0], value == new[1]))
        if killed:
            wait(lambda: world.root_client.owner(NAME) is None, f"{NAME} to be free")
            world.start()
        else:
            call.result()
        world.settle()
        assert change.said(world) in (old, new), f"{point}: {file!r} and {value} before the restart"
        assert change.said(world)[0] == file
    # It was killed before the file was new, and after; otherwise nothing was seen.
    assert {(WRITER, False, False), (WRITER, True, False), (MAIN_LOOP, True, True)} <= seen


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EIO] if is_full() else [errno.ENOSPC])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_system_call_that_fails(world: World, change: Change, fault: int) -> None:
    """The caller is told unless all is well, and the daemon stays in step with the file."""
    prepare(world)
    daemon = world.daemon
    assert daemon is not None
    put_back(world, change)
    old = change.said(world)
    path = world.root / change.file
    paths = [path, path.parent, path.parent.parent, path.with_name(f".{path.name}.new")]
    world.root_client.call(*change.call)
    new = change.said(world)
    put_back(world, change)
    calls = points(world, FAILED_CALLS, lambda: world.root_client.call(*change.call), paths)
    put_back(world, change)
    failures = []
    for point in calls:
        failed: Failed | None = None
        failing = f"error={errno.errorcode[fault]}:when={point.count}"
        with injected([threads(daemon)[point.thread]], point.name, failing, paths):
            try:
                world.root_client.call(*change.call)
            except Failed as error:
                failed = error
        world.settle()
        if failed is not None:
            failures.append(point.name)
            assert failed.name.startswith(f"{NAME}.Error."), failed
            assert "internal error" not in failed.message
        said = change.said(world)
        assert said[0] in (old[0], new[0]) and (failed is not None or said[0] == new[0]), point
        world.root_client.call("Reload")
        assert change.said(world) in (old, new), f"{point}: {failed}"
        put_back(world, change)
    assert "fsync" in failures and ("renameat" in failures or not change.after)
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


# A slow disk ----------------------------------------------------------------------------------

FSYNC_SECONDS = 0.5


@contextlib.contextmanager
def slow_disk(world: World) -> Iterator[None]:
    """Have each fsync() of the daemon take its time meanwhile."""
    world.root_client.call(*set_unit("continue"))  # the thread that writes is there from the first change on
    assert world.daemon is not None
    with injected(threads(world.daemon), "fsync", f"delay_enter={FSYNC_SECONDS * 1e6:.0f}"):
        yield


def test_a_slow_disk_keeps_nobody_else_waiting(world: World) -> None:
    world.service("web.service")
    world.service("late.service", "MemoryFailureDirtyAction=kill", cgroup="")
    world.start()
    other = world.nobody()
    slowest: list[float] = []
    with slow_disk(world):
        for action in ("kill", "panic", "kill"):
            times = []
            first = world.root_client.start(*set_unit(action))
            # A unit's cgroup appears.
            world.tree.make("/system.slice/late.service")
            wait(lambda: world.tree.said("/system.slice/late.service") == "kill", "its policy")
            assert not first.answered
            world.tree.remove("/system.slice/late.service")
            while not first.answered:
                sent = time.monotonic()
                other.call("Explain", "(s)", "web.service")
                times.append(time.monotonic() - sent)
            first.result()
            assert world.tree.said(WEB) == action
            slowest.append(max(times))
            if slowest[-1] < FSYNC_SECONDS / 10:
                break
    print(f"slowest answers while an fsync() takes {FSYNC_SECONDS} s: {slowest}")
    # Whoever waited for the disk waited for it twice: for the file and for its directory.
    assert min(slowest) < FSYNC_SECONDS / 2


def test_changes_are_made_in_the_order_in_which_they_came(world: World) -> None:
    world.service("web.service")
    world.start()
    with slow_disk(world):
        calls = [world.root_client.start(*call) for call in (
            set_unit("kill"), CHANGES["unset"].call, set_unit("continue"), CHANGES["unset"].call, set_unit("panic"))]
        for number, call in enumerate(calls):
            call.result()
            assert not any(later.answered for later in calls[number + 2:])
    assert (world.root / PERSISTENT).read_bytes().endswith(drop_in("panic"))
    assert world.tree.said(WEB) == "panic"


def test_a_panic_that_is_being_armed_is_as_hard_to_disarm(world: World) -> None:
    world.service("web.service")
    world.start()
    polkit = world.polkit()
    with slow_disk(world):
        panic = world.root_client.start(*set_unit("panic"))
        disarm = world.nobody().start(*set_unit("kill"))
        wait(lambda: polkit.questions, "polkit to be asked")
        assert not panic.answered
        polkit.answer = "deny"
        panic.result()
        with pytest.raises(Failed):
            disarm.result()
    assert [question.action_id for question in polkit.questions] == [f"{NAME}.set-policy", f"{NAME}.set-panic"]
    assert world.tree.said(WEB) == "panic"


def test_what_was_accepted_is_done_before_the_end(world: World) -> None:
    world.service("web.service")
    daemon = world.start()
    with slow_disk(world):
        calls = [world.root_client.start(*set_unit(action)) for action in ("kill", "panic")]
        world.settle()
        daemon.terminate()
        wait(lambda: daemon.poll() is not None, "the daemon's end")
        assert daemon.returncode == 0
        for call in calls:
            call.result()
    assert (world.root / PERSISTENT).read_bytes().endswith(drop_in("panic"))
    assert world.tree.said(WEB) == "panic"
