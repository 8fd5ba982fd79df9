# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C library's heap, kept small (mallopt(3), malloc_trim(3))."""

from __future__ import annotations

import ctypes

_libc = ctypes.CDLL(None)

M_MMAP_THRESHOLD = -3  # malloc.h


def keep_memory_low() -> None:
    """Have memory for long messages, which any client may send, given back to the kernel at once.

    Left alone, malloc takes the first ones for a sign that more will come, and keeps room for them.
    """
    _libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def give_back_memory() -> None:
    """Return to the kernel what something about all units took for a moment, and malloc keeps for the next time."""
    _libc.malloc_trim(0)
