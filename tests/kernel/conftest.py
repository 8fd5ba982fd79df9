# SPDX-License-Identifier: GPL-2.0-only
"""The guest and the kernel source, as the tests of the series use them, for each base of the series."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.scale import is_debug, is_full, scaled
from vm.debian import NotOffered, Renewed
from vm.host import TREE, cache_dir, install_packages
from vm.kernel import Source, newest_source, unpack_source

BASES = ("v6.12", "v7")
# On a kernel that checks itself everything takes several times as long: not both in one run.
KERNELS = tuple(f"{base}-debug" for base in BASES) if is_debug() else BASES
SERIES = {base: sorted((TREE / "kernel-patch" / base).glob("*.patch")) for base in BASES}

GUEST = Path(__file__).parent / "guest"
GUEST_PACKAGES = ("dosfstools", "e2fsprogs", "xfsprogs")  # as tests/vm has them, so that one image serves both
GUEST_PROGRAMS = ("rereader", "forkbomb")
SELFTESTS = {"test_failure_dirty": "cgroup", "memory-failure-dirty": "mm"}
# The kernel's own, of which those of mm are not in 6.12
OWN_SELFTESTS = {name: "cgroup" for name in ("test_core", "test_memcontrol", "test_kill", "test_freezer")}
OWN_SELFTESTS_OF = {"v6.12": OWN_SELFTESTS, "v7": {**OWN_SELFTESTS, "memory-failure": "mm"}}
UNUSED = ("arch/[!x]*.[cdhS]*", "drivers/[!r]*.[ch]", "sound/*.[ch]")  # half of the files of a kernel source

# What a kernel says if it finds fault with itself. A panic is told by the status.
SPLAT = re.compile(
    r"WARNING: |BUG: |BUG at |KASAN|possible (?:recursive|circular|irq) |suspicious RCU|inconsistent lock state"
    r"|sleeping function|scheduling while atomic|soft lockup|rcu.*(?:stall|self-detected)|blocked for more than"
    r"|Bad page |general protection|Oops|unable to handle|cut here"
)
# What 6.12 says with DEBUG_VM, with the series or without it: memory_failure() tries to split a large folio down to
# pages where the file system's blocks are larger. Later kernels split as far as they can.
NOT_OF_THE_SERIES = re.compile(
    r".*cut here.*\n.*Cannot split mapped folio below min-order.*\n.*WARNING: .*split_huge_page_to_list_to_order.*\n"
)


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
    """Runs the scripts of tests/kernel/guest on one kernel, whose console it keeps and reads."""

    def __init__(self, kernel: str, share: Path, consoles: Path) -> None:
        self.kernel = kernel
        self.base, _, self.debug = kernel.partition("-")
        self.share = share
        self.consoles = consoles

    def run(self, module: str, *arguments: str, kind: str = "patched") -> Result:
        """Boot a machine and run a script in it; status 99 says that the kernel panicked, its console is in stderr."""
        console = self.consoles / f"{self.kernel}-{len(list(self.consoles.iterdir()))}-{module}.log"
        command = [TREE / "vm/run", "--kernel", kind, "--base", self.base, *(["--debug"] if self.debug else [])]
        command += ["--share", self.share, "--packages", ",".join(GUEST_PACKAGES), "--smp", "2"]
        command += ["--timeout", str(14400 if self.debug else scaled(1800, 14400))]
        command += ["--console", console, "--", "env", "--chdir=/mnt/share"]
        command += ["python3", "-m", f"tests.kernel.guest.{module}", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
        print(done.stdout[-20000:], done.stderr[-20000:], sep="\n")  # pytest shows it if the test fails
        said = NOT_OF_THE_SERIES.sub("", console.read_text(errors="replace"))
        assert [line for line in said.splitlines() if SPLAT.search(line)] == [], f"the console is kept: {console}"
        return Result(done.returncode, done.stdout, done.stderr)


def source(base: str) -> Source:
    """Return Debian's source of a base; skip the test if it offers none."""
    try:
        return newest_source(base)
    except NotOffered as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Provide a directory for kernel trees, removed at the end: they are too large to be kept."""
    path = tmp_path_factory.mktemp("kernel")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def unpacked(base: str, workplace: Path) -> Path:
    """Return the source that the guest's kernel of a base is made of, without the series."""
    tree = workplace / f"linux-{base}"
    if not tree.exists():
        install_packages(["xz-utils"])
        log = workplace / "unpack.log"
        try:
            unpack_source(source(base), workplace / "package", tree, log, UNUSED)
        except Renewed:
            unpack_source(source(base), workplace / "package", tree, log, UNUSED)
    return tree


