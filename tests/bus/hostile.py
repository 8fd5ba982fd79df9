# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make many calls that are wrong, useless or malicious to the cgpolicyd on the system bus; print what came of them.

A program of its own that needs nothing but GLib, so that it runs in the guest as well:

    ./vm/run --share tests/bus -- python3 /mnt/share/hostile.py --calls 200000

Exits with 1 if the daemon ended, left a call without an answer, answered with an error that is none of its own,
or grew by 2 MiB or more after the first tenth of the calls.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from gi.repository import Gio, GLib

NAME = "org.cgpolicy1"
PATH = "/org/cgpolicy1"
MANAGER = f"{NAME}.Manager"
UNIT = f"{NAME}.Unit"
PROPERTIES = "org.freedesktop.DBus.Properties"
NOBODY = 65534

WINDOW = 48  # outstanding calls of one connection; cgpolicyd refuses the 65th that has to wait
TIMEOUT_MS = 60_000  # to an answer
GROWTH_MAX_KIB = 2048

SIGNATURES = {
    "SetUnitPolicy": "(ssbt)", "UnsetUnitPolicy": "(sbt)", "SetMachinePolicy": "(sst)", "UnsetMachinePolicy": "(st)",
    "GetUnit": "(s)", "ListUnits": "(as)", "Explain": "(s)", "Reload": "()",
}

# Its own errors, and those that GDBus and the bus make.
PROPER = re.compile(r"org\.cgpolicy1\.Error\.[A-Z][A-Za-z]+|org\.freedesktop\.DBus\.Error\.[A-Z][A-Za-z.]+")
NO_ANSWER = ("org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Timeout", "")

TEXTS = [
    "", ".", "..", "/", "-.slice", "system.slice", "web.service", "basic.target", "web", "@.service", "web@.service",
    "../../etc/passwd.service", "web.service\n", "w\u00e9b.service", "%n%s%%", "\\x2d.service", "\U0010ffff", "\1\2\3",
    "a" * 247 + ".service", "a" * 248 + ".service", "x" * 10_000, "[" * 200, "[!-~]*" * 40, "*" * 1000 + "x",
    "kill", "panic", "continue", "halt", "Kill", "kill ", "12345678123456781234567812345678", "db", "../db",
]


class Load:
    """Makes calls up and counts the answers."""

    def __init__(self, seed: int, connect: Callable[[], Any]) -> None:
        self.random = random.Random(seed)
        self.connect = connect
        self.connection = connect()
        self.outcomes: Counter[str] = Counter()
        self.improper: list[str] = []
        self.under_way = 0
        self.sent = 0

    def text(self) -> str:
        chance = self.random.random()
        if chance < 0.6:
            return self.random.choice(TEXTS)
        if chance < 0.999:
            stem = self.random.choice(["no", "getty@", "autovt@", "machine-", "a-b-", "system-"])
            suffix = self.random.choice(["service", "scope", "slice", "mount"])
            return f"{stem}{self.random.randrange(100_000)}.{suffix}"
        return self.random.choice("x\1\u20ac") * 300_000

    def value(self, signature: str) -> Any:
        """Make up a value of a type, nothing in it being what it should be."""
        kind = signature[0]
        if kind == "s":
            return self.text()
        if kind == "a":
            return [self.value(signature[1:]) for _ in range(self.random.choice([0, 1, 2, 20]))]
        if kind == "v":
            inner = self.random.choice(["s", "u", "as", "b"])
            return GLib.Variant(inner, self.value(inner))
        if kind == "b":
            return self.random.random() < 0.5
        return self.random.choice([0, 1, 2, 2**31])

    def values(self, signature: str) -> Any:
        """Make up the arguments of a call, as a variant."""
        types = re.findall(r"a*[sbtuv]", signature)
        return GLib.Variant(signature, tuple(self.value(each) for each in types))

    def path(self) -> str:
        unit = re.sub(r"[^a-z0-9]", lambda match: f"_{ord(match[0]):02x}", self.text()[:50].encode().hex()[:20])
        return self.random.choice([PATH, PATH, f"{PATH}/unit/web_2eservice", f"{PATH}/unit/_2d_2eslice", "/",
                                   f"{PATH}/unit", f"{PATH}/unit/{unit or '_'}", "/org/freedesktop/systemd1"])

    def call(self) -> tuple[str, str, str, Any]:
        """Make up a call: path, interface, method, arguments."""
        method = self.random.choice(list(SIGNATURES))
        wrong = self.random.choice(["()", "(s)", "(ss)", "(ssbts)", "(as)", "(v)", "(tttt)", "(aas)"])
        make: Callable[[], tuple[str, str, str, Any]] = self.random.choice([
            lambda: (PATH, MANAGER, method, self.values(SIGNATURES[method])),
            lambda: (PATH, MANAGER, method, self.values(SIGNATURES[method])),
            lambda: (PATH, MANAGER, method, self.values(wrong)),
            lambda: (self.path(), MANAGER, method, self.values(SIGNATURES[method])),
            lambda: (PATH, MANAGER, self.random.choice(["Halt", "setUnitPolicy", "x"]), self.values(wrong)),
            lambda: (self.path(), PROPERTIES, "Get", GLib.Variant("(ss)", self.property())),
            lambda: (self.path(), PROPERTIES, "Set", GLib.Variant("(ssv)", (*self.property(), self.value("v")))),
            lambda: (self.path(), PROPERTIES, "GetAll", GLib.Variant("(s)", self.property()[:1])),
            lambda: (self.path(), PROPERTIES, self.random.choice(["Get", "Set", "GetAll"]), self.values(wrong)),
            lambda: (self.path(), "org.freedesktop.DBus.Introspectable", "Introspect", None),
            lambda: (self.path(), "org.freedesktop.DBus.Peer", "Ping", None),
        ])
        return make()

    def property(self) -> tuple[str, str]:
        names = ["MemoryFailureDirtyAction", "State", "NUnits", "FailureDirty", "Version", "Nice", ""]
        return self.random.choice([MANAGER, UNIT, UNIT, PROPERTIES, "", "x.y"]), self.random.choice(names)

    def start(self) -> None:
        """Make a call and do not wait."""
        path, interface, method, arguments = self.call()
        self.sent += 1
        chance = self.random.random()
        if chance < 0.02:
            # Nobody takes the answer.
            message = Gio.DBusMessage.new_method_call(NAME, path, interface, method)
            message.set_flags(Gio.DBusMessageFlags.NO_REPLY_EXPECTED)
            if arguments is not None:
                message.set_body(arguments)
            self.connection.send_message(message, Gio.DBusSendMessageFlags.NONE)
            self.outcomes["no answer wanted"] += 1
            return
        if chance < 0.022:
            # The caller is gone before the answer comes.
            other = self.connect()
            other.call(NAME, path, interface, method, arguments, None, Gio.DBusCallFlags.NONE, -1, None, None)
            other.flush_sync(None)
            other.close_sync(None)
            self.outcomes["caller left"] += 1
            return
        self.under_way += 1
        flags = self.random.choice([Gio.DBusCallFlags.NONE, Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION])

        def answered(connection: Any, result: Any) -> None:
            self.under_way -= 1
            try:
                connection.call_finish(result)
                outcome = "answer"
            except GLib.Error as error:
                outcome = Gio.DBusError.get_remote_error(error) or ""
                if outcome in NO_ANSWER or not PROPER.fullmatch(outcome) or "internal error" in error.message:
                    self.improper.append(f"{interface}.{method} at {path}: {error.message[:300]}")
            self.outcomes[outcome] += 1

        self.connection.call(NAME, path, interface, method, arguments, None, flags, TIMEOUT_MS, None, answered)


