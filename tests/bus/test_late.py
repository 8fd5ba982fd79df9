# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon on a kernel without memory.failure_dirty_action, with a reactor of the test's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cgpolicy.policytable import CHARGED_FILE
from tests.bus.privatebus import wait
from tests.bus.world import World
from vm.host import TREE

WEB = "/system.slice/web.service"
KILL = "MemoryFailureDirtyAction=kill"
ARMED = {"armed": ["P1", "P2"], "refused": ["memory not locked"], "panic": True}


class Reactor:
    """Takes the place of cgpolicy-reactor beside the daemon."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.programs = world.root / "programs"
        self.programs.mkdir()
        (self.programs / "cgpolicyd").symlink_to(TREE / "units/cgpolicyd")
        (self.programs / "cgpolicy-reactor").symlink_to(TREE / "tests/bus/reactor.py")
        world.programs = self.programs
        os.mkfifo(world.root / "say")
        self._say = os.open(world.root / "say", os.O_RDWR)
        for slice_ in ("system.slice", "machine.slice"):
            (world.tree.path(slice_) / "memory.failure_dirty_action").unlink()
            (world.tree.path(slice_) / CHARGED_FILE).touch()

    def say(self, *messages: dict[str, Any]) -> None:
        os.write(self._say, "".join(f"{json.dumps(message)}\n" for message in messages).encode())

    def end(self) -> None:
        os.write(self._say, b"end\n")

    def told(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.world.root / "told").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def close(self) -> None:
        os.close(self._say)


@pytest.fixture
def reactor(world: World) -> Iterator[Reactor]:
    made = Reactor(world)
    yield made
    made.close()


def service(world: World, name: str, text: str, *, charged: bool = True) -> None:
    world.service(name, text, action=None)
    if charged:
        (world.tree.path(f"/system.slice/{name}") / CHARGED_FILE).touch()


def loss(world: World, lineage: list[int], **values: Any) -> dict[str, Any]:
    """A reactor's message of pages lost."""
    known = {
        "cgroup_id": lineage[-1], "device": [8, 1], "inode": 12, "action": "kill", "pages": 3,
        "positions": [0, 4096, 8192], "pfns": [16, 17, 18], "lineage": lineage, "reaction": "killed", "kills": 1,
    }  # fmt: skip
    return {"loss": known | values}


def test_policies_go_to_the_reactor(world: World, reactor: Reactor) -> None:
    service(world, "web.service", KILL)
    service(world, "bare.service", KILL, charged=False)
    reactor.say(ARMED)
    world.start()
    bus = world.root_client
    assert (bus.get("Backend"), bus.get("Enforcement")) == ("tracefs", "late")
    assert bus.get("EnforcementDetail") == "watches P1 P2, memory not locked"
    web = world.unit("web.service")
    assert (web["State"], web["EffectiveAction"], web["EffectiveFrom"]) == ("applied", "kill", WEB)
    assert world.unit("bare.service")["State"] == "no-controller"
    number = web["ControlGroupId"]
    wait(lambda: reactor.told() == [{"id": number, "cgroup": WEB, "action": "kill"}], "the policy")
    bus.call("SetUnitPolicy", "(ssbt)", "web.service", "panic", True, 0)
    wait(lambda: reactor.told()[1:] == [{"id": number, "cgroup": WEB, "action": "panic"}], "the new policy")
    world.restart_cgroup(WEB)
    (world.tree.path(WEB) / CHARGED_FILE).touch()
    world.settle()
    world.root_client.call("Reload")
    fresh = world.unit("web.service")["ControlGroupId"]
    assert fresh != number
    wait(lambda: {"id": fresh, "cgroup": WEB, "action": "panic"} in reactor.told(), "the new cgroup's policy")


