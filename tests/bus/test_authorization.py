# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may: what polkit is asked, what its answers do, and who waits meanwhile."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gi.repository import GLib

from cgpolicy.client import NAME, UNIT
from tests.bus.privatebus import Call, Client, Failed, wait
from tests.bus.world import PROPERTIES, World, drop_in, unit_object
from tests.scale import scaled

DAEMON = 1  # a user that every Debian has
DENIED = f"{NAME}.Error.NotAuthorized"
WEB = "/system.slice/web.service"

Start = Callable[[Client], Call]


def set_web(action: str) -> Start:
    return lambda client: client.start("SetUnitPolicy", "(ssbt)", "web.service", action, False, 0)


def set_property(action: str) -> Start:
    return lambda client: client.start(
        "Set", "(ssv)", UNIT, "MemoryFailureDirtyAction", GLib.Variant("s", action), path=unit_object("web.service"),
        interface=PROPERTIES,
    )


CHANGES: dict[str, Start] = {
    "set": set_web("continue"),
    "set runtime": lambda client: client.start("SetUnitPolicy", "(ssbt)", "web.service", "continue", True, 0),
    "unset": lambda client: client.start("UnsetUnitPolicy", "(sbt)", "web.service", False, 0),
    "property": set_property("continue"),
    "property unset": set_property(""),
    "machine": lambda client: client.start("SetMachinePolicy", "(sst)", "db", "kill", 0),
    "unset machine": lambda client: client.start("UnsetMachinePolicy", "(st)", "db", 0),
    "reload": lambda client: client.start("Reload"),
}


def prepare(world: World, action: str = "kill") -> None:
    """Have web.service set by a drop-in of ours, and a rule for the machine db; start the daemon."""
    world.write_drop_in("web.service", "50-cgpolicy.conf", drop_in(action))
    world.service("web.service")
    rule = world.root / "etc/cgpolicy/machines/db.conf"
    rule.parent.mkdir(parents=True)
    rule.write_bytes(drop_in(action))
    world.start()


@pytest.mark.parametrize("answer", ["deny", "challenge", "absent"])
def test_unprivileged_is_refused_and_nothing_changes(world: World, answer: str) -> None:
    prepare(world)
    if answer != "absent":
        world.polkit(answer)
    before, nobody = world.policy_files(), world.nobody()
    for name, change in CHANGES.items():
        with pytest.raises(Failed) as failed:
            change(nobody).result()
        assert failed.value.name == DENIED, name
        assert world.policy_files() == before, name
    assert world.systemd.reloads == 0
    # Reading is for everybody.
    assert nobody.get("MemoryFailureDirtyAction", path=unit_object("web.service"), interface=UNIT) == "kill"
    assert nobody.call("Explain", "(s)", "web.service")


@pytest.mark.parametrize("polkit", [True, False])
def test_root_is_not_asked_for(world: World, polkit: bool) -> None:
    prepare(world)
    asked = world.polkit("deny") if polkit else None
    for name, change in CHANGES.items():
        if name != "set runtime":  # refused to everybody beside the persistent one
            change(world.root_client).result()
    assert asked is None or not asked.questions


@pytest.mark.parametrize(("present", "name", "change", "action_id", "details"), [
    ("kill", "set", set_web("kill"), "set-policy", ("web.service", "kill", "set")),
    ("kill", "set", set_web("panic"), "set-panic", ("web.service", "panic", "set")),
    ("kill", "property", set_property("panic"), "set-panic", ("web.service", "panic", "set")),
    ("kill", "property", set_property(""), "set-policy", ("web.service", "", "unset")),
    # To disarm a panic needs as much as to arm it.
    ("panic", "set", set_web("kill"), "set-panic", ("web.service", "kill", "set")),
    ("panic", "unset", CHANGES["unset"], "set-panic", ("web.service", "", "unset")),
    ("kill", "machine", CHANGES["machine"], "set-policy", ("db", "kill", "set")),
    ("panic", "machine", CHANGES["machine"], "set-panic", ("db", "kill", "set")),
    ("panic", "unset machine", CHANGES["unset machine"], "set-panic", ("db", "", "unset")),
    ("kill", "reload", CHANGES["reload"], "set-policy", ("", "", "reload")),
])
def test_what_polkit_is_asked(
    world: World, present: str, name: str, change: Start, action_id: str, details: tuple[str, str, str]
) -> None:
    prepare(world, present)
    polkit, nobody = world.polkit(), world.nobody()
    change(nobody).result()
    (question,) = polkit.questions
    assert question.sender == nobody.connection.get_unique_name()
    assert question.action_id == f"{NAME}.{action_id}"
    assert question.details == dict(zip(("unit", "action", "verb"), details, strict=True))
    assert question.flags == 0


