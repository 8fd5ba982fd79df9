# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disturb the daemon, systemd and a unit, and print whether the unit's value is right again."""

from __future__ import annotations

import os
import signal

from tests.vm.guest.scene import (
    POLICY_FILE,
    SYSTEM,
    becomes,
    cgroup,
    main_pid,
    must,
    service,
    setting,
    shown,
    tell,
    value,
    wait_for,
    write,
)

UNIT = "web.service"


def forge(action: str) -> None:
    (cgroup(UNIT) / POLICY_FILE).write_text(action)


def main() -> None:
    service("web", drop_in=setting("kill"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", UNIT)
    tell(step="started", value=becomes(UNIT, "kill"))

    before = main_pid("cgpolicyd")
    os.kill(before, signal.SIGKILL)
    # While nobody looks: the value, the drop-in, and a unit that is started.
    forge("continue")
    service("late", drop_in=setting("panic"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", "late.service")
    wait_for(lambda: main_pid("cgpolicyd") not in (0, before))
    seen = becomes(UNIT, "kill"), becomes("late.service", "panic")
    tell(step="kill -9", value=seen[0], late=seen[1], state=shown(UNIT)["State"])

    write(SYSTEM / f"{UNIT}.d/50-policy.conf", setting("continue"))
    must("systemctl", "daemon-reload")
    tell(step="daemon-reload", value=becomes(UNIT, "continue"))

    must("systemctl", "daemon-reexec")
    write(SYSTEM / f"{UNIT}.d/50-policy.conf", setting("panic"))
    must("systemctl", "daemon-reload")
    tell(step="daemon-reexec", value=becomes(UNIT, "panic"))

    old = cgroup(UNIT).stat().st_ino
    must("systemctl", "restart", UNIT)
    after = becomes(UNIT, "panic")
    tell(step="restarted unit", value=after, new_cgroup=cgroup(UNIT).stat().st_ino != old)

    forge("continue")
    once = becomes(UNIT, "panic")
    forge("kill")
    wait_for(lambda: shown(UNIT)["State"] == "failed")
    tell(step="foreign write", once=once, twice=value(UNIT), state=shown(UNIT)["State"])

    must("systemctl", "restart", "cgpolicyd")
    tell(step="restarted daemon", value=becomes(UNIT, "panic"))

    (SYSTEM / f"{UNIT}.d/50-policy.conf").unlink()
    must("systemctl", "daemon-reload")
    tell(step="drop-in removed", value=becomes(UNIT, "continue"))

    must("systemctl", "stop", "cgpolicyd")
    tell(step="stopped daemon", value=value("late.service"))


main()
