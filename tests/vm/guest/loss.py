# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lose a dirty page of a service to a true machine check; print who was told what."""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from tests.vm.guest.scene import must, service, setting, shown, tell, value, wait_for

PAGE = 4096
OFFSET = 3 * PAGE
LOSS_ID = "6935ae465d074405a4cc4710e737d4de"  # as cgpolicy.catalog has it


def victim(path: str) -> None:
    """Be a service that has written what has not reached the disk."""
    with open(path, "wb") as file:
        file.write(b"saved".ljust(8 * PAGE, b"."))
        file.flush()
        os.fsync(file.fileno())
        os.pwrite(file.fileno(), b"dirty", OFFSET)
    Path(f"{path}.ready").touch()
    time.sleep(3600)


def listen(monitor: subprocess.Popen[str]) -> None:
    """Return when the monitor hears signals: it has shown one of those that are made until then."""
    assert monitor.stdout
    service("noise", run="/bin/true")
    must("systemctl", "daemon-reload")
    for number in itertools.count():
        must("cgpolicy", "set", "--runtime", "noise", ("kill", "continue")[number % 2])
        if select.select([monitor.stdout], [], [], 1)[0]:
            return


def lose(unit: str, action: str, monitor: subprocess.Popen[str]) -> None:
    file = Path(f"/var/lib/{unit}")
    main = f"/usr/bin/python3 -m tests.vm.guest.loss {file}"
    service(unit, run=main, more="WorkingDirectory=/mnt/share\n", drop_in=setting(action))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", unit)
    wait_for(Path(f"{file}.ready").exists)
    before = {"value": value(f"{unit}.service"), **shown(unit)}
    invocation = must("systemctl", "show", "-P", "InvocationID", unit).strip()
    must("vm-mce", must("vm-physaddr", str(file), str(OFFSET)).strip())
    signals = []
    for line in monitor.stdout or ():
        signals.append(json.loads(line))
        if signals[-1]["signal"] == "DirtyDataLost":
            break
    wait_for(lambda: must("systemctl", "show", "-P", "ActiveState", unit).strip() == "failed" or action == "continue")
    records = must("journalctl", "-o", "json", f"MESSAGE_ID={LOSS_ID}", f"CGPOLICY_UNIT={unit}.service")
    status = file.stat()
    tell(
        step=action,
        before=before,
        invocation=invocation,
        signal=signals[-1],
        records=[json.loads(line) for line in records.splitlines()],
        by_unit=must("journalctl", "-o", "cat", "-u", unit, "-t", "cgpolicyd"),
        explained=must("journalctl", "-x", "-o", "short", f"MESSAGE_ID={LOSS_ID}", f"CGPOLICY_UNIT={unit}.service"),
        device=[os.major(status.st_dev), os.minor(status.st_dev)],
        inode=status.st_ino,
        result=must("systemctl", "show", "-P", "Result", unit).strip(),
        after=shown(unit),
    )


def main() -> None:
    must("journalctl", "--update-catalog")  # as a package's trigger does
    Path("/proc/sys/vm/dirty_writeback_centisecs").write_text("0")  # or the page is clean by then
    with subprocess.Popen(["cgpolicy", "--json", "monitor"], stdout=subprocess.PIPE, text=True) as monitor:
        listen(monitor)
        lose("keeper", "continue", monitor)
        lose("loser", "kill", monitor)
        monitor.terminate()


if sys.argv[1:]:
    victim(sys.argv[1])
else:
    main()
