# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's kernel: Debian's source with the patch series of the working tree."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vm.debian import Archive, newest_archive
from vm.host import (
    TREE,
    HarnessError,
    cache_dir,
    content_hash,
    install_packages,
    locked,
    progress,
    run,
    scratch_dir,
)

HOST_PACKAGES = ("bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "lz4", "make", "patch", "xz-utils")
BASE = "v6.12"
SOURCE = "linux-source"  # depends on the package with the source, which is named after the series
HERE = Path(__file__).parent

# What a patch does to these files does not get into the image: no reason to build another one.
NOT_BUILT = re.compile(r"diff --git a/(Documentation/|tools/|MAINTAINERS)")

# Nothing of this host or hour goes into the image.
ENVIRONMENT = {
    "KBUILD_BUILD_TIMESTAMP": "2026-01-01",
    "KBUILD_BUILD_USER": "cgpolicy",
    "KBUILD_BUILD_HOST": "cgpolicy",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
}

# Run in the source tree; data, so that the cache's key follows it.
CONFIGURE = ("make", "allnoconfig")  # and KCONFIG_ALLCONFIG, the fragment
BUILD = ("make", "bzImage")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A bootable kernel; one with modules has an initial RAM disk and a disk image of /usr/lib/modules."""

    image: Path
    initrd: Path | None = None
    modules: Path | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The newest kernel source of a series that Debian offers."""

    archive: Archive
    package: str
    version: str


def newest_source(base: str) -> Source:
    """Return the newest source of a series; raise HarnessError, saying what there is instead, if there is none."""
    archive = newest_archive(SOURCE, base)
    (package,) = archive.depends(SOURCE)
    version, _ = archive.newest(package)
    return Source(archive, package, version)


def unpack_source(source: Source, scratch: Path, tree: Path, log: Path, exclude: Sequence[str] = ()) -> None:
    """Unpack a kernel source into a new directory, without the files that match patterns."""
    source.archive.unpack(source.package, scratch)
    (tarball,) = (scratch / "usr/src").glob("linux-source-*.tar.xz")
    tree.mkdir()
    patterns = [f"--exclude={tarball.name.removesuffix('.tar.xz')}/{pattern}" for pattern in exclude]
    run(["tar", "--extract", f"--file={tarball}", f"--directory={tree}", "--strip-components=1", *patterns], log=log)
    shutil.rmtree(scratch)


def made_against(base: str) -> str:
    """Return the version of Debian's source that a series was made against: its cover letter's last line."""
    letter = TREE / "kernel-patch" / base / "0000-cover-letter.txt"
    match = re.search(r"^base: linux-source-\S+ (\S+)$", letter.read_text(), re.MULTILINE)
    if not match:
        raise HarnessError(f"{letter.relative_to(TREE)} does not say what the series was made against")
    return match[1]


def fragments(base: str, *, debug: bool = False) -> str:
    """Return what the guest's kernel has, in the syntax of a configuration."""
    names = ("kernel.config", f"kernel-{base}.config", *(("kernel-debug.config",) if debug else ()))
    if not (HERE / names[1]).exists():
        raise HarnessError(f"no kernel of {base} is built here", hint="Debian's own one is --kernel stock")
    return "".join((HERE / name).read_text() for name in names)


def built_part(patch: Path) -> str:
    """Return those changes of a patch that can make a difference to the image."""
    _, *files = re.split(r"^(?=diff --git )", patch.read_text(), flags=re.MULTILINE)
    return "".join(file for file in files if not NOT_BUILT.match(file))


def patched(base: str, *, debug: bool = False) -> Kernel:
    """Return Debian's kernel source with kernel-patch/<base> applied, built if it is not cached."""
    patches = sorted((TREE / "kernel-patch" / base).glob("*.patch"))
    if not patches:
        raise HarnessError(
            f"there is no series for {base}",
            hint=f"kernel-patch/{base} holds no patch; Debian's own kernel is --kernel stock",
        )
    return built(base, patches, debug=debug)


def unpatched(base: str, *, debug: bool = False) -> Kernel:
    """Return the same kernel as patched() without the series, to be compared with it."""
    return built(base, (), debug=debug)


def built(base: str, patches: Sequence[Path], *, debug: bool) -> Kernel:
    """Return a kernel of Debian's newest source of a series, built if it is not cached."""
    source = newest_source(base)
    config = fragments(base, debug=debug)
    recipe = repr((sorted(ENVIRONMENT.items()), CONFIGURE, BUILD))
    key = content_hash(recipe, config, source.package, source.version, *map(built_part, patches))
    name = "-".join(["patched" if patches else "unpatched", base, *(["debug"] if debug else []), key])
    path = cache_dir("kernels") / name
    if not path.exists():
        install_packages(HOST_PACKAGES)
        with locked(name):
            if not path.exists():
                build(path, source, config, patches)
    return Kernel(path / "bzImage")


def build(path: Path, source: Source, config: str, patches: Sequence[Path]) -> None:
    """Unpack, patch, configure and build; only the image, its configuration and System.map are kept.

    Debian's releases come faster than ours: a patch may find its lines elsewhere in the file, but not with other
    lines around them. patch(1) would guess then, and has put a field between the lines of a foreign #ifdef that way.
    """
    log = path.with_name(f"{path.name}.log")
    what = f"{source.package} {source.version}"
    progress(f"building {what} with {len(patches)} patches (8 minutes on two idle cores; log: {log})")
    if patches and source.version != (made := made_against(patches[0].parent.name)):
        progress(f"the series was made against {made}; trying it with {source.version}")
    with scratch_dir("kernel") as scratch:
        tree, complete, wanted = scratch / "source", scratch / "complete", scratch / "wanted"
        complete.mkdir()
        unpack_source(source, scratch / "package", tree, log)
        for patch in patches:
            run(
                ["patch", "-p1", "--fuzz=0", "--forward", "--batch", "-d", tree, "-i", patch],
                log=log,
                hint=f"{patch.name} does not apply to {what}: kernel-patch/README.md, 'Point releases'; see {log}",
            )
        wanted.write_text(config)
        run(CONFIGURE, cwd=tree, log=log, env={**ENVIRONMENT, "KCONFIG_ALLCONFIG": str(wanted)})
        check_config(tree / ".config", wanted)
        run([*BUILD, f"-j{os.cpu_count()}"], cwd=tree, log=log, env=ENVIRONMENT)
        for name in ("arch/x86/boot/bzImage", "System.map", ".config"):
            shutil.copy(tree / name, complete / Path(name).name.replace(".config", "config"))
        complete.rename(path)


def check_config(config: Path, fragment: Path) -> None:
    """Raise HarnessError unless the configuration says what the fragment asks for, symbol by symbol."""
    values = config_values(config)
    ignored = [
        f"{symbol}={wanted} (is {values.get(symbol, 'n')})"
        for symbol, wanted in config_values(fragment).items()
        if values.get(symbol, "n") != wanted
    ]
    if ignored:
        raise HarnessError(f"Kconfig did not honour {', '.join(ignored)}", hint="see vm/kernel*.config")


def config_values(path: Path) -> dict[str, str]:
    """Map the symbols that a kernel configuration names to their values, n where it says 'is not set'."""
    found = {}
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"(CONFIG_\w+)=(.*)|# (CONFIG_\w+) is not set", line):
            found[match[1] or match[3]] = match[2] or "n"
    return found
