# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages quote what somebody sent, and not all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cgpolicy import unitname
from cgpolicy.action import Action
from cgpolicy.error import UserError
from cgpolicy.policyfile import PolicyFiles

REFUSE: list[Callable[[str], object]] = [unitname.check, unitname.mangle, Action.parse, PolicyFiles().check_machine]


@pytest.mark.parametrize("refuse", REFUSE)
@pytest.mark.parametrize("text", ["x" * 1_000_000, "\1" * 1_000_000, "\U000e0001" * 1_000_000 + ".service"])
def test_a_message_is_short_whatever_it_quotes(refuse: Callable[[str], object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        refuse(text)
    message = str(caught.value)
    assert len(message) < 3000 and message.isprintable()
    assert text[:3] in message or repr(text[:3])[1:-1] in message
