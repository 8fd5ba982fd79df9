# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lose pages of a unit that is gone, many at once, below a unit's cgroup; print who was told what."""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gi.repository import Gio, GLib

from tests.vm.guest.cases import BUS, PATH, call, properties
from tests.vm.guest.scene import SECONDS, cgroup, main_pid, must, run, service, setting, tell, wait_for, write

PAGE = mmap.PAGESIZE
LOSS_ID = "6935ae465d074405a4cc4710e737d4de"  # as cgpolicy.catalog has them
UNSEEN_ID = "f4e2ea4cac9a4e98b6e436f1d710cf70"
POISON = Path("/sys/kernel/debug/hwpoison/corrupt-pfn")
FILES = 10


def page_frames(path: Path) -> list[int]:
    """Return the page frames of a file's page cache; mapped for that moment only (pagemap.rst)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        for offset in range(0, len(memory), PAGE):
            memory[offset]
        inode = os.fstat(file.fileno()).st_ino
        rows = Path("/proc/self/maps").read_text().splitlines()
        start = next(int(row.split("-")[0], 16) for row in rows if int(row.split()[4]) == inode)
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), 8 * (len(memory) // PAGE), start // PAGE * 8)
    return [entry & (1 << 55) - 1 for (entry,) in struct.iter_unpack("=Q", entries)]


def poison(frames: list[int]) -> None:
    for frame in frames:
        POISON.write_text(f"{frame:#x}")


class Listener:
    """Hears DirtyDataLost, on a connection of its own: it ends with the bus, and this process does not."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        flags = Gio.DBusConnectionFlags
        self.bus = Gio.DBusConnection.new_for_address_sync(
            Gio.dbus_address_get_for_bus_sync(Gio.BusType.SYSTEM),
            flags.AUTHENTICATION_CLIENT | flags.MESSAGE_BUS_CONNECTION, None, None,
        )
        self.bus.signal_subscribe(BUS, f"{BUS}.Manager", "DirtyDataLost", PATH, None, 0, self.hear)
        # The answer comes after that to the subscription.
        ask = (BUS, PATH, "org.freedesktop.DBus.Peer", "Ping", None, None, 0, 60_000, None)
        self.bus.call_sync(*ask)

    def hear(self, *signal: Any) -> None:
        self.heard.append(signal[5].unpack())

    def until(self, condition: Callable[[], bool]) -> None:
        """Take signals until a condition is true, or the time is over."""
        context = GLib.MainContext.default()
        deadline = time.monotonic() + 2 * SECONDS
        while not condition() and time.monotonic() < deadline:
            if not context.iteration(False):
                time.sleep(0.05)

    def pages(self, unit: str) -> int:
        return sum(values[4] for values in self.heard if values[0] == unit)


def records(unit: str, identity: str) -> list[dict[str, str]]:
    """Return journal records about a unit."""
    must("journalctl", "--sync")
    told = must("journalctl", "-o", "json", f"MESSAGE_ID={identity}", f"CGPOLICY_UNIT={unit}")
    return [json.loads(line) for line in told.splitlines()]


def counted(unit: str) -> int:
    """Return what the daemon shows of the kernel's counter."""
    (path,) = call(PATH, f"{BUS}.Manager", "GetUnit", "s", unit)
    said = must("busctl", "--json=short", "get-property", BUS, path, f"{BUS}.Unit", "FailureDirty")
    return int(json.loads(said)["data"])


def in_kernel(unit: str) -> int:
    rows = dict(row.split() for row in (cgroup(unit) / "memory.events").read_text().splitlines())
    return int(rows["failure_dirty"])


def script(name: str, before: str, directory: Path, pages: int, count: int, after: str) -> str:
    """Write a shell script that leaves dirty files behind, and return the command that runs it."""
    directory.mkdir()
    dirty = f"for i in $(seq {count}); do dd if=/dev/zero of={directory}/$i bs=4k count={pages} status=none; done"
    write(Path(f"/run/{name}.sh"), f"{before}\n{dirty}\ntouch /run/{name}.ready\n{after}\n")
    return f"/bin/sh /run/{name}.sh"


def dirty_again(path: Path) -> None:
    """Write a file's own bytes once more: on a busy host its pages were found clean, written to the disk since.

    Whom they are charged to stays as it is.
    """
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), file.read(), 0)


