# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd's TEST-15-DROPIN expects of drop-ins, said again of this setting: which of several files decides.

systemd's own function finds the drop-ins; what they say together is read by this project.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpolicy.setting import Setting
from cgpolicy.systemd import read_files
from tests.unit.conftest import Find

ETC, RUN, LIB = "etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system"
TRANSIENT = "run/systemd/transient"
MASK = "mask"

# unit, files by path with what they set ("" resets, None says nothing), the action and the file that decided
CASES: dict[str, tuple[str, dict[str, str | None], str | None, str]] = {
    # Precedence
    "nothing": ("a.service", {f"{LIB}/a.service": None}, None, ""),
    "fragment": ("a.service", {f"{LIB}/a.service": "kill"}, "kill", f"{LIB}/a.service"),
    "drop-in after the fragment": (
        "a.service", {f"{ETC}/a.service": "kill", f"{LIB}/a.service.d/1.conf": "panic"}, "panic",
        f"{LIB}/a.service.d/1.conf"),
    "of one name that in /etc": (
        "a.service", {f"{LIB}/a.service.d/1.conf": "kill", f"{RUN}/a.service.d/1.conf": "panic",
                      f"{ETC}/a.service.d/1.conf": "continue"}, "continue", f"{ETC}/a.service.d/1.conf"),
    "of one name that in /run before that in /usr": (
        "a.service", {f"{LIB}/a.service.d/1.conf": "kill", f"{RUN}/a.service.d/1.conf": "panic"}, "panic",
        f"{RUN}/a.service.d/1.conf"),
    "of two names the later one, wherever it is": (
        "a.service", {f"{LIB}/a.service.d/2.conf": "kill", f"{ETC}/a.service.d/1.conf": "panic"}, "kill",
        f"{LIB}/a.service.d/2.conf"),
    "names compare as bytes": (
        "a.service", {f"{ETC}/a.service.d/10.conf": "kill", f"{ETC}/a.service.d/9.conf": "panic"}, "panic",
        f"{ETC}/a.service.d/9.conf"),
    "reset": (
        "a.service", {f"{LIB}/a.service": "kill", f"{ETC}/a.service.d/1.conf": ""}, None, ""),
    "reset and set again": (
        "a.service", {f"{LIB}/a.service": "kill", f"{ETC}/a.service.d/1.conf": "",
                      f"{ETC}/a.service.d/2.conf": "panic"}, "panic", f"{ETC}/a.service.d/2.conf"),
    "another suffix, another name": (
        "a.service", {f"{ETC}/a.service.d/1.conf~": "kill", f"{ETC}/a.service.d/2": "kill",
                      f"{ETC}/b.service.d/1.conf": "kill", f"{ETC}/a.service.wants/1.conf": "kill"}, None, ""),
    "below the drop-in directory": ("a.service", {f"{ETC}/a.service.d/x.conf/1.conf": "kill"}, None, ""),
    # Masks
    "mask of the same name": (
        "a.service", {f"{LIB}/a.service": "kill", f"{LIB}/a.service.d/1.conf": "panic",
                      f"{ETC}/a.service.d/1.conf": MASK}, "kill", f"{LIB}/a.service"),
    "an empty file hides as well": (
        "a.service", {f"{LIB}/a.service": "kill", f"{LIB}/a.service.d/1.conf": "panic",
                      f"{RUN}/a.service.d/1.conf": None}, "kill", f"{LIB}/a.service"),
    "a mask without precedence hides nothing": (
        "a.service", {f"{LIB}/a.service.d/1.conf": MASK, f"{ETC}/a.service.d/1.conf": "panic"}, "panic",
        f"{ETC}/a.service.d/1.conf"),
    # Templates
    "template's for each instance": (
        "a@x.service", {f"{LIB}/a@.service": "kill", f"{ETC}/a@.service.d/1.conf": "panic"}, "panic",
        f"{ETC}/a@.service.d/1.conf"),
    "of one name the instance's": (
        "a@x.service", {f"{ETC}/a@.service.d/1.conf": "panic", f"{ETC}/a@x.service.d/1.conf": "kill"}, "kill",
        f"{ETC}/a@x.service.d/1.conf"),
    "of two names the later one, though it is the template's": (
        "a@x.service", {f"{ETC}/a@.service.d/2.conf": "panic", f"{ETC}/a@x.service.d/1.conf": "kill"}, "panic",
        f"{ETC}/a@.service.d/2.conf"),
    "the template's in /etc before the instance's in /usr": (
        "a@x.service", {f"{ETC}/a@.service.d/1.conf": "panic", f"{LIB}/a@x.service.d/1.conf": "kill"}, "panic",
        f"{ETC}/a@.service.d/1.conf"),
    "not another instance's": ("a@x.service", {f"{ETC}/a@y.service.d/1.conf": "panic"}, None, ""),
    "a mask for one instance": (
        "a@x.service", {f"{LIB}/a@.service": "kill", f"{LIB}/a@.service.d/1.conf": "panic",
                        f"{ETC}/a@x.service.d/1.conf": MASK}, "kill", f"{LIB}/a@.service"),
    # Prefixes
    "of each prefix": ("a-b-c.service", {f"{ETC}/a-.service.d/1.conf": "kill"}, "kill", f"{ETC}/a-.service.d/1.conf"),
    "of one name that of the longest prefix": (
        "a-b-c.service", {f"{ETC}/a-.service.d/1.conf": "kill", f"{ETC}/a-b-.service.d/1.conf": "panic"}, "panic",
        f"{ETC}/a-b-.service.d/1.conf"),
    "of one name that in /etc, though its prefix is shorter": (
        "a-b-c.service", {f"{ETC}/a-.service.d/1.conf": "kill", f"{RUN}/a-b-c.service.d/1.conf": "panic"}, "kill",
        f"{ETC}/a-.service.d/1.conf"),
    "a prefix ends with a dash": ("ab.service", {f"{ETC}/a-.service.d/1.conf": "kill"}, None, ""),
    "the prefix itself is not meant": ("a.service", {f"{ETC}/a-.service.d/1.conf": "kill"}, None, ""),
    "of a slice": ("a-b.slice", {f"{ETC}/a-.slice.d/1.conf": "kill"}, "kill", f"{ETC}/a-.slice.d/1.conf"),
    "an escaped dash is none": (
        r"machine-qemu\x2d7\x2dweb.scope", {f"{ETC}/machine-qemu-.scope.d/1.conf": "kill",
                                            f"{ETC}/machine-.scope.d/1.conf": "panic"}, "panic",
        f"{ETC}/machine-.scope.d/1.conf"),
    # All units of a type
    "of the type": ("a.service", {f"{ETC}/service.d/1.conf": "kill"}, "kill", f"{ETC}/service.d/1.conf"),
    "not of another type": ("a.scope", {f"{ETC}/service.d/1.conf": "kill"}, None, ""),
    "the type's comes last of one name, also in /etc": (
        "a.service", {f"{ETC}/service.d/1.conf": "kill", f"{LIB}/a.service.d/1.conf": "panic"}, "panic",
        f"{LIB}/a.service.d/1.conf"),
    "the type's hidden for one unit": (
        "a.service", {f"{ETC}/service.d/1.conf": "kill", f"{LIB}/a.service.d/1.conf": MASK}, None, ""),
    # Transient units
    "transient with a drop-in of its own name": (
        "run-1.scope", {f"{TRANSIENT}/run-1.scope": None, f"{ETC}/run-1.scope.d/1.conf": "kill"}, "kill",
        f"{ETC}/run-1.scope.d/1.conf"),
    "transient with one of its prefix": (
        "run-1.service", {f"{TRANSIENT}/run-1.service": None, f"{ETC}/run-.service.d/1.conf": "kill"}, "kill",
        f"{ETC}/run-.service.d/1.conf"),
    "transient with one for all scopes": (
        "run-1.scope", {f"{TRANSIENT}/run-1.scope": None, f"{LIB}/scope.d/1.conf": "kill"}, "kill",
        f"{LIB}/scope.d/1.conf"),
    "what systemctl set-property wrote comes first": (
        "run-1.service", {f"{TRANSIENT}/run-1.service.d/50-x.conf": "panic",
                          f"{ETC}/run-1.service.d/50-x.conf": "kill"}, "panic",
        f"{TRANSIENT}/run-1.service.d/50-x.conf"),
    # Containers as their managers name them
    "podman": ("libpod-0123abcd.scope", {f"{ETC}/libpod-.scope.d/1.conf": "kill"}, "kill",
               f"{ETC}/libpod-.scope.d/1.conf"),
    "docker": ("docker-0123abcd.scope", {f"{ETC}/docker-.scope.d/1.conf": "kill"}, "kill",
               f"{ETC}/docker-.scope.d/1.conf"),
    "kubernetes": ("cri-containerd-0123abcd.scope", {f"{ETC}/cri-containerd-.scope.d/1.conf": "kill"}, "kill",
                   f"{ETC}/cri-containerd-.scope.d/1.conf"),
    "all pods of a class": (
        "kubepods-besteffort-pod0123_4567.slice", {f"{ETC}/kubepods-besteffort-.slice.d/1.conf": "kill"}, "kill",
        f"{ETC}/kubepods-besteffort-.slice.d/1.conf"),
    "nspawn": ("systemd-nspawn@db.service", {f"{ETC}/systemd-nspawn@.service.d/1.conf": "kill"}, "kill",
               f"{ETC}/systemd-nspawn@.service.d/1.conf"),
}


def make(path: Path, value: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if value == MASK:
        path.symlink_to("/dev/null")
    else:
        path.write_text("" if value is None else f"[X-CgPolicy]\nMemoryFailureDirtyAction={value}\n")


def read(find: Find, root: Path, unit: str) -> Setting:
    """Read a unit's setting as systemd has its files; the fragment is the first one there is."""
    stem, at, _ = unit.partition("@")
    named = [unit, f"{stem}@.service"] if at else [unit]
    fragments = [str(root / base / name) for base in (TRANSIENT, ETC, RUN, LIB) for name in named]
    fragment = [path for path in fragments if Path(path).exists()][:1]
    return read_files([*fragment, *find(root, unit)])


@pytest.mark.parametrize(("unit", "files", "action", "decided"), CASES.values(), ids=CASES.keys())
def test_which_file_decides(
    find: Find, tmp_path: Path, unit: str, files: dict[str, str | None], action: str | None, decided: str
) -> None:
    for name, value in files.items():
        make(tmp_path / name, value)
    setting = read(find, tmp_path, unit)
    assert (setting.action, setting.path) == (action, str(tmp_path / decided) if decided else "")
