#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""several BASE SCRIPTS: run scripts one after another, and the selftests; print a JSON object each with what it said.

SCRIPTS is a JSON array of arrays of words, of which "BASE" stands for the base of the series.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernel.guest.pagecache import filesystem

SECONDS = 3600
HERE = Path(__file__).parent


def main() -> None:
    base, scripts = sys.argv[1:]
    for words in json.loads(scripts):
        arguments = [base if word == "BASE" else word for word in words]
        command, directory = [sys.executable, "-m", f"tests.kernel.guest.{arguments[0]}", *arguments[1:]], "."
        if words[0] == "selftest":
            # On a disk, and on one with large folios
            command, directory = [str(HERE / words[1])], str(filesystem("xfs"))
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
