# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the unit tests share: systemd's own library as the judge, and the same examples in every run."""

from __future__ import annotations

import ctypes
import glob

import pytest
from hypothesis import settings

# No database: it would be written into the tree.
settings.register_profile("cgpolicy", database=None, deadline=None, derandomize=True, max_examples=300)
settings.load_profile("cgpolicy")


@pytest.fixture(scope="session")
def libsystemd() -> ctypes.CDLL:
    """The library of systemd's programs, which holds what they judge unit names and unit files by."""
    libraries = glob.glob("/usr/lib/*/systemd/libsystemd-shared-*.so")
    assert libraries, "no libsystemd-shared: install systemd, or run ./tests/run unit"
    return ctypes.CDLL(libraries[0])
