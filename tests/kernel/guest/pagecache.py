# SPDX-License-Identifier: GPL-2.0-only
"""Page cache, memory errors and cgroups, as seen by the tests in the guest."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import mmap
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_IFMT
from typing import ClassVar

PAGE = mmap.PAGESIZE
OLD, NEW = b"A", b"B"  # what is in the backing store, and what is dirty in the page cache

# /proc/kpageflags (Documentation/admin-guide/mm/pagemap.rst)
DIRTY, SWAPCACHE, COMPOUND_HEAD, COMPOUND_TAIL, HWPOISON = 4, 13, 15, 16, 19

MADV_HWPOISON = 100  # not in module mmap

CGROUPS = Path("/sys/fs/cgroup")
HWPOISON_INJECT = Path("/sys/kernel/debug/hwpoison/corrupt-pfn")
WAIT_SECONDS = 60  # for what takes well below a second on an idle machine

LOST = re.compile(
    r"Memory failure: 0x(?P<pfn>[0-9a-f]+): dirty page cache lost:"
    r" dev (?P<major>\d+):(?P<minor>\d+) \((?P<s_id>[^)]*)\)"
    r" ino (?P<ino>\d+) pos (?P<pos>\d+) mode (?P<mode>0\d+) memcg (?P<memcg>\S+) action (?P<action>\w+)$"
)

libc = ctypes.CDLL(None, use_errno=True)


def check(expected: object, actual: object, what: str) -> None:
    if expected != actual:
        raise AssertionError(f"{what}: expected {expected!r}, got {actual!r}")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Poll for what the kernel offers no event for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.01)


# Memory ---------------------------------------------------------------------------------------


def number_in(fd: int, index: int) -> int:
    """Return a 64-bit number of a file that is an array of them."""
    return int.from_bytes(os.pread(fd, 8, index * 8), sys.byteorder)


def pagemap_entry(address: int) -> int:
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        return number_in(pagemap.fileno(), address // PAGE)


def is_present(address: int) -> bool:
    return bool(pagemap_entry(address) >> 63)


def pfn_at(address: int) -> int:
    """Return the page frame number behind an address of this process."""
    entry = pagemap_entry(address)
    if not entry >> 63:
        raise AssertionError(f"no page at {address:#x}")
    return entry & ((1 << 55) - 1)


def address_of(buffer: mmap.mmap) -> int:
    view = (ctypes.c_char * 1).from_buffer(buffer)
    address = ctypes.addressof(view)
    del view
    return address


def file_pfn(fd: int, pos: int) -> int:
    """Return the page frame number of a cached page of a file, mapped for that moment only."""
    with mmap.mmap(fd, PAGE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=pos) as page:
        page[0]
        # A read-only buffer does not tell its address: look it up.
        inode = os.fstat(fd).st_ino
        with open("/proc/self/maps") as maps:
            rows = [row.split() for row in maps]
        found = (row for row in rows if int(row[4]) == inode and int(row[2], 16) == pos)
        return pfn_at(int(next(found)[0].split("-")[0], 16))


def kpageflags(pfn: int) -> int:
    with open("/proc/kpageflags", "rb", buffering=0) as file:
        return number_in(file.fileno(), pfn)


def charged_to(pfn: int) -> int:
    """Return the inode number, which is the ID, of the cgroup that is charged for a page."""
    with open("/proc/kpagecgroup", "rb", buffering=0) as file:
        return number_in(file.fileno(), pfn)


def has_flag(pfn: int, *flags: int) -> bool:
    return any(kpageflags(pfn) >> flag & 1 for flag in flags)


def is_dirty(pfn: int) -> bool:
    """Tell whether a page is dirty, which the first page of a large folio knows."""
    while has_flag(pfn, COMPOUND_TAIL):
        pfn -= 1
    return has_flag(pfn, DIRTY)


def keep_quiet() -> None:
    """Have nobody write dirty pages back, nor read a block device and be charged for it, unless asked to.

    An interval of 0 would not do: the flusher is then woken as soon as a page gets dirty, and a new device's
    share of the dirty memory is so small that it starts to write (wb_wakeup_delayed(), wb_over_bg_thresh()).
    """
    for name in ("dirty_writeback_centisecs", "dirty_expire_centisecs"):
        Path("/proc/sys/vm", name).write_text("360000")
    for name in ("dirty_ratio", "dirty_background_ratio"):
        Path("/proc/sys/vm", name).write_text("90")
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=True)


# Errors ---------------------------------------------------------------------------------------


class KernelLog:
    """The kernel's messages from now on, waited for by poll()."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.fd, 0, os.SEEK_END)
        self.lines: list[str] = []

    def read(self) -> list[str]:
        """Return all lines so far."""
        while True:
            try:
                record = os.read(self.fd, 8192)
            except BlockingIOError:
                return self.lines
            except BrokenPipeError:  # overwritten
                continue
            self.lines.append(record.decode(errors="replace").partition(";")[2].split("\n")[0])

    def wait(self, pattern: str) -> str:
        deadline = time.monotonic() + WAIT_SECONDS
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            for line in self.read():
                if re.search(pattern, line):
                    return line
            if time.monotonic() > deadline:
                raise AssertionError(f"no kernel message matches {pattern}; there were: {self.lines}")
            poll.poll(1000)

    def lost(self) -> list[re.Match[str]]:
        return [match for line in self.read() if (match := LOST.search(line))]

    def close(self) -> None:
        os.close(self.fd)


