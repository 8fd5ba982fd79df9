# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much of a long test is run: a share of it each time, all of it with tests/run --full."""

from __future__ import annotations

import os

VARIABLE = "CGPOLICY_TESTS_FULL"


def is_full() -> bool:
    return os.environ.get(VARIABLE) == "1"


def scaled(usual: int, full: int) -> int:
    """Return how many rounds of a test to run: all that is claimed of it (full), or as many as CI has time for."""
    return full if is_full() else usual