@pytest.fixture(scope="session")
def linux(base: str, workplace: Path) -> Path:
    """Provide the source that the guest's kernel is made of, unpacked, without the series."""
    return unpacked(base, workplace)


def selftests(linux: Path, series: Sequence[Path], programs: Mapping[str, str], target: Path) -> None:
    """Put selftests of a series and of the kernel, made by their own Makefiles for the guest, into a directory."""
    install_packages(("gcc", "libc6-dev", "make", "patch", "rsync"))
    copy = linux.with_name(f"{linux.name}-selftests")
    for directory in ("tools/testing/selftests", "tools/include", "tools/arch", "include/uapi"):
        shutil.copytree(linux / directory, copy / directory, symlinks=True)
    shutil.copy(linux / "MAINTAINERS", copy)
    (copy / "mm").mkdir()
    shutil.copy(linux / "mm/gup_test.h", copy / "mm")  # which the Makefile takes for a prerequisite of all
    for patch in series[-2:]:
        run(["patch", "-p1", "--fuzz=0", "-i", patch], cwd=copy)
    for name, directory in programs.items():
        tests = copy / "tools/testing/selftests" / directory
        said = run(["make", "LDFLAGS=-static", f"OUTPUT={tests}", tests / name], cwd=tests)
        assert name not in SELFTESTS or "warning" not in said, said
        shutil.copy(tests / name, target)
    shutil.rmtree(copy)


@pytest.fixture(scope="session")
def shares(tmp_path_factory: pytest.TempPathFactory, workplace: Path) -> Callable[[str], Path]:
    """Provide the shared directory of each base: the scripts and the C programs, made once however pytest sorts."""

    @functools.cache
    def share(base: str) -> Path:
        path = tmp_path_factory.mktemp("share")
        target = path / GUEST.relative_to(TREE)
        shutil.copytree(GUEST, target, ignore=shutil.ignore_patterns("__pycache__"))
        options = ("-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
        for name in GUEST_PROGRAMS:
            run(["gcc", *options, "-o", name, f"{name}.c"], cwd=target)
        programs = {**SELFTESTS, **(OWN_SELFTESTS_OF[base] if is_full() else {})}
        selftests(unpacked(base, workplace), SERIES[base], programs, target)
        return path

    return share


@pytest.fixture(scope="session", params=KERNELS)
def guest(request: pytest.FixtureRequest, shares: Callable[[str], Path]) -> Guest:
    base = str(request.param).partition("-")[0]
    # Not with pytest's files, of which those of the last three runs are kept.
    return Guest(request.param, shares(base), Path(tempfile.mkdtemp(dir=cache_dir("consoles"))))


def kernel(item: pytest.Item) -> str:
    """Return the kernel that a test is for: the parameter that it has from the guest."""
    return str(getattr(item, "callspec").params["guest"])  # noqa: B009


def wanted(item: pytest.Item) -> tuple[str, ...] | None:
    """Return the words of a test's marker, completed by the test's own parameter if it has one."""
    marker = item.get_closest_marker("script")
    if not marker:
        return None
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    own = [str(value) for name, value in parameters.items() if name != "guest"]
    return (*map(str, marker.args), *own)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, guest: Guest) -> dict[tuple[str, ...], Result]:
    """Run, in one machine, what all the selected tests of this kernel are marked to want."""
    scripts = list(
        dict.fromkeys(
            words for item in request.session.items if (words := wanted(item)) and kernel(item) == guest.kernel
        )
    )
    machine = guest.run("several", guest.base, json.dumps(scripts))
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
