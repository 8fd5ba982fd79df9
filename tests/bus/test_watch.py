# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon notices by itself: units and cgroups that come and go, reloads, and writes of others."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest

from cgpolicy.client import NAME, UNIT
from cgpolicy.systemd import SERVICE
from cgpolicy.systemd_watch import MANY
from tests.bus.privatebus import Signal, wait
from tests.bus.world import World, drop_in, unit_object

CONTINUE, KILL, PANIC = (f"MemoryFailureDirtyAction={action}" for action in ("continue", "kill", "panic"))
WEB = "/system.slice/web.service"
WEB_OBJECT = unit_object("web.service")


def test_cgroup_that_appears_gets_its_policy(world: World) -> None:
    world.service("web.service", KILL, cgroup="")
    world.start()
    assert world.unit("web.service")["State"] == "inactive"
    listener = world.nobody()
    world.systemd.holding = True  # what is known must do: a process is a few milliseconds behind
    with world.paused():
        world.tree.make(WEB)
    world.settle()
    assert world.tree.said(WEB) == "kill"
    unit = world.unit("web.service")
    assert (unit["State"], unit["ControlGroup"]) == ("applied", WEB)
    listener.get("Version")
    assert Signal("UnitPolicyChanged", "/org/cgpolicy1", ("web.service", "kill", "kill", "applied")) \
        in listener.signals


