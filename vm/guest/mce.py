#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""vm-mce PHYSADDR: have the host raise a machine check (SRAO memory error) at a guest-physical address.

Exits 0 once it was raised; the kernel goes on handling it in a worker.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

LOCK = "/run/lock/vm-mce"


def port() -> Path:
    """Return the device of the port to the host."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for candidate in Path("/sys/class/virtio-ports").glob("*"):
            if (candidate / "name").read_text().strip() == "cgpolicy.mce":
                return Path("/dev", candidate.name)
        time.sleep(0.05)
    sys.exit("vm-mce: not in a machine started by vm/run")


def main() -> int:
    try:
        (word,) = sys.argv[1:]
        address = int(word, 0)
    except ValueError:
        print("usage: vm-mce PHYSADDR (bytes, decimal or 0x...)", file=sys.stderr)
        return 2
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        descriptor = os.open(port(), os.O_RDWR)
        os.write(descriptor, b"%#x\n" % address)
        answer = b""
        while not answer.endswith(b"\n"):
            answer += os.read(descriptor, 4096)
        os.close(descriptor)  # before the lock goes: a port can be opened only once
    if answer != b"ok\n":
        print(f"vm-mce: {answer.decode().strip()}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
