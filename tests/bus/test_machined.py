# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machine rules by UUID, which only systemd-machined can tell."""

from __future__ import annotations

import uuid

import pytest

from cgpolicy.client import NAME
from tests.bus.fakes import FakeMachined
from tests.bus.privatebus import Failed, wait
from tests.bus.world import World

UUID = uuid.UUID("8a1c3b6e-7c0c-4b57-9a53-0c8f3a2f1e44")
SCOPE = r"machine-qemu\x2d7\x2dweb01.scope"
CGROUP = f"/machine.slice/{SCOPE}"


@pytest.mark.parametrize("given", [str(UUID), UUID.hex, str(UUID).upper()])
@pytest.mark.parametrize("running", [True, False])
def test_rule_by_uuid_comes_before_the_name(world: World, running: bool, given: str) -> None:
    world.tree.make(CGROUP)
    world.systemd.add(SCOPE, slice="machine.slice", cgroup=CGROUP)
    machined = FakeMachined(world.client())
    if running:
        machined.add("qemu-7-web01", SCOPE, UUID)
    world.start()
    world.root_client.call("SetMachinePolicy", "(sst)", "web01", "continue", 0)
    world.root_client.call("SetMachinePolicy", "(sst)", given, "kill", 0)
    if not running:
        assert world.tree.said(CGROUP) == "continue"
        machined.add("qemu-7-web01", SCOPE, UUID)
    wait(lambda: world.tree.said(CGROUP) == "kill", "the rule by UUID")
    unit = world.unit(SCOPE)
    assert unit["Source"] == "machine-uuid"
    assert unit["SourcePath"] == str(world.root / f"etc/cgpolicy/machines/{UUID}.conf")
    world.root_client.call("UnsetMachinePolicy", "(st)", given, 0)
    assert world.tree.said(CGROUP) == "continue"
    assert world.unit(SCOPE)["Source"] == "machine-name"


@pytest.mark.parametrize("given", [str(UUID), UUID.hex])
def test_panic_by_name_is_as_hard_to_disarm_by_uuid(world: World, given: str) -> None:
    world.tree.make(CGROUP)
    world.systemd.add(SCOPE, slice="machine.slice", cgroup=CGROUP)
    FakeMachined(world.client()).add("qemu-7-web01", SCOPE, UUID)
    world.start()
    world.root_client.call("SetMachinePolicy", "(sst)", "web01", "panic", 0)
    polkit = world.polkit("deny")
    with pytest.raises(Failed):
        world.nobody().call("SetMachinePolicy", "(sst)", given, "kill", 0)
    assert [question.action_id for question in polkit.questions] == [f"{NAME}.set-panic"]
    assert world.tree.said(CGROUP) == "panic"


def test_rule_by_the_name_that_only_machined_knows(world: World) -> None:
    world.service("appliance.service")
    FakeMachined(world.client()).add("db", "appliance.service", uuid.UUID(int=0))
    world.start()
    world.root_client.call("SetMachinePolicy", "(sst)", "db", "panic", 0)
    wait(lambda: world.tree.said("/system.slice/appliance.service") == "panic", "the rule by name")
    assert world.unit("appliance.service")["Source"] == "machine-name"
    polkit = world.polkit("deny")
    with pytest.raises(Failed):
        world.nobody().call("UnsetMachinePolicy", "(st)", "db", 0)
    assert [question.action_id for question in polkit.questions] == [f"{NAME}.set-panic"]


def test_panic_is_as_hard_to_disarm_by_another_spelling_of_a_domain(world: World) -> None:
    world.tree.make(CGROUP)
    world.systemd.add(SCOPE, slice="machine.slice", cgroup=CGROUP)
    world.start()
    world.root_client.call("SetMachinePolicy", "(sst)", "web_01", "panic", 0)
    assert world.tree.said(CGROUP) == "panic"
    polkit = world.polkit("deny")
    for name in ("web01", "web+01", "web_01"):
        with pytest.raises(Failed):
            world.nobody().call("SetMachinePolicy", "(sst)", name, "kill", 0)
    assert {question.action_id for question in polkit.questions} == {f"{NAME}.set-panic"}