def test_restarted_unit_gets_its_policy_again(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    before = world.unit("web.service")["ControlGroupId"]
    world.systemd.holding = True
    with world.paused():
        world.restart_cgroup(WEB)
    world.settle()
    assert world.tree.said(WEB) == "kill"
    assert world.unit("web.service")["ControlGroupId"] not in (0, before)
    # The new file is watched as well.
    with world.paused():
        world.tree.say(WEB, "continue")
    world.settle()
    assert world.tree.said(WEB) == "kill"


def test_cgroup_of_a_unit_that_systemd_tells_of_later(world: World) -> None:
    world.start()
    with world.paused():
        world.tree.make(WEB)
    world.settle()
    assert world.tree.said(WEB) == "continue"
    # While the unit starts, ControlGroup is still empty.
    world.service("web.service", KILL, cgroup="")
    world.systemd.unit_new("web.service")
    wait(lambda: world.tree.said(WEB) == "kill", "the policy")


def test_unit_that_systemd_has_not_loaded_yet(world: World) -> None:
    """Its first start, and that of a slice with a default: the files say what PID 1 has no time to say."""
    world.start()
    world.systemd.holding = True
    world.write_fragment("new.service", KILL)
    world.write_fragment("tpl@.service", KILL)
    world.write_fragment("shop.slice", PANIC)
    world.write_fragment("till.service")
    with world.paused():
        for name in ("new", "tpl@a", "none"):
            world.tree.make(f"/system.slice/{name}.service")
        world.tree.make("/shop.slice")
    world.settle()
    with world.paused():
        world.tree.make("/shop.slice/till.service")
    world.settle()
    said = {name: world.tree.said(f"/system.slice/{name}.service") for name in ("new", "tpl@a", "none")}
    assert said == {"new": "kill", "tpl@a": "kill", "none": "continue"}
    assert (world.tree.said("/shop.slice/till.service"), world.tree.said("/shop.slice")) == ("panic", "continue")
    # What was only guessed goes with its cgroup.
    listed = {row[0] for row in world.root_client.call("ListUnits", "(as)", [])}
    with world.paused():
        world.tree.remove("/system.slice/new.service")
    world.settle()
    assert listed - {row[0] for row in world.root_client.call("ListUnits", "(as)", [])} == {"new.service"}


def test_cgroup_that_appears_while_systemd_is_asked_about_everything(world: World) -> None:
    world.service("web.service", KILL, cgroup="")
    world.start()
    world.service("new.service", KILL, cgroup="")
    world.systemd.holding = True
    reload = world.root_client.start("Reload")
    wait(lambda: world.systemd.held, "the questions")
    with world.paused():
        world.tree.make(WEB)
        world.tree.make("/system.slice/new.service")
    world.settle()
    # The answers are older than the cgroups.
    world.systemd.go_on()
    reload.result()
    for name in ("web.service", "new.service"):
        assert world.tree.said(f"/system.slice/{name}") == "kill"
        assert world.unit(name)["State"] == "applied"


def test_cgroups_in_a_slice_that_appears(world: World) -> None:
    world.systemd.add("app.slice", slice="-.slice", fragment=world.write_fragment("app.slice", KILL))
    world.service("web.service", slice="app.slice", cgroup="")
    world.start()
    with world.paused():
        world.tree.make("/app.slice/web.service")
    world.settle()
    assert world.tree.said("/app.slice/web.service") == "kill"
    assert world.tree.said("/app.slice") == "continue"


def test_unit_that_stops_and_is_unloaded(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    assert world.root_client.get("NUnits") == 1
    with world.paused():
        world.tree.remove(WEB)
    world.settle()
    unit = world.unit("web.service")
    assert (unit["State"], unit["ControlGroupId"], unit["MemoryFailureDirtyAction"]) == ("inactive", 0, "kill")
    # Kept in mind, since it can be started again: its policy is applied before systemd says anything.
    world.systemd.unit_removed("web.service")
    world.settle()
    assert world.unit("web.service")["State"] == "inactive"
    with world.paused():
        world.tree.make(WEB)
    wait(lambda: world.tree.said(WEB) == "kill", "the policy")
    with world.paused():
        world.tree.remove(WEB)
    Path(world.write_fragment("web.service", KILL)).unlink()
    world.systemd.unit_removed("web.service")
    wait(lambda: world.root_client.get("NUnits") == 0, "the unit to be forgotten")


def test_echo_of_a_question_is_not_answered_by_another(world: World) -> None:
    """systemd announces a unit that it loads to answer for it: asked about again and again it would never end."""
    world.start()
    world.systemd.add("late.service", listed=False, fragment=world.write_fragment("late.service", KILL))
    world.root_client.call("GetUnit", "(s)", "late.service")
    for _ in range(20):
        world.settle()
    assert world.systemd.gets["late.service"] == 5
    assert world.unit("late.service")["State"] == "inactive"


def test_every_unit_is_found(world: World) -> None:
    """However its name ends: PID 1 is asked for a long list in parts."""
    names = [f"a{last}.service" for last in f"{string.ascii_letters}{string.digits}:-_.\\"]
    names += ["a.mount", "a.scope", "a.slice", "a.socket", "a.swap", "a@1.service", "a.service.mount", "7.s.service"]
    for name in names:
        world.systemd.add(name, fragment=world.write_fragment(name, KILL))
    many = [f"many-{number}.scope" for number in range(MANY)]
    for name in many:
        world.systemd.add(name)
    world.start()
    for _ in range(2):  # all at once, and in parts
        assert {row[0] for row in world.root_client.call("ListUnits", "(as)", [])} == {
            *names, *many, "-.slice", "machine.slice", "system.slice"}
        world.root_client.call("Reload")


def test_reload_of_systemd_is_followed(world: World) -> None:
    world.service("web.service", KILL)
    world.service("other.service", KILL)
    world.start()
    world.write_fragment("web.service", CONTINUE)
    path = world.write_drop_in("web.service", "10-a.conf", drop_in("panic"))
    # Not before systemd has read them: what counts is what systemd uses.
    world.root_client.call("ListUnits", "(as)", [])
    assert world.tree.said(WEB) == "kill"
    world.systemd.reload()
    wait(lambda: world.tree.said(WEB) == "panic", "the new policy")
    assert world.unit("web.service")["SourcePath"] == str(path)
    path.unlink()
    world.systemd.reload()
    wait(lambda: world.tree.said(WEB) == "continue", "the fragment's policy")
    assert world.tree.said("/system.slice/other.service") == "kill"


def test_reexecuted_systemd_is_subscribed_to_again(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    world.systemd.subscribed = False
    world.systemd.client.release(SERVICE)
    world.write_fragment("web.service", PANIC)
    world.systemd.client.own(SERVICE)
    wait(lambda: world.tree.said(WEB) == "panic", "the new policy")
    assert world.systemd.subscribed


def test_systemd_that_does_not_answer_is_no_reason_to_forget(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    world.systemd.client.release(SERVICE)
    world.root_client.call("Reload")
    assert world.unit("web.service")["State"] == "applied"
    assert world.root_client.get("NUnits") == 1


def test_foreign_write_is_put_back_once_and_not_fought_over(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    listener = world.nobody()
    with world.paused():
        world.tree.say(WEB, "continue")
    world.settle()
    assert world.tree.said(WEB) == "kill"
    assert world.unit("web.service")["State"] == "applied"
    with world.paused():
        world.tree.say(WEB, "continue")
    world.settle()
    assert world.tree.said(WEB) == "continue"
    unit = world.unit("web.service")
    assert (unit["State"], unit["MemoryFailureDirtyAction"], unit["EffectiveAction"]) == ("failed", "kill", "continue")
    assert "continue by somebody else" in unit["LastError"]
    listener.get("Version")
    assert [signal.values for signal in listener.signals if signal.name == "UnitPolicyChanged"] == [
        ("web.service", "kill", "continue", "failed")]
    assert world.root_client.get("NFailed") == 1
    # Nothing but a word of somebody's brings it back.
    world.root_client.call("Reload")
    assert world.tree.said(WEB) == "continue"
    world.root_client.call("SetUnitPolicy", "(ssbt)", "web.service", "kill", False, 0)
    assert world.tree.said(WEB) == "kill"
    assert world.root_client.get("NFailed") == 0


def test_foreign_write_where_nothing_is_configured_is_left_alone(world: World) -> None:
    world.service("web.service")
    world.start()
    with world.paused():
        world.tree.say(WEB, "panic")
    world.settle()
    world.root_client.call("Reload")
    assert world.tree.said(WEB) == "panic"
    assert world.unit("web.service")["EffectiveAction"] == "panic"
    assert world.unit("web.service")["State"] == "unset"


def test_stricter_ancestor_shows(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    listener = world.nobody()
    with world.paused():
        world.tree.say("/system.slice", "panic")
    world.settle()
    unit = world.unit("web.service")
    assert (unit["MemoryFailureDirtyAction"], unit["EffectiveAction"]) == ("kill", "panic")
    assert unit["EffectiveFrom"] == "/system.slice"
    assert world.tree.said(WEB) == "kill"
    listener.get("Version")
    assert ("web.service", "kill", "panic", "applied") in [signal.values for signal in listener.signals]
    kind, path, _, value, _ = world.root_client.call("Explain", "(s)", "web.service")[-1]
    assert (kind, path, value) == ("cgroup", "/system.slice", "panic")


def test_explain_names_every_stricter_cgroup_above(world: World) -> None:
    cgroup = "/system.slice/a.slice/web.service"
    world.tree.make(cgroup)
    world.systemd.add("web.service", cgroup=cgroup, fragment=world.write_fragment("web.service", CONTINUE))
    world.start()
    world.tree.say("/system.slice", "panic")
    world.tree.say("/system.slice/a.slice", "kill")
    world.root_client.call("Reload")
    assert [row for row in world.root_client.call("Explain", "(s)", "web.service") if row[0] == "cgroup"] == [
        ("cgroup", "/system.slice/a.slice", 0, "kill", "stricter than the unit's own, but /system.slice decides"),
        ("cgroup", "/system.slice", 0, "panic", "effective: stricter than the unit's own, by /system.slice"),
    ]


def test_explain_names_every_place(world: World) -> None:
    world.service("web.service", KILL)
    first = world.write_drop_in("web.service", "10-a.conf", b"\n\n" + drop_in("panic"))
    second = world.write_drop_in("web.service", "20-b.conf", drop_in("halt") + b"MemoryFailureDirtyActoin=kill\n")
    world.systemd.units["system.slice"].fragment = world.write_fragment("system.slice", CONTINUE)
    world.systemd.units["web.service"].drop_ins = world.systemd.find_drop_ins("web.service")
    world.start()
    assert world.tree.said(WEB) == "panic"
    units = world.root / "usr/lib/systemd/system"
    rows = world.root_client.call("Explain", "(s)", "web.service")
    assert [row[:4] for row in rows] == [
        ("unit-file", f"{units}/web.service", 4, "kill"),
        ("unit-file", str(first), 4, "panic"),
        ("unit-file", str(second), 2, "halt"),
        ("slice", f"{units}/system.slice", 4, "continue"),
        ("problem", str(second), 2, ""),
        ("problem", str(second), 3, ""),
    ]
    verdicts = [row[4] for row in rows]
    assert verdicts[0] == f"overridden by {first}:4"
    assert verdicts[1] == "in force"
    assert "expected panic, kill or continue; keeping panic" in verdicts[2]
    assert verdicts[3] == f"lost: unit-file {first}:4 comes first (default of system.slice)"
    assert "did you mean MemoryFailureDirtyAction=?" in verdicts[5]


@pytest.mark.parametrize(("junk", "line"), [
    pytest.param(bytes(range(256)) * 64, 4, id="binary"),
    pytest.param(b"[X-CgPolicy]\nMemoryFailureDirtyAction=\xff\n", 2, id="no UTF-8"),
    pytest.param(b"[X-CgPolicy\nMemoryFailureDirtyAction=panic\n", 1, id="open header"),
    pytest.param(b"[X-CgPolicy]\nMemoryFailureDirtyAction=" + b"a" * (1 << 20), 2, id="oversized line"),
    pytest.param(b"[X-CgPolicy]\n" + b"\\\n" * 2 + b"a" * (1 << 20) + b"\n", 4, id="oversized continuation"),
    pytest.param(drop_in("p" * 100_000), 2, id="oversized value"),
])
def test_junk_is_named_and_harms_no_other_unit(world: World, junk: bytes, line: int) -> None:
    path = world.write_drop_in("web.service", "40-junk.conf", junk)
    world.write_drop_in("web.service", "60-good.conf", drop_in("kill"))
    world.service("web.service", CONTINUE)
    world.service("other.service", KILL)
    world.start()
    # The file is ignored, not the unit.
    assert world.tree.said(WEB) == "kill"
    assert world.tree.said("/system.slice/other.service") == "kill"
    rows = world.root_client.call("Explain", "(s)", "web.service")
    problems = [row for row in rows if row[0] == "problem"]
    assert [row[1:3] for row in problems] == [(str(path), line)]
    assert 0 < len(problems[0][4]) < 500 and problems[0][4].isprintable()


@pytest.mark.parametrize("kind", ["missing", "directory", "dangling link", "mask", "endless", "FIFO"])
def test_drop_in_that_cannot_be_read_says_nothing(world: World, kind: str) -> None:
    path = world.write_drop_in("web.service", "40-odd.conf", drop_in("panic"))
    world.service("web.service", KILL)
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(world.root / "fifo")
        path.symlink_to(world.root / "fifo")  # in somebody's directory
    elif kind != "missing":
        path.symlink_to({"mask": "/dev/null", "endless": "/dev/zero"}.get(kind, "nowhere"))
    world.start()
    assert str(path) in world.systemd.units["web.service"].drop_ins
    assert world.tree.said(WEB) == "kill"
    assert world.unit("web.service")["State"] == "applied"


def test_other_clients_see_only_what_changes(world: World) -> None:
    world.service("web.service", KILL)
    world.start()
    listener = world.nobody()
    for _ in range(3):
        world.systemd.job_removed("web.service")
        world.systemd.reload()
        world.root_client.call("Reload")
    listener.get("Version")
    assert listener.signals == []
    assert listener.get("MemoryFailureDirtyAction", path=WEB_OBJECT, interface=UNIT) == "kill"
    assert world.root_client.owner(NAME) is not None


def test_action_of_a_later_kernel_is_left_alone_and_harms_no_other_unit(world: World) -> None:
    world.service("web.service", KILL)
    world.service("other.service", KILL)
    world.start()
    for restart in (False, True):
        with world.paused():
            world.tree.say(WEB, "notify")
            world.tree.say("/system.slice", "notify")
            world.tree.say("/system.slice/other.service", "continue")
        if restart:
            world.kill()
            world.start()
        world.settle()
        assert world.tree.said(WEB) == "notify"
        assert world.tree.said("/system.slice/other.service") == "kill"
        assert world.unit("web.service")["State"] == "failed"
        assert "unknown action 'notify'" in world.unit("web.service")["LastError"]
        assert world.unit("other.service")["State"] == "applied"
