# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a policy needs to be enforced on this machine, checked piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cgpolicy.cgroupfs import POLICY_FILE, CgroupTree
from cgpolicy.client import Client
from cgpolicy.error import UserError
from cgpolicy.kprobes import LossProbes
from cgpolicy.losses import EVENT
from cgpolicy.status import STRENGTH


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and the next step if it is not as it has to be."""

    what: str
    good: bool
    found: str
    cure: str = ""


def examine(root: Path = Path("/")) -> list[Finding]:
    """Look at the kernel, the cgroup hierarchy and the daemon, the foundations first."""
    tree, tracing = CgroupTree(root / "sys/fs/cgroup"), root / "sys/kernel/tracing"
    patched = policy_file(tree)
    losses = tracepoint(tracing) if patched.good else probes(tracing, root / "sys/kernel/btf/vmlinux")
    return [hierarchy(tree), patched, losses, daemon()]


def hierarchy(tree: CgroupTree) -> Finding:
    what = "cgroup v2 with the memory controller"
    if tree.is_unified():
        return Finding(what, True, f"at {tree.root}")
    return Finding(what, False, f"not at {tree.root}", "boot with systemd.unified_cgroup_hierarchy=1")


def policy_file(tree: CgroupTree) -> Finding:
    if tree.is_supported():
        return Finding(POLICY_FILE, True, "this kernel has it")
    cure = "enforcement is late at best: boot a kernel with the series in kernel-patch/ (see its README.md)"
    return Finding(POLICY_FILE, False, "no cgroup has it", cure)


def tracepoint(tracing: Path) -> Finding:
    what = "tracepoint for reports of losses"
    path = tracing / "events" / EVENT
    try:
        if path.is_dir():
            return Finding(what, True, str(path))
        mounted = (tracing / "events").is_dir()
    except PermissionError:
        return Finding(what, False, f"{tracing} is not readable", "run it as root")
    if not mounted:
        return Finding(what, False, f"no tracefs at {tracing}", "systemctl start sys-kernel-tracing.mount")
    cure = "losses are not reported: boot a kernel with the series in kernel-patch/"
    return Finding(what, False, f"no {path}", cure)


def probes(tracing: Path, btf: Path) -> Finding:
    what = "probes for a late reaction"
    try:
        LossProbes(tracing, btf).check()
    except UserError as error:
        return Finding(what, False, error.message, error.hint or "")
    return Finding(what, True, "this kernel has what they need")


def daemon() -> Finding:
    what = "cgpolicyd"
    try:
        manager = Client().manager()
    except UserError as error:
        return Finding(what, False, error.message, error.hint or "see systemctl status cgpolicyd")
    strength = manager["Enforcement"]
    found = f"version {manager['Version']}, enforcement {strength}: {STRENGTH.get(strength, '')}"
    if manager["EnforcementDetail"]:
        found += f"; {manager['EnforcementDetail']}"
    failed = manager["NFailed"]
    if failed:
        return Finding(what, False, f"{found}; {failed} units fail", "see cgpolicy status")
    return Finding(what, True, f"{found}; {manager['NUnits']} units with a policy")