def connect(user: int) -> Any:
    """Return a connection of its own, as another user."""
    address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/run/dbus/system_bus_socket")
    flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
    before = os.geteuid()
    os.seteuid(user)
    try:
        return Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
    finally:
        os.seteuid(before)


def daemon_pid(connection: Any) -> int:
    """Return the process that owns the daemon's name."""
    bus = "org.freedesktop.DBus"
    reply = connection.call_sync(
        bus, "/org/freedesktop/DBus", bus, "GetConnectionUnixProcessID", GLib.Variant("(s)", (NAME,)), None,
        Gio.DBusCallFlags.NONE, TIMEOUT_MS, None,
    )  # fmt: skip
    return int(reply.unpack()[0])


def resident_kib(pid: int, field: str = "VmRSS") -> int:
    """Return a process' resident memory."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{field}:"))


def peak_kib(pid: int) -> int:
    """Return the most that a process' resident memory has been."""
    return resident_kib(pid, "VmHWM")


def ping(connection: Any) -> None:
    """Return when the daemon has answered: it has seen all that was sent before."""
    connection.call_sync(
        NAME, PATH, PROPERTIES, "Get", GLib.Variant("(ss)", (MANAGER, "NUnits")), None, Gio.DBusCallFlags.NONE,
        TIMEOUT_MS, None,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=20130417)
    options = parser.parse_args()
    context = GLib.MainContext.default()
    root = connect(0)
    ping(root)  # starts it if need be
    pid = daemon_pid(root)
    # root is let through everywhere, so one in ten only, and nothing that could succeed is in TEXTS twice over.
    load = Load(options.seed, lambda: connect(NOBODY))
    resident = [resident_kib(pid)]
    warm_up = options.calls // 10
    while load.sent < options.calls:
        while load.under_way < WINDOW and load.sent < options.calls:
            load.start()
            if load.sent % warm_up == 0:
                ping(root)
                resident.append(resident_kib(pid))
        context.iteration(True)
    while load.under_way:
        context.iteration(True)
    ping(root)
    lives = daemon_pid(root) == pid
    resident.append(resident_kib(pid) if lives else 0)
    growth = resident[-1] - resident[1]
    print(json.dumps({
        "calls": load.sent, "outcomes": dict(load.outcomes.most_common()), "improper": load.improper[:20],
        "resident_kib": resident, "growth_kib": growth,
    }))  # fmt: skip
    return int(not lives or bool(load.improper) or growth >= GROWTH_MAX_KIB)


if __name__ == "__main__":
    sys.exit(main())