def storm(listener: Listener, pages: int) -> None:
    unit, directory = "storm.service", Path("/var/lib/storm")
    command = script("storm", "", directory, pages, FILES, "exec sleep infinity")
    service("storm", run=command, drop_in=setting("continue"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", unit)
    wait_for(Path("/run/storm.ready").exists)
    frames = {name: page_frames(directory / str(name)) for name in range(1, FILES + 1)}
    late = [frames[FILES].pop() for _ in range(5)]  # for later
    total = sum(map(len, frames.values()))
    begin = time.monotonic()
    for name, some in frames.items():
        dirty_again(directory / str(name))
        poison(some)
    seconds = time.monotonic() - begin
    listener.until(lambda: listener.pages(unit) >= total)
    found = records(unit, LOSS_ID)
    invocation = must("systemctl", "show", "-P", "InvocationID", unit).strip()
    tell(
        step="storm", total=total, seconds=seconds, signalled=listener.pages(unit),
        signals=sum(values[0] == unit for values in listener.heard),
        records=len(found), recorded=sum(int(record["CGPOLICY_PAGES"]) for record in found),
        invocations=sorted({record["INVOCATION_ID"] for record in found}), invocation=invocation,
        kernel=in_kernel(unit), shown=counted(unit),
    )

    before = main_pid("cgpolicyd")
    os.kill(before, signal.SIGKILL)
    dirty_again(directory / str(FILES))
    poison(late[:3])
    wait_for(lambda: main_pid("cgpolicyd") not in (0, before))
    listener.until(lambda: listener.pages(unit) >= total + 3)
    must("systemctl", "stop", "cgpolicyd")
    dirty_again(directory / str(FILES))
    poison(late[3:])
    must("systemctl", "start", "cgpolicyd")
    listener.until(lambda: listener.pages(unit) >= total + 5)
    # A second look finds nothing that is not told yet.
    must("systemctl", "restart", "cgpolicyd")
    time.sleep(3)
    listener.until(lambda: listener.pages(unit) > total + 5 or time.monotonic() > begin)
    tell(
        step="restarts", signalled=listener.pages(unit) - total,
        unseen=[int(record["CGPOLICY_PAGES"]) for record in records(unit, UNSEEN_ID)],
        kernel=in_kernel(unit) - total, shown=counted(unit) - total,
    )


def below(listener: Listener) -> None:
    """Pages charged to a cgroup below the unit's follow the unit's policy, and are the unit's."""
    unit, directory = "nest.service", Path("/var/lib/nest")
    own = f"/sys/fs/cgroup/system.slice/{unit}"
    enter = f"mkdir {own}/below && echo 0 >{own}/below/cgroup.procs && echo +memory >{own}/cgroup.subtree_control"
    command = script("nest", enter, directory, 4, 1, "exec sleep infinity")
    service("nest", run=command, more="Delegate=yes\n", drop_in=setting("kill"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", unit)
    wait_for(Path("/run/nest.ready").exists)
    invocation = must("systemctl", "show", "-P", "InvocationID", unit).strip()
    effective = properties(unit)["EffectiveAction"]
    frames = page_frames(directory / "1")[:1]
    dirty_again(directory / "1")
    poison(frames)
    wait_for(lambda: must("systemctl", "show", "-P", "ActiveState", unit).strip() == "failed")
    listener.until(lambda: listener.pages(unit) >= 1)
    wait_for(lambda: len(records(unit, LOSS_ID)) > 0)
    (record,) = records(unit, LOSS_ID)
    tell(
        step="below", effective=effective, result=must("systemctl", "show", "-P", "Result", unit).strip(),
        cgroup=record.get("CGPOLICY_CGROUP", ""), action=record["CGPOLICY_ACTION"],
        invocation=[record.get("INVOCATION_ID", ""), invocation],
    )


def gone(name: str) -> None:
    """What a unit that is gone has left in the page cache is that run's of that unit."""
    unit, directory, note = f"{name}.service", Path(f"/var/lib/{name}"), Path(f"/run/{name}")
    command = script(name, f"echo $INVOCATION_ID >{note}", directory, 4, 1, "")
    must("systemd-run", "--quiet", "--wait", f"--unit={name}", *command.split())
    loaded = run("systemctl", "show", "-P", "LoadState", unit)[1].strip()
    frames = page_frames(directory / "1")[:1]
    dirty_again(directory / "1")
    poison(frames)
    wait_for(lambda: len(records(unit, LOSS_ID)) > 0)
    found = [record.get("INVOCATION_ID", "") for record in records(unit, LOSS_ID)]
    tell(step=name, loaded=loaded, invocation=note.read_text().strip(), recorded=found)


def after_bus_restart(name: str) -> None:
    """Lose a page when the daemon is on another bus than before; tell what a new client hears of it."""
    unit, directory, listener = f"{name}.service", Path(f"/var/lib/{name}"), Listener()
    command = script(name, "", directory, 4, 1, "exec sleep infinity")
    service(name, run=command, drop_in=setting("kill"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", unit)
    wait_for(Path(f"/run/{name}.ready").exists)
    frames = page_frames(directory / "1")[:1]
    dirty_again(directory / "1")
    poison(frames)
    listener.until(lambda: listener.pages(unit) >= 1)
    wait_for(lambda: len(records(unit, LOSS_ID)) > 0)
    (record,) = records(unit, LOSS_ID)
    tell(step=name, signalled=listener.pages(unit), pages=record["CGPOLICY_PAGES"], action=record["CGPOLICY_ACTION"])


def begin() -> Listener:
    """Have the kernel keep what is dirty, and listen."""
    if not POISON.exists():
        must("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug")
    Path("/proc/sys/vm/dirty_writeback_centisecs").write_text("0")  # or the pages are clean by then
    return Listener()
