# SPDX-License-Identifier: LGPL-2.1-or-later
"""Set policies in every way that a person can, well and badly, and print what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.vm.guest.scene import (
    RUNTIME,
    SYSTEM,
    becomes,
    must,
    run,
    service,
    setting,
    shown,
    tell,
    value,
    wait_for,
    write,
)

MANAGER = ("org.cgpolicy1", "/org/cgpolicy1", "org.cgpolicy1.Manager")
DROP_IN = RUNTIME / "foo.service.d/50-cgpolicy.conf"

# The literal call of the README.
SET = ("busctl", "call", *MANAGER, "SetUnitPolicy", "ssbt", "foo.service", "kill", "true", "0")
SCOPE = r"machine-qemu\x2d{}\x2dweb01.scope"


def refused(unit: str, action: str, user: str = "") -> str:
    """Return the D-Bus error of a call that must not succeed."""
    words = ["dbus-send", "--system", "--print-reply", f"--dest={MANAGER[0]}", MANAGER[1]]
    words.append(f"{MANAGER[2]}.SetUnitPolicy")
    _, _, err = run(*words, f"string:{unit}", f"string:{action}", "boolean:true", "uint64:0", user=user)
    return err.strip()


def journal(unit: str) -> list[str]:
    """Return the daemon's messages that belong to a unit."""
    return must("journalctl", "-o", "cat", "-t", "cgpolicyd", f"OBJECT_SYSTEMD_UNIT={unit}").splitlines()


def explained(unit: str) -> list[dict[str, Any]]:
    return list(json.loads(must("cgpolicy", "--json", "explain", unit)))


def by_bus() -> None:
    unit = service("foo")
    must("systemctl", "daemon-reload")
    must("systemctl", "start", unit)
    before = value(unit)
    must(*SET)
    tell(step="set", before=before, value=value(unit), drop_in=DROP_IN.read_text(), shown=shown(unit))
    tell(
        step="refused",
        errors=[
            refused(unit, "halt"),
            refused("nonexistent.service", "kill"),
            refused("no unit name", "kill"),
            refused("cron.timer", "kill"),
            refused(unit, "continue", user="nobody"),
            refused(unit, "panic", user="nobody"),
        ],
        value=value(unit),
        drop_in=DROP_IN.read_text(),
        others=sorted(map(str, [*RUNTIME.glob("*.d/50-cgpolicy.conf"), *SYSTEM.glob("*.d/50-cgpolicy.conf")])),
    )
    must("busctl", "call", *MANAGER, "UnsetUnitPolicy", "sbt", unit, "true", "0")
    tell(step="unset", value=value(unit), drop_in=DROP_IN.exists())
    tell(step="introspected", text=must("busctl", "introspect", *MANAGER))
    path = json.loads(must("busctl", "--json=short", "call", *MANAGER, "GetUnit", "s", unit))["data"][0]
    must("busctl", "set-property", MANAGER[0], path, "org.cgpolicy1.Unit", "MemoryFailureDirtyAction", "s", "panic")
    tell(step="set-property", value=value(unit), drop_in=(SYSTEM / f"{unit}.d/50-cgpolicy.conf").exists())
    must("cgpolicy", "unset", "foo")


def by_command() -> None:
    tell(step="cgpolicy set", said=must("cgpolicy", "set", "foo", "kill"), value=value("foo.service"))
    listed = json.loads(must("cgpolicy", "--json", "list"))
    tell(step="cgpolicy status", text=must("cgpolicy", "status"), listed=listed)
    exits = [
        run("cgpolicy", *words.split())[0]
        for words in ("show foo", "show nonexistent", "set foo halt", "apply nonexistent", "doctor", "explain foo")
    ]
    denied = run("cgpolicy", "set", "foo", "continue", user="nobody")
    tell(step="exits", exits=exits, denied=[denied[0], denied[2]], value=value("foo.service"))
    tell(step="cgpolicy unset", said=must("cgpolicy", "unset", "foo"), value=value("foo.service"))


def by_slice_and_machine() -> None:
    """A slice's default, its exception, a machine's scope by its name and by a drop-in."""
    write(SYSTEM / "shop.slice.d/50-policy.conf", setting("kill"))
    plain = service("plain", more="Slice=shop.slice\n")
    special = service("special", more="Slice=shop.slice\n", drop_in=setting("continue"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", plain, special)
    values = {unit: becomes(unit, wanted) for unit, wanted in ((plain, "kill"), (special, "continue"))}
    tell(step="slice", values=values, slice=value("shop.slice"), why=explained(special))

    must("cgpolicy", "set", "--machine", "web01", "kill")
    seen = []
    for number in (1, 2):  # libvirt counts: the scope's name is another at every start
        unit = SCOPE.format(number)
        must("systemd-run", "--quiet", "--slice=machine.slice", "--scope", f"--unit={unit}", "sh", "-c",
             "sleep infinity >/dev/null 2>&1 &")
        seen.append(becomes(unit, "kill"))
    must("cgpolicy", "unset", "--machine", "web01")
    tell(step="machine", values=seen, after=becomes(SCOPE.format(2), "continue"), why=explained(SCOPE.format(2)))


def bad_drop_ins() -> None:
    """Three drop-ins that are wrong beside one that is right."""
    wrong: dict[str, str | bytes] = {
        "unknown": "[X-CgPolicy]\n\nMemoryFailureDirtyAction=halt\n",
        "junk": b"[X-CgPolicy]\nMemoryFailureDirtyAction=\xff\xfe\x00\x80\x01binary\n",
        "long": b"[X-CgPolicy]\n#\nMemoryFailureDirtyAction=" + b"k" * (2 << 20) + b"\n",
    }
    units = {name: service(name, drop_in=content) for name, content in wrong.items()}
    good = service("good", drop_in=setting("kill"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", good, *units.values())
    tell(step="good", value=becomes(good, "kill"))
    wait_for(lambda: all(journal(unit) for unit in units.values()))
    for name, unit in units.items():
        verified = run("cgpolicy", "verify", str(SYSTEM / f"{unit}.d/50-policy.conf"))
        tell(step=name, value=value(unit), journal=journal(unit), why=explained(unit), verified=list(verified[:2]))
    # Mended, it counts; and verify without files looks at what systemd has loaded.
    status, out, _ = run("cgpolicy", "verify")
    write(SYSTEM / f"{units['junk']}.d/50-policy.conf", setting("panic"))
    must("systemctl", "daemon-reload")
    tell(step="mended", verify=[status, len(out.splitlines())], value=becomes(units["junk"], "panic"))


def main() -> None:
    tell(step="doctor", findings=json.loads(must("cgpolicy", "--json", "doctor")))
    by_bus()
    by_command()
    by_slice_and_machine()
    bad_drop_ins()
    for path in Path("/run/systemd/system").glob("*.d/50-cgpolicy.conf"):
        tell(step="left behind", path=str(path))
    tell(step="security", text=must("systemd-analyze", "security", "--no-pager", "cgpolicyd").splitlines()[-1])


main()
