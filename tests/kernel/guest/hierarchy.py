#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""hierarchy BASE PAGES [TEST...]: the file, who may write it, whose value counts, and how losses are reported.

PAGES are lost in the storm.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kernel.guest.pagecache import (
    CGROUPS,
    HWPOISON_INJECT,
    NEW,
    PAGE,
    Cgroup,
    KernelLog,
    Process,
    Target,
    Trace,
    address_of,
    charged_to,
    check,
    errno_of,
    file_pfn,
    filesystem,
    keep_quiet,
    libc,
    overwrite,
    pfn_at,
    poison,
    target,
    wait_for,
)

NOBODY = 65534
CLONE_NEWUSER = 0x10000000
FILE = "memory.failure_dirty_action"

base, pages = "", 0  # from the command line


def idle(process: Process) -> None:
    process.wait_for_order()


def lose(owner: Cgroup, *, stay: bool = False) -> Process | None:
    """Have a process in a cgroup dirty a page of a file, and lose it."""

    def body(process: Process) -> None:
        with target("ext4") as file:
            hold(process, file.path)

    process = Process(owner, body)
    poison(int(process.hear()), "inject")
    if stay:
        return process
    process.end()
    return None


def test_interface() -> None:
    group = Cgroup("interface")
    check(False, (CGROUPS / FILE).exists(), "file on the root cgroup")
    check("continue\n", group.action, "default")
    for value in ("kill", "panic", "continue", "kill\n", " kill \n"):
        group.action = value
        check(value.strip() + "\n", group.action, f"after writing {value!r}")
    for value in ("\n", "Kill", "kill panic", "killed", "kil", "0", "2", "default", "inherit", "max"):
        check("EINVAL", write_error(group.path / FILE, value), f"writing {value!r}")
        check("kill\n", group.action, f"after writing {value!r}")
    check("continue\n", Cgroup("child", group).action, "value of a new child: nothing is copied")
    check(0o644, (group.path / FILE).stat().st_mode & 0o777, "mode")
    check(["failure_dirty", "failure_dirty_kill"], list(group.events())[-2:], "keys of memory.events")
    check(list(group.events()), list(group.events(local=True)), "keys of memory.events.local")
    delegatable = Path("/sys/kernel/cgroup/delegate").read_text().split()
    check(False, FILE in delegatable, "delegatable")


def write_error(path: Path, value: str) -> str:
    """Write without what Python's files add, as truncation; return the error's name, or "ok"."""
    fd = -1

    def write() -> None:
        nonlocal fd
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, value.encode())

    try:
        return errno_of(write)
    finally:
        if fd >= 0:
            os.close(fd)


def test_controller_disabled() -> None:
    """The value is gone also if the io controller, which depends on memory, keeps the state of the cgroup alive."""
    for number, controllers in enumerate(("+memory", "+memory +io")):
        top = Cgroup(f"disabled{number}", controllers=controllers)
        child = Cgroup("child", top, controllers=controllers)
        child.action = "kill"
        process = Process(child, idle)
        (top.path / "cgroup.subtree_control").write_text("-memory")
        check(False, (child.path / FILE).exists(), "file without the controller")
        (top.path / "cgroup.subtree_control").write_text("+memory")
        check("continue\n", child.action, f"{controllers}: value after memory was off")
        process.end()


def test_highest_kill_counts() -> None:
    outside = Cgroup("outside")
    top = Cgroup("highest", outside)
    middle = Cgroup("middle", top)
    owner = Cgroup("owner", middle)
    sibling = Cgroup("sibling", top)
    bare = Cgroup("bare", sibling, controllers="")
    for group in (top, owner):
        group.action = "kill"
    neighbour = Cgroup("neighbour", outside)
    doomed = [Process(group, idle) for group in (middle_leaf(middle), bare, sibling_leaf(top))]
    spared = Process(neighbour, idle)
    log = KernelLog()
    process = lose(owner, stay=True)
    assert process
    for victim in (process, *doomed):
        check(signal.SIGKILL, victim.wait(), "wait status")
    check(True, spared.alive(), "process next to the group alive")
    log.wait(r"tasks in /outside/highest are going to be killed due to memory.failure_dirty_action set$")
    check((1, 1), top.losses(), "the group's counters")
    check((0, 1), top.losses(local=True), "the group's local counters")
    check((1, 0), owner.losses(), "the owner's counters")
    check((1, 0), owner.losses(local=True), "the owner's local counters")
    check((1, 1), outside.losses(), "the counters above")
    check((0, 0), outside.losses(local=True), "the local counters above")
    check((0, 0), sibling.losses(), "the sibling's counters")
    spared.end()