def poison(pfn: int, how: str) -> None:
    """Report an uncorrectable error in a page and return once it was handled: "inject" or "srao".

    What madvise() does is for a process that has the page mapped: see poison_own().
    """
    log = KernelLog()
    if how == "srao":
        subprocess.run(["vm-mce", hex(pfn * PAGE)], check=True)
        log.wait(rf"Memory failure: {pfn:#x}: (recovery action for|unhandlable)")
    else:
        # EBUSY only says that the page could not be isolated.
        with contextlib.suppress(OSError), open(HWPOISON_INJECT, "w") as file:
            file.write(hex(pfn))
    log.close()


def poison_own(fd: int, pos: int, mapping: mmap.mmap | None) -> None:
    """Have an error in a page that this process has mapped, as if it had touched it: MADV_HWPOISON, and SIGBUS."""
    signal.signal(signal.SIGBUS, lambda *_: None)
    page = mapping or mmap.mmap(fd, PAGE, prot=mmap.PROT_READ, offset=pos)
    with contextlib.suppress(OSError):  # as above
        page.madvise(MADV_HWPOISON)


# Control groups -------------------------------------------------------------------------------


class Cgroup:
    """A control group below /sys/fs/cgroup, made with the memory controller on."""

    def __init__(self, name: str, parent: Cgroup | None = None, *, controllers: str = "+memory") -> None:
        above = parent.path if parent else CGROUPS
        if controllers:
            (above / "cgroup.subtree_control").write_text(controllers)
        self.path: Path = above / name
        self.path.mkdir()

    @property
    def name(self) -> str:
        return "/" + str(self.path.relative_to(CGROUPS))

    @property
    def id(self) -> int:
        return self.path.stat().st_ino

    @property
    def action(self) -> str:
        return (self.path / "memory.failure_dirty_action").read_text()

    @action.setter
    def action(self, value: str) -> None:
        (self.path / "memory.failure_dirty_action").write_text(value)

    def events(self, *, local: bool = False) -> dict[str, int]:
        text = (self.path / ("memory.events.local" if local else "memory.events")).read_text()
        return {key: int(value) for key, value in (line.split() for line in text.splitlines())}

    def losses(self, *, local: bool = False) -> tuple[int, int]:
        """Return pages lost and group kills."""
        events = self.events(local=local)
        return events["failure_dirty"], events["failure_dirty_kill"]

    def populated(self) -> bool:
        return "populated 1" in (self.path / "cgroup.events").read_text()

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def kill(self) -> None:
        (self.path / "cgroup.kill").write_text("1")


class Process:
    """A child process that has joined a cgroup and does what a function says, with a pipe each way."""

    orders: ClassVar[set[int]] = set()  # the parent's ends, which no child may keep open

    def __init__(self, cgroup: Cgroup | None, body: Callable[[Process], object]) -> None:
        self.to_child, self.to_parent = os.pipe(), os.pipe()
        self.orders.add(self.to_child[1])
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                for fd in self.orders:
                    os.close(fd)
                os.close(self.to_parent[0])
                if cgroup:
                    cgroup.join()
                self.tell("here")
                body(self)
                status = 0
            except BaseException as error:  # noqa: BLE001
                with contextlib.suppress(OSError):
                    os.write(self.to_parent[1], f"! {error!r}\n".encode())
            finally:
                os._exit(status)
        os.close(self.to_child[0])
        os.close(self.to_parent[1])
        self.pidfd = os.pidfd_open(self.pid)
        check("here", self.hear(), "child process")

    # In the child
    def tell(self, text: str) -> None:
        os.write(self.to_parent[1], f"{text}\n".encode())

    def wait_for_order(self) -> None:
        """Wait for one byte; the end of the parent is the end of the child."""
        if not os.read(self.to_child[0], 1):
            os._exit(0)

    # In the parent
    def hear(self) -> str:
        if not select.select([self.to_parent[0]], [], [], WAIT_SECONDS)[0]:
            raise AssertionError("the child process says nothing")
        text = b""
        while not text.endswith(b"\n"):
            byte = os.read(self.to_parent[0], 1)
            if not byte:
                raise AssertionError(f"the child process ended: {self.wait()}")
            text += byte
        if text.startswith(b"!"):
            raise AssertionError(f"in the child process: {text.decode()}")
        return text.decode().strip()

    def rest(self) -> str:
        """Return what it said last, now that it has ended."""
        os.set_blocking(self.to_parent[0], False)
        try:
            return os.read(self.to_parent[0], 4096).decode()
        except BlockingIOError:
            return ""

    def order(self) -> None:
        os.write(self.to_child[1], b".")

    def wait(self) -> int:
        """Return its wait status, as waitpid() gives it, once it has ended."""
        if not select.select([self.pidfd], [], [], WAIT_SECONDS)[0]:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise AssertionError("the process did not end")
        return os.waitpid(self.pid, 0)[1]

    def alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def end(self) -> None:
        """Have it end by closing its pipe, and reap it."""
        self.orders.remove(self.to_child[1])
        os.close(self.to_child[1])
        self.wait()


