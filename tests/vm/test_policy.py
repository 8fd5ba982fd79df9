# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies on a real systemd: set, refused, wrong, lost and found again, each in one boot of the guest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.vm.conftest import Guest

Steps = dict[str, dict[str, Any]]

ERROR = "Error org.cgpolicy1.Error."

# Name, type, signature, result: org.cgpolicy1(5) in busctl's words.
INTERFACE = {
    (".Explain", "method", "s", "a(ssuss)"),
    (".GetUnit", "method", "s", "o"),
    (".ListUnits", "method", "as", "a(ssssso)"),
    (".Reload", "method", "-", "-"),
    (".SetMachinePolicy", "method", "sst", "-"),
    (".SetUnitPolicy", "method", "ssbt", "-"),
    (".UnsetMachinePolicy", "method", "st", "-"),
    (".UnsetUnitPolicy", "method", "sbt", "-"),
    (".Backend", "property", "s", '"kernel"'),
    (".Enforcement", "property", "s", '"synchronous"'),
    (".EnforcementDetail", "property", "s", '""'),
    (".NFailed", "property", "u", "0"),
    (".NUnits", "property", "u", "0"),
    (".Version", "property", "s", '"0.1"'),
    (".DirtyDataLost", "signal", "sststa{sv}", "-"),
    (".UnitPolicyChanged", "signal", "ssss", "-"),
}


def steps(guest: Guest, module: str, share: Path) -> Steps:
    """Run a module in the guest and return what it told, by step."""
    return {step.pop("step"): step for step in guest.module(module, share)}


