# SPDX-License-Identifier: LGPL-2.1-or-later
"""A storm of losses: few reports, exact totals, nobody's losses taken for another's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cgpolicy.action import Action
from cgpolicy.losses import FileLoss
from cgpolicy.losstally import WINDOW, LossTally
from cgpolicy.reconciler import Owner

LOSS = FileLoss(4711, (254, 16), 12, Action.KILL, 1, (0,), (1,), (4711,))
WEB = Owner("web.service", "8f2a", "/system.slice/web.service")


def tally() -> tuple[LossTally, list[tuple[Owner, FileLoss]]]:
    told: list[tuple[Owner, FileLoss]] = []
    return LossTally(lambda owner, loss: told.append((owner, loss))), told


def test_the_first_is_told_at_once_and_the_rest_together() -> None:
    losses, told = tally()
    for page in range(1000):
        losses.add(WEB, replace(LOSS, inode=page // 100, pages=2), now=page / 10000)
    assert told == [(WEB, replace(LOSS, inode=0, pages=2))]
    assert losses.flush(now=WINDOW / 2)
    assert len(told) == 1
    assert losses.flush(now=WINDOW)
    (_, rest) = told[1]
    assert (rest.pages, rest.files, rest.inode) == (1998, 10, 0)
    assert losses.flush(now=WINDOW + 0.1)
    assert not losses.flush(now=2 * WINDOW)
    losses.add(WEB, LOSS, now=2 * WINDOW)
    assert told[2:] == [(WEB, LOSS)]


OTHER = Owner("db.service", "8f2a", "/system.slice/db.service")
OWNERS = [WEB, replace(WEB, invocation_id="9"), OTHER, Owner("", "", "")]


@given(st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(1, 9), st.floats(0, 0.5), st.sampled_from(Action))))
def test_totals_are_exact(steps: list[tuple[Owner, int, float, Action]]) -> None:
    losses, told = tally()
    now = 0.0
    wanted: Counter[tuple[Owner, Action]] = Counter()
    for owner, pages, pause, action in steps:
        losses.add(owner, replace(LOSS, pages=pages, action=action), now)
        wanted[owner, action] += pages
        now += pause
        losses.flush(now)
    while losses.flush(now):
        now += WINDOW
    found: Counter[tuple[Owner, Action]] = Counter()
    for owner, loss in told:
        found[owner, loss.action] += loss.pages
    assert found == wanted
