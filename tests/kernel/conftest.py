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

from vm.debian import Archive, Renewed
from vm.host import TREE, install_packages
from vm.kernel import SOURCE_PACKAGES, SUITE

BASE = "v6.12"
SERIES = sorted((TREE / "kernel-patch" / BASE).glob("*.patch"))

SOURCE = Path(__file__).parent / "guest"
GUEST_PACKAGES = ("e2fsprogs", "xfsprogs", "dosfstools")
GUEST_PROGRAMS = ("rereader", "forkbomb")
SELFTEST = "tools/testing/selftests/cgroup"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "script(name, *arguments): what the test wants to have run in the guest")


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a command of the host; return what it printed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Result:
    """What a script in the guest printed, and its exit status."""

    status: int
    stdout: str
    stderr: str

    def objects(self) -> list[dict[str, Any]]:
        """Return the JSON objects among the lines of standard output."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]


class Guest:
    """Runs the scripts of tests/kernel/guest."""

    def __init__(self, share: Path) -> None:
        self.share = share

    def run(self, module: str, *arguments: str) -> Result:
        """Boot a machine and run a script in it; status 99 says that the kernel panicked, its console is in stderr."""
        command = [TREE / "vm/run", "--share", self.share, "--packages", ",".join(GUEST_PACKAGES)]
        command += ["--smp", "2", "--timeout", "1200", "--", "env", "--chdir=/mnt/share"]
        command += ["python3", "-m", f"tests.kernel.guest.{module}", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
        print(done.stdout[-20000:], done.stderr[-20000:], sep="\n")  # pytest shows it if the test fails
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Provide a directory for a kernel tree, removed at the end: it is too large to be kept."""
    path = tmp_path_factory.mktemp("kernel")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def linux(workplace: Path) -> Path:
    """Provide the source that the guest's kernel is made of, unpacked, without the series."""
    install_packages(["xz-utils"])
    archive, package = Archive(SUITE), workplace / "package"
    try:
        archive.unpack(SOURCE_PACKAGES[BASE], package)
    except Renewed:
        archive.unpack(SOURCE_PACKAGES[BASE], package)
    (tarball,) = package.glob("usr/src/linux-source-*.tar.xz")
    tree = workplace / "linux"
    tree.mkdir()
    unused = ("arch/[!x]*.[cdhS]*", "drivers/[!r]*.[ch]", "sound/*.[ch]")  # half of the files
    excluded = [f"--exclude={tarball.name.removesuffix('.tar.xz')}/{pattern}" for pattern in unused]
    run(["tar", "-xf", tarball, "--strip-components=1", *excluded], cwd=tree)
    shutil.rmtree(package)
    return tree


@pytest.fixture(scope="session")
def selftest(linux: Path, workplace: Path) -> Path:
    """Provide the series' selftest, made by its own Makefile, for the guest, in a copy of its directory."""
    install_packages(("gcc", "libc6-dev", "make", "patch"))
    copy, program = workplace / "copy", workplace / "copy" / SELFTEST / "test_failure_dirty"
    shutil.copytree(linux / "tools/testing/selftests", copy / "tools/testing/selftests", symlinks=True)
    shutil.copy(linux / "MAINTAINERS", copy)
    run(["patch", "-p1", "--fuzz=0", "-i", SERIES[-1]], cwd=copy)
    said = run(["make", "LDFLAGS=-static", f"OUTPUT={program.parent}", program], cwd=program.parent)
    assert "warning" not in said, said
    return program


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory, selftest: Path) -> Guest:
    """Provide the guest, with the scripts and the C programs in the shared directory."""
    share = tmp_path_factory.mktemp("share")
    target = share / SOURCE.relative_to(TREE)
    shutil.copytree(SOURCE, target, ignore=shutil.ignore_patterns("__pycache__"))
    for name in GUEST_PROGRAMS:
        run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", name, f"{name}.c"], cwd=target)
    shutil.copy(selftest, target)
    return Guest(share)


def wanted(item: pytest.Item) -> tuple[str, ...] | None:
    """Return the words of a test's marker, completed by the test's parameter if it has one."""
    marker = item.get_closest_marker("script")
    if not marker:
        return None
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return (*marker.args, *parameters.values())


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, guest: Guest) -> dict[tuple[str, ...], Result]:
    """Run, in one machine, what all the selected tests are marked to want."""
    scripts = list(dict.fromkeys(words for item in request.session.items if (words := wanted(item))))
    machine = guest.run("several", json.dumps(scripts))
    assert machine.status == 0
    return {tuple(said["words"]): Result(said["status"], said["stdout"], said["stderr"]) for said in machine.objects()}


@pytest.fixture
def result(request: pytest.FixtureRequest, results: dict[tuple[str, ...], Result]) -> Result:
    """Provide what the script that a test is marked with has said; pytest shows it if the test fails."""
    words = wanted(request.node)
    assert words
    found = results[words]
    print(found.stdout, found.stderr, sep="\n")
    return found
