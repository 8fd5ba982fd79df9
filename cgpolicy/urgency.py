# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real-time priority for the main loop, as long as it needs little of the processor.

Nice= counts only against programs of the same cgroup as soon as the cpu controller is on, and any unit with
Delegate=yes turns it on for all slices. A new cgroup then waits until all other services have had their turn, and so
does what the daemon was busy with before. Many calls of a client, or all units read anew, are not for this priority:
whoever causes them would run before everybody else. See sched(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from ctypes import POINTER, c_int, c_uint, c_ulong, c_ushort, c_void_p
from typing import Any

from cgpolicy.rawglib import function, glib

PRIORITY = 1  # of SCHED_RR: before all that is not real-time, behind all that is
PERIOD = 1.0  # seconds
SHARE = 0.5  # seconds of processor time in a period; whatever it has used, a new cgroup is urgent


class _PollFD(ctypes.Structure):
    """GPollFD (glib/gpoll.h), which is struct pollfd."""

    _fields_ = (("fd", c_int), ("events", c_ushort), ("revents", c_ushort))


_PollFunc = ctypes.CFUNCTYPE(c_int, POINTER(_PollFD), c_uint, c_int)
_set_poll_func = function(glib, "g_main_context_set_poll_func", None, c_void_p, _PollFunc)
_poll = function(ctypes.CDLL(None), "poll", c_int, POINTER(_PollFD), c_ulong, c_int)


class Urgency:
    """Stands between the main loop and poll(2), and decides at what priority the loop goes on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_urgent = False
        self._since = self._used = 0.0  # when the period began, and what had been used of the processor by then
        self._function = _PollFunc(self._wait)  # GLib keeps no reference

    def start(self) -> None:
        """Take effect for the calling thread, which is to run the default main loop."""
        with contextlib.suppress(OSError):  # not allowed (RLIMIT_RTPRIO): it goes without
            self._be(True)
            _set_poll_func(None, self._function)

    def _wait(self, descriptors: Any, count: int, timeout: int) -> int:
        if timeout:
            self._be(True)  # when it has been woken it is too late
        ready = int(_poll(descriptors, count, timeout))
        self._be(self._is_within_share() or any(self._is_cgroups(descriptors[at]) for at in range(count)))
        return max(ready, 0)  # interrupted: nothing is ready, and errno is not what it was

    def _is_cgroups(self, polled: _PollFD) -> bool:
        return bool(polled.fd == self._descriptor and polled.revents)

    def _is_within_share(self) -> bool:
        now, used = time.monotonic(), time.thread_time()
        if now - self._since >= PERIOD:
            self._since, self._used = now, used
        return used - self._used < SHARE

    def _be(self, urgent: bool) -> None:
        if urgent != self._is_urgent:
            policy, priority = (os.SCHED_RR, PRIORITY) if urgent else (os.SCHED_OTHER, 0)
            os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
            self._is_urgent = urgent
