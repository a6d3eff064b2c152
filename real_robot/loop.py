"""The control loop: one episode at a fixed rate, the same for a robot, its simulation and shadow mode; at rest however it ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from real_robot.robot import Reading, Robot
from real_robot.safety import Decision
from vla_rl.data.episode import Episode, EpisodeRecorder, Provenance
from vla_rl.inference.base_policy import BasePolicy, Histories
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace

MISSED_S = 0.002
PARTS = ("late", "observe", "act", "send", "rest")


@runtime_checkable
class Actor(Protocol):
    """What decides: ``vla_rl.inference.worker.RealTimeController``, or ``StepActor``."""

    failure: Exception | None

    @property
    def standing(self) -> bool:
        """Whether the last ``act`` had no action of the policy's to give."""

    def reset(self, seed: int) -> None:
        """A new episode begins."""

    def act(self, features: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The action of this step, (A,), at once."""


class StepActor:
    """Asks a base that decides step by step (a residual on another one) in the loop itself."""

    def __init__(self, base: BasePolicy, seed: int = 0) -> None:
        self.base = base
        self.failure: Exception | None = None
        self.standing = False
        self._histories = Histories(base.spec, 1)
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """See ``Actor``."""
        self._histories.reset(0)
        self.base.reset([0], [seed])

    def act(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Actor``."""
        self._histories.see({k: v[None] for k, v in features.items()}, [0])
        return self.base.chunk(self._histories.observation(), [0])[0, 0]


@dataclass(frozen=True)
class Input:
    """What a person does in one step.

    takeover_A: action in the policy's place, while the person holds on to it
    success: the task is done; failure: it will not be
    rerecord: forget this episode and begin it again
    resume: a fault has been looked after
    ready: the scene is set, the episode may begin
    stop: end everything
    held_switch: the dead-man switch is held
    """

    takeover_A: np.ndarray | None = None
    success: bool = False
    failure: bool = False
    rerecord: bool = False
    resume: bool = False
    ready: bool = False
    stop: bool = False
    held_switch: bool = False


@runtime_checkable
class Operator(Protocol):
    """A person at a keyboard or gamepad."""

    def poll(self) -> Input:
        """What has happened since the last call; returns at once."""


class Nobody:
    """No person: episodes begin and end by themselves, and a fault ends the run."""

    def poll(self) -> Input:
        """See ``Operator``."""
        return Input(ready=True)


Judge = Callable[[Reading], tuple[float, bool]]  # reward and success of an observation, where the robot does not know


@dataclass
class Timing:
    """Seconds of each part of the steps, and deadlines that were missed.

    parts_s: by part: how late the step began, observe, act, send, and the rest until the next deadline's wait
    missed: steps that began more than MISSED_S late, and deadlines that were left out
    """

    parts_s: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    missed: int = 0

    def summary(self) -> dict[str, Any]:
        """Percentiles in ms, as plain data."""
        shown: dict[str, Any] = {"missed_deadlines": self.missed, "steps": len(self.parts_s["late"])}
        for part, seconds in self.parts_s.items():
            if seconds:
                p50, p99, most = 1e3 * np.percentile(seconds, [50, 99, 100])
                shown[part] = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "max_ms": round(most, 3)}
        return shown


@dataclass(frozen=True)
class Outcome:
    """How an episode ended.

    ended_by: success, failure, robot (it cannot go on), time, fault, operator (stop), rerecord
    """

    seed: int
    episode: Episode | None
    success: bool
    steps: int
    ended_by: str
    fault: str | None


