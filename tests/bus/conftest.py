# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures: a machine in a directory, with a bus of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bus.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Provide a machine of the test's own; the daemon is not started yet."""
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()
