#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""vm-physaddr FILE OFFSET: print the physical address of the page cache that holds a byte of a file.

The page is mapped for that moment only, so that nobody is left to get a SIGBUS
(kernel: Documentation/admin-guide/mm/pagemap.rst). Page cache that was not there is read in, and is then
charged to the caller's cgroup.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys

PAGE = mmap.PAGESIZE
PRESENT = 1 << 63
PFN = (1 << 55) - 1


def physical_address(path: str, offset: int) -> int:
    """Return the physical address of the byte at a file's offset."""
    with (
        open(path, "rb") as file,
        mmap.mmap(
            file.fileno(), PAGE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=offset - offset % PAGE
        ) as page,
    ):
        page[0]  # fault it in
        # Python does not tell where it mapped; the kernel does.
        inode = os.fstat(file.fileno()).st_ino
        with open("/proc/self/maps") as maps:
            start = next(int(row.split("-")[0], 16) for row in maps if int(row.split()[4]) == inode)
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            (entry,) = struct.unpack("=Q", os.pread(pagemap.fileno(), 8, start // PAGE * 8))
    if not entry & PRESENT or not entry & PFN:
        raise OSError(f"{path}: no page of memory at offset {offset} (not root?)")
    return int(entry & PFN) * PAGE + offset % PAGE


def main() -> int:
    try:
        path, offset = sys.argv[1:]
        print(f"{physical_address(path, int(offset, 0)):#x}")
    except ValueError as error:
        print(f"vm-physaddr: {error}\nusage: vm-physaddr FILE OFFSET", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vm-physaddr: {error}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
