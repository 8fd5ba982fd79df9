#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""panic FS HOW inject|srao|madvise self|parent: lose a page under panic, set on the owner or on its parent only.

Prints what the kernel's last lines must say; the console has them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.kernel.guest.pagecache import (
    PAGE,
    Cgroup,
    Process,
    file_pfn,
    keep_quiet,
    overwrite,
    poison,
    poison_own,
    target,
)

POS = 3 * PAGE


def body(process: Process, path: Path, how: str, size: int) -> None:
    fd, mapping = overwrite(path, POS, how, size)
    process.tell(str(file_pfn(fd, POS)))
    process.wait_for_order()
    poison_own(fd, POS, mapping)
    process.tell("still alive")


def main() -> None:
    kind, how, injection, where = sys.argv[1:]
    keep_quiet()
    top = Cgroup("top")
    owner = Cgroup("owner", top)
    (top if where == "parent" else owner).action = "panic"
    if where == "parent":
        owner.action = "kill"  # cannot relax it
    # Use up the allowance of lines first: the one before the panic must come nevertheless.
    spendthrift = Cgroup("spendthrift")
    with target("ext4") as file:
        process = Process(spendthrift, lambda process: spend(process, file.path))
        for word in process.hear().split():
            poison(int(word), "inject")
    with target(kind) as file:
        process = Process(owner, lambda process: body(process, file.path, how, file.size))
        pfn = int(process.hear())
        said = {"pfn": f"{pfn:#x}", "ino": file.inode, "pos": POS, "memcg": owner.name}
        print(json.dumps(said), flush=True)
        time.sleep(2)  # nothing tells when the channel has passed it on, and after the panic it is too late
        if injection == "madvise":
            process.order()
            process.hear()
        else:
            poison(pfn, injection)
    print("still alive", flush=True)
    sys.exit(1)


def spend(process: Process, path: Path) -> None:
    fd, _ = overwrite(path, 0, "write", 0)
    for number in range(1, 20):
        overwrite(path, number * PAGE, "write", 0)
    process.tell(" ".join(str(file_pfn(fd, number * PAGE)) for number in range(20)))
    process.wait_for_order()


main()