@pytest.fixture(scope="module")
def policy(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return steps(guest, "policy", tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def recovery(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return steps(guest, "recovery", tmp_path_factory.mktemp("recovery"))


@pytest.fixture(scope="module")
def loss(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return steps(guest, "loss", tmp_path_factory.mktemp("loss"))


# Set by hand ----------------------------------------------------------------------------------


def test_set_at_once(policy: Steps) -> None:
    """The literal call of the README changes the file before it returns, and writes the runtime drop-in."""
    seen = policy["set"]
    assert (seen["before"], seen["value"]) == ("continue", "kill")
    assert seen["drop_in"].splitlines()[-2:] == ["[X-CgPolicy]", "MemoryFailureDirtyAction=kill"]
    shown = seen["shown"]
    assert (shown["Source"], shown["State"], shown["EffectiveAction"]) == ("unit-file", "applied", "kill")
    assert (shown["SourcePath"], shown["SourceLine"]) == ("/run/systemd/system/foo.service.d/50-cgpolicy.conf", 3)
    assert shown["ControlGroup"] == "/system.slice/foo.service"
    assert policy["unset"] == {"value": "continue", "drop_in": False}
    assert policy["set-property"] == {"value": "panic", "drop_in": True}


def test_refused(policy: Steps) -> None:
    """Each wrong call has its own error, and none changes anything."""
    seen = policy["refused"]
    action, unit, name, kind, *unprivileged = seen["errors"]
    assert action.startswith(f"{ERROR}InvalidAction: 'halt'")
    assert unit.startswith(f"{ERROR}NoSuchUnit: nonexistent.service")
    assert name.startswith(f"{ERROR}InvalidUnitName: 'no unit name'")
    assert kind.startswith(f"{ERROR}NotSupported: cron.timer: a timer unit")
    for error in unprivileged:
        assert error.startswith(f"{ERROR}NotAuthorized: ")
    assert seen["value"] == "kill"
    assert seen["drop_in"] == policy["set"]["drop_in"]
    assert seen["others"] == ["/run/systemd/system/foo.service.d/50-cgpolicy.conf"]
    assert "left behind" not in policy


def test_introspection(policy: Steps) -> None:
    lines = [tuple(line.split()[:4]) for line in policy["introspected"]["text"].splitlines()[1:]]
    assert set(lines) == INTERFACE


def test_command(policy: Steps) -> None:
    """The command does the same, says what came of it, and its exit status tells failures apart."""
    assert policy["cgpolicy set"]["value"] == "kill"
    assert policy["cgpolicy set"]["said"].startswith("foo.service: kill; ")
    status = policy["cgpolicy status"]
    assert status["text"].startswith("Enforcement: synchronous (backend kernel): the kernel acts before the data")
    (line,) = [line for line in status["text"].splitlines() if "foo.service" in line]
    assert line.split()[-3:] == ["kill", "/etc/systemd/system/foo.service.d/50-cgpolicy.conf:3", "applied"]
    assert [row["unit"] for row in status["listed"]] == ["foo.service"]
    assert policy["exits"]["exits"] == [0, 4, 2, 4, 0, 0]
    assert policy["exits"]["denied"][0] == 1
    assert "org.cgpolicy1.set-policy needs authentication" in policy["exits"]["denied"][1]
    assert policy["exits"]["value"] == "kill"
    assert policy["cgpolicy unset"]["value"] == "continue"


def test_doctor(policy: Steps) -> None:
    assert [finding["good"] for finding in policy["doctor"]["findings"]] == [True] * 4


def test_slice_default(policy: Steps) -> None:
    """A slice's setting is the default of its units, an exception stands, and the slice's own file is left alone."""
    seen = policy["slice"]
    assert seen["values"] == {"plain.service": "kill", "special.service": "continue"}
    assert seen["slice"] == "continue"
    assert [(row["kind"], row["value"]) for row in seen["why"]] == [("unit-file", "continue"), ("slice", "kill")]
    assert seen["why"][0]["verdict"] == "in force"
    assert seen["why"][1]["verdict"].startswith("lost: unit-file /etc/systemd/system/special.service.d/")


def test_machine_rule(policy: Steps) -> None:
    """A rule for a machine's name counts for its scope, whatever number the scope's name carries."""
    assert policy["machine"]["values"] == ["kill", "kill"]
    assert policy["machine"]["after"] == "continue"
    assert policy["machine"]["why"] == []


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("unknown", 3, "MemoryFailureDirtyAction=halt: expected panic, kill or continue; keeping unset"),
        ("junk", 2, "not valid UTF-8; the file is ignored from here on"),
        ("long", 3, "line of 1048576 bytes or more; the file is ignored from here on"),
    ],
)
def test_bad_drop_in(policy: Steps, name: str, line: int, reason: str) -> None:
    """A bad drop-in is reported once with file and line, by the journal, explain and verify; others are unaffected."""
    path = f"/etc/systemd/system/{name}.service.d/50-policy.conf"
    seen = policy[name]
    assert seen["journal"] == [f"{path}:{line}: {reason}"]
    problem = {"kind": "problem", "path": path, "line": line, "value": "", "verdict": reason}
    assert problem in seen["why"]
    assert seen["verified"] == [1, f"{path}:{line}: {reason}\n"]
    assert seen["value"] == "continue"
    assert policy["good"]["value"] == "kill"
    assert policy["mended"] == {"verify": [1, 3], "value": "panic"}


def test_sandbox(policy: Steps) -> None:
    match = re.search(r"for cgpolicyd\.service: ([0-9.]+)", policy["security"]["text"])
    assert match
    assert float(match[1]) < 3.0


# Disturbed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "seen"),
    [
        ("started", {"value": "kill"}),
        ("kill -9", {"value": "kill", "late": "panic", "state": "applied"}),
        ("daemon-reload", {"value": "continue"}),
        ("daemon-reexec", {"value": "panic"}),
        ("restarted unit", {"value": "panic", "new_cgroup": True}),
        ("foreign write", {"once": "panic", "twice": "kill", "state": "failed"}),
        ("restarted daemon", {"value": "panic"}),
        ("drop-in removed", {"value": "continue"}),
        ("stopped daemon", {"value": "panic"}),
    ],
)
def test_recovery(recovery: Steps, step: str, seen: dict[str, Any]) -> None:
    """Values are right again without anyone's help; what others write is put right once and not fought over."""
    assert recovery[step] == seen


# Lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "result"), [("continue", "success"), ("kill", "signal")])
def test_loss(loss: Steps, action: str, result: str) -> None:
    """A true machine check: one journal record, one signal, the same file, page and invocation in both."""
    seen = loss[action]
    unit = seen["before"]["Id"]
    assert seen["before"]["value"] == action
    (record,) = seen["records"]
    signal = seen["signal"]
    detail: dict[str, Any] = signal["detail"]
    assert (signal["signal"], signal["unit"], signal["action"], signal["pages"]) == ("DirtyDataLost", unit, action, 1)
    assert (signal["cgroup"], signal["cgroup_id"]) == (f"/system.slice/{unit}", seen["before"]["ControlGroupId"])
    assert (detail["Device"], detail["Inode"], detail["Positions"]) == (seen["device"], seen["inode"], [3 * 4096])
    assert detail["InvocationID"] == seen["invocation"]
    wanted = {
        "CGPOLICY_ACTION": action,
        "CGPOLICY_DEVICE": "{}:{}".format(*seen["device"]),
        "CGPOLICY_INODE": str(seen["inode"]),
        "CGPOLICY_OFFSET": str(3 * 4096),
        "CGPOLICY_PAGES": "1",
        "CGPOLICY_ENFORCEMENT": "synchronous",
        "CGPOLICY_BACKEND": "kernel",
    }
    assert {name: record[name] for name in wanted} == wanted
    assert f"{unit}: dirty page cache lost: page at device" in seen["by_unit"]
    assert "Subject: Dirty page cache of" in seen["explained"]
    assert seen["result"] == result
    if action == "continue":
        assert (seen["after"]["FailureDirty"], seen["after"]["FailureDirtyKill"]) == (1, 0)


# On a kernel without the series ---------------------------------------------------------------


def test_stock_kernel(guest: Guest) -> None:
    """It can only be late there, and everything says so: the first line, what set says, and the doctor."""
    done = guest.run("sh", "-c", "cgpolicy set cgpolicyd kill; cgpolicy status; exec cgpolicy doctor", kernel="stock")
    assert done.status == 1
    said, first, *rest = done.stdout.splitlines()
    assert said.startswith("cgpolicyd.service: kill; ")
    assert said.endswith("; applied; enforcement late")
    assert first.startswith("Enforcement: late (backend tracefs): this kernel lacks memory.failure_dirty_action;")
    assert "stale reads can get out meanwhile" in first
    (row,) = [line for line in rest if "cgpolicyd.service" in line and "50-cgpolicy.conf" in line]
    assert row.endswith("applied")
    assert "problem memory.failure_dirty_action: no cgroup has it" in rest
