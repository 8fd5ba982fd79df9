# SPDX-License-Identifier: LGPL-2.1-or-later
"""How strong the guarantee is: the backends of cgpolicyd(8) and what each of them promises."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Enforcement:
    """A backend, the word for its strength, and what else is to be known: what it watches, or why there is none."""

    backend: str
    strength: str
    detail: str = ""


KERNEL = Enforcement("kernel", "synchronous")


def late(detail: str) -> Enforcement:
    """Return the backend for kernels without memory.failure_dirty_action."""
    return Enforcement("tracefs", "late", detail)


def none(reason: str) -> Enforcement:
    """Return the backend that enforces nothing, and why."""
    return Enforcement("none", "none", reason)
