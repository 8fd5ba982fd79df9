# SPDX-License-Identifier: LGPL-2.1-or-later
"""tests/run: set up what the tests need and run them, one pytest a suite."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from cgpolicy.error import UserError
from tests import scale
from vm.host import (
    TREE,
    cache_dir,
    content_hash,
    install_packages,
    locked,
    progress,
    require_root,
    run,
    scratch_dir,
)

SUITES = ("unit", "bus", "vm", "kernel")
IDLE = "idle"  # marks tests of tests/vm that need the machine for themselves

HOST_PACKAGES = (
    "dbus",
    "gcc",
    "libc6-dev",
    "meson",
    "ninja-build",
    "pkgconf",
    "python3-gi",
    "python3-pydbus",
    "python3-pystemd",
    "python3-venv",
    "strace",
    "systemd",
)

# From the Python index and pinned: with every release linters find new faults in old code.
PYTHON_PACKAGES = ("hypothesis==6.170.15", "mypy==2.4.1", "pytest==8.3.5", "ruff==0.17.6")
SYSTEMD_PC = Path("/usr/share/pkgconfig/systemd.pc")  # in systemd itself before Debian 13, in systemd-dev since
PYTHON = Path("/usr/bin/python3")  # the one that sees Debian's gi, pydbus and pystemd


def environment() -> Path:
    """Return the interpreter of a virtual environment with the test tools, made if it is not cached."""
    path = cache_dir("python") / content_hash(sys.version, *PYTHON_PACKAGES)
    if not path.exists():
        with locked(f"python-{path.name}"):
            if not path.exists():
                make_environment(path)
    return path / "bin/python"


def make_environment(path: Path) -> None:
    """Install the test tools; python -m finds them after the directory was moved into place."""
    log = path.with_name(f"{path.name}.log")
    progress(f"installing {', '.join(PYTHON_PACKAGES)} (log: {log})")
    with scratch_dir("python") as scratch:
        made = scratch / "environment"
        run([PYTHON, "-m", "venv", "--system-site-packages", made], log=log)
        run([made / "bin/python", "-m", "pip", "install", "--ignore-installed", *PYTHON_PACKAGES], log=log)
        made.rename(path)


def start(
    python: Path, suite: str, options: Sequence[str], output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a suite; its output goes to a file if it runs beside another."""
    command = [python, "-m", "pytest", TREE / "tests" / suite, *options]
    return subprocess.Popen([str(word) for word in command], cwd=TREE, stdout=output)


def run_suite(python: Path, suite: str, options: Sequence[str]) -> bool:
    """Run one suite and tell whether it passed; pytest's exit status is not 0 if it ran no test."""
    print(f"== {suite}", flush=True)
    return start(python, suite, options).wait() == 0


def run_all(python: Path) -> list[str]:
    """Run every suite and return those that failed.

    A guest under TCG keeps one core busy, so that the two suites that wait for guests run side by side, after
    the tests that are about time have had the machine for themselves.
    """
    failed = [suite for suite in ("unit", "bus") if not run_suite(python, suite, ())]
    if not run_suite(python, "vm", ("-m", IDLE)):
        failed.append("vm")
    with tempfile.TemporaryFile() as said:
        kernel = start(python, "kernel", (), said)
        try:
            if not run_suite(python, "vm", ("-m", f"not {IDLE}")) and "vm" not in failed:
                failed.append("vm")
            if kernel.wait() != 0:
                failed.append("kernel")
        finally:
            kernel.terminate()
            kernel.wait()
            said.seek(0)
            print("== kernel", flush=True)
            shutil.copyfileobj(said, sys.stdout.buffer)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/run", description=__doc__)
    parser.add_argument("--full", action="store_true", help="run each long test in full (hours)")
    parser.add_argument("--debug", action="store_true", help="the kernel suite on kernels that check themselves")
    parser.add_argument("suite", nargs="?", choices=(*SUITES, "all"), default="all")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="for pytest, such as -k NAME")
    options = parser.parse_args(arguments)
    try:
        require_root()
        install_packages(HOST_PACKAGES)
        if not SYSTEMD_PC.exists():
            install_packages(["systemd-dev"])
        python = environment()
    except UserError as error:
        print(f"tests/run: {error}", file=sys.stderr)
        return 1
    if options.full:
        os.environ[scale.VARIABLE] = "1"
    if options.debug:
        os.environ[scale.DEBUG_VARIABLE] = "1"
    if options.suite == "all" and not options.options:
        failed = run_all(python)
    else:
        suites = SUITES if options.suite == "all" else (options.suite,)
        failed = [suite for suite in suites if not run_suite(python, suite, options.options)]
    if failed:
        print(f"tests/run: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
