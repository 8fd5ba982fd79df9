# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is laid over the pristine image at every start: the working tree installed, channel, command."""

from __future__ import annotations

import os
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path

from vm.host import TREE, cache_dir, install_packages, run
from vm.image import GUEST_FILES, GUEST_LIBRARY

HOST_PACKAGES = ("meson", "ninja-build")

# Where the guest's systemd looks, not the host's: Debian 12 and 13 differ.
MESON_OPTIONS = (
    "--prefix=/usr",
    "--sysconfdir=/etc",
    "--localstatedir=/var",
    "-Dsystemdsystemunitdir=/usr/lib/systemd/system",
    "-Dcatalogdir=/usr/lib/systemd/catalog",
    "-Dman=disabled",
)

UNITS = "etc/systemd/system"
FILES = {
    "channel.py": f"{GUEST_LIBRARY}/channel",
    "vm-channel.service": f"{UNITS}/vm-channel.service",
    "vm-command.service": f"{UNITS}/vm-command.service",
    "mce.py": "usr/local/bin/vm-mce",
    "physaddr.py": "usr/local/bin/vm-physaddr",
}


def write_payload(path: Path, command: Sequence[str], *, share: bool, scratch: Path) -> None:
    """Write the tar archive that vm/guest/init unpacks from a disk; tar pads it to whole sectors."""
    stage = scratch / "stage"
    stage.mkdir()
    install_tree(stage, scratch / "build")
    for name, target in FILES.items():
        place(stage / target, (GUEST_FILES / name).read_bytes(), 0o644 if name.endswith(".service") else 0o755)
    place(stage / GUEST_LIBRARY / "command", command_script(command), 0o755)
    place(stage / "etc/cgpolicy-vm.conf", b"VM_SHARE=%s\n" % (b"yes" if share else b""), 0o644)
    wants = stage / UNITS / "sysinit.target.wants/vm-channel.service"
    wants.parent.mkdir(parents=True)
    wants.symlink_to("../vm-channel.service")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(stage, arcname=".", filter=as_root)


def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Own every file by root; keep /usr's date old, or systemd takes the machine for an updated one."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    if member.isdir():
        member.mtime = 0
    return member


def install_tree(stage: Path, build: Path) -> None:
    """Install the working tree by meson below a directory."""
    install_packages(HOST_PACKAGES)
    log = cache_dir("log") / "meson.log"
    run(["meson", "setup", *MESON_OPTIONS, build, TREE], log=log)
    run(["meson", "install", "-C", build], log=log, env={"DESTDIR": str(stage)})


def command_script(command: Sequence[str]) -> bytes:
    """Return a script that becomes the command; its shell says so and exits with 127 if there is none."""
    words = " ".join(shlex.quote(word) for word in command)
    return b"#!/bin/sh\nexec %s\n" % os.fsencode(words)


def place(path: Path, data: bytes, mode: int) -> None:
    """Write a file with its directories and mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
