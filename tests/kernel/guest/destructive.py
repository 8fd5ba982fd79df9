#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Run the selftest of the series that panics."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

subprocess.run(
    [Path(__file__).with_name("memory-failure-dirty")], cwd="/var/tmp", env={**os.environ, "RUN_DESTRUCTIVE": "1"}
)