@pytest.mark.parametrize(("slice_", "change"), [
    ("-.slice", lambda client: client.start("SetUnitPolicy", "(ssbt)", "system.slice", "kill", False, 0)),
    ("system.slice", set_web("kill")),
    ("machine.slice", lambda client: client.start("SetMachinePolicy", "(sst)", "backup", "kill", 0)),
    ("-.slice", lambda client: client.start("SetMachinePolicy", "(sst)", "backup", "kill", 0)),
])
def test_inherited_panic_is_as_hard_to_disarm(world: World, slice_: str, change: Start) -> None:
    world.service("web.service")
    world.systemd.units[slice_].fragment = world.write_fragment(slice_, "MemoryFailureDirtyAction=panic")
    world.start()
    polkit = world.polkit()
    change(world.nobody()).result()
    assert [question.action_id for question in polkit.questions] == [f"{NAME}.set-panic"]


@pytest.mark.parametrize("interactive", [True, False])
def test_prompt_only_for_callers_who_allow_it(world: World, interactive: bool) -> None:
    prepare(world)
    polkit, nobody = world.polkit(), world.nobody()
    nobody.call("SetUnitPolicy", "(ssbt)", "web.service", "kill", False, 0, interactive=interactive)
    assert [question.flags for question in polkit.questions] == [int(interactive)]


def test_prompt_keeps_nobody_else_waiting(world: World) -> None:
    prepare(world)
    polkit = world.polkit("hang")
    first = set_web("continue")(world.nobody())
    wait(lambda: polkit.questions, "polkit to be asked")
    for other in (world.nobody(), world.root_client):
        assert other.call("ListUnits", "(as)", ["web.service"])
    set_web("panic")(world.root_client).result()
    assert world.tree.said(WEB) == "panic"
    assert not first.answered


def test_answer_is_for_the_question_that_was_asked(world: World) -> None:
    """A panic armed while a person was asked about something smaller is not disarmed by that answer."""
    prepare(world)
    polkit = world.polkit("hang")
    first = set_web("continue")(world.nobody())
    wait(lambda: polkit.questions, "polkit to be asked")
    set_web("panic")(world.root_client).result()
    polkit.questions[0].answer(True)
    wait(lambda: len(polkit.questions) == 2 or first.answered, "polkit to be asked again")
    assert world.tree.said(WEB) == "panic"
    assert [question.action_id for question in polkit.questions] == [f"{NAME}.set-policy", f"{NAME}.set-panic"]
    polkit.questions[1].answer(True)
    first.result()
    assert world.tree.said(WEB) == "continue"


def test_caller_who_leaves_takes_the_prompt_along(world: World) -> None:
    prepare(world)
    polkit, nobody = world.polkit("hang"), world.nobody()
    set_web("continue")(nobody)
    wait(lambda: polkit.questions, "polkit to be asked")
    nobody.close()
    wait(lambda: polkit.cancelled, "the question to be taken back")
    assert polkit.cancelled == [polkit.questions[0].cookie]
    polkit.questions[0].answer(True)
    world.settle()
    assert world.is_alive()


def test_one_caller_has_few_prompts_at_once(world: World) -> None:
    prepare(world)
    polkit, nobody = world.polkit("hang"), world.nobody()
    calls = [set_web("continue")(nobody) for _ in range(20)]
    wait(lambda: sum(call.answered for call in calls) == 16, "the surplus to be refused")
    assert len(polkit.questions) == 4
    assert {call.error.name for call in calls if call.error is not None} == {DENIED}
    # Others are not kept out by it, and answers make room.
    others = set_web("continue")(world.nobody())
    wait(lambda: len(polkit.questions) == 5, "the other caller's question")
    for question in polkit.questions:
        question.answer(True)
    for call in [others, *(call for call in calls if call.error is None)]:
        call.result()
    polkit.answer = "allow"
    set_web("kill")(nobody).result()
    assert world.tree.said(WEB) == "kill"


