#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Raise machine checks on two dirty pages of a file at once; print what the kernel logged of each."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time

PAGE = 4096
PATH = "/var/tmp/hit"
OFFSETS = (0, 5 * PAGE)


def wait_for_line(kmsg: int, text: str) -> str:
    """Return the first line of the kernel log with that text, or nothing after a minute."""
    deadline = time.monotonic() + 60
    poll = select.poll()
    poll.register(kmsg, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        line = os.read(kmsg, 8192).decode(errors="replace").split("\n")[0]
        if text in line:
            return line
    return ""


def main() -> None:
    with open(PATH, "wb") as file:
        file.write(b"saved bytes.....".ljust(16) * (8 * PAGE // 16))
        file.flush()
        os.fsync(file.fileno())
        for offset in OFFSETS:
            os.pwrite(file.fileno(), b"changed", offset)
    kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(kmsg, 0, os.SEEK_END)
    addresses = []
    for offset in OFFSETS:
        found = subprocess.run(["vm-physaddr", PATH, str(offset)], check=True, capture_output=True, text=True)
        addresses.append(int(found.stdout, 16))
    calls = [subprocess.Popen(["vm-mce", f"{address:#x}"]) for address in addresses]
    statuses = [call.wait() for call in calls]
    wanted = [f"Memory failure: {address // PAGE:#x}: recovery action" for address in addresses]
    lines = []
    for text in wanted:
        os.lseek(kmsg, 0, os.SEEK_DATA)  # from the first line again: the two come in either order
        lines.append(wait_for_line(kmsg, text))
    with open(PATH, "rb") as file:
        pages = [os.pread(file.fileno(), 7, offset).decode() for offset in OFFSETS]
    nonsense = subprocess.run(["vm-mce", "nonsense"], capture_output=True, check=False).returncode
    xfs = subprocess.run(["mkfs.xfs", "-V"], stdout=subprocess.DEVNULL, check=False).returncode
    seen = {"statuses": statuses, "lines": lines, "pages": pages, "nonsense": nonsense, "mkfs.xfs": xfs}
    json.dump(seen, sys.stdout)


main()
