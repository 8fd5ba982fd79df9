# SPDX-License-Identifier: LGPL-2.1-or-later
"""Journal records as journald would receive them, and their entries in the catalog."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cgpolicy import journal
from cgpolicy.action import Action
from cgpolicy.losses import FileLoss
from cgpolicy.unitfile import Problem

TREE = Path(__file__).resolve().parents[2]
LOSS = FileLoss(4711, (254, 16), 1234, Action.KILL, 3, (8192, 12288), (0x1A2B3C, 0x1A2B3D), (4711,))
WHERE = "at device 254:16 inode 1234 offset 8192; action kill (synchronous)"

# Runs in a mount namespace of its own, where journald's socket is this program's.
RECEIVER = """
import json, os, socket
from tests.unit import test_journal
from cgpolicy import journal
os.makedirs(journal.SOCKET.parent)
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind(str(journal.SOCKET))
for send in (test_journal.send_loss, test_journal.send_problem, test_journal.send_unseen):
    send()
    print(json.dumps(dict(line.split("=", 1) for line in receiver.recv(65536).decode().splitlines())))
"""


def send_loss() -> None:
    journal.record_loss("web.service", "", "/system.slice/web.service", LOSS, "kernel", "synchronous")


def send_problem() -> None:
    journal.warn_problem("web.service", Problem("/etc/x.conf", 3, "no = in line: x"))


def send_unseen() -> None:
    journal.record_unseen("web.service", "8f2a", "/system.slice/web.service", 7, "kernel", "synchronous")


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    shell = 'mount -t tmpfs tmpfs /run && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", RECEIVER]
    result = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=True)
    received = [json.loads(line) for line in result.stdout.splitlines()]
    # CODE_*: where pystemd calls libsystemd.
    return [{name: record[name] for name in record if not name.startswith("CODE_")} for record in received]


def test_what_a_record_of_a_loss_holds(records: list[dict[str, str]]) -> None:
    assert records[0] == {
        "MESSAGE": f"web.service: dirty page cache lost: 3 pages, the first {WHERE}",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "cgpolicyd",
        "MESSAGE_ID": journal.LOSS_ID,
        "OBJECT_SYSTEMD_UNIT": "web.service",
        "CGPOLICY_UNIT": "web.service",  # and no INVOCATION_ID, which was empty
        "CGPOLICY_ACTION": "kill",
        "CGPOLICY_CGROUP": "/system.slice/web.service",
        "CGPOLICY_CGROUP_ID": "4711",
        "CGPOLICY_DEVICE": "254:16",
        "CGPOLICY_INODE": "1234",
        "CGPOLICY_OFFSET": "8192",
        "CGPOLICY_PFN": "0x1a2b3c",
        "CGPOLICY_PAGES": "3",
        "CGPOLICY_BACKEND": "kernel",
        "CGPOLICY_ENFORCEMENT": "synchronous",
    }


def test_what_a_record_of_a_problem_holds(records: list[dict[str, str]]) -> None:
    assert records[1] == {
        "MESSAGE": "/etc/x.conf:3: no = in line: x",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "cgpolicyd",
        "MESSAGE_ID": journal.PROBLEM_ID,
        "OBJECT_SYSTEMD_UNIT": "web.service",
        "CGPOLICY_PATH": "/etc/x.conf",
        "CGPOLICY_LINE": "3",
    }


def test_what_a_record_of_unseen_losses_holds(records: list[dict[str, str]]) -> None:
    said = "web.service: dirty page cache lost: 7 pages more than were seen one by one, by memory.events of "
    assert records[2].pop("MESSAGE") == f"{said}/system.slice/web.service; see the kernel log for which"
    assert records[2] == {
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "cgpolicyd",
        "MESSAGE_ID": journal.UNSEEN_ID,
        "OBJECT_SYSTEMD_UNIT": "web.service",
        "CGPOLICY_UNIT": "web.service",
        "INVOCATION_ID": "8f2a",
        "CGPOLICY_CGROUP": "/system.slice/web.service",
        "CGPOLICY_PAGES": "7",
        "CGPOLICY_BACKEND": "kernel",
        "CGPOLICY_ENFORCEMENT": "synchronous",
    }


def test_the_catalog_speaks_of_these_records_and_their_fields(records: list[dict[str, str]]) -> None:
    catalog = (TREE / "units/cgpolicy.catalog").read_text()
    entries = dict(re.findall(r"^-- ([0-9a-f]{32})\n(.*?)(?=^-- |\Z)", catalog, re.DOTALL | re.MULTILINE))
    assert set(entries) == {record["MESSAGE_ID"] for record in records}
    for record in records:
        fields = set(re.findall("@([A-Z_]+)@", entries[record["MESSAGE_ID"]]))
        assert fields and fields <= record.keys()


@pytest.mark.parametrize(
    ("unit", "cgroup", "pages", "start"),
    [
        ("web.service", "/system.slice/web.service/payload", 1, "web.service: dirty page cache lost: page"),
        ("", "/elsewhere", 1, "/elsewhere: dirty page cache lost: page"),
        ("", "", 2, "cgroup 4711, which is gone: dirty page cache lost: 2 pages, the first"),
    ],
)
def test_without_a_journal_the_message_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unit: str, cgroup: str,
    pages: int, start: str,
) -> None:
    monkeypatch.setattr(journal, "SOCKET", tmp_path / "none")
    journal.record_loss(unit, "", cgroup, replace(LOSS, pages=pages), "kernel", "synchronous")
    assert capsys.readouterr().err == f"<3>{start} {WHERE}\n"


def test_the_message_says_what_came_of_a_late_reaction(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "SOCKET", tmp_path / "none")
    journal.record_loss("web.service", "", "", replace(LOSS, reaction="nobody left to kill"), "tracefs", "late")
    assert capsys.readouterr().err.endswith("action kill (late): nobody left to kill\n")


def test_pages_of_several_files_have_no_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "SOCKET", tmp_path / "none")
    loss = replace(LOSS, device=(0, 0), inode=0, positions=())
    journal.record_loss("web.service", "", "", loss, "tracefs", "late")
    expected = "web.service: dirty page cache lost: 3 pages of several files; action kill (late)\n"
    assert capsys.readouterr().err == f"<3>{expected}"
