# SPDX-License-Identifier: LGPL-2.1-or-later
"""At what priority the main loop's handlers run; in a process of its own, whose priority is nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
RESET = os.SCHED_RESET_ON_FORK

SCRIPT = """
import json, os, time
from gi.repository import GLib
from cgpolicy import urgency

urgency.PERIOD = 3600.0
seen = []
cgroups, made = os.pipe()
loop = GLib.MainLoop()

def see():
    seen.append(os.sched_getscheduler(0))

def work():
    see()
    while time.thread_time() < urgency.SHARE + 1:
        pass
    GLib.timeout_add(0, worked)

def worked():
    see()
    os.write(made, b".")

def cgroup_made(*arguments):
    see()
    urgency.PERIOD = 0.0
    GLib.timeout_add(0, renewed)

def renewed():
    see()
    loop.quit()

GLib.io_add_watch(cgroups, GLib.PRIORITY_HIGH, GLib.IOCondition.IN, cgroup_made)
urgency.Urgency(cgroups).start()
GLib.timeout_add(0, work)
loop.run()
print(json.dumps(seen))
"""


@pytest.fixture
def may_be_real_time() -> None:
    policy = os.sched_getscheduler(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pytest.skip("real-time priority is not for this user")
    os.sched_setscheduler(0, policy, os.sched_param(0))


def test_who_works_much_is_urgent_for_cgroups_only(may_be_real_time: None) -> None:
    """At first, when the share is used up, for a new cgroup all the same, and in the next period."""
    printed = subprocess.run([sys.executable, "-c", SCRIPT], cwd=TREE, stdout=subprocess.PIPE, check=True).stdout
    real_time, ordinary = os.SCHED_RR | RESET, os.SCHED_OTHER | RESET
    assert json.loads(printed) == [real_time, ordinary, real_time, real_time]