def middle_leaf(middle: Cgroup) -> Cgroup:
    return Cgroup("leaf", middle, controllers="")


def sibling_leaf(top: Cgroup) -> Cgroup:
    return Cgroup("another", top, controllers="")


def test_child_cannot_relax_nor_parent() -> None:
    top = Cgroup("relax")
    owner = Cgroup("owner", top)
    top.action, owner.action = "kill", "continue"
    process = lose(owner, stay=True)
    assert process
    check(signal.SIGKILL, process.wait(), "set on the parent: wait status")
    check((1, 1), top.losses(), "the parent's counters")
    strict = Cgroup("strict")
    child = Cgroup("child", strict)
    child.action = "kill"
    other = Process(Cgroup("other", strict), idle)
    process = lose(child, stay=True)
    assert process
    check(signal.SIGKILL, process.wait(), "set on the child: wait status")
    check(True, other.alive(), "process under the lenient parent alive")
    other.end()


def test_special_processes() -> None:
    """Die: those stopped, frozen, OOM-protected, init of a PID namespace, or without a first thread."""
    group = Cgroup("special")
    group.action = "kill"

    def stopped(process: Process) -> None:
        process.tell("here")
        os.kill(os.getpid(), signal.SIGSTOP)
        process.wait_for_order()

    def protected(process: Process) -> None:
        Path("/proc/self/oom_score_adj").write_text("-1000")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        process.tell("here")
        process.wait_for_order()

    def headless(process: Process) -> None:
        """Leave only a second thread."""

        def second() -> None:
            process.tell("here")
            process.wait_for_order()

        threading.Thread(target=second).start()
        libc.syscall(60, 0)  # exit of this thread, x86-64

    def namespace_init(process: Process) -> None:
        libc.unshare(0x20000000)  # CLONE_NEWPID
        child = os.fork()
        if child == 0:
            process.tell("here")
            process.wait_for_order()
            os._exit(0)
        os.waitpid(child, 0)
        process.wait_for_order()

    processes = [Process(group, body) for body in (stopped, protected, headless, namespace_init)]
    for process in processes:
        check("here", process.hear(), "process")
    frozen = Cgroup("frozen", group, controllers="")
    processes.append(Process(frozen, idle))
    (frozen.path / "cgroup.freeze").write_text("1")
    wait_for(lambda: "frozen 1" in (frozen.path / "cgroup.events").read_text(), "frozen")
    loser = lose(group, stay=True)
    assert loser
    for process in [loser, *processes]:
        check(signal.SIGKILL, process.wait() & 0x7F, "signal in the wait status")
    wait_for(lambda: not group.populated(), "empty")


def test_uninterruptible_process() -> None:
    """One that sleeps uninterruptibly dies as it wakes up, and does nothing before that."""
    group = Cgroup("uninterruptible")
    group.action = "kill"
    mountpoint = filesystem("xfs")
    path = mountpoint / "late"

    def sleeper(process: Process) -> None:
        process.tell(str(os.getpid()))
        process.wait_for_order()
        path.write_text("x")  # sleeps until the file system is thawed
        process.tell("awake")

    process = Process(group, sleeper)
    stat = Path("/proc", process.hear(), "stat")
    subprocess.run(["fsfreeze", "--freeze", mountpoint], check=True)
    try:
        process.order()
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "D", "uninterruptible")
        loser = lose(group, stay=True)
        assert loser
        check(signal.SIGKILL, loser.wait(), "wait status of the process that wrote")
        check(True, process.alive(), "uninterruptible process still there")
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", mountpoint], check=True)
    check(signal.SIGKILL, process.wait(), "wait status")
    check("", process.rest(), "what it did after waking up")


