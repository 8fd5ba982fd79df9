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

from tests.kernel.conftest import BASES, SERIES, run, source
from tests.scale import is_full
from vm import kernel
from vm.debian import Archive, NotOffered
from vm.host import HarnessError, install_packages
from vm.kernel import HOST_PACKAGES, Source, built_part, fragments, made_against

# What is left out of the guest's configuration, and the objects in which that makes a difference.
OBJECTS = {
    (): ("mm/memory-failure.o", "mm/memcontrol.o", "kernel/cgroup/cgroup.o", "drivers/ras/ras.o"),
    ("MEMORY_FAILURE", "HWPOISON_INJECT"): ("mm/memcontrol.o", "drivers/ras/ras.o"),
    ("MEMCG",): ("mm/memory-failure.o", "drivers/ras/ras.o"),
    ("CGROUPS", "SCHED_AUTOGROUP"): ("mm/memory-failure.o", "drivers/ras/ras.o"),
}


class Build:
    """An output directory with a configuration of its own, and what the compiler and sparse say."""

    def __init__(self, linux: Path, base: str, without: tuple[str, ...]) -> None:
        self.linux, self.objects = linux, OBJECTS[without]
        self.name = "-".join(["build", *without])
        self.is_guests = not without
        self.output = linux.parent / f"{base}-{self.name}"
        self.output.mkdir()
        wanted = self.output / "wanted"
        wanted.write_text(fragments(base) + "".join(f"CONFIG_{symbol}=n\n" for symbol in without))
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


def kernel_doc(linux: Path) -> Counter[str]:
    """Return what the kernel's own tool finds fault with in the comments of the files that the series touches."""
    tool = next(path for path in (linux / "scripts/kernel-doc", linux / "scripts/kernel-doc.py") if path.exists())
    files = ("include/linux/memcontrol.h", "kernel/cgroup/cgroup.c", "mm/memcontrol.c", "mm/memory-failure.c")
    done = subprocess.run([tool, "-none", *files], cwd=linux, capture_output=True, text=True, check=False)
    found = re.findall(r"^(?:Warning: )?(\S+?):\d+:? (?:warning: )?(.*)$", done.stderr, re.MULTILINE | re.IGNORECASE)
    return Counter(f"{file}: {text}" for file, text in found)


@pytest.mark.parametrize("base", BASES)
def test_series_is_complete(base: str) -> None:
    """File names and cover letter number the patches as their subjects do, and none carries a sign-off."""
    series = SERIES[base]
    letter = (series[0].parent / "0000-cover-letter.txt").read_text()
    assert len(series) == 9 and f"[PATCH 0/{len(series)}]" in letter
    for number, patch in enumerate(series, 1):
        text = patch.read_text()
        assert patch.name.startswith(f"{number:04}-")
        headers, _, body = text.partition("\n\n")
        _, numbered, title = headers.replace("\n ", " ").partition(f"\nSubject: [PATCH {number}/{len(series)}] ")
        assert numbered and f"\n  {number}  {title}\n" in letter
        assert "\nAssisted-by: " in text
        assert "Signed-off-by:" not in text
        assert [line for line in body.partition("\n---\n")[0].splitlines() if len(line) > 75] == []
    assert made_against(base)


def test_bases_are_in_step() -> None:
    """Both bases get the same patches."""
    first, *others = ([patch.name for patch in SERIES[base]] for base in BASES)
    assert all(names == first for names in others)


def test_what_is_not_built_does_not_count(tmp_path: Path) -> None:
    """Messages, documentation and selftests of the series change nothing about the kernel in the cache."""
    patch = SERIES["v6.12"][4]
    assert "a/Documentation/" in patch.read_text()
    changed = tmp_path / patch.name
    changed.write_text(patch.read_text().replace("Anonymous memory", "Other memory").replace("Subject:", "Subject: a"))
    assert built_part(changed) == built_part(patch) != ""
    changed.write_text(patch.read_text().replace("READ_ONCE", "WRITE_ONCE"))
    assert built_part(changed) != built_part(patch)
    assert [built_part(patch) for patch in SERIES["v6.12"][-2:]] == ["", ""]


