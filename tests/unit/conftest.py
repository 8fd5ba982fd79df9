# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the unit tests share: systemd's own library as the judge, and the same examples in every run."""

from __future__ import annotations

import ctypes
import glob
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

# What it keeps all the same goes where pytest keeps its own.
set_hypothesis_home_dir(Path(__file__).resolve().parents[2] / ".pytest_cache/hypothesis")
settings.register_profile("cgpolicy", database=None, deadline=None, derandomize=True, max_examples=300)
settings.load_profile("cgpolicy")


@pytest.fixture(scope="session")
def libsystemd() -> ctypes.CDLL:
    """The library of systemd's programs, which holds what they judge unit names and unit files by."""
    libraries = glob.glob("/usr/lib/*/systemd/libsystemd-shared-*.so")
    assert libraries, "no libsystemd-shared: install systemd, or run ./tests/run unit"
    return ctypes.CDLL(libraries[0])
