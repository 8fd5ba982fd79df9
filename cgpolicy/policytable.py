# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies that the kernel has no file for: a table beside the cgroup hierarchy, with the same rules.

Keyed by the kernel's cgroup ids, which are never given twice: a policy cannot pass to the next cgroup of that name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cgpolicy.action import Action
from cgpolicy.cgroupfs import CgroupTree, Events
from cgpolicy.error import NotSupported

# There in every cgroup that memory can be charged to, also where the policy's own file is not.
CHARGED_FILE = "memory.current"

# What was lost, counted on the cgroup itself as memory.events would: it outlives the daemon and goes with the cgroup.
COUNTERS = "trusted.cgpolicy.lost"

# Cgroups that are gone may still lose pages. They are looked for when the table holds so many or has doubled,
# and the older ones are forgotten.
TABLE_MIN = 4096
GONE_MAX = 2048


@dataclass(frozen=True, slots=True)
class Entry:
    """A cgroup's own policy; the path tells the cgroup while it exists."""

    cgroup: str
    action: Action


class PolicyTable(CgroupTree):
    """A cgroup v2 hierarchy whose policies are kept here and enforced by whom changed() tells.

    changed is called with a cgroup's id, and its entry or None if it has no policy any more.
    """

    def __init__(
        self, root: Path, changed: Callable[[int, Entry | None], None], links: Path | None = None
    ) -> None:
        super().__init__(root, links)
        self.enforced = True
        self.can_panic = True
        self._changed = changed
        self._entries: dict[int, Entry] = {}
        self._prune_at = TABLE_MIN

    def is_supported(self) -> bool:
        """Tell whether somebody enforces the policies."""
        return self.enforced

    def read_action(self, cgroup: str) -> Action | None:
        """Return a cgroup's own policy, None where memory is not charged to it."""
        if not (self.path(cgroup) / CHARGED_FILE).exists():
            return None
        entry = self._entries.get(self.cgroup_id(cgroup))
        return entry.action if entry else Action.CONTINUE

    def write_action(self, cgroup: str, action: Action) -> None:
        """Set a cgroup's own policy; raise NotSupported where it cannot be enforced."""
        cgroup_id = self.cgroup_id(cgroup)
        if not cgroup_id or not (self.path(cgroup) / CHARGED_FILE).exists():
            raise NotSupported(
                f"{cgroup or '/'}: no {CHARGED_FILE}",
                hint="the cgroup is gone or lacks the memory controller (MemoryAccounting=yes)",
            )
        if action is Action.PANIC and not self.can_panic:
            raise NotSupported("cannot panic from user space", hint="this kernel has no /proc/sysrq-trigger")
        entry = Entry(cgroup, action)
        if self._entries.get(cgroup_id) != entry:
            self._entries[cgroup_id] = entry
            self._changed(cgroup_id, entry)
            self._prune()

    def mark(self, cgroup: str, action: Action | None) -> None:
        """Forget a cgroup of which nothing is wanted any more; what is wanted stands in the table already."""
        if action is None:
            self._forget(self.cgroup_id(cgroup))

    def marked(self, cgroup: str) -> Action | None:
        """Return what was last written here: nobody else can write."""
        entry = self._entries.get(self.cgroup_id(cgroup))
        return entry.action if entry else None

    def events(self, cgroup: str) -> Events:
        """Return a cgroup's loss counters, what is below it included, zeros where nothing was lost."""
        try:
            pages, kills = os.getxattr(self.path(cgroup), COUNTERS).split()
            return Events(int(pages), int(kills))
        except (OSError, ValueError):
            return Events()

    def count(self, cgroup: str, pages: int, kills: int) -> None:
        """Add to a cgroup's loss counters; one that is gone needs none."""
        before = self.events(cgroup)
        counters = f"{before.failure_dirty + pages} {before.failure_dirty_kill + kills}"
        with contextlib.suppress(OSError):
            os.setxattr(self.path(cgroup), COUNTERS, counters.encode())

    def _forget(self, cgroup_id: int) -> None:
        if self._entries.pop(cgroup_id, None) is not None:
            self._changed(cgroup_id, None)

    def _prune(self) -> None:
        if len(self._entries) <= self._prune_at:
            return
        gone = [number for number, entry in self._entries.items() if self.cgroup_id(entry.cgroup) != number]
        for number in gone[: max(len(gone) - GONE_MAX, 0)]:
            self._forget(number)
        self._prune_at = max(TABLE_MIN, 2 * len(self._entries))
