# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's own kernel package, booted with an initial RAM disk of our own."""

from __future__ import annotations

import lzma
import os
import shutil
from pathlib import Path

from vm.debian import Archive
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

HOST_PACKAGES = ("cpio", "kmod", "e2fsprogs", "dpkg")

# Loaded by the initial RAM disk, with what they depend on: all that the machine is made of, so that the
# guest needs no coldplug.
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
/bin/busybox mount -t ext4 -o ro /dev/vdc /root/usr/lib/modules
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /usr/local/lib/cgpolicy-vm/init
"""


def stock(suite: str) -> Kernel:
    """Return Debian's newest kernel package of a suite, with an initial RAM disk of our own."""
    archive = Archive(suite)
    version, _ = archive.newest("linux-image-amd64")
    path = cache_dir("kernels") / f"stock-{suite}-{content_hash(Path(__file__), version)}"
    if not path.exists():
        install_packages(HOST_PACKAGES)
        with locked(path.name):
            if not path.exists():
                build_stock(path, archive)
    return Kernel(path / "vmlinuz", path / "initrd", path / "modules.ext4")


def build_stock(path: Path, archive: Archive) -> None:
    """Fetch the kernel package and arrange it for direct boot."""
    log = path.with_name(f"{path.name}.log")
    progress(f"fetching Debian {archive.suite}'s own kernel (log: {log})")
    packages = [name for name in archive.depends("linux-image-amd64") if name.startswith("linux-image-")]
    if not packages:
        raise HarnessError(f"linux-image-amd64 of Debian {archive.suite} depends on no kernel")
    with scratch_dir("stock") as scratch:
        root, complete = scratch / "root", scratch / "complete"
        complete.mkdir()
        archive.unpack(packages[0], root)
        archive.unpack("busybox-static", scratch / "busybox")
        (vmlinuz,) = (root / "boot").glob("vmlinuz-*")
        release = vmlinuz.name.removeprefix("vmlinuz-")
        modules = next(path for path in (root / "usr/lib/modules", root / "lib/modules") if path.exists())
        if modules.parent.parent == root:
            (root / "usr/lib").mkdir(parents=True, exist_ok=True)
            modules = modules.rename(root / "usr/lib/modules")
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")
        run(["depmod", "--basedir", root, release], log=log)
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
        shutil.copy(vmlinuz, complete / "vmlinuz")
        complete.rename(path)


def make_initrd(path: Path, modules: Path, scratch: Path, log: Path) -> None:
    """Write an initial RAM disk of busybox and the machine's modules, uncompressed, in loading order."""
    tree = scratch / "initrd"
    for name in ("bin", "dev", "root", "modules"):
        (tree / name).mkdir(parents=True)
    (busybox,) = (scratch / "busybox").glob("**/bin/busybox")
    shutil.copy(busybox, tree / "bin/busybox")
    order = module_order(modules)
    for module in order:
        data = (modules / module).read_bytes()
        if module.endswith(".xz"):
            data = lzma.decompress(data)
        (tree / "modules" / module_name(module)).write_bytes(data)
    (tree / "modules/order").write_text("".join(f"{module_name(module)}\n" for module in order))
    (tree / "init").write_text(INITRD_INIT)
    (tree / "init").chmod(0o755)
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    run(["sh", "-c", 'cpio --quiet -o -H newc > "$0"', path], cwd=tree, stdin="\n".join(names), log=log)


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