class StopRequest:
    """SIGINT and SIGTERM as a flag that the loop looks at in every step; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        del frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write(f"\nstopping ({signal.Signals(number).name}); again to interrupt at once\n")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM for the time of the block; outside the main thread, where Python knows no signals, do nothing."""
    request = StopRequest()
    try:
        before = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_episode(
    robot: Robot,
    actor: Actor,
    *,
    seed: int,
    steps: int,
    instruction: str,
    timing: Timing,
    stop: StopRequest,
    operator: Operator | None = None,
    judge: Judge | None = None,
    provenance: Provenance | None = None,
    on_step: Callable[[Reading, Decision], None] | None = None,
    waits_for_resume: bool = False,
) -> Outcome:
    """Run one episode: the robot is reset to where it begins, and is at rest when this returns.

    Args:
        robot: connected.
        actor: decides.
        seed: of the scene, and of the actor's noise.
        steps: after which the episode is truncated.
        instruction: the task in words, recorded.
        timing: is added to.
        stop: ends the episode when asked.
        operator: a person (none: nobody).
        judge: of reward and success, where the robot does not know them.
        provenance: of the recorded episode.
        on_step: called with each observation and what was sent.
        waits_for_resume: a fault does not end the episode; the person may resume it.
    """
    operator = operator or Nobody()
    robot.reset(seed)
    actor.reset(seed)
    pace, reading = Pace(robot.action_spec.control_hz), robot.observe()
    known: Provenance = {"source": "policy", **(provenance or {}), "scene_seed": seed, "robot": robot.config.name}
    recorder = EpisodeRecorder(dict(reading.features), instruction, known)
    intervened: list[bool] = []
    ended_by, success, moved_s = "", False, time.monotonic()
    action_A: np.ndarray | None = None
    decision: Decision | None = None
    while True:
        late_s = pace.wait()
        woke_s = time.monotonic()
        reading = robot.observe()
        seen_s = time.monotonic()
        human = operator.poll()
        if decision is not None:  # what the step before led to
            reward, success = _judged(reading, judge, human)
            recorder.add(
                executed_A=decision.sent_A.astype(np.float32),
                intended_A=np.asarray(decision.sent_A if action_A is None else action_A, np.float32),
                observation=dict(reading.features),
                reward=reward,
                success=success,
            )
            ended_by = _ended(success, reading, human, stop, robot, waits_for_resume)
            ended_by = ended_by or ("time" if len(intervened) == steps else "")
            if ended_by:
                break
        if human.resume and robot.fault is not None and robot.state.at_rest:
            with contextlib.suppress(UserError):  # what is still wrong stays the fault
                robot.resume()
        proposed_A = actor.act(reading.features)
        action_A = None if actor.standing else proposed_A
        wanted_A = action_A if human.takeover_A is None else human.takeover_A
        moved_s = moved_s if wanted_A is None else time.monotonic()
        decided_s = time.monotonic()
        decision = robot.send(wanted_A, without_s=decided_s - moved_s, held_switch=human.held_switch)
        sent_s = time.monotonic()
        intervened.append(human.takeover_A is not None)
        if on_step is not None:
            on_step(reading, decision)
        _count(timing, late_s, woke_s, seen_s, decided_s, sent_s)
    timing.missed += pace.skipped
    rest(robot)
    episode = None
    if ended_by != "rerecord":
        terminated = ended_by in ("success", "failure", "robot")
        ended = recorder.episode(terminated=terminated, truncated=not terminated)
        episode = replace(ended, intervened_T=np.array(intervened))
    return Outcome(seed, episode, success, len(intervened), ended_by, robot.fault)


def _count(timing: Timing, late_s: float, woke_s: float, seen_s: float, decided_s: float, sent_s: float) -> None:
    values = late_s, seen_s - woke_s, decided_s - seen_s, sent_s - decided_s, time.monotonic() - sent_s
    for part, seconds in zip(PARTS, values, strict=True):
        timing.parts_s[part].append(seconds)
    timing.missed += late_s > MISSED_S


def _judged(reading: Reading, judge: Judge | None, human: Input) -> tuple[float, bool]:
    """Reward and success: the person's word, else the robot's, else the judge's."""
    if human.success or human.failure:
        return float(human.success), human.success
    if reading.success is not None:
        reward = float(reading.success) if reading.reward is None else reading.reward
        return reward, reading.success
    return judge(reading) if judge is not None else (0.0, False)


def _ended(success: bool, reading: Reading, human: Input, stop: StopRequest, robot: Robot, waits: bool) -> str:
    if stop.asked or human.stop:
        return "operator"
    if human.rerecord:
        return "rerecord"
    if success:
        return "success"
    if human.failure:
        return "failure"
    if robot.fault is not None and not waits:
        return "fault"
    return "robot" if reading.ended else ""


def rest(robot: Robot) -> None:
    """Bring the commands to rest, at the robot's rate."""
    pace = Pace(robot.action_spec.control_hz)
    while not robot.state.at_rest:
        pace.wait()
        robot.observe()
        robot.send(None)
