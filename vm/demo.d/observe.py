#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest's part of vm/demo: lets each workload lose a dirty page and prints what happened, as lines of JSON.

It judges nothing: vm/demonstration.py knows what should happen, and no drop-in is read here.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SYSTEM = Path("/etc/systemd/system")
DATA = Path("/var/lib/demo")
RECORDS = Path("/run/demo")
CGROUPS = Path("/sys/fs/cgroup")

# As in workload.c.
PAGE = 4096
LOST_OFFSET = 3 * PAGE
NOT_CALLED = (1 << 64) - 1

KPF_DIRTY = 1 << 4  # include/uapi/linux/kernel-page-flags.h

SCOPE = r"machine-qemu\x2d1\x2dweb01.scope"

REACTION_SECONDS = 30.0  # from the machine check to death or the first stale read; far less on an idle host
STALE_SECONDS = 2.0  # how long a survivor is watched
BUS = "org.cgpolicy1"


@dataclass(frozen=True, slots=True)
class Workload:
    """A running workload: its unit, its process and where it counts what it read."""

    unit: str
    name: str
    main_pid: int
    child: subprocess.Popen[bytes] | None = None  # a scope's process is ours and not systemd's

    @property
    def file(self) -> Path:
        return DATA / self.name

    def record(self) -> dict[str, Any]:
        """Return what the workload counted so far."""
        data = (RECORDS / self.name).read_bytes()
        fresh, stale, failed, *fsync = struct.unpack_from("=5Q", data)
        called = [os.strerror(code) if code else "0" for code in fsync if code != NOT_CALLED]
        return {"fresh": fresh, "stale": stale, "failed": failed, "fsync": called}


def tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True).stdout.strip()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def start_service(name: str) -> Workload:
    systemctl("start", f"{name}.service")
    pid = int(systemctl("show", "-P", "MainPID", f"{name}.service"))
    return Workload(f"{name}.service", name, pid)


def start_machine(name: str) -> Workload:
    """Start a workload the way libvirt starts a virtual machine: a transient scope in machine.slice."""
    command = ["systemd-run", "--quiet", "--scope", "--slice=machine.slice", f"--unit={SCOPE}"]
    command += [str(HERE / "workload"), str(DATA / name), str(RECORDS / name)]
    child = subprocess.Popen(command)
    return Workload(SCOPE, name, child.pid, child)


def reading(workload: Workload) -> bool:
    """Tell whether a workload has changed its page and reads it."""
    path = RECORDS / workload.name
    return path.exists() and path.stat().st_size == PAGE and workload.record()["fresh"] > 0


def running(workload: Workload) -> bool:
    if workload.child:
        return workload.child.poll() is None
    return systemctl("show", "-P", "ActiveState", workload.unit) in ("active", "activating")


def ending(workload: Workload) -> str:
    """Say how a workload ended, in systemd's words or the parent's."""
    if workload.child:
        code = workload.child.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    lines = systemctl("show", "-p", "Result,ExecMainCode,ExecMainStatus", workload.unit).splitlines()
    shown = dict(line.split("=", 1) for line in lines)
    if int(shown["ExecMainCode"]) == os.CLD_EXITED:
        return f"exited with {shown['ExecMainStatus']}"
    number = signal.Signals(int(shown["ExecMainStatus"]))
    return f"killed by {number.name}, Result={shown['Result']}"


def cgroup(workload: Workload) -> Path:
    """Return the cgroup's directory as the kernel says, whatever the unit is called."""
    line = Path(f"/proc/{workload.main_pid}/cgroup").read_text().strip()
    return CGROUPS / line.removeprefix("0::/")


def policy(unit: str) -> dict[str, Any]:
    """Return what cgpolicyd says of a unit, or why it says nothing."""
    call = ["busctl", "--json=short", "call", BUS, "/org/cgpolicy1", f"{BUS}.Manager", "GetUnit", "s", unit]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return {"error": found.stderr.strip()}
    (path,) = json.loads(found.stdout)["data"]
    names = ("MemoryFailureDirtyAction", "SourcePath", "EffectiveAction", "State")
    get = ["busctl", "--json=short", "get-property", BUS, path, f"{BUS}.Unit", *names]
    shown = subprocess.run(get, capture_output=True, text=True, check=False)
    if shown.returncode != 0:
        return {"error": shown.stderr.strip()}
    values = [json.loads(line)["data"] for line in shown.stdout.splitlines()]
    return dict(zip(("configured", "source", "effective", "state"), values, strict=True))


