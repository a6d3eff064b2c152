"""A person at a keyboard or gamepad: SDL's own events, and a gamepad that SDL makes up; through the whole loop, without hardware."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robot_toys import ToyDriver, arm_rules, limits, toy_robot
from scipy.spatial.transform import Rotation

from real_robot.limits import Rules, make_rules
from real_robot.loop import Input, Outcome, Situation, StopRequest, Timing, run_episode
from real_robot.operators.base import Nobody, Operator, Person
from real_robot.operators.config import MoveConfig, OperatorConfig, SwitchConfig
from real_robot.operators.devices import open_person
from real_robot.operators.screen import status_lines
from real_robot.operators.teleop import Teleop
from real_robot.robot import Robot, RobotError, load_robot
from real_robot.safety import View, filter_step, start
from real_robot.stopping import stop_on_signals
from vla_rl.inference.base_policy import BaseSpec
from vla_rl.inference.timeline import ExecutionConfig
from vla_rl.inference.worker import RealTimeController
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.config import decode, names_in
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE, ActionSpec, FeatureSpec

pygame = importlib.import_module("pygame")
RULES = arm_rules()
NOWHERE = Situation(start(RULES, np.zeros(4)), "running", 7)


def at(*command: float) -> Situation:
    return replace(NOWHERE, state=start(RULES, np.array(command)))


@pytest.fixture
def no_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    yield
    pygame.display.quit()


def opened(stack: ExitStack, kind: Any, rules: Rules | None = None, config: OperatorConfig | None = None) -> Person:
    return stack.enter_context(open_person(kind, rules or arm_rules(), config or OperatorConfig(), "toy"))


@pytest.fixture
def keyboard(no_screen: None) -> Iterator[Person]:
    with ExitStack() as stack:
        person = opened(stack, "keyboard")
        pygame.event.clear()
        yield person


def press(*keys: int) -> None:
    for key in keys:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))


def release(*keys: int) -> None:
    for key in keys:
        pygame.event.post(pygame.event.Event(pygame.KEYUP, key=key))


def test_a_take_over_lasts_as_long_as_its_key_is_held(keyboard: Person) -> None:
    press(pygame.K_w, pygame.K_d)
    assert keyboard.poll(NOWHERE).takeover_A is None, "keys that move nothing took over"
    press(pygame.K_SPACE)
    moved_A = keyboard.poll(NOWHERE).takeover_A
    assert moved_A is not None
    dt, speed = 1 / 20, 0.25  # a quarter of the limit of 1 rad/s
    assert moved_A == pytest.approx([speed * dt, -speed * dt, 0, 0])
    assert keyboard.poll(NOWHERE).takeover_A is not None
    release(pygame.K_d)
    assert keyboard.poll(NOWHERE).takeover_A == pytest.approx([speed * dt, 0, 0, 0])
    release(pygame.K_SPACE)
    assert keyboard.poll(NOWHERE) == Input()
    press(pygame.K_SPACE)
    release(pygame.K_SPACE)
    assert keyboard.poll(NOWHERE).takeover_A is None, "let go of before it was looked at"


def test_keys_are_let_go_of_when_another_window_comes_to_the_front(keyboard: Person) -> None:
    press(pygame.K_SPACE, pygame.K_LSHIFT)
    held = keyboard.poll(NOWHERE)
    assert held.takeover_A is not None
    assert held.held_switch
    pygame.event.post(pygame.event.Event(pygame.WINDOWFOCUSLOST))
    assert keyboard.poll(NOWHERE) == Input()


def test_each_command_is_said_once(keyboard: Person) -> None:
    keys = {
        "success": pygame.K_y, "failure": pygame.K_n, "rerecord": pygame.K_BACKSPACE, "reset": pygame.K_r,
        "ready": pygame.K_RETURN, "resume": pygame.K_p, "stop": pygame.K_ESCAPE,
    }  # fmt: skip
    for name, key in keys.items():
        press(key)
        assert keyboard.poll(NOWHERE) == Input(**{name: True})
        assert keyboard.poll(NOWHERE) == Input(), "a key that is held says it again"
        release(key)
    press(pygame.K_y, pygame.K_n)
    assert keyboard.poll(NOWHERE) == Input(failure=True), "of success and failure at once"
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert keyboard.poll(NOWHERE) == Input(stop=True), "its window was closed"


def test_a_gripper_stays_until_its_button_changes_it(keyboard: Person) -> None:
    closed = at(0, 0, 0, 0.9)
    press(pygame.K_SPACE)
    grip = [keyboard.poll(closed).takeover_A]
    press(pygame.K_g)
    grip += [keyboard.poll(closed).takeover_A, keyboard.poll(NOWHERE).takeover_A]
    press(pygame.K_g)
    grip += [keyboard.poll(closed).takeover_A]
    assert [a[3] for a in grip if a is not None] == [0.9, -1.0, -1.0, 1.0]
    held = Teleop(arm_rules(), OperatorConfig(switches={"gripper": SwitchConfig((1.0, -0.5), "g", held=True)}))
    held.begin(NOWHERE.state)
    said = [held.action({}, frozenset(), frozenset(names), NOWHERE.state)[3] for names in ([], ["gripper"], [])]
    assert said == [1.0, -0.5, 1.0]


@pytest.mark.parametrize(("mode", "wanted"), [("delta", 0.2 / 20), ("velocity", 0.2)])
def test_movements_and_velocities_are_in_the_actions_own_unit(mode: Any, wanted: float) -> None:
    teleop = Teleop(arm_rules(mode), OperatorConfig(moves={"a1": MoveConfig(0.2, ("w", "s"))}))
    action_A = teleop.action({"a1": 1.0}, frozenset(), frozenset(), at(0, 0, 0, 0.4).state)
    assert action_A == pytest.approx([0, wanted, 0, 0.4])


def test_places_go_on_from_what_was_sent_and_do_not_wind_up() -> None:
    """Against a bound for two seconds: the first step back moves the other way at once; and away from bounds the speed is kept."""
    rules = arm_rules(max_jerk=(60.0,) * 4)
    teleop = Teleop(rules, OperatorConfig(moves={"a0": MoveConfig(0.8, ("w", "s"))}))
    state, sent = start(rules, np.array([1.0, 0, 0, 0])), []
    for step in range(180):
        push = 1.0 if step < 80 else -1.0
        wanted_A = teleop.action({"a0": push}, frozenset(), frozenset(), state)
        assert abs(wanted_A - state.command_A).max() <= 0.2, "further ahead than a stop is long"
        state, decision = filter_step(rules, state, wanted_A, View(step / 20, state.command_A))
        sent.append(decision.sent_A[0])
    v = np.diff(sent, prepend=1.0) * 20
    assert max(sent) == pytest.approx(2.0, abs=1e-3)
    assert v[5:15] == pytest.approx(0.8, abs=1e-3)
    assert v[80] < -0.1, "it was still full of what it wanted before"
    assert abs(np.diff(v) * 20).max() <= 5.0 * (1 + 1e-5)


def test_a_robot_that_runs_after_its_policy_comes_to_rest_before_it_follows_a_person() -> None:
    """Else it would go on with what the policy wanted, as fast as it may."""
    rules = arm_rules(hz=50.0)
    teleop, state, speeds = Teleop(rules, OperatorConfig()), start(rules, np.zeros(4)), []
    for step in range(60):
        if step == 10:
            teleop.begin(state)
        if step < 10:  # a place that runs away
            wanted_A = np.array([0.1 * (step + 1), 0.0, 0.0, 0.0])
        else:
            wanted_A = teleop.action({"a0": -1.0}, frozenset(), frozenset(), state)
        state, _ = filter_step(rules, state, wanted_A, View(step / 50, state.command_A))
        speeds.append(state.velocity_A[0])
    assert speeds[9] > 0.5
    assert np.diff(speeds[13:20]) * 50 == pytest.approx(-5.0, abs=1e-3), "braked as hard as the limits allow"
    assert min(speeds) > -0.25 * 1.2, "it made up for the time in which it braked"
    assert speeds[-10:] == pytest.approx([-0.25] * 10, abs=1e-6)


def test_turns_are_composed_and_not_added() -> None:
    spec = ActionSpec(("rx", "ry", "rz"), ("rad",) * 3, (-4.0,) * 3, (4.0,) * 3, "absolute", 20.0)
    rules = make_rules(spec, limits(3, rotations=("rx",)))
    teleop = Teleop(rules, OperatorConfig(moves={"rx": MoveConfig(1.0, ("w", "s"))}))
    state = start(rules, np.array([0.0, 0.0, math.pi / 2]))
    for step in range(20):
        wanted_A = teleop.action({"rx": 1.0}, frozenset(), frozenset(), state)
        state, decision = filter_step(rules, state, wanted_A, View(step / 20, state.command_A))
        assert decision.reasons == ()
    gone = Rotation.from_rotvec(state.command_A) * Rotation.from_rotvec([0, 0, math.pi / 2]).inv()
    about_x, *others = gone.as_rotvec()  # the world's, not the hand's
    assert 0.8 < about_x < 1.0
    assert others == pytest.approx([0.0, 0.0], abs=1e-9)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"moves": {"elbow": {"speed": 0.1}}}, "is to move 'elbow'; the robot's actions are a0, a1, a2, gripper"),
        ({"moves": {"a0": {"speed": 2.0}}}, "moves a0 at 2 rad .* its limits allow 1"),
        ({"moves": {"a0": {"speed": 0.0}}}, "speed wants a number > 0, got 0"),
        ({"moves": {"a0": {"speed": 0.1, "keys": ["w"]}}}, "keys wants two"),
        ({"moves": {"a0": {"speed": 0.1, "stick": "middle"}}}, "stick wants one of left_x, .* got 'middle'"),
        ({"moves": {"a0": {"speed": 0.1, "keys": ["w", "y"]}}}, "key y means success already"),
        ({"moves": {"gripper": {"speed": 0.1}}}, "belongs under switches"),
        ({"switches": {"gripper": {"values": [0.0, 7.0]}}}, r"places \[0.0, 7.0\], and the action goes from -1 to 1"),
        ({"switches": {"gripper": {"button": "back"}}}, "button back means stop already"),
    ],
)
def test_what_does_not_fit_the_robot_is_refused(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        decode(OperatorConfig, raw).resolved(arm_rules())


@pytest.mark.parametrize("name", names_in("robot"))
def test_every_robot_can_be_moved_by_a_person(name: str) -> None:
    config = load_robot(name)
    found = config.operator.resolved(config.rules())
    assert len(found.moves) >= min(6, int(config.rules().moving_A.sum()))
    assert all(move.keys and move.stick for move in found.moves.values())


def test_without_a_display_or_pygame_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"no display .*gamepad"), ExitStack() as stack:
        opened(stack, "keyboard")
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UserError, match=r"pip install 'vla-rl\[teleop\]'"), ExitStack() as stack:
        opened(stack, "gamepad")


def test_a_key_that_no_keyboard_has_is_refused(no_screen: None) -> None:
    config = OperatorConfig(moves={"a0": MoveConfig(0.1, ("w", "any"))})
    with pytest.raises(UserError, match="no key is called 'any'"), ExitStack() as stack:
        opened(stack, "keyboard", config=config)


def test_faults_and_refusals_are_shown_as_alarms() -> None:
    lines = status_lines(replace(NOWHERE, fault="link: gone", notice="cannot resume", in_command="you"))
    assert ("FAULT: link: gone", True) in lines
    assert ("cannot resume", True) in lines
    assert any("you" in text and not alarm for text, alarm in lines)


class Pad:
    """A gamepad that SDL makes up."""

    AXES = {"left_x": 0, "left_y": 1, "right_x": 2, "right_y": 3}
    BUTTONS = {"a": 0, "y": 3, "back": 4, "left_shoulder": 9, "right_shoulder": 10, "pad_up": 11}

    def __init__(self) -> None:
        (library,) = Path(str(pygame.__path__[0]) + ".libs").glob("libSDL2-2*")
        self._sdl = ctypes.CDLL(str(library))
        self._sdl.SDL_JoystickOpen.restype = ctypes.c_void_p
        self.plug()

    def plug(self) -> None:
        index = self._sdl.SDL_JoystickAttachVirtual(1, 6, 15, 0)
        assert index >= 0
        self._stick = ctypes.c_void_p(self._sdl.SDL_JoystickOpen(index))

    def unplug(self) -> None:
        assert self._sdl.SDL_JoystickDetachVirtual(0) == 0

    def push(self, name: str, value: float) -> None:
        self._sdl.SDL_JoystickSetVirtualAxis(self._stick, self.AXES[name], ctypes.c_int16(round(value * 32767)))

    def hold(self, *names: str, down: bool = True) -> None:
        for name in names:
            self._sdl.SDL_JoystickSetVirtualButton(self._stick, self.BUTTONS[name], int(down))


@pytest.fixture
def pad(no_screen: None) -> Iterator[Pad]:
    if sys.platform != "linux":
        pytest.skip("pygame's own SDL is looked for in its Linux wheel")
    pygame.display.init()
    importlib.import_module("pygame._sdl2.controller").init()
    made = Pad()
    yield made
    importlib.import_module("pygame._sdl2.controller").quit()


def test_a_gamepad_moves_the_robot_while_its_shoulder_button_is_held(pad: Pad) -> None:
    with ExitStack() as stack:
        person = opened(stack, "gamepad")
        pad.push("left_y", -1.0)  # up, which is ahead
        assert person.poll(NOWHERE).takeover_A is None
        pad.hold("right_shoulder")
        assert person.poll(NOWHERE).takeover_A == pytest.approx([0.25 / 20, 0, 0, 0])
        pad.push("left_y", 0.05)  # a worn stick
        pad.push("left_x", -0.55)  # half way beyond the dead band; a1 goes to the left
        assert person.poll(NOWHERE).takeover_A == pytest.approx([0, 0.125 / 20, 0, 0], rel=1e-3)
        pad.hold("a", "left_shoulder")
        both = person.poll(NOWHERE)
        assert both.takeover_A is not None
        assert both.takeover_A[3] == 1.0
        assert both.held_switch
        pad.hold("right_shoulder", "left_shoulder", "a", down=False)
        pad.hold("y")
        assert person.poll(NOWHERE) == Input(success=True)
        assert person.poll(NOWHERE) == Input()


def test_a_gamepad_that_is_pulled_out_lets_go_of_everything_and_may_come_back(pad: Pad) -> None:
    with ExitStack() as stack:
        person = opened(stack, "gamepad")
        pad.hold("right_shoulder", "left_shoulder")
        held = person.poll(NOWHERE)
        assert held.takeover_A is not None
        assert held.held_switch
        pad.unplug()
        gone = person.poll(NOWHERE)
        assert (gone.takeover_A, gone.held_switch) == (None, False)
        assert "is gone" in str(gone.broken)
        pad.plug()
        assert person.poll(NOWHERE) == Input()
        pad.hold("left_shoulder")
        assert person.poll(NOWHERE) == Input(held_switch=True)
        pad.unplug()


def test_without_a_gamepad_it_says_so(no_screen: None) -> None:
    with pytest.raises(UserError, match="no gamepad: none is connected"), ExitStack() as stack:
        opened(stack, "gamepad")


class Waiting:
    """A policy that goes on and on in one direction; counts how often it had to plan anew."""

    failure: Exception | None = None
    standing = False

    def __init__(self) -> None:
        self.drops, self.acts = 0, 0

    def reset(self, seed: int) -> None:
        self.drops = self.acts = 0

    def drop(self) -> None:
        self.drops += 1

    def act(self, features: Any) -> np.ndarray | None:
        self.acts += 1
        return features["observation.state"].astype(float) + np.array([0.002, 0, 0, 0])


class Script:
    """Has something happen before some of the polls, and keeps what was told and said."""

    def __init__(self, operator: Operator, events: dict[int, Callable[[], object]]) -> None:
        self.operator, self.events = operator, events
        self.told: list[Situation] = []
        self.said: list[Input] = []

    def poll(self, situation: Situation) -> Input:
        self.events.get(len(self.told), lambda: None)()
        self.told.append(situation)
        self.said.append(self.operator.poll(situation))
        return self.said[-1]


def episode(robot: Robot, operator: Operator, actor: Any = None, **options: Any) -> Outcome:
    usual: dict[str, Any] = {"seed": 3, "steps": 60, "instruction": "", "timing": Timing(), "stop": StopRequest()}
    return run_episode(robot, actor or Waiting(), operator=operator, **{**usual, **options})


@pytest.fixture
def toy() -> Iterator[tuple[Robot, ToyDriver]]:
    robot, driver = toy_robot(hz=50.0, heartbeat_s=5.0)
    yield robot, driver
    robot.stop()


@pytest.fixture
def person(toy: tuple[Robot, ToyDriver], no_screen: None) -> Iterator[Person]:
    """At the keyboard of ``toy``."""
    with ExitStack() as stack:
        made = opened(stack, "keyboard", toy[0].rules)
        pygame.event.clear()
        yield made


def test_an_episode_begins_when_the_person_says_so_and_ends_as_they_say(
    toy: tuple[Robot, ToyDriver], person: Person
) -> None:
    robot, driver = toy

    events: dict[int, Callable[[], object]] = {
        1: lambda: press(pygame.K_y),
        2: lambda: setattr(driver, "place_A", np.array([0.5, 0.0, 0.0, 0.0])),  # by hand
        4: lambda: press(pygame.K_p),
        5: lambda: press(pygame.K_RETURN),
        15: lambda: press(pygame.K_y),
    }
    script = Script(person, events)
    outcome = episode(robot, script, waits_for_ready=True, waits_for_resume=True)
    assert "tracking" in str(script.told[4].fault), "it moved without commands"
    assert [told.phase for told in script.told] == ["scene"] * 6 + ["running"] * 10
    assert (outcome.ended_by, outcome.success, outcome.steps, outcome.taken_over) == ("success", True, 9, 0)
    assert outcome.episode is not None
    assert outcome.episode.observations["observation.state"][0, 0] == pytest.approx(0.5), "the scene that was set"
    assert outcome.episode.reward_T.tolist() == [0.0] * 8 + [1.0]
    assert min(at_A[0] for _, at_A in driver.written) >= 0.5 - 1e-9, "it went back to where it was before"


def test_nobody_is_waited_for_where_there_is_nobody(toy: tuple[Robot, ToyDriver]) -> None:
    assert episode(toy[0], Nobody(), waits_for_ready=True, steps=3).steps == 3


@pytest.mark.parametrize(
    ("key", "ended_by", "terminated"),
    [
        ("K_n", "failure", True),
        ("K_r", "reset", False),
        ("K_ESCAPE", "operator", False),
        ("K_BACKSPACE", "rerecord", None),
    ],
)
def test_keys_end_an_episode(
    key: str, ended_by: str, terminated: bool | None, toy: tuple[Robot, ToyDriver], person: Person
) -> None:
    outcome = episode(toy[0], Script(person, {4: lambda: press(getattr(pygame, key))}))
    assert (outcome.ended_by, outcome.steps, outcome.success) == (ended_by, 4, False)
    made = outcome.episode
    assert (None if made is None else made.terminated) == terminated
    assert made is None or made.reward_T.tolist() == [0.0] * 4
    assert toy[0].state.at_rest


def test_what_the_person_did_is_recorded_and_the_policy_plans_anew(
    toy: tuple[Robot, ToyDriver], person: Person
) -> None:
    robot, _ = toy
    actor = Waiting()
    events: dict[int, Callable[[], object]] = {
        5: lambda: press(pygame.K_SPACE, pygame.K_s),
        25: lambda: release(pygame.K_SPACE),
        26: lambda: None if actor.drops == 1 else pytest.fail("the policy went on with its old plan"),
    }
    script = Script(person, events)
    outcome = episode(robot, script, actor, steps=40)
    made = outcome.episode
    assert made is not None
    assert (outcome.taken_over, actor.drops, actor.acts) == (20, 1, 40)
    assert np.flatnonzero(made.intervened_T).tolist() == list(range(5, 25))
    assert {told.in_command for told in script.told[7:25]} == {"you"}
    moved_TA = np.diff(made.action_TA, axis=0)
    assert moved_TA[15:23, 0] == pytest.approx(-0.25 / 50, abs=1e-5), "a person's speed"
    assert made.intended_TA[20, 0] > made.action_TA[20, 0], "what the policy wanted meanwhile"
    assert abs(np.diff(moved_TA, axis=0)).max() * 50**2 <= 5.0 * 1.001, "a jump at a change of command"


def test_a_fault_is_resumed_by_the_person_who_is_told_why_not_yet(toy: tuple[Robot, ToyDriver], person: Person) -> None:
    robot, driver = toy
    bad: dict[str, Any] = {"broken": ("camera: covered",)}
    events: dict[int, Callable[[], object]] = {
        5: lambda: driver.says.update(bad),
        25: lambda: press(pygame.K_p),
        27: lambda: driver.says.clear(),
        30: lambda: press(pygame.K_p),
        40: lambda: press(pygame.K_y),
    }
    script, actor = Script(person, events), Waiting()
    outcome = episode(robot, script, actor, waits_for_resume=True)
    assert script.told[24].fault == "camera: covered"
    assert "cannot resume: camera: covered" in script.told[26].notice
    assert (script.told[31].fault, script.told[31].notice) == (None, "")
    assert (outcome.ended_by, outcome.resumed, outcome.fault) == ("success", ("camera: covered",), None)
    assert actor.drops == 1
    made = outcome.episode
    assert made is not None
    assert made.provenance["faults_resumed"] == 1
    assert made.action_TA[-1, 0] > made.action_TA[28, 0] + 0.002, "it did not move again"
    assert outcome.held >= 20


def test_a_fault_that_outlasts_an_episode_is_resumed_before_the_next(
    toy: tuple[Robot, ToyDriver], person: Person
) -> None:
    robot, driver = toy
    driver.says["broken"] = ("camera: covered",)
    first = episode(robot, Script(person, {}), steps=5, waits_for_resume=True)
    assert (first.ended_by, first.fault) == ("time", "camera: covered")
    driver.says.clear()
    script = Script(person, {3: lambda: press(pygame.K_p)})
    second = episode(robot, script, steps=5, waits_for_resume=True)
    assert [told.phase for told in script.told] == ["held"] * 4 + ["running"] * 6
    assert (second.ended_by, second.resumed) == ("time", ("camera: covered",))


@pytest.mark.parametrize("asked_by", ["key", "signal"])
def test_waiting_for_the_scene_can_be_ended(asked_by: str, toy: tuple[Robot, ToyDriver], person: Person) -> None:
    stop = StopRequest()
    asks: dict[str, Callable[[], object]] = {
        "key": lambda: press(pygame.K_ESCAPE),
        "signal": lambda: setattr(stop, "asked", True),
    }
    outcome = episode(toy[0], Script(person, {3: asks[asked_by]}), stop=stop, waits_for_ready=True)
    assert (outcome.ended_by, outcome.steps, outcome.episode) == ("operator", 0, None)


def test_a_signal_breaks_off_a_reset(toy: tuple[Robot, ToyDriver], monkeypatch: pytest.MonkeyPatch) -> None:
    robot, driver = toy

    def reset(seed: int) -> None:
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the reset went on")

    monkeypatch.setattr(driver, "reset", reset)
    with stop_on_signals() as stop:
        outcome = episode(robot, Nobody(), stop=stop)
        again = episode(robot, Nobody(), stop=stop)
    assert (outcome.ended_by, outcome.steps, again.ended_by) == ("operator", 0, "operator")
    assert driver.written == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_happens_in_the_loop_the_robot_is_at_rest_first(
    error: type[BaseException], toy: tuple[Robot, ToyDriver]
) -> None:
    robot, driver = toy

    class Raising(Waiting):
        def act(self, features: Any) -> np.ndarray | None:
            if self.acts == 20:
                raise error
            return super().act(features)

    with pytest.raises(error):
        episode(robot, Nobody(), Raising())
    places = [at_A[0] for _, at_A in driver.written]
    assert places[19] - places[18] > 1e-3
    assert places[-1] == pytest.approx(places[-2], abs=1e-12), "it was left in motion"
    with pytest.raises(RobotError, match="not connected"):
        robot.observe()


def test_a_dead_man_switch_on_a_gamepad(pad: Pad) -> None:
    robot, _ = toy_robot(hz=50.0, heartbeat_s=5.0, dead_man=True)
    with ExitStack() as stack:
        stack.callback(robot.stop)
        person = opened(stack, "gamepad", robot.rules)
        events: dict[int, Callable[[], object]] = {
            10: lambda: pad.hold("left_shoulder"),
            30: lambda: pad.hold("left_shoulder", down=False),
        }
        actor = Waiting()
        outcome = episode(robot, Script(person, events), actor)
        assert outcome.episode is not None
        place_T = outcome.episode.observations["observation.state"][:, 0]
        assert place_T[10] == 0.0, "it moved without the switch"
        assert place_T[30] > 0.01
        assert place_T[-1] == place_T[-10], "it moved on"
        assert actor.drops == 1, "what was planned before the switch was held"

        plugged = {5: lambda: pad.hold("left_shoulder", "right_shoulder"), 15: pad.unplug}
        pulled = episode(robot, Script(person, plugged), steps=40, waits_for_resume=True)
        assert "operator: the gamepad" in str(pulled.fault)
        assert pulled.taken_over == 10
        assert robot.state.at_rest, "the policy went on where the person was gone"
    assert os.environ["SDL_VIDEODRIVER"] == "dummy"


class Slow:
    """A base that answers when it is told to, with the first number that it was shown."""

    def __init__(self) -> None:
        policy = PolicySpec({STATE: FeatureSpec((4,))}, RULES.spec, "toy")
        self.spec = BaseSpec(policy, observation_steps=1, execute_steps=4, chunk_steps=8)
        self.go = threading.Semaphore(0)

    def reset(self, env_ids: Any, scene_seeds: Any) -> None:
        pass

    def chunk(self, observation: Any, env_ids: Any, leftovers: Any = None) -> np.ndarray:
        seen = float(observation.features()[STATE][0, -1, 0])
        assert self.go.acquire(timeout=20)
        return np.full((1, 8, 4), seen, np.float32)


def test_what_was_planned_before_a_take_over_is_not_run_after_it() -> None:
    base = Slow()

    def act_until(controller: RealTimeController, place: float, seen: Callable[[Any], bool]) -> list[Any]:
        made = []
        for _ in range(2000):
            made.append(controller.act({STATE: np.full(4, place, np.float32)}))
            if seen(made[-1]):
                return made
            time.sleep(0.005)
        pytest.fail("nothing came")

    with RealTimeController(base, ExecutionConfig("asynchronous")) as controller:
        controller.reset(0)
        base.go.release()
        act_until(controller, 0.1, lambda action_A: action_A is not None)
        for _ in range(4):  # the next chunk is begun, from 0.1
            controller.act({STATE: np.full(4, 0.1, np.float32)})
        controller.drop()
        assert controller.act({STATE: np.full(4, 0.5, np.float32)}) is None, "of the old chunk"
        base.go.release(2)
        *before, first_A = act_until(controller, 0.5, lambda action_A: action_A is not None)
        assert before == [None] * len(before)
        assert first_A == pytest.approx(np.full(4, 0.5)), "planned before, delivered after"
