# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cgpolicyd does on a real systemd, all in one boot."""

from __future__ import annotations

import sys

from tests.vm.guest import cases, storm

listener = storm.begin()
storm.gone("gone")
cases.main()
storm.storm(listener, int(sys.argv[1]))
storm.below(listener)
storm.gone("gone-later")  # after one with Delegate=yes, which has all controllers turned on
cases.bus_restarted()
storm.after_bus_restart("again")
