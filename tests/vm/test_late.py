# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backend tracefs on Debian's own kernels: what userspace can do there, seen in the guest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.scale import is_full, scaled
from tests.vm.conftest import Guest, Result
from vm.host import TREE

PACKAGES = ("e2fsprogs", "xfsprogs", "dosfstools")
RELEASES = {"v6.1": "6.1.", "v6.12": "6.12.", "v7": "7."}
KILLED = 9
PANIC = 99

Told = dict[str, list[dict[str, Any]]]

ROUNDS = scaled(2, 50)
STORM_PAGES = scaled(500, 5_000)
TIMEOUT = scaled(1200, 5400)

# Of the true panics, the first and no more in a usual run; "large" is P3 where the kernel cannot split it.
PANICS = [
    ("v6.12", "xfs large", "srao"),
    ("v6.1", "vfat write", "srao"),
    ("v7", "ext4 write", "inject"),
    ("v7", "ext4 large", "srao"),
    ("v6.12", "ext4 write", "srao"),
    ("v6.12", "vfat write", "inject"),
    ("v6.1", "ext4 write", "srao"),
    ("v7", "vfat write", "srao"),
]  # fmt: skip


def late(guest: Guest, base: str, share: Path, *words: str, module: str = "late") -> Result:
    for package in ("tests/vm/guest", "tests/kernel/guest"):
        shutil.copytree(TREE / package, share / package, dirs_exist_ok=True)
    shell = 'cd /mnt/share && exec python3 -m "tests.vm.guest.$0" "$@"'
    return guest.run(
        "sh", "-c", shell, module, *words, kernel="stock", base=base, packages=PACKAGES, share=share, timeout=TIMEOUT
    )


