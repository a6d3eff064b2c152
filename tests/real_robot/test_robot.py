"""A robot in another process, and all that can go wrong with it: held at once, latched, recorded, resumed without a jump."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from real_robot.loop import Input, Situation, StopRequest, Timing, run_episode
from real_robot.robot import Robot, RobotError, load_robot, open_robot
from real_robot.robots.fake import FakeRobotConfig
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace
from vla_rl.runtime.wire import connect
from vla_rl.types import SpecMismatchError

HZ = 20.0
LOAD = 8.0  # the suite shares two cores with all that it starts: what takes 0.1 s on a robot may take this many times as long
HELD_S = 0.1 * LOAD


@dataclass
class Arm:
    """The simulated arm's process."""

    process: subprocess.Popen[str]
    address: str

    def ask(self, **request: Any) -> dict[str, Any]:
        connection = connect(self.address, "")
        try:
            return connection.ask(request, 10.0)
        finally:
            connection.close()

    def faults(self, **faults: Any) -> None:
        self.ask(call="faults", faults=faults)


def start_arm() -> Arm:
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_rl.cli.main", "robot", "simulate", "push_t", "--follow"],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if "tcp://" in line)
    return Arm(process, "tcp://" + line.split("tcp://")[1].split()[0])


@pytest.fixture(scope="module")
def shared_arm() -> Iterator[Arm]:
    arm = start_arm()
    yield arm
    arm.process.kill()
    arm.process.wait()


WELL = {
    "mute": False, "repeat": False, "nan": False, "freeze": False, "clock_offset_s": 0.0,
    "observation_latency_s": 0.0, "command_latency_s": 0.0, "stall_s": 0.0,
}  # fmt: skip


@pytest.fixture
def arm(shared_arm: Arm) -> Iterator[Arm]:
    shared_arm.faults(**WELL)
    yield shared_arm
    shared_arm.faults(**WELL)


def robot_config(arm: Arm, **safety: Any) -> FakeRobotConfig:
    config = load_robot("push_t_fake")
    assert isinstance(config, FakeRobotConfig)
    slow: dict[str, Any] = {
        "max_velocity": (0.3, 0.3),
        "max_acceleration": (2.0, 2.0),
        "max_jerk": (60.0, 60.0),
        "ramp_s": 0.5,
    }
    slow |= {
        "joints_age_s": 0.08 * LOAD,
        "heartbeat_s": 0.1 * LOAD,
        "max_tracking_error": (0.25, 0.25),
        "inference_s": 5.0,
    }
    return replace(config, address=arm.address, safety=replace(config.safety, **{**slow, **safety}))


@contextmanager
def robot_at(arm: Arm, log: Path | None = None, **safety: Any) -> Iterator[Robot]:
    with open_robot(robot_config(arm, **safety), log) as robot:
        robot.reset(7)
        yield robot


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def sway(robot: Robot, seconds: float, *, before=None, until=None) -> None:
    """Move to and fro at the robot's rate, as a policy would."""
    pace, begun_A = Pace(HZ), robot.state.command_A.copy()
    for step in range(round(seconds * HZ)):
        pace.wait()
        robot.observe()
        if before is not None:
            before(step)
        wish_A = begun_A + 0.06 * np.array([1 - np.cos(2.5 * step / HZ), np.sin(2.5 * step / HZ) * 0.5])
        robot.send(np.clip(wish_A, -0.3, 0.3))
        if until is not None and until():
            return


def check_sent(lines: list[dict[str, Any]], config: FakeRobotConfig) -> None:
    """No step of what was sent is beyond the limits, over faults too; after a resume it goes on from the last command or from the arm."""
    begun: list[list[dict[str, Any]]] = [[]]
    for line in lines:
        if line.get("event") == "resumed":
            begun.append([])
        elif "sent" in line:
            begun[-1].append(line)
    step_m = config.safety.max_velocity[0] / HZ * (1 + 1e-5)
    for part in filter(None, begun):
        sent = np.array([line["sent"] for line in part])
        v = np.diff(sent, axis=0) * HZ
        assert abs(v).max(initial=0) <= config.safety.max_velocity[0] * (1 + 1e-5)
        assert abs(np.diff(v, axis=0) * HZ).max(initial=0) <= config.safety.max_acceleration[0] * (1 + 1e-4)
    for before, after in pairwise(filter(None, begun)):
        first, last, place = (np.array(x) for x in (after[0]["sent"], before[-1]["sent"], after[0]["measured"]))
        assert (np.minimum(abs(first - last), abs(first - place)) <= step_m).all(), "a jump on resume"


