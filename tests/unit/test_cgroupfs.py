# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroup file system on a temporary directory, with the kernel's own inotify and extended attributes."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgpolicy.action import Action
from cgpolicy.cgroupfs import (
    CONTROL_FILE,
    EVENTS_FILE,
    MARK,
    POLICY_FILE,
    CgroupTree,
    CgroupWatch,
    Effective,
    Events,
    Made,
    Overflow,
    Removed,
    Written,
)
from cgpolicy.error import NotSupported, WriteFailed
from tests.unit.plaintree import PlainTree


@pytest.fixture
def tree(tmp_path: Path) -> PlainTree:
    return PlainTree(tmp_path / "cgroup")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# Values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", list(Action))
def test_a_value_written_is_read_back(tree: PlainTree, action: Action) -> None:
    tree.make("/web.service", "continue")
    tree.write_action("/web.service", action)
    assert (tree.path("/web.service") / POLICY_FILE).read_bytes() == action.encode()
    assert tree.read_action("/web.service") is action


@pytest.mark.parametrize("cgroup", ["/gone.service", "/bare.service", "/bare.service/plain"])
def test_no_file_reads_as_none_and_is_never_created(tree: PlainTree, cgroup: str) -> None:
    tree.make("/bare.service", None)
    (tree.path("/bare.service") / "plain").touch()
    before = sorted(tree.root.rglob("*"))
    assert tree.read_action(cgroup) is None
    with pytest.raises((NotSupported, WriteFailed), match=cgroup):
        tree.write_action(cgroup, Action.KILL)
    assert sorted(tree.root.rglob("*")) == before


def test_the_error_without_the_file_says_what_to_do(tree: PlainTree) -> None:
    with pytest.raises(NotSupported, match=r"/web.service: no memory\..*MemoryAccounting=yes"):
        tree.write_action("/web.service", Action.KILL)


def test_a_symbolic_link_is_not_followed(tree: PlainTree, tmp_path: Path) -> None:
    tree.make("/web.service", None)
    (tmp_path / "victim").write_text("precious")
    (tree.path("/web.service") / POLICY_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(WriteFailed):
        tree.write_action("/web.service", Action.KILL)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENODEV])
