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
from vm import debian, machine, stock
from vm.host import TREE, HarnessError, install_packages
from vm.kernel import Kernel

RUN = str(TREE / "vm/run")
FILE_SYSTEMS = ("dosfstools", "e2fsprogs", "xfsprogs")  # as tests/kernel has them, so that one image serves both


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
    done = guest.run("/mnt/share/machine_check.py", share=SCRIPTS, packages=FILE_SYSTEMS)
    assert done.status == 0
    seen = json.loads(done.stdout)
    assert seen["statuses"] == [0, 0]
    assert all("recovery action for dirty LRU page: Recovered" in line for line in seen["lines"])
    assert seen["pages"] == ["saved b", "saved b"]
    assert seen["nonsense"] == 2
    assert seen["mkfs.xfs"] == 0


@pytest.mark.parametrize(("base", "release"), [("v6.1", "6.1."), ("v6.12", "6.12."), ("v7", "7.")])
def test_stock_kernels(guest: Guest, base: str, release: str) -> None:
    """Debian's own kernels of each series run under the same guest, have their modules and handle machine checks."""
    script = (
        "set -e; uname -r; modprobe -a hwpoison-inject loop vfat xfs; systemctl is-system-running;"
        "exec /mnt/share/machine_check.py"
    )
    done = guest.run("sh", "-c", script, kernel="stock", base=base, share=SCRIPTS, packages=FILE_SYSTEMS)
    assert done.status == 0
    running, state, checked = done.stdout.splitlines()
    assert running.startswith(release)
    assert state == "running"
    # Of a file's large folios, which ext4 has in 7.x, the kernel says "unsplit thp: Failed".
    handled = re.compile("recovery action for (dirty LRU page: Recovered|unsplit thp: Failed)")
    assert all(handled.search(line) for line in json.loads(checked)["lines"])


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let suites have the versions that are in this dictionary, and no others."""
    versions: dict[str, str] = {}

    def newest(archive: debian.Archive, package: str) -> tuple[str, str]:
        if archive.suite not in versions:
            raise HarnessError(f"apt-get update failed for {archive.suite}")
        return versions[archive.suite], ""

    monkeypatch.setattr(debian.Archive, "newest", newest)
    return versions


@pytest.mark.parametrize(
    ("versions", "suite"),
    [
        ({"trixie-backports": "7.3.4-1~bpo13+1", "forky": "7.2.12-1", "sid": "7.2.13-1"}, "trixie-backports"),
        ({"trixie-backports": "7.2.13-1~bpo13+1", "forky": "7.2.9-1", "sid": "7.2.13-1"}, "sid"),
        ({"trixie-backports": "7.10.1-1~bpo13+1", "forky": "7.9.3-1", "sid": "8.0.2-1"}, "trixie-backports"),
        ({"forky": "7.2.12-1", "sid": "70.1-1"}, "forky"),
    ],
)
def test_newest_of_a_series(suites: dict[str, str], versions: dict[str, str], suite: str) -> None:
    """The newest kernel of a series is taken, wherever it is; suites that moved on or are not there do not matter."""
    suites.update(versions)
    assert debian.newest_archive(stock.PACKAGE, "v7").suite == suite


def test_a_series_that_is_gone(suites: dict[str, str]) -> None:
    suites.update({"forky": "8.1.2-1", "sid": "8.2.1-1"})
    with pytest.raises(HarnessError) as failure:
        stock.stock("trixie", "v7")
    assert "no linux-image-amd64 of v7 is to be had any more" in failure.value.message
    for said in ("apt-get update failed for trixie-backports", "forky: 8.1.2-1", "sid: 8.2.1-1"):
        assert said in failure.value.message
    assert "choose another --base" in (failure.value.hint or "")


def test_lists_that_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has left the mirror is looked up again, in as many suites as may have had it."""
    tried = []

    def replaced(suite: str, base: str | None) -> Kernel:
        tried.append((suite, base))
        if len(tried) <= len(debian.BASES["v7"]):
            raise debian.Renewed("not on the mirror any more")
        return Kernel(Path("vmlinuz"))

    monkeypatch.setattr(machine, "stock", replaced)
    request = machine.Request(("true",), kernel="stock", base="v7")
    assert machine.select_kernel(request).image == Path("vmlinuz")
    assert set(tried) == {("trixie", "v7")}


@pytest.mark.parametrize("command", [["cat"], ["xz", "--check=crc32", "--stdout"], ["zstd", "--stdout"]])
def test_compressed_modules(tmp_path: Path, command: Sequence[str]) -> None:
    install_packages(stock.HOST_PACKAGES)
    suffix = {"cat": "", "xz": ".xz", "zstd": ".zst"}[command[0]]
    module = tmp_path / f"loop.ko{suffix}"
    with module.open("wb") as compressed:
        subprocess.run(command, input=b"\x7fELF" * 999, stdout=compressed, check=True)
    stock.uncompress(module, tmp_path / "plain.ko", tmp_path / "log")
    assert (tmp_path / "plain.ko").read_bytes() == b"\x7fELF" * 999


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--base", "v6.1"], "there is no series for v6.1"),
        (["--base", "v6.1", "--kernel", "patched"], "Debian's own kernel is --kernel stock"),
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