def test_it_sends_what_it_says_and_stops_whenever_it_is_told(arm: Arm, tmp_path: Path) -> None:
    arm.ask(call="record")
    with robot_at(arm, tmp_path / "log.jsonl") as robot:
        decisions = []
        pace = Pace(HZ)
        for _ in range(20):
            pace.wait()
            robot.observe()
            decisions.append(robot.send(np.array([0.3, 0.3])))
        robot.stop()
        robot.stop()
        with pytest.raises(RobotError, match="not connected"):
            robot.observe()
    executed = np.array([row["action"] for row in arm.ask(call="record")["executed"]])
    lines = lines_of(tmp_path / "log.jsonl")
    sent = np.array([line["sent"] for line in lines if "sent" in line])
    begun = next(i for i, action_A in enumerate(executed) if (abs(sent - action_A).max(axis=1) < 1e-8).any())
    assert len(executed) - begun > 5
    for action_A in executed[begun:]:  # of two that come within a step the newer one counts
        assert (abs(sent - action_A).max(axis=1) < 1e-8).any(), "something else was executed than was sent"
    assert sent[: len(decisions)] == pytest.approx(np.array([d.sent_A for d in decisions]), abs=1e-8)
    assert [line["event"] for line in lines if "event" in line] == ["connected", "reset 7", "stopped"]
    assert lines[-2]["sent"] == lines[-3]["sent"], "it disconnected before it was at rest"
    check_sent(lines, robot.config)  # type: ignore[arg-type]
    moving = [line for line in lines if line.get("reason")]
    assert moving[0]["wanted"] == [0.3, 0.3]
    assert moving[0]["sent"] != moving[0]["wanted"]


