# SPDX-License-Identifier: LGPL-2.1-or-later
"""cgpolicyd as a process of its own, on a private bus, with a systemd, a polkit and a cgroup tree of the tests'.

Everything but the daemon and the bus runs in one main loop, that of the test: a fake answers only while the
test waits for something, so that nothing happens behind its back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gi.repository import GLib

from cgpolicy.client import MANAGER_PATH, NAME, UNIT
from cgpolicy.unitname import bus_label_escape
from tests.bus.fakes import FakePolkit, FakeSystemd, FakeUnit
from tests.bus.privatebus import NOBODY, Client, private_bus, wait
from tests.unit.plaintree import PlainTree
from vm.host import TREE

PYTHON = "/usr/bin/python3"  # the one that sees Debian's gi, pydbus and pystemd
PROPERTIES = "org.freedesktop.DBus.Properties"


class World:
    """A machine in a directory, with the daemon that is started on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._undo = contextlib.ExitStack()
        self._bus = self._undo.enter_context(contextlib.ExitStack())
        self.address = self._bus.enter_context(private_bus())
        (root / "sys/fs").mkdir(parents=True)
        self.tree = PlainTree(root / "sys/fs/cgroup")
        self.systemd = FakeSystemd(self.client(), root)
        self.root_client = self.client()
        self.daemon: subprocess.Popen[bytes] | None = None
        self.programs = TREE / "units"
        self.ready = False
        for name, cgroup in (("-.slice", ""), ("system.slice", "/system.slice"), ("machine.slice", "/machine.slice")):
            if cgroup:
                self.tree.make(cgroup)
            self.systemd.add(name, slice="" if name == "-.slice" else "-.slice", cgroup=cgroup or "/")

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
        self._undo.close()

    # The bus ----------------------------------------------------------------------------------

    def client(self, user: int = 0) -> Client:
        """Connect once more, as a client with no history."""
        client = Client(self.address, user)
        self._undo.callback(client.close)
        return client

    def restart_bus(self) -> None:
        """Have the bus end and another one begin, on which systemd, with the units that it had, and root are anew."""
        self._bus.close()
        self.address = self._bus.enter_context(private_bus())
        before, self.systemd = self.systemd, FakeSystemd(self.client(), self.root)
        self.systemd.listed = before.listed
        for unit in before.units.values():
            self.systemd.take(unit)
        self.root_client = self.client()

    def nobody(self) -> Client:
        """Connect as a user without privileges."""
        return self.client(NOBODY)

    def polkit(self, answer: str = "allow") -> FakePolkit:
        """Put a polkit on the bus."""
        return FakePolkit(self.client(), answer)

    # The daemon -------------------------------------------------------------------------------

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the daemon and return at once; self.ready tells when it has said READY=1."""
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        path = self.root / "notify"
        path.unlink(missing_ok=True)
        notify.bind(str(path))
        self._undo.callback(notify.close)
        self.ready = False

        def notified(source: int, condition: object) -> bool:
            self.ready = self.ready or b"READY=1" in notify.recv(4096).split(b"\n")
            return True

        watch = GLib.unix_fd_add_full(GLib.PRIORITY_DEFAULT, notify.fileno(), GLib.IOCondition.IN, notified)
        self._undo.callback(GLib.source_remove, watch)
        environment = {
            "DBUS_SYSTEM_BUS_ADDRESS": self.address,
            "NOTIFY_SOCKET": str(path),
            "PYTHONPATH": str(TREE),
            "PATH": os.environ["PATH"],
        }
        command = [PYTHON, str(self.programs / "cgpolicyd"), "--root", str(self.root)]
        self.daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        return self.daemon

    def start(self) -> subprocess.Popen[bytes]:
        """Start the daemon and wait until it is ready."""
        daemon = self.launch()
        wait(lambda: self.ready or daemon.poll() is not None, "READY=1")
        assert daemon.poll() is None, f"the daemon ended: {daemon.returncode}"
        return daemon

    def kill(self) -> None:
        """Kill the daemon as nothing else would, and wait until the bus knows."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        wait(lambda: self.root_client.owner(NAME) is None, f"{NAME} to be free")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the daemon meanwhile: it sees several steps as one, as with cgroupfs where they are one."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.daemon.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            self.daemon.send_signal(signal.SIGCONT)

    def settle(self) -> None:
        """Return when the daemon has handled what happened to its files before this call.

        inotify is of higher priority in its main loop than the bus; the second call is answered after a poll() that
        began after the first, so after one that saw every event.
        """
        for _ in range(2):
            self.root_client.get("Version")

    def is_alive(self) -> bool:
        assert self.daemon is not None
        return self.daemon.poll() is None and self.root_client.get("Version") != ""

    # Units ------------------------------------------------------------------------------------

    def service(self, name: str, text: str = "", *, action: str | None = "continue", **values: Any) -> FakeUnit:
        """Add a service that runs in system.slice, with a fragment that holds the text below [X-CgPolicy]."""
        values.setdefault("cgroup", f"/system.slice/{name}")
        if values["cgroup"]:
            self.tree.make(values["cgroup"], action)
        return self.systemd.add(name, fragment=self.write_fragment(name, text), **values)

    def write_fragment(self, name: str, text: str = "") -> str:
        """Write a unit's file and return its path."""
        path = self.root / "usr/lib/systemd/system" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[Unit]\nDescription=A unit\n[X-CgPolicy]\n{text}\n")
        return str(path)

    def write_drop_in(self, unit: str, name: str, content: bytes, base: str = "etc") -> Path:
        """Write a drop-in as it stands."""
        path = self.root / base / "systemd/system" / f"{unit}.d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def restart_cgroup(self, cgroup: str) -> None:
        """Remove a cgroup and make it again; its id is a new one, as the kernel's are."""
        old = os.open(self.tree.path(cgroup), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.tree.remove(cgroup)
            self.tree.make(cgroup)
        finally:
            os.close(old)

    def unit(self, name: str) -> dict[str, Any]:
        """Return the properties of a unit's object."""
        properties = self.root_client.call("GetAll", "(s)", UNIT, path=unit_object(name), interface=PROPERTIES)
        assert isinstance(properties, dict)
        return properties

    def policy_files(self) -> dict[str, bytes]:
        """Return everything that the daemon could have changed: configuration and cgroup files."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for top in ("etc", "run", "sys")
            for path in sorted((self.root / top).rglob("*"))
            if path.is_file()
        }


def unit_object(name: str) -> str:
    """Return the path of a unit's object."""
    return f"{MANAGER_PATH}/unit/{bus_label_escape(name)}"


def drop_in(action: str) -> bytes:
    return f"[X-CgPolicy]\nMemoryFailureDirtyAction={action}\n".encode()
