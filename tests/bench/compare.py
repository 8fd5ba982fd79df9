# SPDX-License-Identifier: LGPL-2.1-or-later
"""tests/bench/compare: lose dirty page cache under four regimes, in guests of one kind, and compare what happens.

kernel         the patched kernel, with cgpolicyd
tracefs        Debian's kernel, with cgpolicyd
rasdaemon      Debian's kernel, with rasdaemon and a MEM_FAIL_TRIGGER script that kills the owner if it can be told
rasdaemon-all  as before, but the script kills every unit that wants it if the owner cannot be told
nothing        Debian's kernel, and nobody reacts
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.figures import as_objects, report
from vm.host import TREE, install_packages

HOST_PACKAGES = ("gcc", "libc6-dev")
GUEST_PACKAGES = ("dosfstools", "e2fsprogs", "rasdaemon", "xfsprogs")
PROGRAMS = ("victim", "deaths")
SOURCE = Path(__file__).parent / "guest"
SHARED = ("tests/kernel/guest/pagecache.py", "tests/vm/guest/scene.py")

PANICKED = 99
TIMEOUT = 7200  # seconds; a script of rasdaemon's takes a quarter of an hour for a storm


# Path, action, how the error is reported, number of events.
Plan = list[tuple[str, str, str, int]]
FULL: Plan = [
    ("P1", "kill", "inject", 200),
    ("P1", "kill", "srao", 20),
    ("P1", "continue", "inject", 3),
    ("P2", "kill", "inject", 10),
    ("P2", "continue", "inject", 2),
    ("P3", "kill", "inject", 10),
    ("P3", "continue", "inject", 2),
]
# A script of rasdaemon's takes a hundred times as long, and where nobody reacts there is little to count.
BRIEF: Plan = [
    ("P1", "kill", "inject", 30),
    ("P1", "kill", "srao", 5),
    ("P1", "continue", "inject", 2),
    ("P2", "kill", "inject", 5),
    ("P2", "continue", "inject", 1),
    ("P3", "kill", "inject", 10),
    ("P3", "continue", "inject", 1),
]
QUICK: Plan = [
    ("P1", "kill", "inject", 10),
    ("P1", "kill", "srao", 2),
    ("P1", "continue", "inject", 2),
    ("P2", "kill", "inject", 2),
    ("P2", "continue", "inject", 1),
    ("P3", "kill", "inject", 2),
    ("P3", "continue", "inject", 1),
]


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel, what reacts in it, and how much of the comparison tells more of it than of the others."""

    kernel: str
    reaction: str
    plan: Plan
    panics: bool
    storms: bool


VARIANTS = {
    "kernel": Variant("patched", "cgpolicyd", FULL, panics=True, storms=True),
    "tracefs": Variant("stock", "cgpolicyd", FULL, panics=True, storms=True),
    "rasdaemon": Variant("stock", "rasdaemon", BRIEF, panics=True, storms=True),
    "rasdaemon-all": Variant("stock", "rasdaemon-all", BRIEF, panics=False, storms=False),
    "nothing": Variant("stock", "nothing", BRIEF, panics=False, storms=False),
}

STORM_PAGES = 5000
PATHS = ("P1", "P2", "P3")


