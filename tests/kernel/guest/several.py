#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""several SCRIPTS: run scripts one after another, and the selftest; print a JSON object each with what it said.

SCRIPTS is a JSON array of arrays of words.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 600
HERE = Path(__file__).parent


def main() -> None:
    for words in json.loads(sys.argv[1]):
        command, directory = [sys.executable, "-m", f"tests.kernel.guest.{words[0]}", *words[1:]], "."
        if words == ["selftest"]:
            command, directory = [str(HERE / "test_failure_dirty")], "/var/tmp"  # on a disk
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            try:
                done = subprocess.run(
                    command, cwd=directory, stdout=stdout, stderr=stderr, timeout=SECONDS, check=False
                )
                status = done.returncode
            except subprocess.TimeoutExpired:
                status = 124
            stdout.seek(0)
            stderr.seek(0)
            said = {"words": words, "status": status, "stdout": stdout.read(), "stderr": stderr.read()}
        print(json.dumps(said), flush=True)


main()