def test_traced_process() -> None:
    """One that is stopped under a debugger dies; the debugger, outside of the group, does not."""
    group = Cgroup("traced")
    group.action = "kill"

    def tracee(process: Process) -> None:
        libc.ptrace(0, 0, 0, 0)  # PTRACE_TRACEME, by whom it was forked
        process.tell("here")
        os.kill(os.getpid(), signal.SIGSTOP)
        process.wait_for_order()

    process = Process(group, tracee)
    check("here", process.hear(), "process")
    _, status = os.waitpid(process.pid, 0)
    check(True, os.WIFSTOPPED(status), "stopped")
    loser = lose(group, stay=True)
    assert loser
    check(signal.SIGKILL, loser.wait(), "wait status of the process that wrote")
    check(signal.SIGKILL, os.waitpid(process.pid, 0)[1], "wait status")


def test_global_init_is_spared() -> None:
    group = Cgroup("init")
    group.action = "kill"
    home = Path(f"{CGROUPS}{Path('/proc/1/cgroup').read_text().strip().removeprefix('0::')}/cgroup.procs")

    def keep_house(process: Process) -> None:
        """Be in the cgroup that init is away from, for init removes its empty ones."""
        home.write_text("0")
        process.tell("home")
        process.wait_for_order()

    keeper = Process(None, keep_house)
    check("home", keeper.hear(), "process")
    (group.path / "cgroup.procs").write_text("1")
    try:
        check(f"0::{group.name}\n", Path("/proc/1/cgroup").read_text(), "cgroup of init")
        process = lose(group, stay=True)
        assert process
        check(signal.SIGKILL, process.wait(), "wait status of the process that wrote")
        check((1, 1), group.losses(), "counters")
        check("1\n", (group.path / "cgroup.procs").read_text(), "who is left")
    finally:
        home.write_text("1")
        keeper.end()
    subprocess.run(["systemctl", "start", "--quiet", "basic.target"], check=True, timeout=60)  # it answers


def test_arrivals_die() -> None:
    """What is moved around in the group, or cloned into its many cgroups, during the kill is killed as well.

    Visiting 500 cgroups takes the kernel longer than a process needs to get from one to the next.
    """
    group = Cgroup("arrivals", controllers="+memory +pids")
    group.action = "kill"
    (group.path / "pids.max").write_text("200")
    parts = [Cgroup(f"part{number}", group, controllers="") for number in range(500)]

    def hopper(process: Process) -> None:
        process.tell("here")
        process.wait_for_order()
        number = os.getpid()
        while True:
            number = (number * 1664525 + 1013904223) % 2**32
            (parts[number % len(parts)].path / "cgroup.procs").write_text("0")
            if number >> 16 & 1 and os.fork():
                os._exit(0)

    processes = [Process(parts[number], hopper) for number in range(8)]
    for process in processes:
        check("here", process.hear(), "process")
        process.order()
    loser = lose(group, stay=True)
    assert loser
    check(signal.SIGKILL, loser.wait(), "wait status of the process that wrote")
    wait_for(lambda: not group.populated(), "empty")


def test_removed_cgroup() -> None:
    """Up to 6.12 a removed cgroup keeps its pages and its value; later, both are the parent's."""
    top = Cgroup("remains")
    owner = Cgroup("owner", top)
    owner.action = "kill"
    with target("ext4") as file:
        process = Process(owner, lambda process: overwrite(file.path, 0, "write", file.size))
        process.wait()
        owner.path.rmdir()
        fd = os.open(file.path, os.O_RDWR)
        pfn = file_pfn(fd, 0)
        dead_kept = base == "v6.12"
        if not dead_kept:
            wait_for(lambda: charged_to(pfn) == top.id, "page charged to the parent")
        log = KernelLog()
        poison(pfn, "inject")
        os.close(fd)
    (line,) = log.lost()
    charged = ("/remains/owner", "kill") if dead_kept else ("/remains", "continue")
    check(charged, (line["memcg"], line["action"]), "the kernel's line")
    check((1, int(dead_kept)), top.losses(), "the parent's counters")


