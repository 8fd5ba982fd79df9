# SPDX-License-Identifier: GPL-2.0-only
"""What reacts to the loss of dirty data, a class each: cgpolicyd, a script of rasdaemon's, and nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tests.bench.guest.units import Deaths, Unit
from tests.kernel.guest.pagecache import wait_for
from tests.vm.guest.scene import CGROUPS, must, properties, run

HERE = Path(__file__).parent
LOSS_ID = "6935ae465d074405a4cc4710e737d4de"  # as units/cgpolicy.catalog has it
IDLE_SECONDS = 3.0  # a daemon that used no processor time for so long is through with its work


class Reaction:
    """Nobody reacts."""

    daemon: ClassVar[str] = ""
    kill_seconds: ClassVar[float] = 1.0  # how long to wait for a unit's end

    def start(self, units: Sequence[Unit]) -> dict[str, str]:
        """Have only this one react; return what it says about itself."""
        for unit in ("cgpolicyd.service", "rasdaemon.service"):
            if unit != self.daemon:
                run("systemctl", "mask", "--runtime", "--now", unit)
        return {}

    def wait_until_armed(self, unit: Unit) -> None:
        """Return once the policy of a unit that has just been started is known."""

    def wait(self, pfn: int, deaths: Deaths) -> int | None:
        """Wait for the reaction to a loss; return when the unit's last process ended, if it did."""
        return deaths.wait(self.kill_seconds)

    def seen(self, pfn: int) -> dict[str, object]:
        """Return what it tells about its reaction to the loss of a page."""
        return {}

    def reported(self) -> int:
        """Return the number of pages whose loss it has reported."""
        return 0

    def busy(self) -> int:
        """Return the processor time that it has used, with all that it has started, in us."""
        if not self.daemon:
            return 0
        lines = (CGROUPS / "system.slice" / self.daemon / "cpu.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["usage_usec"])

    def wait_until_idle(self, seconds: float) -> float | None:
        """Return when it did something for the last time (time.monotonic()), nothing if it goes on to the end."""
        deadline = time.monotonic() + seconds
        since, used = time.monotonic(), self.busy()
        while time.monotonic() < deadline:
            if time.monotonic() - since > IDLE_SECONDS:
                return since
            time.sleep(0.1)
            if (now := self.busy()) - used > 500:  # less is a timer
                since = time.monotonic()
            used = now
        return None


class Cgpolicyd(Reaction):
    """The daemon of this project, with whatever backend the kernel allows."""

    daemon = "cgpolicyd.service"
    kill_seconds = 10.0

    def start(self, units: Sequence[Unit]) -> dict[str, str]:
        super().start(units)
        must("systemctl", "restart", self.daemon)
        manager = ("org.cgpolicy1", "/org/cgpolicy1", "org.cgpolicy1.Manager")
        lines = must("busctl", "-j", "get-property", *manager, "Backend", "Enforcement").splitlines()
        return dict(zip(("backend", "enforcement"), (json.loads(line)["data"] for line in lines), strict=True))

    def wait_until_armed(self, unit: Unit) -> None:
        cgroup_id = unit.cgroup.stat().st_ino

        def armed() -> bool:
            known = properties(unit.id)
            return (known.get("ControlGroupId"), known.get("EffectiveAction")) == (cgroup_id, unit.action)

        wait_for(armed, f"{unit.id} known to cgpolicyd")

    def reported(self) -> int:
        lines = must("journalctl", "-o", "json", f"MESSAGE_ID={LOSS_ID}").splitlines()
        return sum(int(json.loads(line)["CGPOLICY_PAGES"]) for line in lines)


class Rasdaemon(Reaction):
    """rasdaemon, as Debian installs it, with a script for MEM_FAIL_TRIGGER."""

    daemon = "rasdaemon.service"
    kill_seconds = 10.0
    grace_seconds: ClassVar[float] = 0.2  # for a unit's end, after the script has ended
    kill_unknown: ClassVar[bool] = False

    LOG = Path("/run/mem_fail_trigger.log")
    DEFAULTS = Path("/etc/default/rasdaemon")
    TRIGGERS = Path("/etc/ras/triggers")

    def start(self, units: Sequence[Unit]) -> dict[str, str]:
        super().start(units)
        must("systemctl", "stop", self.daemon)
        shutil.copy(HERE / "mem_fail_trigger", self.TRIGGERS / "mem_fail_trigger")
        (self.TRIGGERS / "mem_fail_trigger").chmod(0o755)
        actions = [f"{unit.id} {unit.action}\n" for unit in units]
        Path("/etc/ras/dirty_actions").write_text("unknown kill\n" * self.kill_unknown + "".join(actions))
        # The variable is in no file that Debian installs, and TRIGGER_DIR is there, but empty.
        with open(self.DEFAULTS, "a") as file:
            file.write(f"TRIGGER_DIR={self.TRIGGERS}\nMEM_FAIL_TRIGGER=mem_fail_trigger\n")
        self.LOG.touch()
        must("systemctl", "start", self.daemon)
        pid = must("systemctl", "show", "-P", "MainPID", self.daemon).strip()
        wait_for(lambda: self.listens(pid), "rasdaemon listening")
        percent = Path("/sys/kernel/tracing/instances/rasdaemon/buffer_percent").read_text().strip()
        return {"version": must("dpkg-query", "-W", "-f", "${Version}", "rasdaemon"), "buffer_percent": percent}

    def listens(self, pid: str) -> bool:
        """Tell whether it has come so far; before, it waits for tracepoints, 30 s for each that the kernel lacks."""
        files = Path(f"/proc/{pid}/fd")
        return any(os.readlink(file).endswith("trace_pipe_raw") for file in files.iterdir())

    def lines(self, pfn: int) -> list[list[str]]:
        """Return what the script has logged about a page: when it started and ended (s), and what it did."""
        rows = [line.split() for line in self.LOG.read_text().splitlines()]
        return [row[1:] for row in rows if int(row[0], 16) == pfn]

    def wait(self, pfn: int, deaths: Deaths) -> int | None:
        deadline = time.monotonic() + self.kill_seconds
        while time.monotonic() < deadline and not self.lines(pfn):
            if deaths.readable(0.05):
                break
        return deaths.wait(self.grace_seconds)

    def seen(self, pfn: int) -> dict[str, object]:
        rows = self.lines(pfn)
        if not rows:
            return {"trigger": "did not run"}
        started, ended, *what = rows[-1]
        return {"trigger": " ".join(what), "trigger_started": float(started), "trigger_ended": float(ended)}

    def reported(self) -> int:
        return len(self.LOG.read_text().splitlines())


class RasdaemonKillsAll(Rasdaemon):
    """As before, but the script kills every unit that wants it when it cannot tell the owner."""

    kill_unknown = True


REACTIONS: dict[str, type[Reaction]] = {
    "cgpolicyd": Cgpolicyd,
    "rasdaemon": Rasdaemon,
    "rasdaemon-all": RasdaemonKillsAll,
    "nothing": Reaction,
}


def load_modules() -> None:
    """Load what a stock kernel has as modules; udev, which would do it, is kept quiet."""
    if not Path("/sys/module/loop").exists():
        subprocess.run(["modprobe", "--all", "loop", "ext4", "xfs", "vfat"], check=True)
    if not Path("/sys/kernel/debug/hwpoison").exists():
        subprocess.run(["modprobe", "hwpoison-inject"], check=True)
