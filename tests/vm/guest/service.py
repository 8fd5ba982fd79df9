# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cgpolicyd does on a real systemd, all in one boot."""

from __future__ import annotations

import sys

from tests.vm.guest import cases, storm

listener = storm.begin()
# Before any unit with Delegate= has run: what a cgroup left dirty was not found so afterwards.
storm.gone(listener)
cases.main()
storm.storm(listener, int(sys.argv[1]))
storm.below(listener)
cases.bus_restarted()  # last: it takes the listener's connection, and with it this process