def test_root_cgroup_continues() -> None:
    log = KernelLog()
    with target("ext4") as file:

        def in_root(process: Process) -> None:
            (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
            hold(process, file.path)

        body = Process(None, in_root)
        poison(int(body.hear()), "inject")
        check(True, body.alive(), "process alive")
        body.end()
    (line,) = log.lost()
    check(("/", "continue"), (line["memcg"], line["action"]), "the kernel's line")


def hold(process: Process, path: Path) -> None:
    fd, _ = overwrite(path, 0, "write", 0)
    process.tell(str(file_pfn(fd, 0)))
    process.wait_for_order()


def test_first_toucher_is_charged() -> None:
    """The policy is that of the cgroup that is charged, whoever wrote the data."""
    first, writer = Cgroup("first"), Cgroup("writer")
    writer.action = "kill"
    with target("ext4") as file:
        toucher = Process(first, lambda process: hold(process, file.path))
        toucher.hear()
        process = Process(writer, lambda process: hold(process, file.path))
        poison(int(process.hear()), "inject")
        check((1, 0), first.losses(), "counters of the first toucher")
        check((0, 0), writer.losses(), "counters of the writer")
        check(True, process.alive(), "writer alive")
        process.end()
        toucher.end()


def test_events_can_be_waited_for() -> None:
    group = Cgroup("notify")
    with open(group.path / "memory.events") as events:
        events.read()
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        check([], poll.poll(0), "events before")
        lose(group)
        check(True, bool(poll.poll(5000)), "poll() woken")
        events.seek(0)
        check(True, "failure_dirty 1\n" in events.read(), "memory.events")


def test_storm_is_counted_and_limited() -> None:
    """Lines are limited, and those left out are said; counters and trace events are not limited."""
    group = Cgroup("storm")
    time.sleep(5)  # a new interval of the kernel's limit: 10 lines in 5 s
    lose(Cgroup("calm"))  # has the kernel say what was left out before
    log, trace = KernelLog(), Trace()
    before = time.monotonic()
    with target("ext4", pages * PAGE) as file:
        process = Process(group, lambda process: dirty_all(process, file))
        with open(HWPOISON_INJECT, "w") as inject:
            for number in range(pages):
                inject.write(process.hear())
                with contextlib.suppress(OSError):  # EBUSY: somebody else has a reference on the page
                    inject.flush()
                if number % 500 == 0:
                    log.read()  # the kernel's buffer takes some thousand lines
        process.end()
    intervals = int((time.monotonic() - before) / 5) + 1
    check((pages, 0), group.losses(), "counters")
    check(pages, len(trace.read()), "trace events")
    time.sleep(5)
    lose(group)
    log.wait(r"report_lost_file_data: \d+ callbacks suppressed")
    said = [line for line in log.read() if "callbacks suppressed" in line]
    lines, suppressed = len(log.lost()), sum(int(line.split()[-3]) for line in said)
    check(pages + 1, lines + suppressed, "lines, and those that are said to be left out")
    if lines > 10 * (intervals + 2):
        raise AssertionError(f"{lines} lines in {intervals} intervals")
    stalls = [line for line in log.read() if re.search(r"soft lockup|rcu.*stall|blocked for more than", line)]
    check([], stalls, "what the kernel says of its own pace")
    seconds = round(time.monotonic() - before)
    print(json.dumps({"pages": pages, "lines": lines, "suppressed": suppressed, "seconds": seconds}), flush=True)
    trace.close()


def dirty_all(process: Process, file: Target) -> None:
    """Dirty all pages of a file, each in a folio of its own, and tell their frames."""
    fd = os.open(file.path, os.O_RDWR)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    mapping = mmap.mmap(fd, file.size)
    mapping.madvise(mmap.MADV_RANDOM)
    start = address_of(mapping)
    frames = []
    for pos in range(0, file.size, PAGE):
        mapping[pos : pos + 1] = NEW
        frames.append(pfn_at(start + pos))
    mapping.close()  # nobody is to be told by SIGBUS
    for pfn in frames:
        process.tell(f"{pfn:#x}")
    process.wait_for_order()


# Delegation -----------------------------------------------------------------------------------


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def test_delegation() -> None:
    top = Cgroup("delegated")
    for name in (".", *Path("/sys/kernel/cgroup/delegate").read_text().split()):
        if (top.path / name).exists():
            os.chown(top.path / name, NOBODY, NOBODY)
    with as_user(NOBODY):
        for value in ("continue", "kill", "panic"):
            check("EACCES", write_error(top.path / FILE, value), f"{value} on the top")
    check("continue\n", top.action, "value of the top")

    def user(process: Process) -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        process.tell(own_cgroup(top, "own"))

    def namespace_root(process: Process) -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is the user's again
        if libc.unshare(CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1")
        Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1")
        check(0, os.geteuid(), "uid in the namespace")
        process.tell(own_cgroup(top, "namespaced"))

    (top.path / "cgroup.subtree_control").write_text("+memory")
    for body in (user, namespace_root):
        process = Process(None, body)
        check("panic=EPERM continue=ok kill=ok after=kill", process.hear(), body.__name__)
        check(0, process.wait(), "status")


def own_cgroup(top: Cgroup, name: str) -> str:
    """Make a cgroup, which makes its files ours, and try each value."""
    group = top.path / name
    group.mkdir()
    results = [f"{value}={write_error(group / FILE, value)}" for value in ("panic", "continue", "kill")]
    check("EPERM", write_error(group / FILE, "panic"), "panic again")
    return " ".join([*results, f"after={(group / FILE).read_text().strip()}"])


def test_opener_counts() -> None:
    """The privilege is that of whoever opened the file, not of whoever writes to it."""
    group = Cgroup("opener")
    os.chown(group.path / FILE, NOBODY, NOBODY)
    with as_user(NOBODY):
        fd = os.open(group.path / FILE, os.O_WRONLY)
    check(0, os.geteuid(), "uid of the writer")
    check("EPERM", errno_of(lambda: os.write(fd, b"panic")), "root writes to the user's file")
    check("ok", errno_of(lambda: os.pwrite(fd, b"kill", 0)), "root writes kill to the user's file")
    os.close(fd)
    check("kill\n", group.action, "value")
    fd = os.open(group.path / FILE, os.O_WRONLY)
    with as_user(NOBODY):
        check("ok", errno_of(lambda: os.write(fd, b"panic")), "the user writes to root's file")
    os.close(fd)
    check("panic\n", group.action, "value")
    group.action = "continue"


def test_child_of_root_without_privilege() -> None:
    """What root's child has opened without CAP_SYS_ADMIN does not arm a panic, even if root writes to it."""
    group = Cgroup("child")
    ours, theirs = socket.socketpair()

    def child(process: Process) -> None:
        unprivileged = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        program = [sys.executable, "-c", OPEN_AND_SEND, str(group.path / FILE), str(theirs.fileno())]
        os.execvp(unprivileged[0], unprivileged + program)

    theirs.set_inheritable(True)
    process = Process(None, child)
    _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    check(0, process.wait(), "wait status")
    check("EPERM", errno_of(lambda: os.write(fd, b"panic")), "root writes to what the child has opened")
    check("ok", errno_of(lambda: os.pwrite(fd, b"kill", 0)), "root writes kill")
    os.close(fd)
    check("kill\n", group.action, "value")


OPEN_AND_SEND = """
import os, socket, sys
assert os.geteuid() == 0
fd = os.open(sys.argv[1], os.O_WRONLY)
try:
    os.write(fd, b"panic")
    sys.exit("panic was accepted")
except PermissionError:
    socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"."], [fd])
"""


def main() -> None:
    global base, pages
    base, pages = sys.argv[1], int(sys.argv[2])
    keep_quiet()
    for kind in ("ext4", "xfs"):
        filesystem(kind)  # the processes below share them
    tests: dict[str, Callable[[], None]] = {
        name: value for name, value in globals().items() if name.startswith("test_")
    }
    if sys.argv[3:]:
        tests = {name: tests[name] for name in sys.argv[3:]}
    print(f"1..{len(tests)}", flush=True)
    failed = 0
    for name, test in tests.items():
        try:
            test()
            print(f"ok {name}", flush=True)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            failed += 1
            print(f"not ok {name}: {error}", flush=True)
    sys.exit(1 if failed else 0)


main()
