# SPDX-License-Identifier: LGPL-2.1-or-later
"""vm/demo: four units, three policies, a real machine check on a dirty page of each, and what came of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cgpolicy.error import UserError
from vm.debian import BASES, SUITES
from vm.host import install_packages, progress, require_root, run, scratch_dir
from vm.machine import (
    EXIT_HARNESS,
    EXIT_PANIC,
    Interrupted,
    Outcome,
    Request,
    interruptible,
    run_in_guest,
)

FILES = Path(__file__).parent / "demo.d"
HOST_PACKAGES = ("gcc", "libc6-dev")
TIMEOUT = 600.0  # seconds; 60 on two idle cores

EXIT_UNMET = 1


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a unit's drop-in asks for. Fixed here and not read from vm/demo.d: changing a drop-in must show."""

    unit: str
    action: str
    source: str


EXPECTATIONS = (
    Expectation("shipper.service", "continue", "/etc/systemd/system/shipper.service.d/50-cgpolicy.conf"),
    Expectation("database.service", "kill", "/etc/systemd/system/database.service.d/50-cgpolicy.conf"),
    Expectation(r"machine-qemu\x2d1\x2dweb01.scope", "kill", "/etc/systemd/system/machine-.scope.d/50-cgpolicy.conf"),
    Expectation("ledger.service", "panic", "/etc/systemd/system/ledger.service.d/50-cgpolicy.conf"),
)

# kernel-patch/: the line that says which data was lost; never rate-limited before a panic.
DETAIL = re.compile(
    r"Memory failure: (?P<pfn>0x[0-9a-f]+): dirty page cache lost: dev (?P<device>\d+:\d+) \((?P<sid>[^)]*)\) "
    r"ino (?P<inode>\d+) pos (?P<offset>\d+) mode 0[0-7]+ memcg (?P<memcg>\S+) action (?P<action>\w+)$"
)
PANIC = (
    "Kernel panic - not syncing: Memory failure: {pfn:#x}: dirty page cache lost, memory.failure_dirty_action=panic"
)
TIMESTAMP = re.compile(r"^\[ *\d+\.\d+\] ")


Expect = Callable[[bool, str, object], None]  # condition, what was wanted, what was got


@dataclass(slots=True)
class Row:
    """One unit: what was expected, what was observed, and what of it does not fit."""

    expected: Expectation
    hit: dict[str, Any] | None = None
    seen: dict[str, Any] | None = None
    panicked: bool = False
    kernel: list[str] = field(default_factory=list)
    lost: dict[str, str] | None = None
    unmet: list[str] = field(default_factory=list)

    def happened(self) -> str:
        """Say what happened to the unit, from what was observed alone."""
        if self.panicked:
            return "the kernel panicked"
        if not self.hit:
            return "not hit"
        if not self.seen:
            return "lost sight of"
        record = self.seen["record"]
        reads = f"{record['stale']} stale reads" if record["stale"] else "no stale read"
        if not self.seen["survived"]:
            return f"{self.seen['ending']}, {reads}"
        return f"runs on: fsync {', then '.join(record['fsync']) or 'not answered'}; {reads}"


