# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the unit tests share: systemd's own library as the judge, and the same examples in every run."""

from __future__ import annotations

import ctypes
import glob
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

from cgpolicy.dropin import UNIT_DIRECTORIES

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


Strings = ctypes.POINTER(ctypes.c_char_p)
Find = Callable[[Path, str], tuple[str, ...]]


@pytest.fixture(scope="session")
def find(libsystemd: ctypes.CDLL) -> Find:
    """Return what asks systemd for the drop-ins of a unit below a root directory; the same call from 252 on."""
    call, free = libsystemd.unit_file_find_dropin_paths, libsystemd.strv_free
    call.argtypes = [ctypes.c_char_p, Strings, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p,
                     ctypes.c_void_p, ctypes.POINTER(Strings)]
    free.argtypes, free.restype = [Strings], ctypes.c_void_p

    def ask(root: Path, unit: str) -> tuple[str, ...]:
        present = [f"{root}/{directory}" for directory in UNIT_DIRECTORIES if os.path.isdir(f"{root}/{directory}")]
        paths = (ctypes.c_char_p * (len(present) + 1))(*map(str.encode, present), None)
        out = Strings()
        assert call(None, paths, None, b".d", b".conf", unit.encode(), None, ctypes.byref(out)) >= 0
        if not out:
            return ()
        try:
            found = itertools.takewhile(lambda item: item is not None, (out[index] for index in itertools.count()))
            return tuple(item.decode() for item in found if item is not None)
        finally:
            free(out)

    return ask
