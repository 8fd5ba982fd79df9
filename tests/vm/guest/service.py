# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cgpolicyd does on a real systemd, all in one boot."""

from __future__ import annotations

import sys

from tests.vm.guest import cases, storm

listener = storm.begin()
# Before any unit with Delegate= has run. That turns the io controller on, and then what a cgroup that is gone has left
# was found clean: written to the disk, so that nothing was lost.
storm.gone("gone")
cases.main()
storm.storm(listener, int(sys.argv[1]))
storm.below(listener)
cases.bus_restarted()
storm.after_bus_restart("again")
