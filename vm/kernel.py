# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's kernel: Debian's source with the patch series of the working tree."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vm.debian import Archive
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
SUITE = "trixie"  # whatever the guest is: one kernel serves every suite
SOURCE_PACKAGES = {"v6.12": "linux-source-6.12"}
FRAGMENT = Path(__file__).parent / "kernel.config"

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


def patched(base: str) -> Kernel:
    """Return Debian's kernel source with kernel-patch/<base> applied, built if it is not cached."""
    series = TREE / "kernel-patch" / base
    patches = sorted(series.glob("*.patch"))
    if base not in SOURCE_PACKAGES or not patches:
        raise HarnessError(
            f"there is no series for {base}",
            hint=f"{series.relative_to(TREE)} holds no patch; Debian's own kernel is --kernel stock",
        )
    archive = Archive(SUITE)
    version, _ = archive.newest(SOURCE_PACKAGES[base])
    recipe = repr((sorted(ENVIRONMENT.items()), CONFIGURE, BUILD))
    key = content_hash(recipe, FRAGMENT, version, *patches)
    path = cache_dir("kernels") / f"patched-{base}-{key}"
    if not path.exists():
        install_packages(HOST_PACKAGES)
        with locked(path.name):
            if not path.exists():
                build_patched(path, archive, SOURCE_PACKAGES[base], patches)
    return Kernel(path / "bzImage")


def build_patched(path: Path, archive: Archive, package: str, patches: Sequence[Path]) -> None:
    """Unpack, patch, configure and build; only the image, its configuration and System.map are kept."""
    log = path.with_name(f"{path.name}.log")
    progress(f"building {package} with {len(patches)} patches (7 minutes on two cores; log: {log})")
    with scratch_dir("kernel") as scratch:
        source, complete = scratch / "source", scratch / "complete"
        complete.mkdir()
        source.mkdir()
        archive.unpack(package, scratch / "package")
        (tarball,) = (scratch / "package/usr/src").glob("linux-source-*.tar.xz")
        run(
            ["tar", "--extract", f"--file={tarball}", f"--directory={source}", "--strip-components=1"],
            log=log,
        )
        for patch in patches:
            run(
                ["patch", "-p1", "--forward", "--batch", "-d", source, "-i", patch],
                log=log,
                hint=f"{patch.name} does not apply to {package}; see {log}",
            )

        run(CONFIGURE, cwd=source, log=log, env={**ENVIRONMENT, "KCONFIG_ALLCONFIG": str(FRAGMENT)})
        check_config(source / ".config", FRAGMENT)
        run([*BUILD, f"-j{os.cpu_count()}"], cwd=source, log=log, env=ENVIRONMENT)
        for name in ("arch/x86/boot/bzImage", "System.map", ".config"):
            shutil.copy(source / name, complete / Path(name).name.replace(".config", "config"))
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
        raise HarnessError(f"Kconfig did not honour {', '.join(ignored)}", hint=f"see {fragment.relative_to(TREE)}")


def config_values(path: Path) -> dict[str, str]:
    """Map the symbols that a kernel configuration names to their values, n where it says 'is not set'."""
    found = {}
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"(CONFIG_\w+)=(.*)|# (CONFIG_\w+) is not set", line):
            found[match[1] or match[3]] = match[2] or "n"
    return found
