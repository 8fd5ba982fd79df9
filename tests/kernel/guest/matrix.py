#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""matrix BASE inject|srao|madvise: lose pages of every kind of file, under continue and kill.

Prints a JSON object a case.

The cgroups: top (ancestor), top/owner (the charge and the policy) and top/owner/sub, which has no memory
controller of its own and holds the processes.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from itertools import count

from tests.kernel.guest.cases import CASES, MORE_CASES
from tests.kernel.guest.pagecache import (
    COMPOUND_HEAD,
    COMPOUND_TAIL,
    HWPOISON,
    NEW,
    OLD,
    PAGE,
    Cgroup,
    KernelLog,
    Process,
    Target,
    Trace,
    check,
    file_pfn,
    has_flag,
    is_dirty,
    keep_quiet,
    overwrite,
    poison,
    poison_own,
    target,
)

POS = 64 * PAGE

KERNEL_SAYS = {
    "dropped": r"recovery action for dirty LRU page: Recovered",
    "unsplit": r"recovery action for unsplit thp: Failed",
    "kept": r"recovery action for dirty LRU page: Failed",
}


def victim(process: Process, file: Target, how: str, injection: str) -> None:
    """Dirty a page, tell its frame, and on order lose it, sync and read it, as an application would."""
    fd, mapping = overwrite(file.path, POS, how, file.size)
    process.tell(str(file_pfn(fd, POS)))
    process.wait_for_order()
    if injection == "madvise":
        poison_own(fd, POS, mapping)
        process.tell("poisoned")
        process.wait_for_order()
    if mapping:
        mapping.close()  # a touch would be SIGBUS
    try:
        os.fsync(fd)
        result = "ok"
    except OSError as error:
        result = errno.errorcode[error.errno or 0]
    # Not where the poisoned page is still there: reading it would be the next machine check.
    process.tell(result)
    process.wait_for_order()
    process.tell({OLD: "old", NEW: "new"}.get(os.pread(fd, 1, POS), "other"))
    process.wait_for_order()


numbers = count()


def run_case(
    base: str, kind: str, how: str, fate: str, action: str, injection: str, trace: Trace
) -> dict[str, object]:
    top = Cgroup(f"{injection}{next(numbers)}")
    owner = Cgroup("owner", top)
    sub = Cgroup("sub", owner, controllers="")
    owner.action = action
    log = KernelLog()
    with target(kind) as file:
        reader = Process(sub, lambda process: victim(process, file, how, injection))
        bystander = Process(sub, lambda process: process.wait_for_order())
        outsider = Process(Cgroup("outside", top), lambda process: process.wait_for_order())
        pfn = int(reader.hear())
        check(True, is_dirty(pfn), "page dirty before")
        large = has_flag(pfn, COMPOUND_HEAD, COMPOUND_TAIL)
        check(fate == "unsplit", large, "page in a large folio before")
        check(how == "whole", how == "whole" and has_flag(pfn, COMPOUND_TAIL), "page at the end of a folio before")
        trace.read()

        if injection == "madvise":
            reader.order()
        else:
            poison(pfn, injection)

        log.wait(rf"Memory failure: {pfn:#x}: {KERNEL_SAYS[fate]}")
        check(True, has_flag(pfn, HWPOISON), "page poisoned")
        if how == "whole":
            # 6.12 leaves the folio as it is; later kernels split it as far as the file system allows.
            check(base == "v7", has_flag(pfn, COMPOUND_HEAD), "page at the start of a folio afterwards")

        # The kernel's line
        lost = log.lost()
        check(1, len(lost), "lines about lost data")
        line = lost[0]
        check(f"{pfn:x}", line["pfn"], "pfn")
        check(file.device, os.makedev(int(line["major"]), int(line["minor"])), "device")
        check(POS, int(line["pos"]), "pos")
        check(file.inode, int(line["ino"]), "inode")
        check(file.mode, int(line["mode"], 8), "mode")
        check(owner.name, line["memcg"], "memcg")
        check(action, line["action"], "action")

        # Counters: pages at the owner and its ancestors, kills at the group that is killed
        killed = int(action == "kill")
        check((1, killed), owner.losses(), "owner's memory.events")
        check((1, killed), owner.losses(local=True), "owner's memory.events.local")
        check((1, killed), top.losses(), "ancestor's memory.events")
        check((0, 0), top.losses(local=True), "ancestor's memory.events.local")

        # Tracepoint
        events = trace.read()
        check(1, len(events), "trace events")
        device = f"{os.major(file.device)}:{os.minor(file.device)}"
        expected = {"pfn": f"{pfn:#x}", "dev": device, "pos": str(POS)}
        expected |= {"ino": str(file.inode), "cgroup_id": str(owner.id), "action": action}
        check(expected, {key: events[0][key] for key in expected}, "trace event")

        # What the processes see
        result: dict[str, object] = {"fs": kind, "how": how, "fate": fate, "action": action}
        if action == "kill":
            group = log.wait(rf"{pfn:#x}: tasks in .* are going to be killed")
            check(True, f"tasks in {owner.name} are" in group, "the group in the kernel's line")
            check(signal.SIGKILL, reader.wait(), "reader's wait status")
            check(signal.SIGKILL, bystander.wait(), "bystander's wait status")
            check(True, outsider.alive(), "process outside of the group alive")
            # The error is there for whoever has the file open, and for the next one to open it.
            result["fsync"] = fsync_of(file)
            check(False, owner.populated(), "group populated")
        else:
            if injection == "madvise":
                check("poisoned", reader.hear(), "the reader")
            reader.order()
            result["fsync"] = reader.hear()
            check(True, bystander.alive(), "bystander alive")
            if fate == "dropped":
                reader.order()
                result["read"] = reader.hear()
                check("old", result["read"], "data read after the loss")
            reader.end()
            bystander.end()
        outsider.end()
        check("EIO", result["fsync"], "fsync")
    log.close()
    return result


def fsync_of(file: Target) -> str:
    """Return the result of fsync() on a file opened after the loss: it reports what nobody has seen yet."""
    fd = os.open(file.path, os.O_RDWR)
    try:
        os.fsync(fd)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(fd)
    return "ok"


def main() -> None:
    base, injection = sys.argv[1:]
    keep_quiet()
    trace = Trace()
    for kind, how, fate in CASES + MORE_CASES[base]:
        for action in ("continue", "kill"):
            time.sleep(0.6)  # the kernel prints ten lines in 5 s at most
            try:
                print(json.dumps(run_case(base, kind, how, fate, action, injection, trace)), flush=True)
            except AssertionError as error:
                case = {"fs": kind, "how": how, "action": action, "error": str(error)}
                print(json.dumps(case), flush=True)


main()