@pytest.fixture(scope="module", params=RELEASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def told(guest: Guest, base: str, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the guest told, by step."""
    cases = "all" if is_full() else str(2 * list(RELEASES).index(base))  # other cases on each kernel's paths
    done = late(guest, base, tmp_path_factory.mktemp(base), "main", cases, str(ROUNDS), str(STORM_PAGES))
    return by_step(done)


def by_step(done: Result) -> Told:
    assert done.status == 0
    found: Told = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        found.setdefault(said.pop("step"), []).append(said)
    return found


def test_status_says_in_one_line_what_this_kernel_can_do(told: Told, base: str) -> None:
    (status,) = told["status"]
    assert status["kernel"].startswith(RELEASES[base])
    first, *rest = status["text"].splitlines()
    assert first == (
        "Enforcement: late (backend tracefs): this kernel lacks memory.failure_dirty_action; kill and panic come some"
        " time after the data is gone, stale reads can get out meanwhile; watches P1 P2 P3 P4 P5"
    )
    (row,) = [line for line in rest if "panics.service" in line]
    assert row.split()[1:] == ["panic", "/etc/systemd/system/panics.service.d/50-policy.conf:2", "applied"]


def test_every_action_on_every_path(told: Told) -> None:
    """Each loss is its unit's, with the page that it was; the unit does what it is set to, and no other does."""
    cases = told["loss"]
    # 6 paths, 2 injections, 3 actions; a cgroup below the unit's; what ends the negatives.
    assert len(cases) == 6 * scaled(1, 2 * 3) + 2
    assert len({(case["injection"], case["action"]) for case in cases}) == 2 * 3
    for case in cases:
        loss, record, action = case["loss"], case["record"], case["action"]
        where = f"{case['path']} {case['injection']} {action}"
        assert (loss["pages"], loss["action"]) == (1, action), where
        assert loss["cgroup_id"] == case["charged"], where
        assert loss["detail"]["Device"] == case["device"], where
        assert loss["detail"]["Inode"] == case["inode"], where
        assert loss["detail"]["Positions"] == [5 * 4096], where
        assert loss["detail"]["PageFrames"] == [case["pfn"]], where
        assert loss["detail"]["Enforcement"] == record["CGPOLICY_ENFORCEMENT"] == "late", where
        assert record["CGPOLICY_BACKEND"] == "tracefs", where
        assert record["CGPOLICY_OFFSET"] == str(5 * 4096), where
        if action == "kill":
            assert loss["detail"]["Reaction"] == "killed", where
            assert (case["status"], case["after"]) == (KILLED, ["failed", "signal"]), where
        else:
            assert case["after"] == ["active", "success"], where
        assert case["sysrq"].strip("\0") == ("c" if action == "panic" else ""), where


def test_losses_are_counted(told: Told) -> None:
    counted = [
        (case["shown"]["FailureDirty"], case["shown"]["FailureDirtyKill"])
        for case in told["loss"]
        if case["action"] == "continue"
    ]
    assert counted == [(number, 0) for number in range(1, len(counted) + 1)]


def test_what_is_no_loss_causes_nothing(told: Told) -> None:
    kinds = {case["what"] for case in told["no loss"]}
    assert kinds == {
        "anonymous", "shared_anonymous", "tmpfs", "memfd", "hugetlbfs", "clean", "written_back", "soft_offlined"
    }  # fmt: skip
    assert all(case["poisoned"] for case in told["no loss"])
    assert [case["sysrq"].strip("\0") for case in told["no loss"]] == [""] * len(told["no loss"])
    # Of panics.service: those of the matrix, and the one after these.
    panics = sum(case["action"] == "panic" for case in told["loss"])
    assert told["no losses"] == [{"counted": panics}]


@pytest.mark.parametrize(
    "step",
    [
        "undisturbed", "daemon stopped", "reactor killed", "daemon killed", "other tracer", "instance removed",
        "probes taken away",
    ],
)  # fmt: skip
def test_it_recovers(told: Told, step: str) -> None:
    (seen,) = told[step]
    assert (seen["status"], seen["reaction"]) == (KILLED, "killed")


def test_the_reactor_is_quick(told: Told) -> None:
    (seen,) = told["undisturbed"]
    fifo, reset_on_fork = 1, 0x40000000
    assert seen["scheduling"] == fifo | reset_on_fork
    assert seen["locked"] > 5000  # KiB


def test_another_tracer_is_left_alone_and_leaves_us_alone(told: Told) -> None:
    assert told["other tracer's"] == [{"lines": 1}]
    assert told["stopped"][0]["others"] == 1


def test_whoever_takes_the_probes_away_is_reported(told: Told) -> None:
    (said,) = told["said"]
    assert said["journal"]


def test_no_probe_is_left_behind(told: Told) -> None:
    none = {"probes": [], "instance": False, "events": False}
    assert {name: told["stopped"][0][name] for name in none} == none
    assert told["started"][0]["probes"]
    assert told["killed"] == [none]


def test_the_instance_cannot_be_removed_while_it_is_used(told: Told) -> None:
    assert told["instance removed"][0]["refused"] == "EBUSY"


def test_a_service_that_is_stopped_has_not_failed(told: Told) -> None:
    assert told["stopped"][0]["result"] == ["inactive", "success"]


def test_nobody_but_root_can_read_or_disarm(told: Told) -> None:
    (seen,) = told["unprivileged"]
    assert seen["reading"] != 0 and seen["disarming"] != 0 and seen["same"]
    assert "(run as root)" in seen["said"]


def test_no_innocent_run_is_killed(told: Told) -> None:
    """Killed by the first of thirty losses, the unit begins anew; the others do not touch that run."""
    rounds = told["round"]
    assert [(each["status"], each["same"], each["restarts"]) for each in rounds] == [(KILLED, True, 1)] * ROUNDS
    (end,) = told["innocent"]
    assert sum(end["reactions"].values()) == 30 * ROUNDS
    assert end["reactions"]["killed"] >= ROUNDS
    assert "could not be carried out" not in end["reactions"]


def test_a_storm_is_counted_and_does_not_make_the_reactor_grow(told: Told) -> None:
    (seen,) = told["storm"]
    assert seen["reported"] == {"continues.service": STORM_PAGES} or seen["missed"]
    assert seen["reports"] < STORM_PAGES / 4
    assert seen["after"] - seen["before"] < 4096  # KiB


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        ("nothing", "this kernel has what they need"),
        ("permission", "run as root"),
        ("ftrace", "sysctl kernel.ftrace_enabled=1"),
        ("kprobes", "echo 1 > /sys/kernel/debug/kprobes/enabled"),
        ("btf", "boot a kernel that is built with CONFIG_DEBUG_INFO_BTF"),
        ("tracefs", "systemctl start sys-kernel-tracing.mount"),
        ("lockdown", "boot with lockdown=integrity or none"),
    ],
)
def test_what_a_kernel_lacks_is_named_with_its_cure(told: Told, lack: str, said: str) -> None:
    (seen,) = [each for each in told["lacking"] if each["what"] == lack]
    if "refused" in seen:  # there is no way to take that away from newer kernels
        assert (lack, seen["refused"]) == ("ftrace", "ENOTSUP")
        assert told["status"][0]["kernel"].startswith("7.")
        return
    assert seen["status"] == 1  # at the least for the lack of memory.failure_dirty_action
    assert said in seen["said"]


