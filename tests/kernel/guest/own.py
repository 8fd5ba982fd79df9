#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""own PROGRAM...: run selftests of the kernel; print a JSON object each with its results (KTAP)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


def main() -> None:
    for name in sys.argv[1:]:
        # In a cgroup without processes of others, on a disk
        done = subprocess.run(
            [Path(__file__).with_name(name)], cwd="/var/tmp", stdout=subprocess.PIPE, text=True, check=False
        )
        results = re.findall(r"^(?:not )?ok \d+ .*$", done.stdout, re.MULTILINE)
        print(json.dumps({"name": name, "status": done.returncode, "results": results}), flush=True)


main()
