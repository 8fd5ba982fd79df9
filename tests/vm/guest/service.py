# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cgpolicyd does on a real systemd, all in one boot."""

from __future__ import annotations

import sys

from tests.vm.guest import cases, storm

cases.main()
storm.main(int(sys.argv[1]))
