#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest's end of the channel: runs vm-command.service and carries its output and exit status to the host.

The command writes to two FIFOs and not to the virtio ports, which can be opened only once (/dev/stdout would
fail). Real-time priority empties the FIFOs before the writer executes its next instruction, so that what a
command says before it panics the kernel gets out.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

RUN = Path("/run/cgpolicy-vm")
PORTS = Path("/sys/class/virtio-ports")
DAEMON = "cgpolicyd.service"
COMMAND = "vm-command.service"
CHUNK = 1 << 16


def open_port(name: str) -> int:
    """Open the virtio-serial port of that name; its driver learns the names some time after boot."""
    while True:
        for port in PORTS.glob("*"):
            if (port / "name").read_text().strip() == name:
                return os.open(f"/dev/{port.name}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.02)


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemctl", "--quiet", *words], capture_output=True, text=True, check=False)


def journal(*options: str) -> str:
    return subprocess.run(
        ["journalctl", "--no-pager", "-o", "short-monotonic", *options],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    ).stdout


def exit_status() -> int:
    """Return the command's exit status, 128 and more for death by a signal, as a shell reports it."""
    code, status = (RUN / "exit").read_text().split()
    return int(status) if code == "exited" else 128 + signal.Signals[f"SIG{status}"]


class Stream:
    """One output stream of the command: a FIFO here, a virtio port to the host."""

    def __init__(self, name: str) -> None:
        path = RUN / name
        os.mkfifo(path, 0o666)
        # Open for writing too: no end of file when the command's last process closes it.
        self.fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.port = open_port(f"cgpolicy.{name}")
        self.count = 0

    def pump(self) -> bool:
        """Pass on what there is; return whether there was any."""
        try:
            data = os.read(self.fifo, CHUNK)
        except BlockingIOError:
            return False
        write_all(self.port, data)
        self.count += len(data)
        return True


def main() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    RUN.mkdir(exist_ok=True)
    control = open_port("cgpolicy.control")

    def tell(**message: Any) -> None:
        write_all(control, json.dumps(message).encode() + b"\n")

    streams = {name: Stream(name) for name in ("stdout", "stderr")}
    if systemctl("cat", DAEMON).returncode == 0:
        started = systemctl("start", DAEMON)
        if started.returncode != 0:
            tell(event="failed", reason=f"{DAEMON} did not start", journal=journal("-b", "-u", DAEMON))
            return
    # What the command waits for; its time counts from here.
    systemctl("start", "multi-user.target")
    tell(event="started")
    command = subprocess.Popen(
        ["systemctl", "--quiet", "start", "--wait", COMMAND],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with selectors.DefaultSelector() as selector:
        for stream in streams.values():
            selector.register(stream.fifo, selectors.EVENT_READ, stream)
        ended = os.pidfd_open(command.pid)
        selector.register(ended, selectors.EVENT_READ)
        while command.poll() is None:
            for key, _ in selector.select():
                if key.data:
                    key.data.pump()
        selector.unregister(ended)
        # A restart of the system bus ends systemctl --wait, and not the command.
        while systemctl("show", "-P", "ActiveState", COMMAND).stdout.strip() in ("active", "deactivating"):
            for key, _ in selector.select(0.2):
                if key.data:
                    key.data.pump()
    for stream in streams.values():
        while stream.pump():
            pass
    try:
        status = exit_status()
    except (OSError, ValueError, KeyError) as error:
        tell(event="failed", reason=f"{COMMAND} did not run: {error}", journal=journal("-b", "-u", COMMAND))
        return
    tell(event="exited", status=status, bytes={name: stream.count for name, stream in streams.items()})


main()
