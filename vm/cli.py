# SPDX-License-Identifier: LGPL-2.1-or-later
"""vm/run: a command as root in a guest with the working tree installed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cgpolicy.error import UserError
from vm.debian import BASES, SUITES
from vm.host import require_root
from vm.kernel import BASE
from vm.machine import (
    EXIT_HARNESS,
    EXIT_PANIC,
    EXIT_TIMEOUT,
    Interrupted,
    Request,
    interruptible,
    run_in_guest,
)

CONSOLE_TAIL_LINES = 40

EPILOG = f"""\
Runs CMD as root in a virtual machine with the working tree installed and cgpolicyd running; its output is
streamed. The exit status is CMD's, {EXIT_PANIC} if the guest's kernel panicked, {EXIT_TIMEOUT} on timeout,
{EXIT_HARNESS} if the machine could not be set up or was lost. In the guest: vm-mce PHYSADDR raises a machine
check, vm-physaddr FILE OFFSET tells where the page cache of a file is.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors cannot be taken for the command's own exit status."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_HARNESS, f"{self.prog}: {message}\n")


def parser() -> Parser:
    """Return the parser of vm/run's command line."""
    parser = Parser(prog="vm/run", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "--kernel",
        choices=("patched", "unpatched", "stock"),
        default="patched",
        help="Debian's source with the series, the same without it, or Debian's package",
    )
    parser.add_argument(
        "--base",
        choices=tuple(BASES),
        help=f"series of kernels; else {BASE}, or that of the guest's release if stock",
    )
    parser.add_argument("--debug", action="store_true", help="a kernel that checks itself (lockdep, KASAN); not stock")
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0], help="Debian release of the guest")
    parser.add_argument("--share", type=Path, metavar="DIR", help="read-only at /mnt/share")
    parser.add_argument("--packages", metavar="A,B", default="", help="more Debian packages in the guest")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="from CMD's start")
    parser.add_argument("--smp", type=int, metavar="N", default=1, help="virtual CPUs")
    parser.add_argument("--console", type=Path, metavar="FILE", help="copy the console's log there")
    parser.add_argument("command", nargs="+", metavar="CMD")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.debug and options.kernel == "stock":
        parser().error("--debug is for kernels that are built here")
    if options.share and not options.share.is_dir():
        print(f"vm/run: --share {options.share}: no such directory", file=sys.stderr)
        return EXIT_HARNESS
    request = Request(
        command=options.command,
        kernel=options.kernel,
        base=options.base,
        debug=options.debug,
        suite=options.suite,
        share=options.share,
        packages=tuple(name for name in options.packages.split(",") if name),
        timeout=options.timeout,
        smp=options.smp,
        console=options.console,
    )
    try:
        require_root()
        with interruptible():
            outcome = run_in_guest(request, lambda data: write(1, data), lambda data: write(2, data))
    except UserError as error:
        print(f"vm/run: {error}", file=sys.stderr)
        return EXIT_HARNESS
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except Interrupted as interrupted:
        signal.signal(interrupted.number, signal.SIG_DFL)
        os.kill(os.getpid(), interrupted.number)
    if outcome.status == EXIT_PANIC and outcome.console_path:
        sys.stderr.write(outcome.console)
    elif outcome.status == EXIT_HARNESS and outcome.console_path:
        sys.stderr.write("".join(outcome.console.splitlines(keepends=True)[-CONSOLE_TAIL_LINES:]))
    if outcome.reason:
        print(f"vm/run: {outcome.reason}", file=sys.stderr)
    if outcome.console_path:
        print(f"vm/run: console log: {outcome.console_path}", file=sys.stderr)
    return outcome.status


def write(descriptor: int, data: bytes) -> None:
    """Write all of the data at once, past Python's own buffers."""
    while data:
        data = data[os.write(descriptor, data) :]
