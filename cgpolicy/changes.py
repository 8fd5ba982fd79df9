# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes of files, one after another and in a thread of their own: a disk can take seconds over a few bytes.

The main loop takes a second look at a change when its turn comes, and has seen to what follows from it before the
next one's turn. So nothing is decided by what an earlier change is about to make untrue.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from gi.repository import GLib

T = TypeVar("T")


class Changes:
    """Takes turns; everything but the writing itself is done in the main loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._under_way: Callable[[], None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        # One watch for all of them: each GLib.idle_add() would cost memory for good, see buscall.
        self._written = os.eventfd(0, os.EFD_CLOEXEC)
        GLib.io_add_watch(self._written, GLib.PRIORITY_DEFAULT, GLib.IOCondition.IN, self._finish)

    def add(self, begin: Callable[[], None]) -> None:
        """Call a function when all that was added before is complete; it can write(), once."""
        self._waiting.append(begin)
        self._next()

    def write(self, work: Callable[[], T], then: Callable[[Callable[[], T]], None]) -> None:
        """Do work in the thread, then go on with what returns its result, or raises what it has raised."""
        future = self._thread.submit(work)
        self._under_way = partial(then, future.result)
        future.add_done_callback(lambda future: os.eventfd_write(self._written, 1))

    def close(self) -> None:
        """Complete what was added, however long that takes."""
        while self._under_way is not None:
            self._finish()
        self._thread.shutdown()

    def _next(self) -> None:
        while self._waiting and self._under_way is None:
            self._carefully(self._waiting.popleft())

    def _finish(self, *source: Any) -> bool:
        os.eventfd_read(self._written)  # waits, when it is not called by the main loop
        then, self._under_way = self._under_way, None
        if then is not None:
            self._carefully(then)
        self._next()
        return True

    def _carefully(self, function: Callable[[], None]) -> None:
        # GLib drops a source that raises, and the next change has its turn whatever became of this one.
        try:
            function()
        except Exception:
            sys.excepthook(*sys.exc_info())
