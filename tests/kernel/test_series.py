# SPDX-License-Identifier: GPL-2.0-only
"""The series as patches: it applies, is checkpatch clean, and each patch compiles without new warnings.

What is compiled are the objects that the series touches, with W=1 and sparse, in the configuration of the guest
and in those that leave out what the series adds to.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.kernel.conftest import SERIES, run
from vm.host import install_packages
from vm.kernel import FRAGMENT, HOST_PACKAGES

# What is left out of the guest's configuration, and the objects in which that makes a difference.
OBJECTS = {
    (): ("mm/memory-failure.o", "mm/memcontrol.o", "kernel/cgroup/cgroup.o", "drivers/ras/ras.o"),
    ("MEMORY_FAILURE", "HWPOISON_INJECT"): ("mm/memcontrol.o", "drivers/ras/ras.o"),
    ("CGROUPS", "SCHED_AUTOGROUP"): ("mm/memory-failure.o", "drivers/ras/ras.o"),
}


class Build:
    """An output directory with a configuration of its own, and what the compiler and sparse say."""

    def __init__(self, linux: Path, without: tuple[str, ...]) -> None:
        self.linux, self.objects = linux, OBJECTS[without]
        self.name = "-".join(["build", *without])
        self.output = linux.parent / self.name
        self.output.mkdir()
        wanted = self.output / "wanted"
        wanted.write_text(FRAGMENT.read_text() + "".join(f"CONFIG_{symbol}=n\n" for symbol in without))
        self.make("allnoconfig", f"KCONFIG_ALLCONFIG={wanted}")
        config = (self.output / ".config").read_text()
        for symbol in ("CGROUPS", "MEMCG", "MEMORY_FAILURE"):
            # Without CGROUPS there is no MEMCG.
            wrong = symbol in without or (symbol == "MEMCG" and "CGROUPS" in without)
            assert wrong != (f"\nCONFIG_{symbol}=y\n" in config), symbol
        self.make("prepare")

    def make(self, *arguments: str) -> str:
        return run(["make", "-j2", f"O={self.output}", "LC_ALL=C", *arguments], cwd=self.linux)

    def warnings(self) -> Counter[str]:
        """Compile the objects if what they are made of has changed; return the warnings without line numbers."""
        said = self.make("W=1", "C=1", *self.objects)
        assert all((self.output / name).exists() for name in self.objects)
        found = re.findall(r"^(\S+?):\d+(?::\d+)?: (?:warning|error): (.*)$", said, re.MULTILINE)
        return Counter(f"{file.rpartition('/')[2]}: {re.sub(r'[0-9]+', 'N', text)}" for file, text in found)


def test_series_is_complete() -> None:
    """File names and cover letter number the patches as their subjects do, and none carries a sign-off."""
    letter = (SERIES[0].parent / "0000-cover-letter.txt").read_text()
    assert len(SERIES) == 8 and f"[PATCH 0/{len(SERIES)}]" in letter
    for number, patch in enumerate(SERIES, 1):
        text = patch.read_text()
        assert patch.name.startswith(f"{number:04}-")
        headers, _, body = text.partition("\n\n")
        _, numbered, title = headers.replace("\n ", " ").partition(f"\nSubject: [PATCH {number}/{len(SERIES)}] ")
        assert numbered and f"\n  {number}  {title}\n" in letter
        assert "\nAssisted-by: " in text
        assert "Signed-off-by:" not in text
        assert [line for line in body.partition("\n---\n")[0].splitlines() if len(line) > 75] == []


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name[:4])
def test_checkpatch(linux: Path, patch: Path) -> None:
    install_packages(["perl"])
    said = run(["scripts/checkpatch.pl", "--strict", "--no-signoff", "--no-tree", patch], cwd=linux)
    assert re.search(r"^total: 0 errors, 0 warnings, 0 checks, \d+ lines checked$", said, re.MULTILINE)


def test_each_patch_compiles(linux: Path) -> None:
    """The series applies patch after patch without fuzz, and none adds a warning, in any configuration."""
    install_packages((*HOST_PACKAGES, "libssl-dev", "perl", "python3", "sparse"))
    tree = linux.with_name("patched")
    run(["cp", "-al", linux, tree], cwd=linux)  # patch replaces files
    builds = [Build(tree, without) for without in OBJECTS]
    known = [build.warnings() for build in builds]
    for patch in SERIES:
        said = run(["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch], cwd=tree)
        assert "offset" not in said, said
        for build, old in zip(builds, known, strict=True):
            new = build.warnings() - old
            assert not new, f"{patch.name}, {build.name}: {dict(new)}"
