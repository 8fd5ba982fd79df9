# SPDX-License-Identifier: LGPL-2.1-or-later
"""Drop-ins beside systemd's own unit_file_find_dropin_paths(), which is called in libsystemd-shared."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpolicy.action import Action
from cgpolicy.dropin import UNIT_DIRECTORIES, directories, with_drop_in
from cgpolicy.error import WriteFailed
from cgpolicy.policyfile import DROP_IN, PolicyFiles
from cgpolicy.setting import Setting
from cgpolicy.systemd import read_files
from tests.scale import scaled
from tests.unit.conftest import Find

TREES = scaled(800, 100_000)

UNITS = [
    "web.service", "a-b-c.service", "a-b.service", "web@.service", "web@i.service", "a-b@i-j.service",
    "a-b-@i.service", "a-b-c@i.service", "a---b--c.service", "--a--.service", "---a.service", "-a-b.service",
    "a-b@.service", "a--b.service", "a-.service", "-.slice", "user-1000.slice", "machine-db.scope",
    r"machine-qemu\x2d7\x2ddb.scope",
    "-a.service", "a-@i.service", "--.service", "a@b@c.service", "-.mount", "srv-data.mount",
]


@pytest.mark.parametrize("unit", UNITS)
def test_directories_as_systemd(find: Find, tmp_path: Path, unit: str) -> None:
    """Each directory counts, and in this order: a file in one hides those of its name in all after it."""
    some = ("run/systemd/generator.early", "etc/systemd/system", "usr/lib/systemd/system", unit.rpartition(".")[2])
    ordered = [str(tmp_path / directory / "x.conf") for directory in directories(unit) if directory.startswith(some)]
    for path in ordered:
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
    for path in ordered:
        assert find(tmp_path, unit) == (path,)
        Path(path).unlink()
    assert find(tmp_path, unit) == ()


def test_unit_directories_as_systemd() -> None:
    printed = subprocess.run(["systemd-analyze", "unit-paths"], stdout=subprocess.PIPE, text=True, check=True).stdout
    # /lib is the same as /usr/lib by now and left out where it is a link.
    ours = [f"/{directory}" for directory in UNIT_DIRECTORIES]
    assert [path for path in ours if path != "/lib/systemd/system"] == [
        path for path in printed.split() if path != "/lib/systemd/system"]


def some_names(unit: str) -> list[str]:
    """Return what .d directories there can be that count for a unit or seem to."""
    near = [directory.rpartition("/")[2] for directory in directories(unit)]
    return [*dict.fromkeys(near), "b-.service.d", "target.d", "a.d", f"{unit}.e"]


BASES = ["10-a.conf", DROP_IN, DROP_IN, "60-z.conf", "50-Cgpolicy.conf", "50-cgpolicy.conf~", ".50-cgpolicy.conf.new"]
CONTENTS = ["continue", "kill", "panic", "halt", ""]


def grow(generator: random.Random, root: Path, unit: str) -> None:
    """Make drop-ins up: files, masks, links, some of them ours."""
    for _ in range(generator.randrange(6)):
        directory = root / generator.choice(UNIT_DIRECTORIES) / generator.choice(some_names(unit))
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / generator.choice(BASES)
        if path.is_symlink() or path.exists():
            continue
        kind = generator.random()
        if kind < 0.1:
            path.symlink_to("/dev/null")
        elif kind < 0.15:
            path.symlink_to("nowhere")
        else:
            path.write_text(f"[X-CgPolicy]\nMemoryFailureDirtyAction={generator.choice(CONTENTS)}\n")


def meaning(setting: Setting) -> tuple[object, ...]:
    return setting.action, setting.path, setting.line, setting.trials


@pytest.fixture
def shm() -> Iterator[Path]:
    """Provide a directory in memory: what is written is synced each time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def test_generated_trees_as_systemd(find: Find, shm: Path) -> None:
    """What is set and unset counts at once as it will when systemd has read it, and is refused if it never will."""
    generator = random.Random(20130417)
    refused = uncovered = 0
    for number in range(TREES):
        unit = generator.choice([unit for unit in UNITS if unit != "web@.service"])
        root = shm / str(number)
        root.mkdir()
        grow(generator, root, unit)
        files, before = PolicyFiles(root), find(root, unit)
        runtime = generator.random() < 0.5
        try:
            path = str(files.write_unit(unit, Action.PANIC, runtime=runtime))
        except WriteFailed as error:
            refused += 1
            assert find(root, unit) == before
            # It would have been hidden, and by what the message names.
            own = files.root / ("run/systemd/system" if runtime else "etc/systemd/system") / f"{unit}.d" / DROP_IN
            own.parent.mkdir(parents=True, exist_ok=True)
            own.touch()
            after = find(root, unit)
            assert str(own) not in after and any(path in error.message for path in after), (unit, error, after)
        else:
            after = find(root, unit)
            assert path in after
            assert with_drop_in(before, path) == after
            assert meaning(read_files(with_drop_in(before, path))) == meaning(read_files(after))
            removed = files.remove_unit(unit, runtime=runtime)
            assert str(removed) == path
            other = files.counts_now(unit)
            now = tuple(file for file in after if file != path)
            if other is not None:
                uncovered += str(other) not in now
                now = with_drop_in(now, str(other))
            assert now == find(root, unit)
        shutil.rmtree(root)
    # Otherwise the generator makes nothing worth comparing.
    assert refused > TREES / 50 and uncovered > TREES / 50
