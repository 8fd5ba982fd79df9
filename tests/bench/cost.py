# SPDX-License-Identifier: LGPL-2.1-or-later
"""tests/bench/cost: what the kernel series costs, patched against unpatched, in instructions.

Both kernels have the same source and configuration. With QEMU's -icount the guest's clock counts instructions, so that
the load of the host does not matter. What still differs from boot to boot, by half a percent on 7.x, is where the
kernel's allocators happen to stand: each kernel is booted several times, in turns, and its best boot counts.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vm.debian import BASES
from vm.host import TREE, install_packages

HOST_PACKAGES = ("gcc", "libc6-dev")
SOURCE = Path(__file__).parent / "guest"
NANOSECONDS = 2  # an instruction's, with vm/run --icount

HOT_PATH = 1.001
ONE_MORE_FILE = 1.03  # of about 60
HANDLER = 1.05
LIMITS = {
    "page-cache write": HOT_PATH,
    "page fault": HOT_PATH,
    "fork and exit": HOT_PATH,
    "cgroup mkdir and rmdir": HOT_PATH,
    "the same with memory on": ONE_MORE_FILE,
    "memory_failure() of a dirty page": HANDLER,
}


def measure(share: Path, kernel: str, base: str, rounds: int) -> dict[str, float]:
    """Return the instructions that each operation takes in one boot of a kernel.

    By the cheapest round, which has been disturbed least; memory_failure() by the middle one, since its cheapest
    round is one in which it had less to do.
    """
    command = [str(TREE / "vm/run"), "--kernel", kernel, "--base", base, "--icount", "--share", str(share)]
    command += ["--", "/mnt/share/cost.sh", "/mnt/share/cost", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = (line.rsplit(" ", 2) for line in done.stdout.splitlines())
    return {
        name: int(middle if LIMITS[name] == HANDLER else cheapest) / NANOSECONDS for name, cheapest, middle in rows
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/cost", description=__doc__)
    parser.add_argument("--base", choices=tuple(BASES), default="v6.12")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--boots", type=int, default=5, help="of each kernel")
    options = parser.parse_args(arguments)
    install_packages(HOST_PACKAGES)
    with tempfile.TemporaryDirectory() as directory:
        share = Path(directory)
        shutil.copy(SOURCE / "cost.sh", share)
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(share / "cost")]
        subprocess.run([*command, str(SOURCE / "cost.c")], check=True)
        seen: dict[str, list[dict[str, float]]] = {"unpatched": [], "patched": []}
        for _, (kernel, boots) in itertools.product(range(options.boots), seen.items()):
            boots.append(measure(share, kernel, options.base, options.rounds))
            print(f"cost: {kernel}: {boots[-1]}", file=sys.stderr)
    without, patched = ({name: min(boot[name] for boot in boots) for name in LIMITS} for boots in seen.values())
    failed = False
    print(f"{'instructions':34} {'unpatched':>10} {'patched':>10} {'ratio':>8}  at most")
    for name, limit in LIMITS.items():
        ratio = patched[name] / without[name]
        failed |= ratio > limit
        print(f"{name:34} {without[name]:10.0f} {patched[name]:10.0f} {ratio:8.5f}  {limit}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
