# SPDX-License-Identifier: LGPL-2.1-or-later
"""Load many units, a tenth of them with a policy and running; print how long cgpolicyd needs beside systemctl.

The others are active without a process, so that systemctl's pattern * takes in all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gi.repository import Gio, GLib

from cgpolicy.unitname import bus_label_escape
from tests.vm.guest.scene import CGROUPS, POLICY_FILE, RUNTIME, main_pid, must, run, setting, tell, wait_for, write

SHOW = ["systemctl", "show", "--property=Id,FragmentPath,DropInPaths,ControlGroup", "*"]
SYSTEMD = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
MANAGER = ("org.cgpolicy1", "/org/cgpolicy1", "org.cgpolicy1.Manager")
IDLE_SECONDS = 60
WATCHDOG_SECONDS = 150  # the daemon tells PID 1 so often that it lives, and every fourth time looks at everything
CALLS = 1000
os.environ["SYSTEMD_BUS_TIMEOUT"] = "1h"  # PID 1 may have signals of thousands of starts to send before it answers
AT_ONCE = 500  # units started together: of thousands PID 1 makes jobs for longer than systemctl waits


def timed(*words: str) -> float:
    """Run a command that has to succeed; return the seconds that it took."""
    begin = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def make(count: int) -> list[str]:
    """Write the units, load and start them; return those with a policy."""
    special = []
    for number in range(count):
        name = f"bulk-{number:05}.service"
        if number % 10 == 0:
            special.append(name)
            write(RUNTIME / name, "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sleep infinity\n")
            write(RUNTIME / f"{name}.d/50-policy.conf", setting("kill"))
        else:
            idle = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStop=-/bin/true\n"
            write(RUNTIME / name, f"[Unit]\nDefaultDependencies=no\n{idle}")
    targets = [f"bulk-{first:05}.target" for first in range(0, count, AT_ONCE)]
    for number, target in enumerate(targets):
        wanted = range(number * AT_ONCE, min((number + 1) * AT_ONCE, count))
        write(RUNTIME / target, "[Unit]\n" + "".join(f"Wants=bulk-{each:05}.service\n" for each in wanted))
    must("systemctl", "daemon-reload")
    # A line in the journal and a dozen signals for each unit would take longer than all that is measured.
    must("systemctl", "log-level", "notice")
    for target in targets:
        must("systemctl", "start", "--no-block", target)
        while run("systemctl", "is-active", target)[0] != 0:
            time.sleep(1)
    return special


def value(unit: str) -> str:
    return (CGROUPS / "system.slice" / unit / POLICY_FILE).read_text().strip()


def memory() -> dict[str, int]:
    """Return the daemon's resident memory, now and at most, in KiB."""
    rows = Path(f"/proc/{main_pid('cgpolicyd')}/status").read_text().splitlines()
    return {name: int(row.split()[1]) for row in rows for name in ("VmRSS", "VmHWM") if row.startswith(f"{name}:")}


def switches() -> dict[str, int]:
    """Return how often each thread of the daemon has been put to sleep, so how often it has been awake."""
    found = {}
    for task in Path(f"/proc/{main_pid('cgpolicyd')}/task").iterdir():
        rows = dict(row.split(":", 1) for row in (task / "status").read_text().splitlines())
        found[task.name] = int(rows["voluntary_ctxt_switches"]) + int(rows["nonvoluntary_ctxt_switches"])
    return found


def ask(unit: str, count: int) -> None:
    """Read all properties of a unit so many times."""
    bus = Gio.bus_get_sync(Gio.BusType.SYSTEM, None)
    path = f"{MANAGER[1]}/unit/{bus_label_escape(unit)}"
    which = GLib.Variant("(s)", ("org.cgpolicy1.Unit",))
    for _ in range(count):
        bus.call_sync(MANAGER[0], path, "org.freedesktop.DBus.Properties", "GetAll", which, None, 0, -1, None)


class Wakers:
    """Records who wakes the daemon's threads, by tracing: what to look for if it is not left alone."""

    def __init__(self) -> None:
        self.instance = Path("/sys/kernel/tracing/instances/wakers")
        self.instance.mkdir(exist_ok=True)
        self.event = self.instance / "events/sched/sched_waking"
        (self.event / "filter").write_text(" || ".join(f"pid == {thread}" for thread in switches()))
        (self.event / "enable").write_text("1")

    def close(self) -> list[str]:
        (self.event / "enable").write_text("0")
        lines = (self.instance / "trace").read_text().splitlines()
        self.instance.rmdir()
        return [line.strip() for line in lines if "sched_waking" in line]


def wait_until_undisturbed() -> None:
    """Return when the daemon has just told PID 1 that it lives, and has done all else that it had to do."""
    started = int(must("systemctl", "show", "-P", "ExecMainStartTimestampMonotonic", "cgpolicyd")) / 1e6
    # What systemd and the daemon still have to do for each other is done once both have answered.
    wait_for(lambda: later(1) == 0)
    since = (time.monotonic() - started) % WATCHDOG_SECONDS
    if not WATCHDOG_SECONDS / 10 < since < WATCHDOG_SECONDS / 2:
        time.sleep((WATCHDOG_SECONDS * 1.1 - since) % WATCHDOG_SECONDS)


def later(seconds: float) -> int:
    """Return how often the daemon was awake during some seconds."""
    before = switches()
    time.sleep(seconds)
    after = switches()
    return sum(after.values()) - sum(before.values()) if before.keys() == after.keys() else -1


def main(count: int) -> None:
    must("systemctl", "stop", "cgpolicyd")
    begin = time.monotonic()
    special = make(count)
    # PID 1 has signals of all those starts to send before it takes another client.
    wait_for(lambda: run("systemctl", "list-units", "bulk-*.service")[0] == 0, 600)
    made = time.monotonic() - begin
    loaded = len(must("systemctl", "list-units", "--no-legend", "bulk-*.service").splitlines())
    show = timed(*SHOW)
    ready = timed("systemctl", "start", "cgpolicyd")
    tell(
        step="ready",
        loaded=loaded,
        policies=len(special),
        show=show,
        ready=ready,
        applied=sum(value(unit) == "kill" for unit in special),
        memory=memory(),
        made=made,
    )

    for unit in special:
        write(RUNTIME / f"{unit}.d/50-policy.conf", setting("panic"))
    before = time.monotonic()
    # With all that is loaded it takes longer than systemctl daemon-reload waits.
    must("busctl", "--timeout=3600", "call", *SYSTEMD, "Reload")
    reload = time.monotonic() - before
    wait_for(lambda: all(value(unit) == "panic" for unit in special), show)
    in_step = time.monotonic() - before
    tell(
        step="reloaded", show=show, reload=reload, in_step=in_step,
        applied=sum(value(unit) == "panic" for unit in special), memory=memory(),
    )

    must("busctl", "--timeout=600", "call", *MANAGER, "ListUnits", "as", "0")
    must("busctl", "--timeout=600", "call", *MANAGER, "Reload")
    tell(step="listed", memory=memory())
    ask(special[0], CALLS)  # the heap finds its size
    before_calls = memory()["VmRSS"]
    ask(special[0], CALLS)
    tell(step="asked", calls=CALLS, growth=memory()["VmRSS"] - before_calls)

    wait_until_undisturbed()
    wakers = Wakers()
    wakeups = later(IDLE_SECONDS)
    tell(step="idle", seconds=IDLE_SECONDS, wakeups=wakeups, wakers=wakers.close())


main(int(sys.argv[1]))
