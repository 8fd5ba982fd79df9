# SPDX-License-Identifier: LGPL-2.1-or-later
"""vm/run: statuses, streams, the ways a machine ends, and what is left behind: no process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vm.conftest import SCRIPTS, Guest
from vm.host import TREE

RUN = str(TREE / "vm/run")


def test_two_at_once(guest: Guest) -> None:
    """Two machines at once do not disturb each other; each carries its own output and status."""
    script = "printf 'a\\0b\\n'; echo problem >/dev/stderr; cat /proc/self/cgroup; cat; exit 7"
    with ThreadPoolExecutor() as pool:
        exits = pool.submit(guest.run, "sh", "-c", script)
        missing = pool.submit(guest.run, "no-such-command", "argument")
    assert exits.result().status == 7
    assert exits.result().stdout == "a\0b\n0::/system.slice/vm-command.service\n"
    assert exits.result().stderr.splitlines()[-1] == "problem"
    assert missing.result().status == 127
    assert missing.result().stdout == ""
    assert "no-such-command: not found" in missing.result().stderr


def test_panic(guest: Guest) -> None:
    """A panic is status 99, shows the console and keeps it; what was said before it arrives."""
    done = guest.run("sh", "-c", "echo last words; echo c >/proc/sysrq-trigger; sleep 60; exit 3")
    assert done.status == 99
    assert done.stdout == "last words\n"
    assert "Kernel panic - not syncing: sysrq triggered crash" in done.stderr
    match = re.search(r"console log: (.+)$", done.stderr, re.MULTILINE)
    assert match
    assert "Kernel panic - not syncing: sysrq triggered crash" in Path(match[1]).read_text()


def test_timeout(guest: Guest) -> None:
    done = guest.run("sh", "-c", "echo before; sleep 999", timeout=10)
    assert done.status == 124
    assert done.stdout == "before\n"


def test_death_by_signal_and_shutdown(guest: Guest) -> None:
    """A command killed by a signal has a shell's status for it; one that takes the machine down fails the harness."""
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(guest.run, "sh", "-c", "kill -TERM $$")
        shut_down = pool.submit(guest.run, "sh", "-c", "poweroff --force; sleep 999")
    assert killed.result().status == 128 + signal.SIGTERM
    assert shut_down.result().status == 125
    assert "shut down" in shut_down.result().stderr


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


def wait_for_death(pid: int) -> None:
    """Return when a process that is not our child is gone; fail if it outlives ten seconds."""
    subprocess.run(["timeout", "10", "tail", f"--pid={pid}", "-f", "/dev/null"], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(number: signal.Signals) -> None:
    """Ctrl-C, a polite end and a sudden one: none leaves a QEMU behind."""
    command = [RUN, "--", "sh", "-c", "echo up; sleep 999"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        (machine,) = children(process.pid)
        assert "qemu-system-x86_64" in Path(f"/proc/{machine}/cmdline").read_text()
        process.send_signal(number)
        assert process.wait(20) == -number
        wait_for_death(machine)


def test_machine_check(guest: Guest) -> None:
    """A script of the caller's own, shared into the guest, raises machine checks that the kernel really handles."""
    # The packages of tests/kernel, so that one image serves both.
    packages = ("dosfstools", "e2fsprogs", "xfsprogs")
    done = guest.run("/mnt/share/machine_check.py", share=SCRIPTS, packages=packages)
    assert done.status == 0
    seen = json.loads(done.stdout)
    assert seen["statuses"] == [0, 0]
    assert all("recovery action for dirty LRU page: Recovered" in line for line in seen["lines"])
    assert seen["pages"] == ["saved b", "saved b"]
    assert seen["nonsense"] == 2
    assert seen["mkfs.xfs"] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--share", "/nonexistent"], "/nonexistent"),
        (["--base", "v0"], "v0"),
    ],
)
def test_bad_options(options: Sequence[str], reason: str) -> None:
    done = subprocess.run([RUN, *options, "--", "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert reason in done.stderr


def test_needs_root() -> None:
    """Whoever is not root is told so at once, and nothing is installed or built."""
    done = subprocess.run(
        ["/usr/bin/python3", "-B", "-c", "import sys, vm.cli; sys.exit(vm.cli.main(['--', 'true']))"],
        cwd=TREE,
        user=65534,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 125
    assert "must run as root" in done.stderr