def kernel_file(directory: Path) -> str | None:
    try:
        return (directory / "memory.failure_dirty_action").read_text().strip()
    except FileNotFoundError:
        return None


def page_entry(file: str, pfn: int) -> int:
    """Return a page's 64 bits of /proc/kpageflags or /proc/kpagecgroup."""
    with open(file, "rb", buffering=0) as entries:
        (value,) = struct.unpack("=Q", os.pread(entries.fileno(), 8, pfn * 8))
    return int(value)


def unescape(text: str) -> str:
    """Undo /dev/kmsg's escapes (kernel: Documentation/ABI/testing/dev-kmsg), which the console does not have."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), text)


@contextlib.contextmanager
def kernel_log() -> Iterator[Callable[[], list[str]]]:
    """Yield a function that returns the lines the kernel logged since the block was entered."""
    with open("/dev/kmsg", "rb", buffering=0) as kmsg:
        descriptor = kmsg.fileno()
        os.set_blocking(descriptor, False)
        os.lseek(descriptor, 0, os.SEEK_END)
        lines: list[str] = []

        def read() -> list[str]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    text = os.read(descriptor, 8192).decode(errors="replace")
                    lines.append(unescape(text.split("\n", 1)[0].split(";", 1)[1]))
            return [line for line in lines if "emory failure" in line or "Machine check" in line]

        yield read


def hit(workload: Workload) -> None:
    """Raise a machine check on the workload's dirty page and tell what became of it."""
    if not wait_for(lambda: reading(workload), REACTION_SECONDS):
        sys.exit(f"{workload.unit} did not come to read its file")
    directory = cgroup(workload)
    located = subprocess.run(
        ["vm-physaddr", workload.file, str(LOST_OFFSET)], check=True, capture_output=True, text=True
    )
    address = int(located.stdout, 16)
    status = workload.file.stat()
    tell(
        event="hit",
        unit=workload.unit,
        policy=policy(workload.unit),
        kernel_file=kernel_file(directory),
        pfn=address // PAGE,
        device=f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        inode=status.st_ino,
        offset=LOST_OFFSET,
        dirty=bool(page_entry("/proc/kpageflags", address // PAGE) & KPF_DIRTY),
        charged=page_entry("/proc/kpagecgroup", address // PAGE) == directory.stat().st_ino,
        cgroup=f"/{directory.relative_to(CGROUPS)}",
        before=workload.record(),
    )
    with kernel_log() as log:
        subprocess.run(["vm-mce", f"{address:#x}"], check=True)
        wait_for(lambda: not running(workload) or workload.record()["stale"] > 0, REACTION_SECONDS)
        survived = running(workload)
        if survived:
            time.sleep(STALE_SECONDS)
            os.kill(workload.main_pid, signal.SIGUSR1)
            wait_for(lambda: len(workload.record()["fsync"]) == 2, 10)
        survived = running(workload)
        tell(
            event="seen",
            unit=workload.unit,
            survived=survived,
            ending=None if survived else ending(workload),
            record=workload.record(),
            file_now=read_back(workload),
            kernel=log(),
        )
    if survived:
        os.kill(workload.main_pid, signal.SIGTERM)


def read_back(workload: Workload) -> str:
    """Return what anybody reads from the file's lost page now."""
    with open(workload.file, "rb") as file:
        file.seek(LOST_OFFSET)
        return file.read(16).decode(errors="replace").rstrip(".\0")


def main() -> None:
    assert mmap.PAGESIZE == PAGE
    shutil.copytree(HERE / "system", SYSTEM, dirs_exist_ok=True)
    for directory in (DATA, RECORDS):
        directory.mkdir()
    # A page that is written back in the meantime is clean, and loses nothing.
    Path("/proc/sys/vm/dirty_writeback_centisecs").write_text("0")
    systemctl("daemon-reload")
    for workload in (
        start_service("shipper"),
        start_service("database"),
        start_machine("web01"),
        start_service("ledger"),  # last: a panic ends the machine
    ):
        hit(workload)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
