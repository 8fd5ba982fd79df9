# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start a service 50 times with the daemon, then without it and with ExecStartPre=+cgpolicy apply %n.

The service's main process is first.c, whose first system call opens its own cgroup's file.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.vm.guest.scene import must, run, service, setting, tell, wait_for, write

STARTS = 50
READS = Path("/run/reads")
UNIT = "probe.service"


def start(count: int) -> list[str]:
    """Start the service so many times from nothing, and return what each main process read first."""
    READS.unlink(missing_ok=True)
    for _ in range(count):
        must("systemctl", "start", UNIT)
        wait_for(lambda: not Path("/sys/fs/cgroup/system.slice", UNIT).exists())
    return READS.read_text().splitlines()


def main() -> None:
    shutil.copy("/mnt/share/first", "/usr/local/bin/first")
    output = f"Type=oneshot\nStandardOutput=append:{READS}\n"
    service("probe", run="/usr/local/bin/first", more=output)
    must("systemctl", "daemon-reload")
    tell(step="unset", reads=start(2))

    service("probe", run="/usr/local/bin/first", more=output, drop_in=setting("kill"))
    must("systemctl", "daemon-reload")
    must("busctl", "call", "org.cgpolicy1", "/org/cgpolicy1", "org.cgpolicy1.Manager", "Reload")
    tell(step="inotify", reads=start(STARTS))

    must("systemctl", "stop", "cgpolicyd")
    # D-Bus would start it again for whoever asks; cgpolicy apply does not ask.
    must("systemctl", "mask", "--runtime", "cgpolicyd")
    tell(step="no daemon", reads=start(2))
    service("probe", run="/usr/local/bin/first", more=f"ExecStartPre=+cgpolicy apply %n\n{output}")
    must("systemctl", "daemon-reload")
    tell(step="apply", reads=start(3))

    # Where the value cannot be set the start fails, and the main process does not run.
    write(Path("/etc/systemd/system/bare.slice"), "[Slice]\nDisableControllers=memory\n")
    more = f"Slice=bare.slice\nExecStartPre=+cgpolicy apply %n\n{output}"
    service("probe", run="/usr/local/bin/first", more=more)
    must("systemctl", "daemon-reload")
    READS.unlink()
    status, _, _ = run("systemctl", "start", UNIT)
    tell(step="cannot apply", status=status, reads=READS.read_text().splitlines())


main()
