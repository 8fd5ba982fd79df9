# SPDX-License-Identifier: LGPL-2.1-or-later
"""A reactor that says what the test has it say, and keeps what it is told: cgpolicy-reactor --root DIR CHANNEL.

DIR/say is a FIFO of messages, a line each, "end" being its end; each message that the daemon sends becomes a line
of DIR/told.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path


def main(root: Path, channel: socket.socket) -> None:
    say = os.open(root / "say", os.O_RDWR)  # for writing, too: then it has no end
    waiting = b""
    while True:
        ready, _, _ = select.select([say, channel.fileno()], [], [])
        if channel.fileno() in ready:
            data = channel.recv(65536)
            if not data:
                return
            with open(root / "told", "ab") as told:
                told.write(data + b"\n")
        if say in ready:
            *lines, waiting = (waiting + os.read(say, 65536)).split(b"\n")
            for line in lines:
                if line == b"end":
                    return
                channel.send(line)


main(Path(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])))