# File systems ---------------------------------------------------------------------------------

counter = itertools.count()

MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "xfs16k": ("mkfs.xfs", "-q", "-f", "-b", "size=16384"),  # blocks of four pages: no smaller folios
    "vfat": ("mkfs.vfat",),
}


@dataclass(frozen=True)
class Target:
    """A file, or a block device, whose pages are to be lost; size in bytes, the others as the kernel's line has them.

    The inode of a block device is that of its page cache, and not of its file in /dev: it has the device's number
    (dev_t as in include/linux/kdev_t.h) and no permissions.
    """

    path: Path
    size: int
    device: int
    inode: int
    mode: int


def loop_device(name: str, size: int) -> Path:
    image = Path(f"/var/tmp/{name}.img")
    with open(image, "wb") as file:
        file.truncate(size)
    command = ["losetup", "--find", "--show", str(image)]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


@functools.cache
def filesystem(kind: str) -> Path:
    """Return where a new file system of a kind is mounted; a process's children share what it has made."""
    name = f"{kind}-{os.getpid()}"
    loop = loop_device(name, (384 if kind.startswith("xfs") else 256) << 20)
    mountpoint = Path("/mnt", name)
    subprocess.run([*MKFS[kind], loop], check=True, stdout=subprocess.DEVNULL)
    mountpoint.mkdir()
    subprocess.run(["mount", loop, mountpoint], check=True)
    return mountpoint


@contextlib.contextmanager
def target(kind: str, size: int = 1 << 20) -> Iterator[Target]:
    """Make a file full of OLD on a file system of a kind; "bdev" is a block device.

    Poisoned pages stay where they are until the machine is gone, and so does the file.
    """
    name = f"{os.getpid()}-{next(counter)}"
    if kind == "bdev":
        path = loop_device(name, size)
    else:
        path = filesystem(kind) / name
    with open(path, "r+b" if kind == "bdev" else "wb") as file:
        file.write(OLD * size)
        file.flush()
        os.fsync(file.fileno())
        # Nobody else's: a large folio with a poisoned page in it would be freed, and the page used again.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    stat = path.stat()
    if kind == "bdev":
        device = stat.st_rdev
        yield Target(path, size, device, os.major(device) << 20 | os.minor(device), S_IFMT(stat.st_mode))
    else:
        yield Target(path, size, stat.st_dev, stat.st_ino, stat.st_mode)


def overwrite(path: Path, pos: int, how: str, size: int) -> tuple[int, mmap.mmap | None]:
    """Dirty the page at pos; return the open file, and the mapping if that is how it was done.

    "write" and "mmap" dirty one page that is cached alone. "large" and "large-mmap" overwrite a part of a large
    folio that readahead has built: one that cannot be split while it is dirty. "whole" overwrites all of the file
    at once, so that its large folios can be split.
    """
    fd = os.open(path, os.O_RDWR)
    mapping = None
    if how == "whole":
        os.pwrite(fd, NEW * size, 0)
    elif how.startswith("large"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while os.read(fd, 1 << 16):
            pass
        if how == "large":
            os.pwrite(fd, NEW * 2 * PAGE, pos)
    else:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        if how == "write":
            os.pwrite(fd, NEW * PAGE, pos)
    if how.endswith("mmap"):
        mapping = mmap.mmap(fd, PAGE, offset=pos)
        if how == "mmap":
            mapping.madvise(mmap.MADV_RANDOM)  # page faults do not look at the file's
        mapping[:] = NEW * PAGE
    return fd, mapping


# Tracing --------------------------------------------------------------------------------------


class Trace:
    """Events of ras:memory_failure_dirty, through an instance of its own."""

    def __init__(self) -> None:
        self.path = Path(f"/sys/kernel/tracing/instances/losses-{os.getpid()}")
        self.path.mkdir()
        (self.path / "events/ras/memory_failure_dirty/enable").write_text("1")

    def read(self) -> list[dict[str, str]]:
        lines = (self.path / "trace").read_text().splitlines()
        lines = [line for line in lines if "memory_failure_dirty:" in line]
        (self.path / "trace").write_text("")
        return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines]

    def close(self) -> None:
        (self.path / "events/ras/memory_failure_dirty/enable").write_text("0")
        self.path.rmdir()


def errno_of(function: Callable[[], object]) -> str:
    """Return the name of the error that a call fails with, or "ok"."""
    try:
        function()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"
