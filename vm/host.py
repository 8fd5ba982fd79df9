# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host gives: Debian packages, a cache, locks and subprocesses that die with us."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cgpolicy.error import UserError

TREE = Path(__file__).resolve().parent.parent

PR_SET_PDEATHSIG = 1
LOG_TAIL_LINES = 30


class HarnessError(UserError):
    """The machine could not be set up or lost; says nothing about the command that was to run in it."""


def progress(message: str) -> None:
    """Tell the user on stderr what is being waited for."""
    print(f"vm: {message}", file=sys.stderr, flush=True)


def require_root() -> None:
    """Raise HarnessError unless root: apt and mmdebstrap need it."""
    if os.geteuid() != 0:
        raise HarnessError("must run as root", hint="it installs packages and builds a Debian image; try sudo")


def cache_dir(*parts: str) -> Path:
    """Return a directory below $XDG_CACHE_HOME/cgpolicy, created if missing."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(root).joinpath("cgpolicy", *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock of that name; a second run waits for the first one's result."""
    with open(cache_dir("lock") / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another run that works on {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch_dir(prefix: str) -> Iterator[Path]:
    """Yield a temporary directory on the cache's file system, so that a result can be renamed into place."""
    with tempfile.TemporaryDirectory(prefix=f"{prefix}-", dir=cache_dir("tmp")) as path:
        yield Path(path)


def remove_unused(directory: Path, days: float) -> None:
    """Remove what nobody used for some days: killed runs' leftovers, kernels and images of older trees."""
    oldest = time.time() - days * 86400
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def content_hash(*parts: str | bytes | Path) -> str:
    """Return a short hash over strings and the contents of files, unambiguous at the seams."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        data = data.encode() if isinstance(data, str) else data
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:16]


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Have this process signalled when its parent dies, by whatever means (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    hint: str | None = None,
) -> None:
    """Run a command with its output appended to a log; on failure raise HarnessError with the log's end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        print("+", *command, file=file, flush=True)
        result = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            input=stdin,
            text=True,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
    if result.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        print("\n".join(tail), file=sys.stderr)
        raise HarnessError(f"{command[0]} failed with status {result.returncode}", hint=hint or f"see {log}")


def output(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> str:
    """Return a command's standard output; raise HarnessError with its standard error if it fails."""
    result = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: die_with_parent(signal.SIGTERM),
    )
    if result.returncode != 0:
        raise HarnessError(f"{command[0]} failed with status {result.returncode}", hint=result.stderr.strip()[-2000:])
    return result.stdout


def installed(packages: Sequence[str]) -> set[str]:
    """Return those of the packages that dpkg has configured."""
    result = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Abbrev}\n", *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    return {line.split()[0] for line in result.stdout.splitlines() if line.split()[1:2] == ["ii"]}


def install_packages(packages: Sequence[str]) -> None:
    """Install what is missing of the Debian packages, refreshing apt's lists only if they do not suffice."""
    missing = sorted(set(packages) - installed(packages))
    if not missing:
        return
    with locked("apt"):
        missing = sorted(set(packages) - installed(packages))
        if not missing:
            return
        progress(f"installing {' '.join(missing)}")
        log = cache_dir("log") / "apt.log"
        install = [
            "apt-get",
            "install",
            "--yes",
            "--no-install-recommends",
            "-o",
            "DPkg::Lock::Timeout=300",
            *missing,
        ]
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        known = subprocess.run(["apt-get", "install", "--simulate", *install[2:]], capture_output=True, check=False)
        if known.returncode != 0:
            run(
                ["apt-get", "update"],
                log=log,
                env=env,
                hint=f"apt's package lists cannot be fetched; see {log}",
            )
        try:
            run(install, log=log, env=env)
        except HarnessError:
            # Lists can be older than the mirror, which then no longer has the versions they name.
            run(["apt-get", "update"], log=log, env=env)
            run(install, log=log, env=env, hint=f"missing packages cannot be installed; see {log}")
