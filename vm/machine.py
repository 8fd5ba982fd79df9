# SPDX-License-Identifier: LGPL-2.1-or-later
"""One run of a virtual machine: QEMU, the channel into the guest, machine checks, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vm.debian import BASES, Renewed
from vm.host import cache_dir, die_with_parent, install_packages, remove_unused
from vm.image import image
from vm.kernel import BASE, Kernel, patched, unpatched
from vm.payload import write_payload
from vm.stock import stock

HOST_PACKAGES = ("qemu-system-x86",)

EXIT_PANIC = 99
EXIT_TIMEOUT = 124
EXIT_HARNESS = 125

BOOT_SECONDS = 900.0  # 20 on two idle cores, 60 if the kernel checks itself; the host may be busy
REBOOT_SECONDS = 30.0  # from a panic to the reset that ends QEMU
MEMORY_MIB = 1536
PANIC = "Kernel panic - not syncing"

# An Intel CPU: Linux takes the same error of an AMD one for fatal ("Fatal local machine check").
CPU = "Skylake-Server,check=off"

# SRAO in bank 9, broadcast: VAL UC EN MISCV ADDRV S, memory controller read error (Intel SDM 3B, 16.9).
MCE = "mce -b 0 9 0xbd000000000000c0 0x5 {address:#x} 0x8c"

KEPT_DAYS = {"images": 14, "kernels": 14, "runs": 2, "tmp": 1}  # since the last use

PORTS = ("stdout", "stderr", "control", "mce")


@dataclass(frozen=True, slots=True)
class Request:
    """What to run, and in which machine; timeout in seconds from the command's start."""

    command: Sequence[str]
    kernel: str = "patched"
    base: str | None = None  # else v6.12 if built here, the kernel of the guest's own suite if stock
    debug: bool = False
    suite: str = "trixie"
    share: Path | None = None
    packages: tuple[str, ...] = ()
    timeout: float | None = None
    smp: int = 1
    console: Path | None = None  # also keep its log there, however the run ends


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the command's exit status, or one of the EXIT_ values of this module."""

    status: int
    console: str
    console_path: Path | None = None
    reason: str = ""

    @property
    def panicked(self) -> bool:
        return self.status == EXIT_PANIC


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP: unwinds to the cleanup, then the process ends as if by the signal."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the signals that end a program into Interrupted while the block runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def select_kernel(request: Request) -> Kernel:
    """Return the kernel that a request names, built or fetched if it is not cached."""

    def select() -> Kernel:
        if request.kernel == "stock":
            return stock(request.suite, request.base)
        build = unpatched if request.kernel == "unpatched" else patched
        return build(request.base or BASE, debug=request.debug)

    for _ in max(BASES.values(), key=len):  # each suite's lists may turn out to be old
        with contextlib.suppress(Renewed):
            return select()
    return select()


