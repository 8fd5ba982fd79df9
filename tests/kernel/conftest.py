# SPDX-License-Identifier: GPL-2.0-only
"""The guest and the kernel source, as the tests of the series use them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vm.host import TREE, install_packages

GUEST_PACKAGES = ("e2fsprogs", "xfsprogs", "dosfstools")
GUEST_PROGRAMS = ("rereader", "forkbomb")


@dataclass(frozen=True, slots=True)
class Result:
    """What a command in the guest printed, and its exit status.

    99 says that the kernel panicked; its console is in stderr then.
    """

    status: int
    stdout: str
    stderr: str

    def objects(self) -> list[dict[str, Any]]:
        """Return the JSON objects among the lines of standard output."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]


class Guest:
    """Runs the scripts of tests/kernel/guest, each in a machine of its own."""

    def __init__(self, share: Path) -> None:
        self.share = share

    def run(self, script: str, *arguments: str, smp: int = 2, timeout: int = 900) -> Result:
        command = [TREE / "vm/run", "--share", self.share, "--packages", ",".join(GUEST_PACKAGES)]
        command += ["--smp", str(smp), "--timeout", str(timeout)]
        command += ["--", "sh", "-c", 'cd /mnt/share && exec python3 -m "$@"', "sh"]
        command += [f"tests.kernel.guest.{script}", *arguments]
        words = list(map(str, command))
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        print(done.stdout[-20000:], done.stderr[-20000:], sep="\n")  # pytest shows it if the test fails
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Provide the guest, with the scripts and their C programs in the shared directory."""
    install_packages(("gcc", "libc6-dev"))
    share = tmp_path_factory.mktemp("share")
    source = Path(__file__).parent / "guest"
    target = share / source.relative_to(TREE)
    target.mkdir(parents=True)
    for script in source.glob("*.py"):
        shutil.copy(script, target)
    for program in GUEST_PROGRAMS:
        compile_static(source / f"{program}.c", target / program)
    return Guest(share)


def compile_static(source: Path, output: Path) -> None:
    command: Sequence[str | Path]
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", output, source]
    subprocess.run(command, check=True)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Provide a directory for a kernel tree, removed at the end: it is too large to be kept."""
    path = tmp_path_factory.mktemp("kernel")
    yield path
    shutil.rmtree(path, ignore_errors=True)
