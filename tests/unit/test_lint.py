# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree as a whole: linters, licences, and the three layers of cgpolicy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
PACKAGE = TREE / "cgpolicy"

# What is true, what the machine says, and what runs.
TRUE = {"action", "dropin", "enforcement", "error", "unitname", "unitfile", "setting", "resolve"}
SAID = {"btf", "buscall", "cgroupfs", "heap", "journal", "kprobes", "libsystemd", "losses", "machined", "policyfile",
        "policytable", "polkit", "rawglib", "subtree", "systemd", "systemd_watch"}
RUNS = {"bus", "changes", "cli", "client", "daemon", "doctor", "enforcer", "losstally", "offline", "reactor",
        "reconciler", "status", "urgency"}

BINDINGS = {"gi", "pydbus", "pystemd"}
OUTSIDE = {"ctypes", "glob", "io", "logging", "os", "pathlib", "shutil", "signal", "socket", "subprocess", "tempfile"}

LICENCES = {"LGPL-2.1-or-later", "GPL-2.0-only"}
# Licence texts, and what git makes or reads.
UNMARKED = re.compile(r"LICENSE|COPYING|.*/COPYING|.*\.patch|\.gitignore")


def run(*command: str) -> tuple[int, str]:
    """Run a Python module in the tree; return its status and all that it printed."""
    result = subprocess.run(
        [sys.executable, *command], cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize("command", ["ruff check .", "mypy"])
def test_linter_is_content(command: str) -> None:
    status, output = run("-m", *command.split())
    assert status == 0, output


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=TREE, stdout=subprocess.PIPE, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (TREE / name).is_file()]


@pytest.mark.skipif(not (TREE / ".git").exists(), reason="not a git checkout")
def test_every_text_file_says_its_licence() -> None:
    unmarked, foreign = [], []
    for name in tracked():
        try:
            head = (TREE / name).read_bytes()[:1000].decode(errors="strict" if name.endswith(".py") else "replace")
        except UnicodeDecodeError:
            continue
        if "\0" in head or UNMARKED.fullmatch(name):
            continue
        found = re.search(r"SPDX-License-Identifier: ([\w.-]+)", head)
        if found is None:
            unmarked.append(name)
        elif found[1] not in LICENCES or (name.startswith("kernel-patch/") and found[1] != "GPL-2.0-only"):
            foreign.append(f"{name}: {found[1]}")
    assert (unmarked, foreign) == ([], [])


def imports(path: Path) -> set[str]:
    """Return what a module imports anywhere in it; a module of this package by its bare name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, module = [*name.split("."), ""][:2]
            ours = package == "cgpolicy" and (PACKAGE / f"{module}.py").exists()
            found.add(f"{package}.{module}" if ours else package)
    return found


MODULES = {path.stem: imports(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_the_layers_are_there() -> None:
    """Each module has a place in one of them, a new one too."""
    assert sorted([*TRUE, *SAID, *RUNS]) == sorted(MODULES)
    assert "gi" in MODULES["bus"] and "cgpolicy.resolve" in MODULES["reconciler"]


@pytest.mark.parametrize("module", sorted(TRUE))
def test_what_is_true_asks_nobody(module: str) -> None:
    below = {name for name in MODULES[module] if name.startswith("cgpolicy")}
    assert below <= {f"cgpolicy.{name}" for name in TRUE}
    assert not MODULES[module] & (BINDINGS | OUTSIDE)


@pytest.mark.parametrize("module", sorted(SAID))
def test_what_the_machine_says_knows_nothing_that_runs(module: str) -> None:
    below = {name for name in MODULES[module] if name.startswith("cgpolicy")}
    assert below <= {f"cgpolicy.{name}" for name in TRUE | SAID}


@pytest.mark.parametrize("module", sorted(TRUE) + ["cgroupfs", "policyfile", "losses", "reconciler", "cli"])
def test_no_binding_is_loaded_where_none_is_needed(module: str) -> None:
    program = f"import sys, cgpolicy.{module}; sys.exit(', '.join({BINDINGS!r} & set(sys.modules)) or None)"
    assert run("-c", program) == (0, "")