def test_losses_are_reported_and_counted(world: World, reactor: Reactor) -> None:
    service(world, "web.service", KILL)
    reactor.say(ARMED)
    world.start()
    listener = world.nobody()
    number = world.unit("web.service")["ControlGroupId"]
    slice_id = world.tree.cgroup_id("/system.slice")
    below = loss(world, [slice_id, number, 2**40], kills=0, reaction="nobody left to kill")
    reactor.say(loss(world, [slice_id, number]), below)
    wait(lambda: len([1 for signal in listener.signals if signal.name == "DirtyDataLost"]) == 2, "DirtyDataLost")
    first, second = (signal.values for signal in listener.signals if signal.name == "DirtyDataLost")
    assert first[:5] == ("web.service", WEB, number, "kill", 3)
    assert first[5] == {
        "Device": (8, 1), "Inode": 12, "Positions": [0, 4096, 8192], "PageFrames": [16, 17, 18], "InvocationID": "",
        "Enforcement": "late", "Reaction": "killed",
    }  # fmt: skip
    # A cgroup below the unit's that is gone by now is the unit's all the same: its lineage says so.
    assert second[:5] == ("web.service", "", 2**40, "kill", 3)
    assert second[5]["Reaction"] == "nobody left to kill"
    web = world.unit("web.service")
    assert (web["FailureDirty"], web["FailureDirtyKill"]) == (6, 1)


def test_pages_of_several_files_are_reported_without_a_place(world: World, reactor: Reactor) -> None:
    service(world, "web.service", KILL)
    reactor.say(ARMED)
    world.start()
    listener = world.nobody()
    number = world.unit("web.service")["ControlGroupId"]
    lost = loss(world, [number], pages=5000, device=[0, 0], inode=0, positions=[])
    # Nothing is known of what was missed, and so it is only said: what comes next is reported as ever.
    reactor.say({"missed": 3}, lost)
    wait(lambda: "DirtyDataLost" in [signal.name for signal in listener.signals], "DirtyDataLost")
    (seen,) = (signal.values for signal in listener.signals if signal.name == "DirtyDataLost")
    assert seen[:5] == ("web.service", WEB, number, "kill", 5000)
    assert (seen[5]["Device"], seen[5]["Inode"], seen[5]["Positions"]) == ((0, 0), 0, [])
    assert world.unit("web.service")["FailureDirty"] == 5000


def test_meddling_is_survived(world: World, reactor: Reactor) -> None:
    service(world, "web.service", KILL)
    reactor.say(ARMED)
    world.start()
    number = world.unit("web.service")["ControlGroupId"]
    reactor.say({"fault": "somebody did"}, {"failed": "no kprobes", "hint": "boot another kernel"})
    wait(lambda: world.root_client.get("Enforcement") == "none", "the enforcement to be none")
    assert world.root_client.get("EnforcementDetail") == "no kprobes (boot another kernel)"
    assert world.unit("web.service")["State"] == "not-enforced"
    reactor.say(ARMED)
    wait(lambda: world.root_client.get("Enforcement") == "late", "the enforcement to be late")
    assert world.unit("web.service")["State"] == "applied"
    assert reactor.told() == [{"id": number, "cgroup": WEB, "action": "kill"}]


def test_the_reactors_end_is_the_daemons(world: World, reactor: Reactor) -> None:
    reactor.say(ARMED)
    daemon = world.start()
    reactor.end()
    wait(lambda: daemon.poll() is not None, "the daemon to end")
    assert daemon.returncode == 1


@pytest.mark.parametrize(
    ("broken", "detail"),
    [
        ("fails", "no BTF (boot another kernel)"),
        ("ends", "the reactor did not start (see journalctl -u cgpolicyd)"),
        ("missing", "cgpolicy-reactor (is cgpolicy installed in full?)"),
    ],
)
def test_without_a_reactor_nothing_is_enforced_and_all_else_works(
    world: World, reactor: Reactor, broken: str, detail: str
) -> None:
    service(world, "web.service", KILL)
    match broken:
        case "fails":
            reactor.say({"failed": "no BTF", "hint": "boot another kernel"})
        case "ends":
            reactor.end()
        case "missing":
            (reactor.programs / "cgpolicy-reactor").unlink()
    world.start()
    assert (world.root_client.get("Backend"), world.root_client.get("Enforcement")) == ("none", "none")
    assert str(world.root_client.get("EnforcementDetail")).endswith(detail)
    assert world.unit("web.service")["State"] == "not-enforced"
    assert (Path(world.root) / "told").exists() is False
