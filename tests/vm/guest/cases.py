# SPDX-License-Identifier: LGPL-2.1-or-later
"""A table of units, each with another way to come by a policy; print what the kernel and the daemon say of them."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

from cgpolicy.unitname import bus_label_escape
from tests.vm.guest.scene import (
    CGROUPS,
    POLICY_FILE,
    RUNTIME,
    SYSTEM,
    becomes,
    cgroup,
    main_pid,
    must,
    run,
    service,
    setting,
    tell,
    value,
    wait_for,
    write,
)

BUS = "org.cgpolicy1"
PATH = "/org/cgpolicy1"
PROPERTIES = (
    "MemoryFailureDirtyAction", "Source", "SourcePath", "State", "EffectiveAction", "EffectiveFrom", "LastError",
)


def call(*words: str) -> Any:
    return json.loads(must("busctl", "--json=short", "call", BUS, *words))["data"]


def properties(unit: str) -> dict[str, str]:
    """Return what the daemon says of a unit."""
    (path,) = call(PATH, f"{BUS}.Manager", "GetUnit", "s", unit)
    assert path == f"{PATH}/unit/{bus_label_escape(unit)}"
    rows = must("busctl", "--json=short", "get-property", BUS, path, f"{BUS}.Unit", *PROPERTIES).splitlines()
    return {name: json.loads(row)["data"] for name, row in zip(PROPERTIES, rows, strict=True)}


def in_slice(name: str, slice_: str, drop_in: str | None = None, more: str = "") -> str:
    return service(name, more=f"Slice={slice_}.slice\n{more}", drop_in=setting(drop_in) if drop_in else None)


def units() -> dict[str, str]:
    """Write the table's units; return what each one's file is to say, "" of those that have no cgroup."""
    write(SYSTEM / "-.slice.d/50-policy.conf", setting("kill"))
    write(SYSTEM / "shop.slice", setting("panic"))
    write(SYSTEM / "shop-front.slice", setting("continue"))
    write(SYSTEM / "shop-back.slice", "[Slice]\n")
    write(SYSTEM / "bare.slice", "[Slice]\nDisableControllers=memory\n")
    write(SYSTEM / "tpl@.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    write(SYSTEM / "tpl@.service.d/50-policy.conf", setting("continue"))
    write(SYSTEM / "tpl@b.service.d/60-policy.conf", setting("panic"))
    write(SYSTEM / "user@.service.d/50-policy.conf", setting("panic"))
    write(SYSTEM / "ear.socket", "[Socket]\nListenStream=/run/ear\nExecStartPost=/bin/sh -c 'sleep 9999 &'\n")
    write(SYSTEM / "ear.socket.d/50-policy.conf", setting("panic"))
    service("ear")
    write(SYSTEM / "mnt-table.mount", "[Mount]\nWhat=tmpfs\nWhere=/mnt/table\nType=tmpfs\n")
    write(SYSTEM / "mnt-table.mount.d/50-policy.conf", setting("panic"))
    write(SYSTEM / "var-swapfile.swap", "[Swap]\nWhat=/var/swapfile\n")
    write(SYSTEM / "var-swapfile.swap.d/50-policy.conf", setting("panic"))
    must("fallocate", "-l", "1M", "/var/swapfile")
    os.chmod("/var/swapfile", 0o600)
    must("mkswap", "/var/swapfile")
    return {
        in_slice("root-default", "system"): "kill",
        in_slice("plain", "shop"): "panic",
        in_slice("special", "shop", "kill"): "kill",
        in_slice("front", "shop-front"): "continue",
        in_slice("back", "shop-back"): "panic",
        in_slice("moved", "shop"): "panic",
        in_slice("bare", "bare", "kill"): "",
        "tpl@a.service": "continue",
        "tpl@b.service": "panic",
        "ear.socket": "panic",
        "mnt-table.mount": "panic",
        "var-swapfile.swap": "panic",
        "user@0.service": "panic",
    }


def table() -> None:
    wanted = units()
    must("systemctl", "daemon-reload")
    starts = {unit: run("systemctl", "start", unit)[::2] for unit in wanted}
    # Sweeps over everything and answers when that is done.
    must("busctl", "--timeout=120", "call", BUS, PATH, f"{BUS}.Manager", "Reload")
    for unit, action in wanted.items():
        running = must("systemctl", "show", "-P", "ControlGroup", unit).strip() != ""
        found = becomes(unit, action) if running else None
        tell(step=unit, start=starts[unit][0], wanted=action, value=found, **properties(unit))
    tell(step="slices", own={name: value(f"{name}.slice") for name in ("shop", "shop-front", "shop-back", "system")})

    in_slice("moved", "system")
    must("systemctl", "daemon-reload")
    before = value("moved.service")
    must("systemctl", "restart", "moved.service")
    tell(step="moved", before=before, after=becomes("moved.service", "kill"), **properties("moved.service"))
    (SYSTEM / "-.slice.d/50-policy.conf").unlink()
    must("systemctl", "daemon-reload")
    tell(step="without root default", after=becomes("moved.service", "continue"), **properties("moved.service"))

    # Stricter above: the unit's own file says what is configured, the kernel takes what is effective.
    (cgroup("shop-front.slice") / POLICY_FILE).write_text("kill")
    wait_for(lambda: properties("front.service")["EffectiveAction"] == "kill")
    tell(step="stricter above", value=value("front.service"), **properties("front.service"))
    (cgroup("shop-front.slice") / POLICY_FILE).write_text("continue")

    (cgroup("special.service") / POLICY_FILE).write_text("continue")
    tell(step="interference", value=becomes("special.service", "kill"))
    said = "special.service: somebody changed"
    wait_for(lambda: said in must("journalctl", "-o", "cat", "-t", "cgpolicyd"))
    lines = must("journalctl", "-o", "cat", "-t", "cgpolicyd").splitlines()
    tell(step="interference said", lines=[line for line in lines if line.startswith(said)])


def judged() -> None:
    """Drop-in trees of which systemctl cat is the judge."""
    policy = "50-policy.conf"
    for name in ("judge-a-b", "judge-masked", "judge-real", "judge@"):
        write(SYSTEM / f"{name}.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    write(SYSTEM / "service.d/10-all.conf", setting("continue"))
    write(SYSTEM / f"judge-.service.d/{policy}", setting("panic"))
    write(SYSTEM / "judge-a-.service.d/60-more.conf", setting("kill"))
    write(RUNTIME / f"judge-masked.service.d/{policy}", setting("kill"))
    (SYSTEM / "judge-masked.service.d").mkdir()
    (SYSTEM / f"judge-masked.service.d/{policy}").symlink_to("/dev/null")
    (SYSTEM / "judge-alias.service").symlink_to("judge-real.service")
    write(SYSTEM / "judge-alias.service.d/70-alias.conf", setting("kill"))
    write(SYSTEM / f"judge@.service.d/{policy}", setting("kill"))
    write(SYSTEM / "judge@one.service.d/40-less.conf", setting("panic"))
    write(SYSTEM / "judge@two.service.d/60-more.conf", "[X-CgPolicy]\nMemoryFailureDirtyAction=\n")
    must("systemctl", "daemon-reload")
    for unit in ("judge-a-b", "judge-masked", "judge-real", "judge@one", "judge@two"):
        unit = f"{unit}.service"
        must("systemctl", "start", unit)
        must("busctl", "--timeout=120", "call", BUS, PATH, f"{BUS}.Manager", "Reload")
        section, action, path, source = "", "", "", ""
        # A heading of systemctl cat is a file's name; SYSTEMD_COLORS is off in a pipe.
        for line in must("systemctl", "cat", unit).splitlines():
            if line.startswith("# /"):
                path, section = line[2:], ""
            elif line.startswith("["):
                section = line
            elif section == "[X-CgPolicy]" and (found := re.fullmatch(r"MemoryFailureDirtyAction=(.*)", line)):
                action, source = found[1], path if found[1] else ""
        seen = properties(unit)
        shown = must("systemctl", "show", "-P", "DropInPaths", unit).split()
        tell(
            step=f"judged {unit}", systemctl=[action, source], drop_ins=len(shown),
            cgpolicy=[seen["MemoryFailureDirtyAction"], seen["SourcePath"]], value=value(unit),
        )
    (SYSTEM / "service.d/10-all.conf").unlink()
    must("systemctl", "daemon-reload")


def overflow() -> None:
    """Have the kernel drop inotify events that nothing else tells of."""
    limit = Path("/proc/sys/fs/inotify/max_queued_events")
    usual = limit.read_text()
    limit.write_text("8")
    must("systemctl", "restart", "cgpolicyd")
    limit.write_text(usual)
    daemon = main_pid("cgpolicyd")
    os.kill(daemon, signal.SIGSTOP)
    for number in range(10):
        (CGROUPS / "system.slice" / f"noise-{number}").mkdir()
    (cgroup("special.service") / POLICY_FILE).write_text("continue")
    before = value("special.service")
    os.kill(daemon, signal.SIGCONT)
    tell(step="overflow", before=before, after=becomes("special.service", "kill"))
    for number in range(10):
        (CGROUPS / "system.slice" / f"noise-{number}").rmdir()


def bus_restarted(unit: str = "dbus.service") -> None:
    """Restart the bus, with a change meanwhile of which nobody can tell the daemon."""
    before = main_pid("cgpolicyd")
    must("systemctl", "restart", unit)
    write(SYSTEM / "special.service.d/50-policy.conf", setting("panic"))
    must("systemctl", "daemon-reload")
    after = becomes("special.service", "panic")
    wait_for(lambda: run("busctl", "status", BUS)[0] == 0)
    tell(step=f"{unit} restarted", after=after, again=main_pid("cgpolicyd") != before, **properties("special.service"))
    write(SYSTEM / "special.service.d/50-policy.conf", setting("kill"))
    must("systemctl", "daemon-reload")


def main() -> None:
    table()
    judged()
    overflow()
    tell(step="security", text=must("systemd-analyze", "security", "--no-pager", "cgpolicyd").splitlines()[-1])
