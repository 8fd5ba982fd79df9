# SPDX-License-Identifier: LGPL-2.1-or-later
"""A message bus of the tests' own, and clients of it that run in the tests' one main loop."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gi.repository import Gio, GLib

from cgpolicy.client import MANAGER, MANAGER_PATH, NAME
from vm.host import TREE

NOBODY = 65534
TICK_MS = 10
DEADLINE_MS = 20_000

# As system.conf of dbus-daemon: nothing is allowed that a service's own file does not allow.
CONFIGURATION = """<busconfig>
  <type>system</type>
  <listen>unix:tmpdir={directory}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <deny send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"
          send_member="UpdateActivationEnvironment"/>
  </policy>
  <policy user="root">
    <allow own_prefix="org.freedesktop"/>
    <allow send_destination_prefix="org.freedesktop"/>
  </policy>
  <include>{service}</include>
</busconfig>
"""


class Failed(Exception):
    """A call that was answered with an error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class Signal(NamedTuple):
    """A signal, its values unpacked."""

    name: str
    path: str
    values: tuple[Any, ...]


@dataclass(slots=True)
class Call:
    """A call under way or answered."""

    answered: bool = False
    values: tuple[Any, ...] = ()
    error: Failed | None = None

    def result(self) -> tuple[Any, ...]:
        """Wait for the answer; raise Failed if it is an error."""
        wait(lambda: self.answered, "an answer")
        if self.error is not None:
            raise self.error
        return self.values


def wait(condition: Callable[[], object], what: str, seconds: float = DEADLINE_MS / 1000) -> None:
    """Run the main loop, in which the fakes answer, until a condition holds."""
    late = False

    def deadline() -> bool:
        nonlocal late
        late = True
        return False

    # Files change without a word on the bus: those conditions are looked at with every tick.
    tick = GLib.timeout_add(TICK_MS, lambda: True)
    last = GLib.timeout_add(int(seconds * 1000), deadline)
    try:
        while not condition():
            assert not late, f"waited in vain for {what}"
            GLib.MainContext.default().iteration(True)
    finally:
        GLib.source_remove(tick)
        if not late:
            GLib.source_remove(last)


class Client:
    """A connection to the bus, with the signals of cgpolicyd that it received."""

    def __init__(self, address: str, user: int = 0) -> None:
        # The bus asks the kernel who connects: SO_PEERCRED has the effective user.
        os.seteuid(user)
        try:
            flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
            self.connection = Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
        finally:
            os.seteuid(0)
        self.signals: list[Signal] = []
        self.connection.signal_subscribe(NAME, None, None, None, None, Gio.DBusSignalFlags.NONE, self._signal)

    def _signal(self, connection: Any, sender: str, path: str, interface: str, signal: str, values: Any) -> None:
        self.signals.append(Signal(signal, path, values.unpack()))

    def start(
        self, method: str, signature: str = "()", *values: object, path: str = MANAGER_PATH, interface: str = MANAGER,
        service: str = NAME, interactive: bool = False,
    ) -> Call:
        """Send a call and return at once."""
        call = Call()

        def answered(connection: Any, result: Any) -> None:
            try:
                call.values = connection.call_finish(result).unpack()
            except GLib.Error as error:
                name = Gio.DBusError.get_remote_error(error) or ""
                call.error = Failed(name, error.message.removeprefix(f"GDBus.Error:{name}: "))
            call.answered = True

        flags = Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else Gio.DBusCallFlags.NONE
        self.connection.call(
            service, path, interface, method, GLib.Variant(signature, values), None, flags, DEADLINE_MS, None, answered
        )
        return call

    def call(self, method: str, signature: str = "()", *values: object, **where: Any) -> Any:
        """Call and wait; return the one value of the answer, or the tuple of its values. Raises Failed."""
        result = self.start(method, signature, *values, **where).result()
        return result[0] if len(result) == 1 else result

    def get(self, name: str, path: str = MANAGER_PATH, interface: str = MANAGER) -> Any:
        """Return a property."""
        return self.call("Get", "(ss)", interface, name, path=path, interface="org.freedesktop.DBus.Properties")

    def owner(self, name: str) -> str | None:
        """Return the unique name that owns a name."""
        try:
            return str(self.call("GetNameOwner", "(s)", name, **BUS))
        except Failed:
            return None

    def own(self, name: str) -> None:
        """Take a name, which must be free."""
        assert self.call("RequestName", "(su)", name, 4, **BUS) == 1, f"{name} is taken"

    def release(self, name: str) -> None:
        self.call("ReleaseName", "(s)", name, **BUS)

    def close(self) -> None:
        if not self.connection.is_closed():
            self.connection.close_sync(None)


BUS: dict[str, Any] = {
    "service": "org.freedesktop.DBus", "path": "/org/freedesktop/DBus", "interface": "org.freedesktop.DBus",
}


@contextlib.contextmanager
def private_bus() -> Iterator[str]:
    """Run a dbus-daemon with the project's own bus policy; yield its address."""
    directory = Path(tempfile.mkdtemp(prefix="cgpolicy-bus-"))
    directory.chmod(0o755)  # nobody has to reach the socket
    configuration = directory / "bus.conf"
    configuration.write_text(
        CONFIGURATION.format(directory=directory, service=TREE / "units" / "org.cgpolicy1.conf")
    )
    command = ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--nosyslog",
               "--print-address"]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert daemon.stdout is not None
        yield daemon.stdout.readline().strip()
    finally:
        daemon.terminate()
        daemon.communicate()
        shutil.rmtree(directory)
