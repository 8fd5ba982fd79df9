# SPDX-License-Identifier: LGPL-2.1-or-later
"""Structured journal records (systemd.journal-fields(7)), and standard error where there is no journal."""

from __future__ import annotations

import sys
from pathlib import Path

from cgpolicy.libsystemd import part
from cgpolicy.losses import FileLoss
from cgpolicy.unitfile import Problem

journal = part("journal")

SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "cgpolicyd"

# Made with systemd-id128 new; units/cgpolicy.catalog explains them to journalctl -x.
LOSS_ID = "6935ae465d074405a4cc4710e737d4de"
UNSEEN_ID = "f4e2ea4cac9a4e98b6e436f1d710cf70"
PROBLEM_ID = "1c511847d9ed4560b6fc1d5d45c9e892"

ERROR, WARNING, NOTICE = 3, 4, 5  # syslog(3)


def send(priority: int, message: str, **fields: str | int) -> None:
    """Write one record; a field that is empty is left out."""
    if not SOCKET.exists():
        print(f"<{priority}>{message}", file=sys.stderr, flush=True)
        return
    given = {name: str(value) for name, value in fields.items() if value != ""}
    journal.sendv(MESSAGE=message, PRIORITY=str(priority), SYSLOG_IDENTIFIER=IDENTIFIER, **given)


def log_error(message: str) -> None:
    send(ERROR, message)


def log_warning(message: str) -> None:
    send(WARNING, message)


def warn_problem(unit: str, problem: Problem) -> None:
    """Record something wrong in a unit's files, under that unit too (journalctl -u UNIT)."""
    send(
        WARNING,
        str(problem),
        MESSAGE_ID=PROBLEM_ID,
        OBJECT_SYSTEMD_UNIT=unit,
        CGPOLICY_PATH=problem.path,
        CGPOLICY_LINE=problem.line,
    )


def record_loss(
    unit: str, invocation_id: str, cgroup: str, loss: FileLoss, backend: str, enforcement: str
) -> None:
    """Record pages of one file that a unit lost together; offsets are bytes."""
    device = f"{loss.device[0]}:{loss.device[1]}"
    whose = unit or cgroup or f"cgroup {loss.cgroup_id}, which is gone"
    known = bool(loss.positions)
    if not known:
        what = f"{loss.pages} pages of several files"
    elif loss.files > 1:
        what = f"{loss.pages} pages of {loss.files} files, the first"
    else:
        what = "page" if loss.pages == 1 else f"{loss.pages} pages, the first"
    if known:
        what += f" at device {device} inode {loss.inode} offset {loss.positions[0]}"
    reaction = f": {loss.reaction}" if loss.reaction else ""
    send(
        ERROR,
        f"{whose}: dirty page cache lost: {what};"
        f" action {loss.action} ({enforcement}){reaction}",
        MESSAGE_ID=LOSS_ID,
        OBJECT_SYSTEMD_UNIT=unit,  # what journalctl -u looks for in records of root's
        CGPOLICY_UNIT=unit,
        INVOCATION_ID=invocation_id,
        CGPOLICY_ACTION=loss.action,
        CGPOLICY_REACTION=loss.reaction,
        CGPOLICY_CGROUP=cgroup,
        CGPOLICY_CGROUP_ID=loss.cgroup_id,
        CGPOLICY_DEVICE=device if known else "",
        CGPOLICY_INODE=loss.inode if known else "",
        CGPOLICY_OFFSET=loss.positions[0] if known else "",
        CGPOLICY_PFN=f"{loss.pfns[0]:#x}",
        CGPOLICY_PAGES=loss.pages,
        CGPOLICY_FILES=loss.files if loss.files > 1 else "",
        CGPOLICY_BACKEND=backend,
        CGPOLICY_ENFORCEMENT=enforcement,
    )


def record_unseen(unit: str, invocation_id: str, cgroup: str, pages: int, backend: str, enforcement: str) -> None:
    """Record pages that the kernel has counted for a unit and that no report came of."""
    what = "page" if pages == 1 else f"{pages} pages"
    send(
        ERROR,
        f"{unit}: dirty page cache lost: {what} more than were seen one by one, by memory.events of {cgroup};"
        " see the kernel log for which",
        MESSAGE_ID=UNSEEN_ID,
        OBJECT_SYSTEMD_UNIT=unit,
        CGPOLICY_UNIT=unit,
        INVOCATION_ID=invocation_id,
        CGPOLICY_CGROUP=cgroup,
        CGPOLICY_PAGES=pages,
        CGPOLICY_BACKEND=backend,
        CGPOLICY_ENFORCEMENT=enforcement,
    )
