# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real domain of libvirt, registered with machined, in a guest whose bus is dbus-broker's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vm.conftest import Guest

Steps = dict[str, dict[str, Any]]

PACKAGES = ("dbus-broker", "libvirt-clients", "libvirt-daemon-system", "qemu-system-x86", "systemd-container")
RULES = "/etc/cgpolicy/machines"
UUID = "f7f2a1d0-0c51-4b9e-9d0b-9a8a3c1f2e4d"


@pytest.fixture(scope="module")
def told(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    share = tmp_path_factory.mktemp("libvirt")
    return {step.pop("step"): step for step in guest.module("machines", share, packages=PACKAGES, timeout=1200)}


@pytest.mark.parametrize(
    ("step", "number", "source", "rule"),
    [
        ("first", 1, "machine-name", "web01"),
        ("second", 2, "machine-name", "web01"),
        ("by uuid", 3, "machine-uuid", UUID),
    ],
)
def test_rule_follows_the_machine(told: Steps, step: str, number: int, source: str, rule: str) -> None:
    """By name and by UUID, whatever number libvirt gives to the run."""
    seen = told[step]
    assert seen["scope"] == rf"machine-qemu\x2d{number}\x2dweb01.scope"
    assert (seen["value"], seen["State"]) == ("kill", "applied")
    assert (seen["Source"], seen["SourcePath"]) == (source, f"{RULES}/{rule}.conf")


def test_lost_below_the_scope(told: Steps) -> None:
    """libvirt charges a domain's pages to a cgroup below its scope: they follow the scope's policy, and are its."""
    seen = told["lost"]
    assert (seen["state"], seen["action"]) == ("shut off", "kill")
    assert seen["cgroup"].startswith(r"/machine.slice/machine-qemu\x2d3\x2dweb01.scope/libvirt")
    assert seen["invocation"][0] == seen["invocation"][1]


def test_lost_after_the_bus_was_restarted(told: Steps) -> None:
    assert told["again"] == {"signalled": 1, "pages": "1", "action": "kill"}


def test_bus_of_dbus_broker_restarted(told: Steps) -> None:
    assert told["broker"] == {"unit": "dbus-broker.service", "after": "kill", "again": True}
