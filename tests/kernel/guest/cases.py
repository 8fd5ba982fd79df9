# SPDX-License-Identifier: GPL-2.0-only
"""The ways in which dirty file data is lost."""

from __future__ import annotations

# File system, how the page is dirtied, and what becomes of it: dropped (P1), kept because it cannot be dropped (P2),
# or kept in a folio that was not split (P3), or not to the end (P4).
CASES = [
    ("ext4", "write", "dropped"),
    ("ext4", "mmap", "dropped"),
    ("xfs", "write", "dropped"),
    ("xfs", "mmap", "dropped"),
    ("xfs", "large", "unsplit"),
    ("xfs", "large-mmap", "unsplit"),
    ("xfs16k", "whole", "unsplit"),
    ("vfat", "write", "kept"),
    ("vfat", "mmap", "kept"),
    ("bdev", "write", "kept"),
    ("bdev", "mmap", "kept"),
]
# ext4 of 6.12 has no large folios.
MORE_CASES: dict[str, list[tuple[str, str, str]]] = {
    "v6.12": [],
    "v7": [("ext4", "large", "unsplit"), ("ext4", "large-mmap", "unsplit")],
}
