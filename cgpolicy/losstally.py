# SPDX-License-Identifier: LGPL-2.1-or-later
"""Losses of one unit that keep coming: the first is told of at once, the others together, and none is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cgpolicy.losses import FileLoss
from cgpolicy.reconciler import Owner

WINDOW = 1.0  # seconds from one report of a unit's losses to the next


@dataclass(slots=True)
class Held:
    """What has come of a unit since it was last told of."""

    until: float
    owner: Owner
    first: FileLoss | None = None
    pages: int = 0
    kills: int = 0
    files: set[tuple[tuple[int, int], int]] = field(default_factory=set)

    def add(self, loss: FileLoss) -> None:
        self.first = self.first or loss
        self.pages += loss.pages
        self.kills += loss.kills
        self.files.add((loss.device, loss.inode))

    def together(self) -> FileLoss | None:
        """Return all as one loss that names the first file; None if there is none."""
        if self.first is None:
            return None
        return replace(self.first, pages=self.pages, kills=self.kills, files=len(self.files))


class LossTally:
    """Takes losses as they are read and reports them; flush() has to be called every WINDOW while it says so."""

    def __init__(self, report: Callable[[Owner, FileLoss], None]) -> None:
        self._report = report
        self._held: dict[tuple[str, str, int, str, str], Held] = {}

    def add(self, owner: Owner, loss: FileLoss, now: float) -> None:
        """Report a loss at once, unless others of the same run were just reported."""
        key = owner.unit, owner.invocation_id, loss.cgroup_id, str(loss.action), loss.reaction
        held = self._held.get(key)
        if held is None:
            self._held[key] = Held(now + WINDOW, owner)
            self._report(owner, loss)
        else:
            held.add(loss)

    def flush(self, now: float) -> bool:
        """Report what is due; return whether to come again."""
        for key, held in list(self._held.items()):
            if held.until > now:
                continue
            loss = held.together()
            if loss is None:
                del self._held[key]
                continue
            self._held[key] = Held(now + WINDOW, held.owner)
            self._report(held.owner, loss)
        return bool(self._held)
