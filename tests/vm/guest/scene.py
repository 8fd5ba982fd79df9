# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units to try things on, in the guest."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYSTEM = Path("/etc/systemd/system")
RUNTIME = Path("/run/systemd/system")
CGROUPS = Path("/sys/fs/cgroup")
POLICY_FILE = "memory.failure_dirty_action"

SECONDS = 60.0  # until something counts as not happening; on an idle host nothing takes two of them


def run(*words: str, user: str = "") -> tuple[int, str, str]:
    """Run a command and return its exit status and what it said."""
    command = ["runuser", "-u", user, "--", *words] if user else list(words)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.returncode, done.stdout, done.stderr


def must(*words: str) -> str:
    """Run a command that has to succeed and return what it printed."""
    status, out, err = run(*words)
    if status != 0:
        raise SystemExit(f"{' '.join(words)}: {status}: {err}")
    return out


def wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Return whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def setting(action: str) -> str:
    return f"[X-CgPolicy]\nMemoryFailureDirtyAction={action}\n"


def write(path: Path, content: str | bytes) -> None:
    """Write a file with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def service(name: str, *, drop_in: str | bytes | None = None, more: str = "", run: str = "/bin/sleep infinity") -> str:
    """Write a service's file, with a drop-in if given, and return its name; systemd is not told."""
    unit = f"{name}.service"
    write(SYSTEM / unit, f"[Service]\nExecStart={run}\n{more}")
    if drop_in is not None:
        write(SYSTEM / f"{unit}.d/50-policy.conf", drop_in)
    return unit


def cgroup(unit: str) -> Path:
    return CGROUPS / must("systemctl", "show", "-P", "ControlGroup", unit).strip().lstrip("/")


def value(unit: str) -> str:
    """Return what a unit's file in the kernel says, "" where there is none."""
    try:
        return (cgroup(unit) / POLICY_FILE).read_text().strip()
    except OSError:
        return ""


def becomes(unit: str, wanted: str) -> str:
    """Return a unit's value once it is the wanted one, or what it is when the time is over."""
    wait_for(lambda: value(unit) == wanted)
    return value(unit)


def shown(unit: str) -> dict[str, Any]:
    """Return what cgpolicy show says of a unit."""
    (properties,) = json.loads(must("cgpolicy", "--json", "show", unit))
    return dict(properties)


def call(service: str, path: str, method: str, *arguments: str) -> Any:
    """Call a method whose arguments are all strings, from this process: a program takes far longer to start."""
    from gi.repository import Gio, GLib  # noqa: PLC0415

    interface, _, member = method.rpartition(".")
    given = GLib.Variant(f"({'s' * len(arguments)})", arguments)
    bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
    return bus.call_sync(service, path, interface, member, given, None, 0, 60_000).unpack()


def object_path(root: str, unit: str) -> str:
    """Return the path of a unit's object, escaped as systemd does (sd_bus_path_encode(3))."""
    return root + "".join(each if each.isalnum() else f"_{ord(each):02x}" for each in unit)


def properties(unit: str) -> dict[str, Any]:
    """Return the properties of a unit's object on our bus name, none if there is no such object (yet)."""
    from gi.repository import GLib  # noqa: PLC0415

    path = object_path("/org/cgpolicy1/unit/", unit)
    try:
        return dict(call("org.cgpolicy1", path, "org.freedesktop.DBus.Properties.GetAll", "org.cgpolicy1.Unit")[0])
    except GLib.Error:
        return {}


def property_of(unit: str, interface: str, name: str) -> Any:
    """Return a property that systemd has of a unit; interface is Unit, Service, ..."""
    path = object_path("/org/freedesktop/systemd1/unit/", unit)
    get = "org.freedesktop.DBus.Properties.Get"
    return call("org.freedesktop.systemd1", path, get, f"org.freedesktop.systemd1.{interface}", name)[0]


def tell(**seen: Any) -> None:
    """Print what was seen, for the test on the host to judge."""
    print(json.dumps(seen), flush=True)


def main_pid(unit: str) -> int:
    return int(must("systemctl", "show", "-P", "MainPID", unit))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