def observe(request: Request) -> tuple[list[dict[str, Any]], Outcome]:
    """Run the guest's part and return what it told, and how the machine ended."""
    told = bytearray()

    def on_stdout(data: bytes) -> None:
        told.extend(data)

    def on_stderr(data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.flush()

    outcome = run_in_guest(request, on_stdout, on_stderr)
    return [json.loads(line) for line in told.decode().splitlines()], outcome


def console_lines(console: str) -> list[str]:
    """Return the console's lines without the kernel's timestamps."""
    return [TIMESTAMP.sub("", line) for line in console.splitlines()]


def build_rows(messages: Sequence[dict[str, Any]], outcome: Outcome) -> list[Row]:
    """Join what the guest told with what its console shows."""
    rows = {expectation.unit: Row(expectation) for expectation in EXPECTATIONS}
    for message in messages:
        row = rows[message["unit"]]
        if message["event"] == "hit":
            row.hit = message
        else:
            row.seen = message
            row.kernel = message["kernel"]
    hit = [row for row in rows.values() if row.hit]
    if outcome.panicked and hit and not hit[-1].seen:
        last = hit[-1]
        last.panicked = True
        pfn = f"{last.hit['pfn']:#x}" if last.hit else ""
        last.kernel = [line for line in console_lines(outcome.console) if pfn in line]
    for row in rows.values():
        found = [match.groupdict() for line in row.kernel if (match := DETAIL.search(line))]
        row.lost = found[0] if found else None
    return list(rows.values())


def judge(row: Row, console: str) -> None:
    """Name every expectation that was not met."""
    expected = row.expected

    def expect(condition: bool, wanted: str, got: object) -> None:
        if not condition:
            row.unmet.append(f"{expected.unit}: expected {wanted}, {got}")

    if not row.hit:
        row.unmet.append(f"{expected.unit}: expected {expected.action}, it was not hit: the machine was gone before")
        return
    policy = row.hit["policy"]
    configured, source = policy.get("configured"), policy.get("source")
    expect(
        (configured, source) == (expected.action, expected.source),
        f"cgpolicyd to read {expected.action} from {expected.source}",
        policy.get("error") or f"it reads {configured} from {source}",
    )
    kernel_file = row.hit["kernel_file"]
    expect(
        kernel_file == expected.action,
        f"memory.failure_dirty_action to be {expected.action}",
        f"it is {kernel_file}" if kernel_file else "this kernel has no such file",
    )
    expect(row.hit["dirty"] and row.hit["charged"], "its own dirty page to be hit", "the page was clean or another's")
    judge_detail(row, expect)
    if expected.action == "panic":
        wanted = PANIC.format(pfn=row.hit["pfn"])
        expect(row.panicked, "the kernel to panic", row.happened())
        expect(wanted in console_lines(console), f"{wanted!r} on the console", "it is not there")
    elif row.panicked or not row.seen:
        expect(False, f"{expected.action}, as configured", row.happened())
    else:
        judge_ending(row, expect)


def judge_detail(row: Row, expect: Expect) -> None:
    """Compare the kernel's detail line with the file, page and cgroup that were hit."""
    assert row.hit
    told = {
        "pfn": f"{row.hit['pfn']:#x}",
        "device": row.hit["device"],
        "inode": str(row.hit["inode"]),
        "offset": str(row.hit["offset"]),
        "memcg": row.hit["cgroup"],
        "action": row.expected.action,
    }
    if not row.lost:
        expect(False, "the kernel to say which data was lost", "it printed no such line")
        return
    wrong = {name: row.lost[name] for name, value in told.items() if row.lost[name] != value}
    expect(not wrong, f"the kernel to name {told}", f"it has {wrong}")


def judge_ending(row: Row, expect: Expect) -> None:
    """Judge a unit on continue or kill by how it ended and what it read."""
    assert row.seen
    record, survived = row.seen["record"], row.seen["survived"]
    if row.expected.action == "continue":
        expect(survived, "it to run on", f"it was {row.seen['ending']}")
        if survived:
            expect(record["fsync"] == [os.strerror(5), "0"], "fsync to fail once with EIO", record["fsync"])
            expect(record["stale"] > 0, "stale reads (that is what continue means)", "there was none")
        return
    read = f"read {record['stale']} times stale bytes"
    expect(not survived, "death by SIGKILL", f"it is still running and {read}")
    if not survived:
        expect(row.seen["ending"].startswith("killed by SIGKILL"), "death by SIGKILL", f"it {row.seen['ending']}")
        expect(record["stale"] == 0, "no stale read", f"it {read} before it died")


def print_table(rows: Sequence[Row]) -> None:
    """Print a table, the kernel's lines for each unit below it."""
    header = ("UNIT", "ACTION", "POLICY FROM", "LOST", "WHAT HAPPENED")
    table = [header]
    for row in rows:
        policy = row.hit["policy"] if row.hit else {}
        lost = row.lost or {}
        where = f"dev {lost['device']} ({lost['sid']}) ino {lost['inode']} pos {lost['offset']}" if lost else "-"
        table.append(
            (
                row.expected.unit,
                policy.get("configured") or "-",
                policy.get("source", "-").removeprefix("/etc/systemd/system/"),
                where,
                row.happened(),
            )
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print("\nThe kernel's own lines:")
    for row in rows:
        print(f"  {row.expected.unit}")
        for line in row.kernel or ["(none)"]:
            print(textwrap.indent(line, "    "))


def as_json(rows: Sequence[Row]) -> str:
    """Return everything observed, and what of it was not expected, as one JSON document."""
    units = [{**asdict(row), "happened": row.happened()} for row in rows]
    return json.dumps({"units": units, "met": not any(row.unmet for row in rows)}, indent=2)


def demonstrate(kernel: str, base: str | None, suite: str, files: Path) -> tuple[list[Row], Outcome]:
    """Set up a machine, let each unit lose a page, and judge what was seen."""
    require_root()
    install_packages(HOST_PACKAGES)
    with scratch_dir("demo") as scratch:
        share = scratch / "share"
        shutil.copytree(files, share)
        compile_c = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]
        run([*compile_c, "-o", share / "workload", files / "workload.c"], log=scratch / "gcc.log")
        request = Request(
            ("/usr/bin/python3", "/mnt/share/observe.py"),
            kernel=kernel,
            base=base,
            suite=suite,
            share=share,
            timeout=TIMEOUT,
        )
        progress("starting the machine")
        messages, outcome = observe(request)
    if outcome.console_path and outcome.panicked:
        progress(f"console log: {outcome.console_path}")
    rows = build_rows(messages, outcome)
    for row in rows:
        judge(row, outcome.console)
    return rows, outcome


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vm/demo", description=__doc__)
    parser.add_argument("--kernel", choices=("patched", "stock"), default="patched", help="stock must fail")
    parser.add_argument("--base", choices=tuple(BASES), help="series of kernels, as in vm/run")
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0], help="Debian release of the guest")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", default=FILES, help="units and drop-ins other than vm/demo.d"
    )
    parser.add_argument("--json", action="store_true", help="print everything observed as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with interruptible():
            rows, outcome = demonstrate(options.kernel, options.base, options.suite, options.files)
    except UserError as error:
        print(f"vm/demo: {error}", file=sys.stderr)
        return EXIT_HARNESS
    except Interrupted as interrupted:
        signal.signal(interrupted.number, signal.SIG_DFL)
        os.kill(os.getpid(), interrupted.number)
    if outcome.status not in (0, EXIT_PANIC):
        sys.stderr.write("".join(outcome.console.splitlines(keepends=True)[-40:]))
        print(f"vm/demo: {outcome.reason or f'the guest part failed with {outcome.status}'}", file=sys.stderr)
        return EXIT_HARNESS
    if options.json:
        print(as_json(rows))
    else:
        print_table(rows)
    unmet = [text for row in rows for text in row.unmet]
    for text in unmet:
        print(f"vm/demo: {text}", file=sys.stderr)
    if not unmet and not options.json:
        print("\nEverything happened as configured.")
    return EXIT_UNMET if unmet else 0