@pytest.mark.parametrize("when", ["locked down", "locked down later"])
def test_a_kernel_that_is_locked_down_enforces_nothing_and_says_so(told: Told, when: str) -> None:
    (seen,) = told[when]
    first = seen["status"].splitlines()[0]
    assert first.startswith("Enforcement: none")
    assert "the kernel is locked down (boot with lockdown=integrity or none)" in first


def test_a_unit_says_that_its_policy_is_not_enforced(told: Told) -> None:
    assert told["locked down"][0]["unit"] == "not-enforced"


@pytest.mark.parametrize(("where", "path", "injection"), PANICS[: scaled(1, len(PANICS))])
def test_panic(guest: Guest, tmp_path: Path, where: str, path: str, injection: str) -> None:
    done = late(guest, where, tmp_path, "panic", *path.split(), injection)
    assert done.status == PANIC
    assert "cgpolicyd: 0x" in done.stderr
    assert "dirty page cache lost: dev " in done.stderr
    assert "Kernel panic - not syncing: sysrq triggered crash" in done.stderr


# The probes alone, without a daemon ---------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(guest: Guest, base: str, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the probes say of every path, and of what is no loss: minutes of each kernel, so with --full only."""
    if not is_full():
        pytest.skip("with tests/run --full")
    return by_step(late(guest, base, tmp_path_factory.mktemp(base), module="kprobes"))


def test_the_probes_attribute_every_path(probed: Told) -> None:
    cases = {step: seen[0] for step, seen in probed.items() if "expected" in seen[0]}
    assert len(cases) == 9 * 2
    for step, seen in cases.items():
        assert seen["losses"] == [seen["expected"]], step
        assert seen["in_time"], step


def test_the_probes_pass_over_what_is_no_loss(probed: Told) -> None:
    cases = {step: seen[0] for step, seen in probed.items() if "poisoned" in seen[0]}
    assert len(cases) == 14
    assert {step: seen["losses"] for step, seen in cases.items()} == dict.fromkeys(cases, [])


def test_the_probes_know_the_path_of_the_charged_cgroup(probed: Told, base: str) -> None:
    (limit,) = probed["at the limit"]
    assert limit["lineages"] == [limit["ids"]]
    (below,) = probed["below the limit"]
    assert below["lineages"] == [[*below["ids"][:12], 0, below["ids"][-1]]]
    assert probed["root"][0]["lineages"] == [[]]
    (removed,) = probed["removed"]
    # Newer kernels charge the parent then.
    assert removed["lineages"] == [removed["ids"][:1] if base == "v7" else removed["ids"]]


def test_the_probes_are_quick_and_lose_nothing(probed: Told) -> None:
    assert len(probed["wakes"][0]["microseconds"]) == 5
    (storm,) = probed["storm"]
    assert (storm["right"], storm["dropped"]) == (True, 0)
    assert (probed["end"][0]["unattributed"], probed["end"][0]["dropped"]) == (0, 0)


def test_the_probes_are_taken_over_from_the_dead_only(probed: Told) -> None:
    (seen,) = probed["taken over"]
    assert "is in use" in seen["refusal"]
    assert seen["held"] and seen["left"]
    assert (seen["losses"], seen["after"]) == (1, [])
    assert probed["leftovers"][0]["after"] == probed["disarmed"][0]["after"] == []


def test_the_probes_notice_whoever_meddles(probed: Told) -> None:
    (seen,) = probed["disturbed"]
    faults, losses = seen["faults"], seen["losses"]
    assert faults.pop("") == faults.pop("again") == faults.pop("emptied") == ""
    assert all(faults.values())
    assert (losses["again"], losses["with another"]) == (1, 1)
    assert not seen["emptied"] and seen["after"] == []
    assert any("other/dirty" in line for line in seen["others"])
