# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much of a long test is run: a share of it each time, all of it with tests/run --full; and on what kernels."""

from __future__ import annotations

import os

VARIABLE = "CGPOLICY_TESTS_FULL"
DEBUG_VARIABLE = "CGPOLICY_TESTS_DEBUG"


def is_full() -> bool:
    return os.environ.get(VARIABLE) == "1"


def is_debug() -> bool:
    """Tell whether the kernel suite is to be run on kernels that check themselves (tests/run --debug kernel)."""
    return os.environ.get(DEBUG_VARIABLE) == "1"


def scaled(usual: int, full: int) -> int:
    """Return how many rounds of a test to run: all that is claimed of it (full), or as many as CI has time for."""
    return full if is_full() else usual
