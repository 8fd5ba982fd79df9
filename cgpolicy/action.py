# SPDX-License-Identifier: LGPL-2.1-or-later
"""The actions of memory.failure_dirty_action and their order (kernel: Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from cgpolicy.error import InvalidAction, quoted


class Action(enum.StrEnum):
    """What the kernel does when dirty page cache of a cgroup is lost; members stand weakest first."""

    CONTINUE = "continue"
    KILL = "kill"
    PANIC = "panic"

    @property
    def strictness(self) -> int:
        """Position in the kernel's order: 0 for continue, 2 for panic."""
        return list(Action).index(self)

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action spelled exactly so; raise InvalidAction otherwise (as the kernel file: EINVAL)."""
        try:
            return cls(text)
        except ValueError:
            raise InvalidAction(f"{quoted(text)} is no action", hint="expected panic, kill or continue") from None


def strictest(actions: Iterable[Action]) -> Action:
    """Return the strictest of the actions on a path to the root, continue where there is none."""
    return max(actions, key=lambda action: action.strictness, default=Action.CONTINUE)