def progress(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


def compile_programs(share: Path) -> None:
    """Make the shared directory: the scripts of the guest, and its C programs, compiled."""
    install_packages(HOST_PACKAGES)
    target = share / SOURCE.relative_to(TREE)
    shutil.copytree(SOURCE, target, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SHARED:
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / name, share / name)
    for name in PROGRAMS:
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", name, f"{name}.c"]
        subprocess.run(command, cwd=target, check=True)


@dataclass(frozen=True, slots=True)
class Guests:
    """Runs the plans, each in a machine of its own."""

    share: Path
    smp: int

    def run(self, variant: Variant, plan: dict[str, Any]) -> tuple[int, list[dict[str, Any]], str]:
        """Return vm/run's exit status, the objects that the guest printed, and what else was said."""
        command = [str(TREE / "vm/run"), "--kernel", variant.kernel, "--packages", ",".join(GUEST_PACKAGES)]
        command += ["--smp", str(self.smp), "--share", str(self.share), "--timeout", str(TIMEOUT), "--"]
        command += ["env", "--chdir=/mnt/share", "python3", "-m", "tests.bench.guest.measure"]
        command += [variant.reaction, json.dumps(plan)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return done.returncode, said, done.stderr


def panic(guests: Guests, name: str, path: str) -> dict[str, Any]:
    """Lose a page of a unit that is set to panic; say what became of the machine."""
    plan = {"events": [], "storm": 0, "panic": path}
    status, said, stderr = guests.run(VARIANTS[name], plan)
    outcome = f"failed: exit status {status}"
    if status == PANICKED:
        lines = [line for line in stderr.splitlines() if "Kernel panic - not syncing" in line]
        outcome = lines[-1].partition("Kernel panic - not syncing: ")[2] if lines else outcome
    elif status == 0 and said and "event" in said[-1]:
        event = said[-1]["event"]
        outcome = (
            event.get("error") or f"did not panic; {event['stale']} stale reads, {event['served']} bad page reads"
        )
    return {"variant": name, "path": path, "outcome": outcome}


def compare(guests: Guests, plans: dict[str, Plan], pages: int, *, panics: bool) -> dict[str, Any]:
    """Run all that was asked for, one machine after another, and return what they said."""
    results: dict[str, Any] = {"guests": {}, "events": [], "storms": [], "panics": [], "failures": []}
    for name, plan in plans.items():
        storm = pages if VARIANTS[name].storms else 0
        progress(f"{name}: {sum(number for *_, number in plan)} events, a storm of {storm} pages")
        status, said, stderr = guests.run(VARIANTS[name], {"events": plan, "storm": storm, "panic": None})
        if status != 0:
            results["failures"].append({"variant": name, "status": status, "stderr": stderr[-4000:]})
            progress(f"{name}: exit status {status}: {stderr[-4000:]}")
        for line in said:
            if "about" in line:
                results["guests"][name] = line
            elif "event" in line:
                results["events"].append({"variant": name, **line["event"]})
            elif "storm" in line:
                results["storms"].append({"variant": name, **line["storm"]})
        for path in PATHS:
            if panics and VARIANTS[name].panics:
                progress(f"{name}: panic on {path}")
                results["panics"].append(panic(guests, name, path))
    return results


def at_most(events: int, plan: Plan) -> Plan:
    return [(path, action, injection, min(number, events)) for path, action, injection, number in plan]


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of several runs as one."""
    lists = ("events", "storms", "panics", "failures")
    guests = {name: about for part in parts for name, about in part["guests"].items()}
    return {"guests": guests, **{name: [each for part in parts for each in part[name]] for name in lists}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tests/bench/compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 events a variant, no storm unless told, no panic")
    parser.add_argument("--events", type=int, metavar="N", default=200, help="of a kind at most")
    parser.add_argument("--storm", type=int, metavar="PAGES", help=f"instead of {STORM_PAGES}; 0: none")
    parser.add_argument("--smp", type=int, default=2, metavar="N", help="virtual CPUs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all that was seen, and the figures, as JSON")
    parser.add_argument("--no-panics", action="store_true", help="leave out the panics, each of which is a machine")
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="run nothing, use what --json printed")
    options = parser.parse_args(arguments)
    if options.read:
        results = merged([json.loads(file.read_text()) for file in options.read])
    else:
        names = options.variants.split(",")
        if unknown := set(names) - set(VARIANTS):
            parser.error(f"no such variant: {', '.join(sorted(unknown))}")
        plans = {name: at_most(options.events, QUICK if options.quick else VARIANTS[name].plan) for name in names}
        storm = options.storm if options.storm is not None else 0 if options.quick else STORM_PAGES
        with tempfile.TemporaryDirectory(prefix="compare-") as share:
            compile_programs(Path(share))
            panics = not options.quick and not options.no_panics
            guests = Guests(Path(share), options.smp)
            results = compare(guests, plans, storm, panics=panics)
    print(json.dumps(as_objects(results)) if options.json else report(results), end="\n" if options.json else "")
    return 1 if results["failures"] else 0
