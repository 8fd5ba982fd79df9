# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decide and apply for one unit without the daemon: what ExecStartPre=+cgpolicy apply %n needs.

Imports no GLib: a service's start waits for this.
"""

from __future__ import annotations

from dataclasses import dataclass

from cgpolicy.action import Action
from cgpolicy.cgroupfs import CgroupTree
from cgpolicy.error import NoSuchUnit, UserError, WriteFailed
from cgpolicy.policyfile import PolicyFiles
from cgpolicy.resolve import Decision, resolve
from cgpolicy.setting import read_setting
from cgpolicy.systemd import SystemdManager, UnitFacts, read_files
from cgpolicy.unitname import parent_slices


@dataclass(frozen=True, slots=True)
class Applied:
    """What apply() did; action None means that nothing is configured and nothing was written."""

    unit: str
    cgroup: str
    action: Action | None
    decision: Decision


def decide_from(facts: UnitFacts, systemd: SystemdManager, files: PolicyFiles) -> Decision:
    """Resolve a unit's policy from its facts; the slices around it are asked for."""
    slices = [(name, read_files(systemd.unit(name).files)) for name in parent_slices(facts.slice) if facts.slice]
    rule = files.machine_rule_of(facts.name)
    return resolve(
        facts.name, read_files(facts.files), machine_name=read_setting([rule]) if rule else None, slices=slices
    )


def existing(unit: str, systemd: SystemdManager) -> UnitFacts:
    """Return a unit's facts; raise NoSuchUnit where systemd has neither a file nor a process of it."""
    facts = systemd.unit(unit)
    if not facts.exists:
        raise NoSuchUnit(f"{unit}: systemd has no such unit", hint="see systemctl list-units --all")
    return facts


def decide(unit: str) -> Decision:
    """Return what a unit's policy is to be; raise UserError."""
    systemd = SystemdManager()
    try:
        return decide_from(existing(unit, systemd), systemd, PolicyFiles())
    finally:
        systemd.close()


def apply(unit: str, tree: CgroupTree | None = None) -> Applied:
    """Write a unit's policy to its cgroup and see that it stands; raise UserError where that cannot be done."""
    tree = tree or CgroupTree()
    systemd = SystemdManager()
    try:
        facts = existing(unit, systemd)
        decision = decide_from(facts, systemd, PolicyFiles())
    finally:
        systemd.close()
    if decision.action is None:
        return Applied(unit, facts.cgroup, None, decision)
    if not facts.cgroup:
        raise UserError(f"{unit} has no control group", hint="is it running? in a unit file use ExecStartPre=+")
    tree.write_action(facts.cgroup, decision.action)
    tree.mark(facts.cgroup, decision.action)
    if tree.read_action(facts.cgroup) != decision.action:
        raise WriteFailed(f"{facts.cgroup}: the kernel did not keep {decision.action}")
    return Applied(unit, facts.cgroup, decision.action, decision)
