# SPDX-License-Identifier: LGPL-2.1-or-later
"""meson install: every file in its place, below DESTDIR, and what is installed runs and is valid."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent.parent

FILES = {
    "usr/bin/cgpolicy",
    "usr/lib/cgpolicy/cgpolicy-reactor",
    "usr/lib/cgpolicy/cgpolicyd",
    "usr/lib/python3/dist-packages/cgpolicy/org.cgpolicy1.xml",
    "usr/share/dbus-1/interfaces/org.cgpolicy1.xml",
    "usr/share/dbus-1/system-services/org.cgpolicy1.service",
    "usr/share/dbus-1/system.d/org.cgpolicy1.conf",
    "usr/share/polkit-1/actions/org.cgpolicy1.policy",
}


def install(directory: Path, *options: str) -> Path:
    """Install the tree below a directory and return that."""
    stage = directory / "stage"
    build = ["meson", "setup", "--prefix=/usr", "--sysconfdir=/etc", "-Dman=disabled", *options]
    run([*build, str(directory / "build"), str(TREE)])
    run(["meson", "install", "-C", str(directory / "build"), "--destdir", str(stage)])
    return stage


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def installed(stage: Path) -> set[str]:
    return {str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("install"))


def test_files(stage: Path) -> None:
    """Each module and file is there, the directories being those that systemd names itself."""
    unit_directory = run(["pkg-config", "--variable=systemdsystemunitdir", "systemd"]).strip()
    catalog_directory = run(["pkg-config", "--variable=catalogdir", "systemd"]).strip()
    modules = {f"usr/lib/python3/dist-packages/cgpolicy/{path.name}" for path in TREE.glob("cgpolicy/*.py")}
    wanted = FILES | modules
    wanted |= {f"{unit_directory}/cgpolicyd.service"[1:], f"{catalog_directory}/cgpolicy.catalog"[1:]}
    assert {path for path in installed(stage) if "examples" not in path} == wanted


def test_directories_can_be_chosen(tmp_path: Path) -> None:
    stage = install(
        tmp_path, "-Dsystemdsystemunitdir=/a", "-Dcatalogdir=/b", "-Ddbusdir=/c", "-Dpolkitdir=/d", "-Dpythondir=/e"
    )
    found = installed(stage)
    assert {"a/cgpolicyd.service", "b/cgpolicy.catalog", "c/system.d/org.cgpolicy1.conf"} <= found
    assert {"d/org.cgpolicy1.policy", "e/cgpolicy/cli.py"} <= found


def test_launchers_are_isolated(stage: Path) -> None:
    """The launchers import from the system's directory alone: nothing of the caller's has a say."""
    for launcher in ("usr/bin/cgpolicy", "usr/lib/cgpolicy/cgpolicyd", "usr/lib/cgpolicy/cgpolicy-reactor"):
        assert (stage / launcher).stat().st_mode & 0o111
        assert (stage / launcher).read_text().startswith("#!/usr/bin/python3 -I\n")


def test_service_names_what_is_installed(stage: Path) -> None:
    (unit,) = stage.rglob("cgpolicyd.service")
    match = re.search(r"^ExecStart=/(\S+)", unit.read_text(), re.MULTILINE)
    assert match
    assert match[1] in installed(stage)
    activation = (stage / "usr/share/dbus-1/system-services/org.cgpolicy1.service").read_text()
    assert "Name=org.cgpolicy1\n" in activation
    assert f"SystemdService={unit.name}\n" in activation


def test_xml_is_well_formed(stage: Path) -> None:
    actions = ET.parse(stage / "usr/share/polkit-1/actions/org.cgpolicy1.policy").getroot().findall("action")
    assert {action.get("id") for action in actions} == {"org.cgpolicy1.set-policy", "org.cgpolicy1.set-panic"}
    ET.parse(stage / "usr/share/dbus-1/system.d/org.cgpolicy1.conf")
