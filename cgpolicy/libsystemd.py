# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of pystemd that are used here, without the package's own __init__.

That imports an XML parser and everything of systemd's bus interfaces: 6 MiB of memory of the daemon, and a tenth of
the time that ExecStartPre=+cgpolicy apply %n holds up a service's start.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any


def part(name: str) -> Any:
    """Import one module of pystemd; raise ImportError as import does."""
    if "pystemd" not in sys.modules:
        spec = PathFinder.find_spec("pystemd")
        if spec is not None and spec.submodule_search_locations is not None:
            package = ModuleType("pystemd")
            package.__path__ = list(spec.submodule_search_locations)
            package.__spec__ = spec
            sys.modules["pystemd"] = package
    return import_module(f"pystemd.{name}")
