# SPDX-License-Identifier: LGPL-2.1-or-later
"""vm/demo: it passes when everything happened as configured, and names what did not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from vm.demonstration import FILES
from vm.host import TREE


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([TREE / "vm/demo", *options], capture_output=True, text=True, check=False)
    print(done.stdout[-20000:], done.stderr[-20000:], sep="\n")
    return done


def test_everything_as_configured() -> None:
    done = demo("--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["met"]
    shipper, database, machine, ledger = told["units"]
    assert shipper["seen"]["survived"]
    assert shipper["seen"]["record"]["stale"] > 0
    assert shipper["seen"]["record"]["fsync"] == ["Input/output error", "0"]
    for killed in (database, machine):
        assert killed["seen"]["ending"].startswith("killed by SIGKILL")
        assert killed["seen"]["record"]["stale"] == 0
        assert killed["seen"]["file_now"] == "saved bytes"
    assert ledger["panicked"]
    assert ledger["kernel"][-1].startswith("Kernel panic - not syncing: Memory failure: ")


def test_changed_drop_in(tmp_path: Path) -> None:
    """With another action in a drop-in the demonstration fails and says which expectation broke."""
    files = shutil.copytree(FILES, tmp_path / "demo.d")
    drop_in = files / "system/database.service.d/50-cgpolicy.conf"
    drop_in.write_text(drop_in.read_text().replace("kill", "continue"))
    done = demo("--files", str(files))
    assert done.returncode == 1
    assert "database.service: expected death by SIGKILL, it is still running and read" in done.stderr
    assert "shipper.service: expected" not in done.stderr


def test_stock_kernel() -> None:
    """A kernel without the series is late at best, and the demonstration says for each unit what broke."""
    done = demo("--kernel", "stock")
    assert done.returncode == 1
    for unit, action in (("shipper", "continue"), ("database", "kill"), ("ledger", "panic")):
        missing = f"{unit}.service: expected memory.failure_dirty_action to be {action}, this kernel has no such file"
        assert missing in done.stderr
        assert f"{unit}.service: expected the kernel to say which data was lost" in done.stderr
    assert "ledger.service: expected 'Kernel panic - not syncing: Memory failure: " in done.stderr
