# SPDX-License-Identifier: GPL-2.0-only
"""The series as patches: it applies, is checkpatch clean, and each patch compiles without new warnings.

What is compiled are the objects that the series touches, with W=1 and sparse, in the configuration of the guest
and in those that leave out what the series adds to.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from vm.host import TREE, install_packages

SERIES = sorted((TREE / "kernel-patch/v6.12").glob("[0-9]*.patch"))
SOURCE = Path("/usr/src/linux-source-6.12.tar.xz")
PACKAGES = "linux-source-6.12 gcc make flex bison bc libelf-dev libssl-dev patch perl python3 sparse xz-utils"
JOBS = 2

# Configurations, as what is changed in that of the guest, and the touched objects that are built in each.
OBJECTS = {
    "guest": ["mm/memory-failure.o", "mm/memcontrol.o", "kernel/cgroup/cgroup.o", "drivers/ras/ras.o"],
    "MEMCG=n": ["mm/memory-failure.o", "kernel/cgroup/cgroup.o", "drivers/ras/ras.o"],
    "MEMORY_FAILURE=n": ["mm/memcontrol.o", "kernel/cgroup/cgroup.o", "drivers/ras/ras.o"],
    "CGROUPS=n": ["mm/memory-failure.o", "drivers/ras/ras.o"],
}


@pytest.fixture(scope="session")
def linux(workplace: Path) -> Path:
    """Provide the source package, unpacked, without the series."""
    install_packages(PACKAGES.split())
    tree = workplace / "linux"
    tree.mkdir()
    subprocess.run(["tar", "-xf", SOURCE, "-C", tree, "--strip-components=1"], check=True)
    return tree


class Build:
    """An output directory with a configuration of its own, and what the compiler and sparse say."""

    def __init__(self, linux: Path, name: str) -> None:
        self.linux, self.name = linux, name
        self.output = linux.parent / f"build-{name}"
        self.output.mkdir()
        self.make("x86_64_defconfig")
        fragment = self.output / "fragment"
        # MEMORY_FAILURE is selected by what injects errors, CGROUPS by what groups tasks.
        off = {"MEMORY_FAILURE=n": ["HWPOISON_INJECT"], "CGROUPS=n": ["SCHED_AUTOGROUP"]}.get(name, [])
        lines = [f"CONFIG_{symbol}=n" for symbol in off] + ([f"CONFIG_{name}"] if "=" in name else [])
        fragment.write_text("".join(f"{line}\n" for line in lines))
        merge = linux / "scripts/kconfig/merge_config.sh"
        run([merge, "-m", "-O", self.output, self.output / ".config", TREE / "vm/kernel.config", fragment], cwd=linux)
        self.make("olddefconfig")
        if "=" in name:
            config = (self.output / ".config").read_text()
            assert f"CONFIG_{name.partition('=')[0]}=y\n" not in config, f"{name} was overridden"
        self.make("prepare")

    def make(self, *arguments: str) -> str:
        return run(["make", f"-j{JOBS}", "-C", self.linux, f"O={self.output}", *arguments])

    def warnings(self) -> Counter[str]:
        """Compile the objects anew; return the warnings without their line numbers."""
        objects = OBJECTS[self.name]
        for name in objects:
            (self.output / name).unlink(missing_ok=True)
        said = self.make("W=1", "C=1", *objects)
        for name in objects:
            assert (self.output / name).exists(), f"{name} was not built"
        found = re.findall(r"^(\S+?):\d+(?::\d+)?: (?:warning|error): (.*)$", said, re.MULTILINE)
        return Counter(f"{file.rpartition('/')[2]}: {re.sub(r'[0-9]+', 'N', text)}" for file, text in found)


def run(command: list[str | Path], cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr)[-4000:]}"
    return done.stdout + done.stderr


def test_series_is_complete() -> None:
    """The subjects number the patches as their file names do, and none carries a sign-off."""
    assert SERIES
    for number, patch in enumerate(SERIES, 1):
        text = patch.read_text()
        assert patch.name.startswith(f"{number:04}-")
        assert f"[PATCH {number}/{len(SERIES)}]" in text
        assert "\nAssisted-by: " in text
        assert "Signed-off-by:" not in text
        body = text.partition("\n\n")[2].partition("\n---\n")[0]
        assert [line for line in body.splitlines() if len(line) > 75] == []


def test_checkpatch(linux: Path) -> None:
    for patch in SERIES:
        run([linux / "scripts/checkpatch.pl", "--strict", "--no-signoff", "--no-tree", patch], cwd=linux)


def test_each_patch_compiles(linux: Path) -> None:
    """Patch after patch, in each configuration; the series applies without fuzz."""
    builds = [Build(linux, name) for name in OBJECTS]
    known = {build.name: build.warnings() for build in builds}
    for patch in SERIES:
        said = run(["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch], cwd=linux)
        assert "offset" not in said, said
        if not re.search(r"^diff --git a/(mm|kernel|include|drivers)/", patch.read_text(), re.MULTILINE):
            continue
        for build in builds:
            new = build.warnings() - known[build.name]
            assert not new, f"{patch.name}, {build.name}: {dict(new)}"


def test_selftest_compiles(linux: Path) -> None:
    """The selftest that the series adds compiles without a warning; the guest runs it."""
    directory = linux / "tools/testing/selftests/cgroup"
    if not (directory / "test_failure_dirty.c").exists():
        for patch in SERIES:
            run(["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch], cwd=linux)
    command: list[str | Path] = ["gcc", "-Wall", "-Werror", "-pthread", "-o", linux.parent / "selftest"]
    run([*command, "test_failure_dirty.c", "cgroup_util.c"], cwd=directory)