FAULTS = {
    "link that goes silent": ({"mute": True}, "stale observation"),
    "state that repeats itself": ({"repeat": True}, "stale observation"),
    "clock that jumps ahead": ({"clock_offset_s": 5.0}, "clock"),
    "clock that jumps back": ({"clock_offset_s": -5.0}, "clock"),
    "numbers that are none": ({"nan": True}, "not finite"),
    "link that buffers": ({"observation_latency_s": 1.2}, "stale observation"),
    "robot that stalls": ({"stall_s": 1.6}, "stale observation"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_holds_latches_records_and_resumes(name: str, arm: Arm, tmp_path: Path) -> None:
    faults, says = FAULTS[name]
    log = tmp_path / "log.jsonl"
    with robot_at(arm, log) as robot:
        sway(
            robot,
            3.0,
            before=lambda step: arm.faults(**faults) if step == 15 else None,
            until=lambda: robot.fault is not None,
        )
        assert says in str(robot.fault)
        fault = robot.fault
        arm.faults(**WELL)
        sway(robot, 1.0)
        assert robot.fault == fault, "it let go of the fault by itself"
        assert robot.state.at_rest
        robot.resume()
        sway(robot, 1.0)
        assert robot.fault is None
    lines = lines_of(log)
    steps = [line for line in lines if "sent" in line]
    first = next(i for i, line in enumerate(steps) if line["fault"])
    assert steps[first]["t"] - steps[first - 1]["t"] <= HELD_S, "it did not hold in time"
    assert steps[first]["holding"]
    assert not steps[first - 1]["holding"]
    check_sent(lines, robot.config)  # type: ignore[arg-type]
    after = next(i for i, line in enumerate(lines) if line.get("event") == "resumed")
    before_resume = next(line for line in reversed(lines[:after]) if "sent" in line)
    after_resume = next(line for line in lines[after:] if "sent" in line)
    from_command = abs(np.subtract(after_resume["sent"], before_resume["sent"]))
    from_arm = abs(np.subtract(after_resume["sent"], after_resume["measured"]))
    moved = np.minimum(from_command, from_arm).max()
    assert moved <= 0.3 / HZ * 0.11, f"it jumped by {moved} on resume"


def test_a_killed_robot_is_noticed_and_the_loop_goes_on(tmp_path: Path) -> None:
    arm = start_arm()
    log = tmp_path / "log.jsonl"
    robot = Robot(robot_config(arm), log)
    robot.connect()
    robot.reset(7)

    def kill(step: int) -> None:
        if step == 10:
            arm.process.kill()

    sway(robot, 2.0, before=kill)
    assert "link" in str(robot.fault) or "stale" in str(robot.fault)
    begun = time.monotonic()
    robot.stop()
    assert time.monotonic() - begun < 5
    steps = [line for line in lines_of(log) if "sent" in line]
    assert steps[-1]["fault"] == robot.fault
    assert steps[-1]["holding"]
    check_sent(lines_of(log), robot.config)  # type: ignore[arg-type]


DRIVE = """
import sys, time, numpy as np
from dataclasses import replace
from real_robot.robot import load_robot, open_robot
from vla_rl.runtime.pace import Pace
with open_robot(replace(load_robot("push_t_fake"), address=sys.argv[1])) as robot:
    robot.reset(7)
    pace, begun_A = Pace(20.0), robot.state.command_A.copy()
    for step in range(10**6):
        pace.wait()
        robot.observe()
        robot.send(begun_A + 0.05 * np.sin(3 * step / 20))
        if step == 10:
            print("moving", flush=True)
"""


def test_a_killed_policy_is_held_by_the_arm_itself(arm: Arm) -> None:
    arm.ask(call="record")
    policy = subprocess.Popen([sys.executable, "-c", DRIVE, arm.address], stdout=subprocess.PIPE, text=True)
    assert policy.stdout is not None
    assert policy.stdout.readline() == "moving\n"
    time.sleep(0.5)
    os.kill(policy.pid, signal.SIGKILL)
    policy.wait()
    time.sleep(0.6)
    executed = arm.ask(call="record")["executed"]
    commands = [np.array(row["action"]) for row in executed]
    holds = [row["holding"] for row in executed]
    last_moving = max(i for i, held in enumerate(holds) if not held)
    assert len(holds) - last_moving > 5, "it never held"
    same = [i for i in range(len(commands)) if (commands[i] == commands[-1]).all()]
    first_of_last = same[0]
    assert executed[last_moving + 1]["t"] - executed[first_of_last]["t"] <= HELD_S + 1.5 / HZ
    assert all((c == commands[first_of_last]).all() for c in commands[first_of_last:]), "it moved on without commands"


class Hanging:
    """An actor that stops answering."""

    def __init__(self, answers: int) -> None:
        self.left, self.failure, self.standing = answers, None, False

    def reset(self, seed: int) -> None:
        self.begun_A: np.ndarray | None = None

    def drop(self) -> None:
        pass

    def act(self, features) -> np.ndarray | None:
        if self.begun_A is None:
            self.begun_A = features["observation.state"].astype(float)
        self.left -= 1
        self.standing = self.left < 0
        return None if self.standing else self.begun_A + 0.01 * np.array([1.0, 0.5])


def test_inference_that_hangs_is_a_fault_and_ends_the_episode(arm: Arm, tmp_path: Path) -> None:
    with robot_at(arm, tmp_path / "log.jsonl", inference_s=0.3) as robot:
        outcome = run_episode(
            robot, Hanging(10), seed=3, steps=100, instruction="push", timing=Timing(), stop=StopRequest()
        )
    assert outcome.ended_by == "fault"
    assert "inference deadline" in str(outcome.fault)
    assert outcome.episode is not None
    assert outcome.episode.truncated
    assert 10 < outcome.steps < 20
    steps = [line for line in lines_of(tmp_path / "log.jsonl") if "sent" in line]
    held = next(i for i, line in enumerate(steps) if line["holding"] and i > 2)
    assert steps[held]["t"] - steps[held - 1]["t"] <= HELD_S


class Person:
    """Plays a list of inputs, a step each."""

    def __init__(self, inputs: dict[int, Input]) -> None:
        self.inputs, self.step = inputs, -1

    def poll(self, situation: Situation) -> Input:
        self.step += 1
        return self.inputs.get(self.step, Input())


def test_what_was_executed_is_recorded_with_the_observation_it_led_to(arm: Arm) -> None:
    wild = np.array([0.3, -0.3])
    with robot_at(arm) as robot:
        person = Person({k: Input(takeover_A=wild) for k in range(10, 16)} | {40: Input(success=True)})
        outcome = run_episode(
            robot,
            Hanging(100),
            seed=4,
            steps=100,
            instruction="push",
            timing=(timing := Timing()),
            stop=StopRequest(),
            operator=person,
        )
    episode = outcome.episode
    assert episode is not None
    assert (outcome.ended_by, outcome.success, episode.terminated) == ("success", True, True)
    assert episode.length == 40 == len(timing.parts_s["late"])
    assert np.flatnonzero(episode.intervened_T).tolist() == list(range(10, 16))
    assert episode.success_T.tolist() == [False] * 39 + [True]
    v = np.diff(episode.action_TA, axis=0) * HZ
    assert abs(v).max() <= 0.3 * (1 + 1e-4), "recorded is what was executed, not what was wanted"
    state_TS = episode.observations["observation.state"]
    assert len(state_TS) == 41
    assert episode.provenance["scene_seed"] == 4
    gone_TS = state_TS[10:] - state_TS[10]  # on a loaded machine the arm is late
    assert gone_TS[:, 0].max() > 0.01
    assert gone_TS[:, 1].min() < -0.01, "the person's action did not move it"


@pytest.mark.parametrize(
    ("said", "ended_by"),
    [(Input(failure=True), "failure"), (Input(stop=True), "operator"), (Input(rerecord=True), "rerecord")],
)
def test_a_person_ends_an_episode(said, ended_by, arm: Arm) -> None:
    with robot_at(arm) as robot:
        outcome = run_episode(
            robot,
            Hanging(100),
            seed=4,
            steps=100,
            instruction="",
            timing=Timing(),
            stop=StopRequest(),
            operator=Person({5: said}),
        )
    assert (outcome.ended_by, outcome.steps, outcome.success) == (ended_by, 5, False)
    assert (outcome.episode is None) == (ended_by == "rerecord"), "an episode to be recorded again is forgotten"


def test_an_episode_ends_in_time_and_at_rest(arm: Arm) -> None:
    with robot_at(arm) as robot:
        outcome = run_episode(
            robot, Hanging(100), seed=4, steps=12, instruction="", timing=Timing(), stop=StopRequest()
        )
        assert robot.state.at_rest
    assert (outcome.ended_by, outcome.steps) == ("time", 12)
    assert outcome.episode is not None
    assert outcome.episode.truncated


def test_nothing_is_sent_in_shadow(arm: Arm) -> None:
    arm.ask(call="reset", scene=9)
    time.sleep(0.2)
    arm.ask(call="record")
    robot = Robot(robot_config(arm), silent=True)
    robot.connect()
    try:
        sway(robot, 0.5)
        assert robot.fault is None
        assert robot.tally.steps == 10
    finally:
        robot.stop()
    assert all(row["holding"] for row in arm.ask(call="record")["executed"])


def test_a_policy_for_another_robot_is_refused_naming_both(arm: Arm) -> None:
    robot = Robot(robot_config(arm))
    spec = replace(robot.action_spec, control_hz=10.0)
    with pytest.raises(
        SpecMismatchError, match=r"policy p and of robot 'push_t_fake' differ in control_hz: 10\.0 and 20\.0"
    ):
        robot.require_fit(spec, robot.observation_spec, "policy p")
    swapped = replace(robot.action_spec, names=("y", "x"))
    with pytest.raises(SpecMismatchError, match="differ in names"):
        robot.require_fit(swapped, robot.observation_spec, "policy p")


def test_a_robot_that_is_another_one_than_described_is_refused(arm: Arm) -> None:
    other = replace(robot_config(arm), action=replace(robot_config(arm).action, low=(-0.3, -0.35)))
    with pytest.raises(SpecMismatchError, match="differ in low"):
        Robot(other).connect()
    shapes = replace(robot_config(arm), observations={"observation.state": (3,)})
    with pytest.raises(RobotError, match=r"shape \(3,\), task 'push_t' has \(2,\)"):
        Robot(shapes).connect()


def test_a_robot_that_is_not_there_is_refused_soon() -> None:
    config = replace(load_robot("push_t_fake"), address="tcp://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(UserError, match="nobody answers"):
        Robot(config).connect()
    assert time.monotonic() - begun < 5


def test_threads_end_with_the_robot(arm: Arm) -> None:
    before = threading.active_count()
    for _ in range(3):
        with robot_at(arm):
            pass
    assert threading.active_count() <= before


def test_a_held_robot_is_not_reset_and_a_reset_is_no_jump(arm: Arm) -> None:
    with robot_at(arm) as robot:
        sway(robot, 0.5)
        with pytest.raises(RobotError, match="still coming to rest"):
            robot.reset(8)
        while not robot.state.at_rest:
            time.sleep(1 / HZ)
            robot.observe()
            robot.send(None)
        commanded_A = robot.state.command_A
        robot.reset(7)
        measured_A = robot.observe().measured_A
        near_A = abs(measured_A - commanded_A) <= robot.rules.v_max_A * robot.rules.dt
        begun_A = robot.state.command_A
        assert (begun_A[near_A] == commanded_A[near_A]).all()
        assert begun_A[~near_A] == pytest.approx(measured_A[~near_A], abs=0.01), "it was moved by the reset"
        robot.observe()
        robot.send(np.array([np.nan, 0.0]))
        asked = arm.ask(call="next", after=-1, timeout_s=1.0)["token"]
        with pytest.raises(RobotError, match="is held: not finite"):
            robot.reset(9)
        assert arm.ask(call="next", after=-1, timeout_s=1.0)["token"] == asked, "it was reset nevertheless"
    with pytest.raises(RobotError, match="not connected"):
        robot.send(np.zeros(2))