def test_what_the_kernel_refuses_is_told(tree: PlainTree, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    tree.make("/web.service")
    before = open_files()

    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(WriteFailed, match=f"web.service/{POLICY_FILE}: {os.strerror(code)} .*panic"):
        tree.write_action("/web.service", Action.PANIC)
    assert open_files() == before


# The kernel's rule ---------------------------------------------------------------------------------


PATHS = st.lists(st.sampled_from([None, "continue", "kill", "panic"]), min_size=1, max_size=4)


@given(values=PATHS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_effective_is_the_strictest_on_the_path_and_of_equals_the_nearest(
    tree: PlainTree, values: list[str | None]
) -> None:
    (tree.root / POLICY_FILE).write_text("panic\n")  # the root cgroup has none; if it had, it would not count
    cgroups = ["/" + "/".join("abcd"[:depth]) for depth in range(1, len(values) + 1)]
    for cgroup, value in zip(cgroups, values, strict=True):
        tree.make(cgroup, value)
    try:
        found = tree.effective(cgroups[-1])
    finally:
        tree.remove("/a")
    order = [None, "continue", "kill", "panic"]
    worst = max(values, key=order.index)
    nearest = max(index for index, value in enumerate(values) if value == worst)
    assert found == (Effective(Action(worst), cgroups[nearest]) if worst else Effective(Action.CONTINUE, ""))


@pytest.mark.parametrize("cgroup", ["", "/", "/gone/too"])
def test_effective_without_any_value(tree: PlainTree, cgroup: str) -> None:
    (tree.root / POLICY_FILE).write_text("panic\n")
    assert tree.effective(cgroup) == Effective(Action.CONTINUE, "")


# What else stands on a cgroup ----------------------------------------------------------------------


def test_the_mark_lasts_as_long_as_the_cgroup(tree: PlainTree) -> None:
    tree.make("/web.service")
    assert tree.marked("/web.service") is None
    tree.mark("/web.service", Action.KILL)
    assert CgroupTree(tree.root).marked("/web.service") is Action.KILL
    tree.mark("/web.service", None)
    tree.mark("/web.service", None)
    assert tree.marked("/web.service") is None
    tree.mark("/web.service", Action.KILL)
    tree.renew("/web.service")
    assert tree.marked("/web.service") is None


def test_a_mark_that_is_no_action_or_has_no_cgroup_is_none(tree: PlainTree) -> None:
    tree.make("/web.service")
    os.setxattr(tree.path("/web.service"), MARK, b"halt")
    assert tree.marked("/web.service") is None
    tree.mark("/gone.service", Action.KILL)
    assert tree.marked("/gone.service") is None


def test_invocation_id_as_systemd_notes_it(tree: PlainTree) -> None:
    tree.make("/web.service")
    assert tree.invocation_id("/web.service") == tree.invocation_id("/gone.service") == ""
    os.setxattr(tree.path("/web.service"), "user.invocation_id", b"a" * 32)
    assert tree.invocation_id("/web.service") == "a" * 32
    os.setxattr(tree.path("/web.service"), "trusted.invocation_id", b"b" * 32)
    assert tree.invocation_id("/web.service") == "b" * 32


def test_invocation_id_of_a_scope_is_a_links_target(tree: PlainTree, tmp_path: Path) -> None:
    """systemd 257 notes none on the cgroup of a scope that machined has made."""
    tree.make("/machine.slice/machine-a.scope")
    (tmp_path / "invocation:machine-a.scope").symlink_to("c" * 32)
    linked = CgroupTree(tree.root, tmp_path)
    assert linked.invocation_id("/machine.slice/machine-a.scope") == "c" * 32
    assert linked.invocation_id("/machine.slice/machine-b.scope") == ""


@pytest.mark.parametrize(
    ("content", "events"),
    [
        (None, Events()),
        ("", Events()),
        ("low 0\nhigh 3\noom_kill 1\n", Events()),
        ("low 0\nfailure_dirty 12\nfailure_dirty_kill 1\n", Events(12, 1)),
        ("failure_dirty 7\nsomething of a later kernel\n", Events(7, 0)),
    ],
)
def test_counters(tree: PlainTree, content: str | None, events: Events) -> None:
    tree.make("/web.service")
    if content is not None:
        (tree.path("/web.service") / EVENTS_FILE).write_text(content)
    assert tree.events("/web.service") == events


def test_a_cgroup_is_found_by_its_id(tree: PlainTree, tmp_path: Path) -> None:
    for cgroup in ("/a.slice/b.service/payload", "/c.slice"):
        tree.make(cgroup)
    (tree.path("/c.slice") / "link").symlink_to(tree.root)  # endless, were it followed
    number = tree.cgroup_id("/a.slice/b.service/payload")
    assert number == os.stat(tree.root / "a.slice/b.service/payload").st_ino
    assert tree.find(number) == "/a.slice/b.service/payload"
    assert tree.children("/c.slice") == tree.children("/gone") == []
    tree.renew("/a.slice/b.service/payload")
    assert tree.find(number) is None
    tree.remove("/a.slice")
    assert tree.cgroup_id("/a.slice") == 0


def test_what_exists(tree: PlainTree) -> None:
    tree.make("/web.service")
    assert [tree.exists(cgroup) for cgroup in ("/web.service", "/gone.service", "")] == [True, False, False]


def test_support_shows_below_the_root(tree: PlainTree) -> None:
    assert tree.is_unified() and not tree.is_supported()
    (tree.root / POLICY_FILE).touch()
    tree.make("/init.scope", None)
    assert not tree.is_supported()
    tree.make("/system.slice")
    assert tree.is_supported()


@pytest.mark.parametrize("controllers", [None, "cpu io\n", "memory_x\n"])
def test_no_memory_controller_is_no_unified_hierarchy(tree: PlainTree, controllers: str | None) -> None:
    (tree.root / "cgroup.controllers").unlink()
    if controllers is not None:
        (tree.root / "cgroup.controllers").write_text(controllers)
    assert not tree.is_unified()


# inotify -------------------------------------------------------------------------------------------


@pytest.fixture
def watch(tree: PlainTree) -> Iterator[CgroupWatch]:
    watch = CgroupWatch(tree)
    yield watch
    watch.close()


def test_cgroups_that_come_and_go_are_told_in_order(tree: PlainTree, watch: CgroupWatch) -> None:
    assert watch.add_children("") and not watch.add_children("")
    tree.make("/a.slice")
    assert watch.add_children("/a.slice")
    tree.make("/a.slice/b.service")
    (tree.path("/a.slice") / "cgroup.procs").touch()  # only cgroups count
    assert select.select([watch], [], [], 0)[0]
    assert list(watch.read()) == [Made("", "a.slice"), Made("/a.slice", "b.service")]
    tree.remove("/a.slice")
    assert list(watch.read()) == [Removed("/a.slice", "b.service"), Removed("", "a.slice")]
    assert list(watch.read()) == [] and not select.select([watch], [], [], 0)[0]


def test_a_write_is_told_of_the_files_that_were_asked_for(tree: PlainTree, watch: CgroupWatch) -> None:
    tree.make("/web.service")
    (tree.path("/web.service") / EVENTS_FILE).touch()
    assert watch.add_file("/web.service", POLICY_FILE) and not watch.add_file("/web.service", POLICY_FILE)
    assert watch.add_children("/web.service")
    (tree.path("/web.service") / EVENTS_FILE).write_text("low 1\n")
    assert list(watch.read()) == []
    tree.write_action("/web.service", Action.KILL)
    assert set(watch.read()) == {Written("/web.service", POLICY_FILE)}


def test_what_is_not_there_cannot_be_watched_until_it_is(tree: PlainTree, watch: CgroupWatch) -> None:
    assert not watch.add_children("/a.slice") and not watch.add_file("/a.slice", CONTROL_FILE)
    tree.make("/a.slice")
    assert not watch.add_file("/a.slice", CONTROL_FILE)
    assert not watch.add_children(f"/a.slice/{POLICY_FILE}")  # no directory
    (tree.path("/a.slice") / CONTROL_FILE).touch()
    assert watch.add_children("/a.slice") and watch.add_file("/a.slice", CONTROL_FILE)


def test_dropping_silences_a_cgroup_and_those_below_it_only(tree: PlainTree, watch: CgroupWatch) -> None:
    for cgroup in ("/a", "/a/b", "/ab"):
        tree.make(cgroup)
        watch.add_children(cgroup)
        watch.add_file(cgroup, POLICY_FILE)
    tree.make("/a/queued")  # still unread when the watch goes, as is
    tree.say("/a", "kill")
    watch.drop("/a")
    assert Path(f"/proc/self/fdinfo/{watch.fileno()}").read_text().count("inotify wd:") == 2
    for cgroup in ("/a", "/a/b", "/ab"):
        tree.make(f"{cgroup}/new")
        tree.say(cgroup, "kill")
    assert set(watch.read()) == {Made("/ab", "new"), Written("/ab", POLICY_FILE)}
    assert watch.add_children("/a/b")
    tree.make("/a/b/newer")
    assert list(watch.read()) == [Made("/a/b", "newer")]


def test_a_cgroup_made_anew_is_watched_anew(tree: PlainTree, watch: CgroupWatch) -> None:
    tree.make("/web.service")
    watch.add_file("/web.service", POLICY_FILE)
    tree.renew("/web.service")
    watch.drop("/web.service")
    assert watch.add_file("/web.service", POLICY_FILE)
    list(watch.read())
    tree.say("/web.service", "panic")
    assert set(watch.read()) == {Written("/web.service", POLICY_FILE)}


def test_a_full_queue_is_told_and_the_watch_goes_on(tree: PlainTree, watch: CgroupWatch) -> None:
    watch.add_children("")
    room = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(room // 2 + 1):
        tree.path("/x").mkdir()
        tree.path("/x").rmdir()
    seen = list(watch.read())
    assert seen[:2] == [Made("", "x"), Removed("", "x")]
    assert seen[-1] == Overflow() and len(seen) == room + 1
    tree.make("/y")
    assert list(watch.read()) == [Made("", "y")]


def test_closing_leaves_nothing_open(tree: PlainTree) -> None:
    before = open_files()
    watch = CgroupWatch(tree)
    assert open_files() == before + 1
    watch.close()
    assert open_files() == before
