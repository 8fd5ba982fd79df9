# SPDX-License-Identifier: LGPL-2.1-or-later
"""A temporary directory that passes for a cgroup hierarchy of the patched kernel."""

from __future__ import annotations

import shutil
from pathlib import Path

from cgpolicy.cgroupfs import POLICY_FILE, CgroupTree


class PlainTree(CgroupTree):
    """Plain files: no value is refused, and a cgroup's id is its directory's inode number as it is in cgroupfs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        root.mkdir(exist_ok=True)
        (root / "cgroup.controllers").write_text("cpu io memory pids\n")

    def make(self, cgroup: str, action: str | None = "continue") -> None:
        """Make a cgroup, and those above it that are missing; without the memory controller if action is None."""
        parent = cgroup.rpartition("/")[0]
        if parent and not self.path(parent).exists():
            self.make(parent)
        self.path(cgroup).mkdir()
        if action is not None:
            self.say(cgroup, action)

    def say(self, cgroup: str, action: str) -> None:
        """Write a cgroup's value as any program might."""
        (self.path(cgroup) / POLICY_FILE).write_text(f"{action}\n")

    def said(self, cgroup: str) -> str:
        """Return a cgroup's value as it stands in the file."""
        return (self.path(cgroup) / POLICY_FILE).read_text().strip()

    def remove(self, cgroup: str) -> None:
        """Remove a cgroup and all below it."""
        shutil.rmtree(self.path(cgroup))

    def renew(self, cgroup: str, action: str = "continue") -> None:
        """Replace a cgroup by one of the same name, as a restart does."""
        old = self.path(cgroup).rename(self.root.with_name("old"))  # kept a moment: else its inode is used again
        self.make(cgroup, action)
        shutil.rmtree(old)
