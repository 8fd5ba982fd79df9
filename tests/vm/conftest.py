# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest to run commands in, through vm/run as a user would.

Booting costs 20 to 60 seconds: put several checks into one script, have it print what it sees as JSON, and
assert on that on the host. A module-scoped fixture shares one boot between tests:

    @pytest.fixture(scope="module")
    def told(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        return guest.module("policy", tmp_path_factory.mktemp("policy"))    # tests/vm/guest/policy.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.suites import IDLE
from vm.host import TREE

SCRIPTS = Path(__file__).parent / "guest"
TIMEOUT = 600.0  # seconds for a command in the guest


@dataclass(frozen=True, slots=True)
class Result:
    """How a run of vm/run ended.

    ``status`` is the command's, 99 if the kernel panicked (``stderr`` then has the console), 124 on timeout,
    125 if the harness failed.
    """

    status: int
    stdout: str
    stderr: str


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{IDLE}: is about time, and needs the machine for itself")


class Guest:
    """Calls vm/run; every call boots a machine of its own."""

    def run(
        self,
        *command: str,
        kernel: str = "patched",
        base: str | None = None,
        suite: str = "trixie",
        packages: Sequence[str] = (),
        share: Path | None = None,
        timeout: float = TIMEOUT,
        smp: int = 1,
    ) -> Result:
        """Run a command as root in a guest; what it said is in the report of a test that fails."""
        options = ["--kernel", kernel, "--suite", suite, "--timeout", str(timeout), "--smp", str(smp)]
        if base:
            options += ["--base", base]
        if packages:
            options += ["--packages", ",".join(packages)]
        if share:
            options += ["--share", str(share)]
        done = subprocess.run(
            [TREE / "vm/run", *options, "--", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        print(f"$ {' '.join(command)}", done.stdout[-20000:], done.stderr[-20000:], sep="\n")
        return Result(done.returncode, done.stdout, done.stderr)

    def module(
        self,
        name: str,
        share: Path,
        *arguments: str,
        kernel: str = "patched",
        base: str | None = None,
        suite: str = "trixie",
        packages: Sequence[str] = (),
        timeout: float = TIMEOUT,
    ) -> list[dict[str, Any]]:
        """Run a Python module of tests/vm/guest/ from a shared directory; return the objects that it printed."""
        shutil.copytree(SCRIPTS, share / SCRIPTS.relative_to(TREE), dirs_exist_ok=True)
        enter = 'cd /mnt/share && exec /usr/bin/python3 -m "$0" "$@"'
        done = self.run(
            "sh", "-c", enter, f"tests.vm.guest.{name}", *arguments,
            kernel=kernel, base=base, suite=suite, packages=packages, share=share, timeout=timeout,
        )
        assert done.status == 0
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def guest() -> Guest:
    """Provide a guest; see this module's docstring."""
    return Guest()