def test_one_user_keeps_others_not_from_being_asked_for(world: World) -> None:
    """A user can have any number of connections."""
    prepare(world)
    polkit = world.polkit("hang")
    calls = [set_web("continue")(nobody) for nobody in [world.nobody() for _ in range(5)] for _ in range(4)]
    wait(lambda: len(polkit.questions) == 16 and sum(call.answered for call in calls) == 4, "16 questions")
    set_web("continue")(world.client(DAEMON))
    wait(lambda: len(polkit.questions) == 17, "the other user's question")


@pytest.mark.parametrize("question", [set_web("continue"), CHANGES["unset machine"]])
def test_polkit_that_restarts_loses_its_questions_and_is_asked_again(world: World, question: Start) -> None:
    prepare(world)
    before, polkit, nobody = world.policy_files(), world.polkit("hang"), world.nobody()
    pending = question(nobody)
    wait(lambda: polkit.questions, "polkit to be asked")
    polkit.client.close()
    with pytest.raises(Failed, match="polkit did not decide") as failed:
        pending.result()
    assert failed.value.name == DENIED
    with pytest.raises(Failed, match="polkit is not there"):
        question(nobody).result()
    assert world.policy_files() == before
    world.polkit("allow")
    question(nobody).result()
    assert world.policy_files() != before


HOLD_SECONDS = scaled(2, 10)
ANSWER_SECONDS = 0.050  # the bound of one answer, whoever is being asked for a password


def answer_times(world: World, seconds: float) -> list[float]:
    """Return how long answers took, sorted, to several clients that read and write all the time."""
    clients: list[tuple[Client, Start]] = [
        (world.nobody(), lambda client: client.start("ListUnits", "(as)", [])),
        (world.nobody(), lambda client: client.start("Explain", "(s)", "web.service")),
        (world.nobody(), lambda client: client.start("GetUnit", "(s)", "web.service")),
        (world.root_client, set_web("panic")),
        (world.nobody(), set_web("panic")),
    ]
    times: list[float] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        for client, start in clients:
            sent = time.monotonic()
            start(client).result()
            times.append(time.monotonic() - sent)
    return sorted(times)


def figures(times: list[float]) -> str:
    p50, p99 = (f"{times[len(times) * part // 100] * 1000:.1f}" for part in (50, 99))
    return f"{len(times)} answers, p50 {p50}, p99 {p99}, max {times[-1] * 1000:.1f} ms"


@pytest.fixture
def world_in_memory() -> Iterator[World]:
    """Provide a machine whose files are on no disk: that one is slow is another matter."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        made = World(Path(path))
        try:
            yield made
        finally:
            made.close()


def test_answers_come_in_time_while_a_prompt_is_held(world_in_memory: World) -> None:
    """The bound is for all answers; a machine on which it does not hold without a prompt either is excused."""
    world = world_in_memory
    prepare(world)
    polkit = world.polkit()
    rounds = []
    for _ in range(3):
        alone = answer_times(world, HOLD_SECONDS / 2)
        polkit.answer = "hang"
        polkit.questions.clear()
        held = world.nobody().start("SetUnitPolicy", "(ssbt)", "web.service", "kill", False, 0, interactive=True)
        wait(lambda: polkit.questions, "the prompt")
        polkit.answer = "allow"
        times = answer_times(world, HOLD_SECONDS)
        assert not held.answered and len(polkit.questions) > 1
        polkit.questions[0].answer(False)
        with pytest.raises(Failed):
            held.result()
        print(f"{HOLD_SECONDS} s of a prompt: {figures(times)}; without one: {figures(alone)}")
        rounds.append((times[-1], alone[-1]))
        if times[-1] < ANSWER_SECONDS:
            break
    busy = max(alone for _, alone in rounds) >= ANSWER_SECONDS
    assert min(slowest for slowest, _ in rounds) < (HOLD_SECONDS / 4 if busy else ANSWER_SECONDS)
