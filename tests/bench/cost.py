# SPDX-License-Identifier: LGPL-2.1-or-later
"""tests/bench/cost: what the kernel series costs, patched against unpatched, in instructions.

Both kernels have the same source and configuration, and run one program, as init. With QEMU's -icount the guest's
clock counts instructions, so that the load of the host does not matter. What still differs from boot to boot, by a
few tenths of a percent, is where the kernel's allocators happen to stand: each kernel is booted several times, in
turns, and its middle boot counts.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vm.debian import BASES
from vm.host import install_packages
from vm.machine import CPU, MEMORY_MIB, Request, select_kernel

HOST_PACKAGES = ("e2fsprogs", "gcc", "libc6-dev", "qemu-system-x86")
SOURCE = Path(__file__).parent / "guest/cost.c"
SHIFT = 1  # an instruction takes 2 ** SHIFT nanoseconds of the guest's clock
DISK_BYTES = 64 << 20
SECONDS = 600  # for one boot, which takes 10 on an idle host

HOT_PATH = 1.001
ONE_MORE_FILE = 1.035  # of about 60
HANDLER = 1.05
LIMITS = {
    "page-cache write": HOT_PATH,
    "page fault": HOT_PATH,
    "fork and exit": HOT_PATH,
    "cgroup mkdir and rmdir": HOT_PATH,
    "the same with memory on": ONE_MORE_FILE,
    "memory_failure() of a dirty page": HANDLER,
}


def make_disk(directory: Path) -> Path:
    """Return a root file system with the program, and with nothing else but where it mounts what it needs."""
    root, disk = directory / "root", directory / "disk"
    for name in ("dev", "proc", "sys"):
        (root / name).mkdir(parents=True)
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(root / "cost"), str(SOURCE)]
    subprocess.run(command, check=True)
    with open(disk, "xb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(root), str(disk)], check=True)
    return disk


def measure(disk: Path, kernel: Path, rounds: int) -> dict[str, float]:
    """Return the instructions that each operation takes in one boot of a kernel.

    By the cheapest round, which has been disturbed least.
    """
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-machine", "q35", "-accel", "tcg,thread=single", "-icount", f"shift={SHIFT},sleep=off"]
    command += ["-cpu", CPU, "-m", str(MEMORY_MIB), "-kernel", str(kernel), "-append"]
    # Random places change how many instructions a walk of a hash or a tree takes.
    command += [
        "root=/dev/vda rootfstype=ext4 rw init=/cost console=ttyS0 loglevel=1 panic=-1 mitigations=off "
        f"nokaslr norandmaps random.trust_cpu=on -- {rounds}"
    ]
    command += ["-drive", f"file={disk},format=raw,if=virtio,snapshot=on,cache=unsafe"]
    command += ["-chardev", "stdio,id=console", "-serial", "chardev:console"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS
    )
    found = re.findall(r"^(\D+) (\d+)$", done.stdout, re.MULTILINE)
    if [name for name, _ in found] != list(LIMITS):
        raise SystemExit(f"cost: {kernel}: not all was measured: {done.stdout.strip()}")
    return {name: int(cheapest) / 2**SHIFT for name, cheapest in found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/cost", description=__doc__)
    parser.add_argument("--base", choices=tuple(BASES), default="v6.12")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--boots", type=int, default=5, help="how often each kernel is booted")
    options = parser.parse_args(arguments)
    install_packages(HOST_PACKAGES)
    images = {
        name: select_kernel(Request((), kernel=name, base=options.base)).image for name in ("unpatched", "patched")
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in images}
    with tempfile.TemporaryDirectory() as directory:
        disk = make_disk(Path(directory))
        for _, (name, boots) in itertools.product(range(options.boots), seen.items()):
            boots.append(measure(disk, images[name], options.rounds))
            print(f"cost: {name}: {boots[-1]}", file=sys.stderr)
    without, patched = (
        {name: statistics.median(boot[name] for boot in boots) for name in LIMITS} for boots in seen.values()
    )
    failed = False
    print(f"{'instructions':34} {'unpatched':>10} {'patched':>10} {'ratio':>8}  at most")
    for name, limit in LIMITS.items():
        ratio = patched[name] / without[name]
        failed |= ratio > limit
        print(f"{name:34} {without[name]:10.0f} {patched[name]:10.0f} {ratio:8.5f}  {limit}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
