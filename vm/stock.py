# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's own kernel package, booted with an initial RAM disk of our own."""

from __future__ import annotations

import lzma
import os
import shutil
from pathlib import Path

from vm.debian import SUITES, Archive, newest_archive
from vm.host import (
    HarnessError,
    cache_dir,
    content_hash,
    install_packages,
    locked,
    progress,
    run,
    scratch_dir,
)
from vm.kernel import Kernel

HOST_PACKAGES = ("cpio", "kmod", "e2fsprogs", "dpkg", "zstd")
PACKAGE = "linux-image-amd64"

# Loaded by the initial RAM disk, with what they depend on: all that the machine is made of, so that the
# guest needs no coldplug. Not every kernel has each as a module; new ones have crc32c built in.
INITRD_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "crc32c_generic",
    "crc32c-intel",
    "ext4",
    "9pnet_virtio",
    "9p",
    "pvpanic-pci",
)

INITRD_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
while read module; do
    /bin/busybox insmod "/modules/$module" || echo "cannot load $module"
done < /modules/order
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mkdir -p /root/usr/lib/modules
/bin/busybox mount -t ext4 -o ro /dev/vdc /root/usr/lib/modules
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /usr/local/lib/cgpolicy-vm/init
"""


def stock(suite: str, base: str | None = None) -> Kernel:
    """Return Debian's newest kernel of a series, or else of a suite, with an initial RAM disk of our own."""
    archive = newest_archive(PACKAGE, base) if base else Archive(suite)
    version, _ = archive.newest(PACKAGE)
    path = cache_dir("kernels") / f"stock-{archive.suite}-{content_hash(Path(__file__), version)}"
    if not path.exists():
        install_packages(HOST_PACKAGES)
        with locked(path.name):
            if not path.exists():
                build_stock(path, archive)
    return Kernel(path / "vmlinuz", path / "initrd", path / "modules.ext4")


def build_stock(path: Path, archive: Archive) -> None:
    """Fetch the kernel's packages and arrange them for direct boot."""
    log = path.with_name(f"{path.name}.log")
    progress(f"fetching Debian {archive.suite}'s own kernel (log: {log})")
    images = [name for name in archive.depends(PACKAGE) if name.startswith("linux-image-")]
    if not images:
        raise HarnessError(f"{PACKAGE} of Debian {archive.suite} depends on no kernel")
    release = images[0].removeprefix("linux-image-")
    # Since 7.x the image, its modules and what depmod(8) needs are packages of their own.
    parts = [name for name in archive.depends(images[0]) if name.endswith(f"-{release}")]
    with scratch_dir("stock") as scratch:
        root, merged, complete = scratch / "root", scratch / "merged", scratch / "complete"
        complete.mkdir()
        for package in (images[0], *parts):
            archive.unpack(package, root)
        Archive(SUITES[0]).unpack("busybox-static", scratch / "busybox")  # backports have none
        (vmlinuz,) = (path for path in root.rglob("vmlinuz*") if path.is_file())
        shutil.copy(vmlinuz, complete / "vmlinuz")
        # Packages and depmod(8) of different releases have modules below /lib or /usr/lib.
        modules = merged / "usr/lib/modules"
        modules.parent.mkdir(parents=True)
        (merged / "lib").symlink_to("usr/lib")
        next(path for path in (root / "usr/lib/modules", root / "lib/modules") if path.exists()).rename(modules)
        run(["depmod", "--basedir", merged, release], log=log)
        make_initrd(complete / "initrd", modules / release, scratch, log)
        run(
            [
                "mke2fs",
                "-q",
                "-F",
                "-t",
                "ext4",
                "-m",
                "0",
                "-d",
                modules,
                complete / "modules.ext4",
                "512M",
            ],
            log=log,
        )
        complete.rename(path)


def make_initrd(path: Path, modules: Path, scratch: Path, log: Path) -> None:
    """Write an initial RAM disk of busybox and the machine's modules, uncompressed, in loading order."""
    tree = scratch / "initrd"
    for name in ("bin", "dev", "root", "modules"):
        (tree / name).mkdir(parents=True)
    (busybox,) = (scratch / "busybox").glob("**/bin/busybox")
    shutil.copy(busybox, tree / "bin/busybox")
    # Named .ko: busybox takes what has another suffix for compressed, and the kernel then complains.
    order = {f"{module_name(file)}.ko": modules / file for file in module_order(modules)}
    for name, file in order.items():
        uncompress(file, tree / "modules" / name, log)
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))
    (tree / "init").write_text(INITRD_INIT)
    (tree / "init").chmod(0o755)
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    run(["sh", "-c", 'cpio --quiet -o -H newc > "$0"', path], cwd=tree, stdin="\n".join(names), log=log)


def uncompress(module: Path, target: Path, log: Path) -> None:
    """Write a module as it is without the compression of its kernel's configuration (MODULE_COMPRESS)."""
    match module.suffix:
        case ".xz":
            target.write_bytes(lzma.decompress(module.read_bytes()))
        case ".zst":
            run(["zstd", "--quiet", "--decompress", module, "-o", target], log=log)
        case _:
            shutil.copy(module, target)


def module_name(path: str) -> str:
    """Return a module's name as modprobe knows it, from its file's path."""
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


def module_order(modules: Path) -> list[str]:
    """Return the files of INITRD_MODULES and what they depend on, in loading order (modules.dep(5))."""
    files: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        file, _, dependencies = line.partition(":")
        files[module_name(file)] = file
        needs[file] = dependencies.split()
    order: list[str] = []
    for name in INITRD_MODULES:
        file = files.get(name.replace("-", "_"), "")
        if file:  # else built in
            # modules.dep lists the transitive closure, what to load first standing last.
            order += [module for module in [*reversed(needs[file]), file] if module not in order]
    return order
