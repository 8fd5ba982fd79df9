# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start services and scopes, with the daemon, and without it but with ExecStartPre=+cgpolicy apply %n.

The services' main process is first.c, whose first system call opens its own cgroup's file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gi.repository import Gio, GLib

from tests.vm.guest.scene import CGROUPS, POLICY_FILE, must, run, service, setting, tell, wait_for, write

READS = Path("/run/reads")
UNIT = "probe.service"
TRACING = Path("/sys/kernel/tracing")
SYSTEMD = "org.freedesktop.systemd1"
MANAGER = f"{SYSTEMD}.Manager"


def start(count: int) -> list[str]:
    """Start the service so many times from nothing, and return what each main process read first."""
    READS.unlink(missing_ok=True)
    for _ in range(count):
        must("systemctl", "start", UNIT)
        wait_for(lambda: not Path("/sys/fs/cgroup/system.slice", UNIT).exists())
    return READS.read_text().splitlines()


class Clock:
    """When the kernel makes a cgroup and when it takes a policy, in seconds of the monotonic clock, by tracing."""

    MADE = re.compile(r" (\d+\.\d+): cgroup_mkdir: .* path=(\S+)")
    WRITTEN = re.compile(r" (\d+\.\d+): policy_write:")

    def __init__(self) -> None:
        self.instance = TRACING / "instances/starts"
        self.define("p:starts/policy_write memory_failure_dirty_action_write")
        self.instance.mkdir()
        (self.instance / "trace_clock").write_text("mono")
        (self.instance / "buffer_size_kb").write_text("4096")
        for event in ("cgroup/cgroup_mkdir", "starts/policy_write"):
            (self.instance / f"events/{event}/enable").write_text("1")

    def close(self) -> None:
        for event in ("cgroup/cgroup_mkdir", "starts/policy_write"):
            (self.instance / f"events/{event}/enable").write_text("0")
        self.instance.rmdir()
        self.define("-:starts/policy_write")

    def define(self, probe: str) -> None:
        # To truncate that file is to remove everybody's probes.
        descriptor = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_CLOEXEC)
        os.write(descriptor, f"{probe}\n".encode())
        os.close(descriptor)

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Return when each cgroup was made, and when policies were written."""
        text = (self.instance / "trace").read_text()
        return (
            {path: float(seconds) for seconds, path in self.MADE.findall(text)},
            [float(seconds) for seconds in self.WRITTEN.findall(text)],
        )


class Scopes:
    """Starts scopes as libvirt and machined do, and looks at each as soon as its job is reported done."""

    def __init__(self) -> None:
        self.bus = Gio.bus_get_sync(Gio.BusType.SYSTEM, None)
        self.loop = GLib.MainLoop()
        self.waiting = ""
        self.seen: dict[str, tuple[float, str]] = {}
        self.bus.signal_subscribe(SYSTEMD, MANAGER, "JobRemoved", None, None, 0, self.removed)
        self.call("Subscribe", None)

    def call(self, method: str, arguments: Any) -> None:
        self.bus.call_sync(SYSTEMD, "/org/freedesktop/systemd1", MANAGER, method, arguments, None, 0, 600_000, None)

    def removed(self, *signal: Any) -> None:
        unit, result = signal[5].unpack()[2:]
        if unit == self.waiting:
            now = time.monotonic()
            said = (CGROUPS / "machine.slice" / unit / POLICY_FILE).read_text().strip()
            self.seen[unit] = now, said if result == "done" else result
            self.loop.quit()

    def start(self, name: str) -> None:
        """Start a scope and return once its job is done; then end it."""
        self.waiting = name
        with subprocess.Popen(["/bin/sleep", "infinity"]) as process:
            properties = [("PIDs", GLib.Variant("au", [process.pid])), ("Slice", GLib.Variant("s", "machine.slice"))]
            self.call("StartTransientUnit", GLib.Variant("(ssa(sv)a(sa(sv)))", (name, "fail", properties, [])))
            self.loop.run()
            process.kill()
        wait_for(lambda: not (CGROUPS / "machine.slice" / name).exists())


def reload() -> None:
    """Have systemd and the daemon read everything anew: of what does not run, systemd keeps nothing then."""
    must("systemctl", "daemon-reload")
    must("busctl", "call", "org.cgpolicy1", "/org/cgpolicy1", "org.cgpolicy1.Manager", "Reload")


def scopes_begin() -> Scopes:
    """Give all scopes of machines a policy by a drop-in."""
    write(Path("/etc/systemd/system/machine-.scope.d/50-policy.conf"), setting("kill"))
    reload()
    must("systemctl", "start", "machine.slice")
    return Scopes()


def scopes(step: str, starter: Scopes, count: int) -> None:
    """Start scopes, and tell what was there when."""
    clock = Clock()
    starter.seen = {}
    for number in range(count):
        starter.start(rf"machine-qemu\x2d{number}\x2dweb.scope")
    made, written = clock.read()
    clock.close()
    applied, jobs = [], []
    for name, (done, _) in starter.seen.items():
        begin = made[f"/machine.slice/{name}"]
        jobs.append(done - begin)
        applied.append(min((moment for moment in written if moment >= begin), default=float("inf")) - begin)
    tell(step=step, values=[said for _, said in starter.seen.values()], applied=applied, jobs=jobs)


def main(first: int, by_inotify: int, by_apply: int, by_scope: int, by_delegation: int) -> None:
    shutil.copy("/mnt/share/first", "/usr/local/bin/first")
    output = f"Type=oneshot\nStandardOutput=append:{READS}\n"
    service("probe", run="/usr/local/bin/first", more=output)
    must("systemctl", "daemon-reload")
    tell(step="unset", reads=start(2))

    service("probe", run="/usr/local/bin/first", more=output, drop_in=setting("kill"))
    reads = []
    for _ in range(first):
        reload()
        reads += start(1)
    tell(step="first", reads=reads)
    tell(step="inotify", reads=start(by_inotify))

    starter = scopes_begin()
    scopes("scopes", starter, by_scope)
    # Such a unit turns all controllers on in all slices, and so the daemon's own weight is that of any service.
    service("nest", more="Delegate=yes\n")
    must("systemctl", "daemon-reload")
    must("systemctl", "start", "nest")
    scopes("scopes beside Delegate=yes", starter, by_delegation)
    tell(step="inotify beside Delegate=yes", reads=start(by_delegation))
    must("systemctl", "stop", "nest")

    must("systemctl", "stop", "cgpolicyd")
    # D-Bus would start it again for whoever asks; cgpolicy apply does not ask.
    must("systemctl", "mask", "--runtime", "cgpolicyd")
    tell(step="no daemon", reads=start(2))
    service("probe", run="/usr/local/bin/first", more=f"ExecStartPre=+cgpolicy apply %n\n{output}")
    must("systemctl", "daemon-reload")
    begin = time.monotonic()
    tell(step="apply", reads=start(by_apply), seconds=(time.monotonic() - begin) / by_apply)

    # Where the value cannot be set the start fails, and the main process does not run.
    write(Path("/etc/systemd/system/bare.slice"), "[Slice]\nDisableControllers=memory\n")
    more = f"Slice=bare.slice\nExecStartPre=+cgpolicy apply %n\n{output}"
    service("probe", run="/usr/local/bin/first", more=more)
    must("systemctl", "daemon-reload")
    READS.unlink()
    status, _, _ = run("systemctl", "start", UNIT)
    tell(step="cannot apply", status=status, reads=READS.read_text().splitlines())


main(*map(int, sys.argv[1:]))