def test_series_that_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base without a source says so, and a base without a series says what there is instead."""

    def nothing(package: str, base: str) -> Archive:
        raise NotOffered(f"no {package} of {base} is to be had any more: sid: 8.1.2-1")

    monkeypatch.setattr(kernel, "newest_archive", nothing)
    with pytest.raises(NotOffered, match="no linux-source of v7 is to be had any more: sid: 8.1.2-1"):
        kernel.patched("v7")
    with pytest.raises(HarnessError, match=r"there is no series for v6\.1 "):
        kernel.patched("v6.1")


def test_later_release_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A release that the series was not made against gets the same patches: with offsets, but not by guessing."""
    patch, tree = tmp_path / "v7" / "0001-change.patch", "more\n" * 20 + "one\ntwo\nthree\nfour\nfive\nsix\n"
    patch.parent.mkdir()
    hunk = " one\n two\n three\n+new\n four\n five\n six\n"
    patch.write_text(f"--- a/file\n+++ b/file\n@@ -2,6 +2,7 @@\n{hunk}")

    def unpack(source: Source, scratch: Path, directory: Path, log: Path) -> None:
        directory.mkdir()
        (directory / "file").write_text(tree)

    monkeypatch.setattr(kernel, "unpack_source", unpack)
    monkeypatch.setattr(kernel, "CONFIGURE", ("cp", "file", ".config"))
    monkeypatch.setattr(kernel, "BUILD", ("false",))
    later = Source(Archive("sid"), "linux-source-7.9", "7.9.1-1")
    with pytest.raises(HarnessError, match="^false failed"):
        kernel.build(tmp_path / "kernel", later, "", [patch])
    assert "trying it with 7.9.1-1" in capfd.readouterr().err
    tree = tree.replace("one", "1")
    with pytest.raises(HarnessError, match="^patch failed") as failure:
        kernel.build(tmp_path / "kernel", later, "", [patch])
    assert "0001-change.patch does not apply to linux-source-7.9 7.9.1-1" in str(failure.value.hint)


def test_checkpatch(linux: Path, base: str) -> None:
    install_packages(["perl"])
    said = run(["scripts/checkpatch.pl", "--strict", "--no-signoff", "--no-tree", *SERIES[base]], cwd=linux)
    totals = re.findall(r"^total: 0 errors, 0 warnings, 0 checks, \d+ lines checked$", said, re.MULTILINE)
    assert len(totals) == len(SERIES[base])


def test_each_patch_compiles(linux: Path, base: str) -> None:
    """The series applies patch after patch without fuzz, and none adds a warning in the guest's configuration.

    In the others, the whole of it does not; tests/run --full compiles each patch there, too. On the version that the
    series was made against, each hunk is where the patch says.
    """
    install_packages((*HOST_PACKAGES, "libssl-dev", "perl", "python3", "sparse"))
    tree = linux.with_name(f"patched-{base}")
    run(["cp", "-al", linux, tree], cwd=linux)  # patch replaces files
    builds = [Build(tree, base, without) for without in OBJECTS]
    known, faults = [build.warnings() for build in builds], kernel_doc(tree)
    moved = source(base).version != made_against(base)
    built = [patch for patch in SERIES[base] if built_part(patch)]
    for patch in SERIES[base]:
        said = run(["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch], cwd=tree)
        assert moved or "offset" not in said, said
        for build, old in zip(builds, known, strict=True):
            if patch in built and (build.is_guests or patch == built[-1] or is_full()):
                new = build.warnings() - old
                assert not new, f"{patch.name}, {build.name}: {dict(new)}"
    assert not kernel_doc(tree) - faults