def has_kvm() -> bool:
    """Tell whether KVM can run this guest; /dev/kvm alone says nothing (it may lack hardware support)."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(flags and {"vmx", "svm"} & set(flags[1].split())) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def run_in_guest(request: Request, stdout: Callable[[bytes], None], stderr: Callable[[bytes], None]) -> Outcome:
    """Run a command in a machine of its own, passing on its output as it comes.

    The console's log is kept, and Outcome.console_path names it, unless the command just exited.
    """
    install_packages(HOST_PACKAGES)
    for name, days in KEPT_DAYS.items():
        remove_unused(cache_dir(name), days)
    kernel = select_kernel(request)
    root = image(request.suite, request.packages)
    for used in (kernel.image.parent, root):
        os.utime(used)
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=cache_dir("runs")))
    keep = False
    try:
        payload = directory / "payload.tar"
        scratch = directory / "scratch"
        scratch.mkdir()
        write_payload(payload, request.command, share=request.share is not None, scratch=scratch)
        shutil.rmtree(scratch)
        console = directory / "console.log"
        with Machine(request, kernel, root, payload, console, {"stdout": stdout, "stderr": stderr}) as machine:
            outcome = machine.run()
        keep = outcome.console_path is not None
        if request.console:
            shutil.copy(console, request.console)
        payload.unlink()
        return outcome
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


class Machine:
    """A QEMU process with its channels: socket pairs, so that no name or port is shared with another run."""

    def __init__(
        self,
        request: Request,
        kernel: Kernel,
        root: Path,
        payload: Path,
        console: Path,
        outputs: dict[str, Callable[[bytes], None]],
    ) -> None:
        self.request = request
        self.console = console
        self.outputs = outputs
        self.received = dict.fromkeys(outputs, 0)
        self.buffers: dict[str, bytes] = {"control": b"", "mce": b"", "qmp": b""}
        self.panicked = False
        self.started = False
        self.exited: dict[str, Any] | None = None
        self.failure: str | None = None
        self.deadline: float | None = time.monotonic() + BOOT_SECONDS
        self.sockets: dict[str, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        self.command = self._command(kernel, root, payload)

    def __enter__(self) -> Machine:
        theirs = {}
        for name in (*PORTS, "qmp"):
            self.sockets[name], theirs[name] = socket.socketpair()
            self.sockets[name].setblocking(False)
            self.selector.register(self.sockets[name], selectors.EVENT_READ, name)
            number = theirs[name].fileno()
            self.command += ["-chardev", f"socket,id={name},fd={number}"]
            if name == "qmp":
                self.command += ["-mon", "chardev=qmp,mode=control"]
            else:
                self.command += ["-device", f"virtserialport,chardev={name},name=cgpolicy.{name}"]
        self.errors = open(self.console.with_name("qemu.log"), "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
            pass_fds=[end.fileno() for end in theirs.values()],
            start_new_session=True,  # the terminal's Ctrl-C is ours to handle
            preexec_fn=die_with_parent,
        )
        for end in theirs.values():
            end.close()
        self.pidfd = os.pidfd_open(self.process.pid)
        self.selector.register(self.pidfd, selectors.EVENT_READ, "exit")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.selector.close()
        os.close(self.pidfd)
        self.errors.close()
        for end in self.sockets.values():
            end.close()

    def _command(self, kernel: Kernel, root: Path, payload: Path) -> list[str]:
        disks = [f"file={root},snapshot=on", f"file={payload},readonly=on"]
        if kernel.modules:
            disks.append(f"file={kernel.modules},readonly=on")
        arguments = (
            "root=/dev/vda rootfstype=ext4 rw init=/usr/local/lib/cgpolicy-vm/init console=ttyS0 loglevel=5 "
            "panic=-1 mitigations=off net.ifnames=0 random.trust_cpu=on systemd.show_status=no "
            "systemd.default_timeout_start_sec=600"  # a kernel that checks itself takes minutes to start a service
        )
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", "q35"]
        command += ["-accel", "kvm" if has_kvm() else "tcg,thread=single"]
        command += ["-cpu", CPU, "-smp", str(self.request.smp), "-m", str(MEMORY_MIB)]
        command += ["-action", "panic=none", "-device", "pvpanic-pci"]
        command += ["-kernel", str(kernel.image), "-append", arguments]
        if kernel.initrd:
            command += ["-initrd", str(kernel.initrd)]
        for disk in disks:
            command += ["-drive", f"{disk},format=raw,if=virtio,cache=unsafe"]
        if self.request.share:
            share = str(self.request.share.resolve()).replace(",", ",,")
            command += ["-fsdev", f"local,id=share,path={share},security_model=none,readonly=on"]
            command += ["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]
        command += ["-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"]
        return command + ["-device", "virtio-serial-pci"]

    def run(self) -> Outcome:
        """Serve the channels until the command exits, the guest panics, time runs out or QEMU ends."""
        self._qmp({"execute": "qmp_capabilities"})
        while True:
            if self.failure:
                return self._lost(self.failure)
            if self.exited and self.received == self.exited["bytes"]:
                return Outcome(self.exited["status"], self._console())
            remaining = self.deadline - time.monotonic() if self.deadline is not None else None
            if remaining is not None and remaining <= 0:
                return self._out_of_time()
            for key, _ in self.selector.select(remaining):
                if key.data == "exit":
                    self._drain()
                    return self._ended()
                self._receive(key.data)

    def _out_of_time(self) -> Outcome:
        if self.panicked:
            return self._panic()
        if not self.started:
            return self._lost(f"the guest did not come up within {BOOT_SECONDS:.0f} s")
        self._drain()
        return Outcome(EXIT_TIMEOUT, self._console(), reason=f"timeout after {self.request.timeout} s")

    def _ended(self) -> Outcome:
        """Say why QEMU ended by itself: a panicked guest resets, and -no-reboot makes that the end."""
        if self.panicked or PANIC in self._console():
            return self._panic()
        if self.exited:
            return Outcome(self.exited["status"], self._console())
        self.errors.seek(0)
        said = self.errors.read().strip()
        return self._lost(f"the guest was shut down or reset before the command exited {said}".strip())

    def _panic(self) -> Outcome:
        return Outcome(EXIT_PANIC, self._console(), self.console, "the guest's kernel panicked")

    def _lost(self, reason: str) -> Outcome:
        return Outcome(EXIT_HARNESS, self._console(), self.console, reason)

    def _console(self) -> str:
        return self.console.read_bytes().decode(errors="replace").replace("\r\n", "\n")

    def _drain(self) -> None:
        for name in self.sockets:
            while self._receive(name):
                pass

    def _receive(self, name: str) -> bool:
        """Take what a channel has; return whether there was any."""
        try:
            data = self.sockets[name].recv(1 << 16)
        except (BlockingIOError, ConnectionResetError):
            return False
        if not data:
            if self.sockets[name] in self.selector.get_map():
                self.selector.unregister(self.sockets[name])
            return False
        if name in self.outputs:
            self.received[name] += len(data)
            self.outputs[name](data)
            return True
        *lines, self.buffers[name] = (self.buffers[name] + data).split(b"\n")
        for line in lines:
            {"control": self._on_control, "mce": self._on_mce, "qmp": self._on_qmp}[name](line)
        return True

    def _on_control(self, line: bytes) -> None:
        message = json.loads(line)
        match message["event"]:
            case "started":
                self.started = True
                timeout = self.request.timeout
                self.deadline = time.monotonic() + timeout if timeout is not None else None
            case "exited":
                self.exited = message
            case "failed":
                print(message["journal"], file=sys.stderr)
                self.failure = message["reason"]

    def _on_mce(self, line: bytes) -> None:
        monitor = {"command-line": MCE.format(address=int(line, 16))}
        self._qmp({"execute": "human-monitor-command", "arguments": monitor, "id": "mce"})

    def _on_qmp(self, line: bytes) -> None:
        message = json.loads(line)
        if message.get("event") == "GUEST_PANICKED":
            self.panicked = True
            self.deadline = time.monotonic() + REBOOT_SECONDS
        elif message.get("id") == "mce":
            said = message["return"] if "return" in message else message["error"]["desc"]
            self.sockets["mce"].sendall(f"{' '.join(said.split()) or 'ok'}\n".encode())

    def _qmp(self, message: dict[str, Any]) -> None:
        self.sockets["qmp"].sendall(json.dumps(message).encode() + b"\n")
