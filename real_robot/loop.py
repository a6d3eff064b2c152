"""The control loop: one episode at a fixed rate, the same for a robot, its simulation and shadow mode; at rest however it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from real_robot.operators.base import Input, Nobody, Operator, Phase, Situation
from real_robot.robot import Reading, Robot
from real_robot.safety import Decision
from real_robot.stopping import StopAsked, StopRequest
from vla_rl.data.episode import Episode, EpisodeRecorder, Provenance
from vla_rl.inference.base_policy import BasePolicy, Histories
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace

MISSED_S = 0.002
LEAST_SHARE = 0.75  # of a control step between two observations: the robot takes no command sooner after the last one
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

    def drop(self) -> None:
        """Somebody else moved the robot, or it was held: forget what was planned, and go on from what is seen next."""


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
        self._seed = seed
        self.drop()

    def drop(self) -> None:
        """See ``Actor``: what the base under it has queued goes with its episode."""
        self.base.reset([0], [self._seed])

    def act(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Actor``."""
        self._histories.see({k: v[None] for k, v in features.items()}, [0])
        return self.base.chunk(self._histories.observation(), [0])[0, 0]


Judge = Callable[[Reading], tuple[float, bool]]  # reward and success of an observation, where the robot does not know


@dataclass
class Timing:
    """Seconds of each part of the steps, and deadlines that were missed.

    parts_s: by part: how late the step began, observe, act, send, and the rest until the next deadline's wait
    missed: steps that began more than MISSED_S late, and deadlines that were left out
    late_s: of each step that began more than MISSED_S late, its deadline and when it began (monotonic)
    """

    parts_s: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    missed: int = 0
    late_s: list[tuple[float, float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Percentiles in ms, as plain data."""
        shown: dict[str, Any] = {"missed_deadlines": self.missed, "steps": len(self.parts_s["late"])}
        for part, seconds in self.parts_s.items():
            if seconds:
                p50, p99, most = 1e3 * np.percentile(seconds, [50, 99, 100])
                shown[part] = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "max_ms": round(most, 3)}
        return shown


@dataclass(frozen=True)
class Transition:
    """What one step led to.

    executed_A: what was sent
    reward: of the step
    success: whether the task is done
    intervened: a person acted
    """

    executed_A: np.ndarray
    reward: float
    success: bool
    intervened: bool


@dataclass(frozen=True)
class Outcome:
    """How an episode ended.

    ended_by: success, failure, robot (it cannot go on), time, fault, operator (stop), rerecord, reset
    taken_over: steps in which a person acted
    held: steps that came to rest, or stood, whatever was wanted
    resumed: faults that a person looked after meanwhile
    """

    seed: int
    episode: Episode | None
    success: bool
    steps: int
    ended_by: str
    fault: str | None
    taken_over: int = 0
    held: int = 0
    resumed: tuple[str, ...] = ()


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
    on_transition: Callable[[Transition], None] | None = None,
    waits_for_ready: bool = False,
    waits_for_resume: bool = False,
) -> Outcome:
    """Run one episode: the robot is reset to where it begins, and is at rest when this returns; an exception stops it first.

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
        on_transition: called with what each step led to, as it is recorded.
        waits_for_ready: a person sets the scene, and the episode begins when they say so.
        waits_for_resume: a fault does not end the episode; the person may resume it.
    """
    watch = _Watch(robot, operator or Nobody(), stop, seed, waits_for_resume)
    try:
        ended_by = watch.await_start(waits_for_ready)
        if ended_by:
            rest(robot)
            return Outcome(seed, None, False, 0, ended_by, robot.fault, resumed=tuple(watch.resumed))
        actor.reset(seed)
        known: Provenance = {"source": "policy", **(provenance or {}), "scene_seed": seed, "robot": robot.config.name}
        recorder = EpisodeRecorder(dict(robot.observe().features), instruction, known)
        ended_by, success, intervened, held = _steps(
            actor, watch, recorder, judge, steps, timing, on_step, on_transition
        )
        rest(robot)
    except BaseException:
        robot.stop()
        raise
    episode = None
    if ended_by != "rerecord":
        terminated = ended_by in ("success", "failure", "robot")
        ended = recorder.episode(terminated=terminated, truncated=not terminated)
        more: Provenance = {"faults_resumed": len(watch.resumed)} if watch.resumed else {}
        episode = replace(ended, intervened_T=np.array(intervened), provenance={**ended.provenance, **more})
    return Outcome(
        seed,
        episode,
        success,
        len(intervened),
        ended_by,
        robot.fault,
        sum(intervened),
        held,
        tuple(watch.resumed),
    )


def _steps(
    actor: Actor,
    watch: _Watch,
    recorder: EpisodeRecorder,
    judge: Judge | None,
    steps: int,
    timing: Timing,
    on_step: Callable[[Reading, Decision], None] | None,
    on_transition: Callable[[Transition], None] | None,
) -> tuple[str, bool, list[bool], int]:
    """The control steps: what ended them, success, in which a person acted, and how many were held."""
    robot = watch.robot
    pace = Pace(robot.action_spec.control_hz, least_share=LEAST_SHARE)
    intervened: list[bool] = []
    held, success, begun_s = 0, False, time.monotonic()
    moved_s = begun_s
    action_A: np.ndarray | None = None
    decision: Decision | None = None
    while True:
        late_s = pace.wait()
        woke_s = time.monotonic()
        reading = robot.observe()
        seen_s = time.monotonic()
        human = watch.poll("running", woke_s - begun_s)
        if decision is not None:  # what the step before led to
            reward, success = _judged(reading, judge, human)
            recorder.add(
                executed_A=decision.sent_A.astype(np.float32),
                intended_A=np.asarray(decision.sent_A if action_A is None else action_A, np.float32),
                observation=dict(reading.features),
                reward=reward,
                success=success,
            )
            if on_transition is not None:
                on_transition(Transition(decision.sent_A, reward, success, intervened[-1]))
            ended_by = _ended(success, reading, human, watch)
            ended_by = ended_by or ("time" if len(intervened) == steps else "")
            if ended_by:
                break
        if watch.resume(human):
            moved_s = time.monotonic()
        if watch.gives_back(human):
            actor.drop()
        proposed_A = actor.act(reading.features)
        action_A = None if actor.standing else proposed_A
        wanted_A = human.takeover_A if human.takes_over else action_A
        moved_s = time.monotonic() if human.takes_over or wanted_A is not None else moved_s
        decided_s = time.monotonic()
        broken = () if human.broken is None else (human.broken,)
        decision = robot.send(wanted_A, without_s=decided_s - moved_s, held_switch=human.held_switch, broken=broken)
        sent_s = time.monotonic()
        intervened.append(human.takes_over)
        held += decision.holding
        if on_step is not None:
            on_step(reading, decision)
        _count(timing, late_s, woke_s, seen_s, decided_s, sent_s)
    timing.missed += pace.skipped
    return ended_by, success, intervened, held


class _Watch:
    """A person beside the loop: what they are told, and what they may do whatever the loop does."""

    def __init__(self, robot: Robot, operator: Operator, stop: StopRequest, seed: int, waits_for_resume: bool) -> None:
        self.robot, self.operator, self.stop, self.seed = robot, operator, stop, seed
        self.waits_for_resume = waits_for_resume
        self.resumed: list[str] = []
        self._notice = ""
        self._in_command = "nobody"
        self._away = False  # the policy does not move the robot

    def poll(self, phase: Phase, elapsed_s: float = 0.0) -> Input:
        """Tell the person how things stand, and hear what they want."""
        robot = self.robot
        situation = Situation(robot.state, phase, self.seed, elapsed_s, robot.fault, self._in_command, self._notice)
        human = self.operator.poll(situation)
        self.stop.asked |= human.stop  # whatever the loop does in this step
        return human

    def resume(self, human: Input) -> bool:
        """Let go of a fault if the person wants it and it is over; else they are told why not."""
        fault = self.robot.fault
        if not human.resume or not self.waits_for_resume or fault is None:
            return False
        if not self._let_go():
            return False
        self.resumed.append(fault)
        return True

    def _let_go(self) -> bool:
        if not self.robot.state.at_rest:
            self._notice = "the robot is still coming to rest; say so again when it has"
            return False
        try:
            self.robot.resume()
        except UserError as error:
            self._notice = str(error)
            return False
        self._notice = ""
        return True

    def gives_back(self, human: Input) -> bool:
        """Whether the policy moves the robot again, after a person did, or after it was held."""
        released = self.robot.config.safety.dead_man and not human.held_switch
        held = self.robot.fault is not None or human.broken is not None or released
        taken = human.takes_over
        self._in_command = "nobody, the robot is held" if held else "you" if taken else "the policy"
        if self.robot.fault is None and released:
            self._in_command = "nobody, the dead-man switch is released"
        before, self._away = self._away, held or taken
        return before and not self._away

    def await_start(self, waits_for_ready: bool) -> str:
        """Bring the robot to where the episode begins; why it does not begin ('' if it does)."""
        ended_by = ""
        if self.robot.fault is not None and self.waits_for_resume:
            ended_by = self._stand("held", lambda _: True)
        if not ended_by:
            try:
                with self.stop.breaks_off():
                    self.robot.reset(self.seed)
            except StopAsked:
                ended_by = "operator"
        if not ended_by and waits_for_ready:
            # a person has moved the robot, perhaps: it goes on from where it is now, slowly at first
            ended_by = self._stand("scene", lambda human: human.ready and self._let_go())
        return ended_by

    def _stand(self, phase: Phase, done: Callable[[Input], bool]) -> str:
        """Stand, and watch, until a person wants to go on; what ends it instead."""
        pace = Pace(self.robot.action_spec.control_hz, least_share=LEAST_SHARE)
        self._in_command = "nobody, the robot stands"
        while True:
            pace.wait()
            self.robot.observe()
            human = self.poll(phase)
            if self.stop.asked:
                return "operator"
            self.resume(human)
            if self.robot.fault is not None and not self.waits_for_resume:
                return "fault"
            if self.robot.fault is None and done(human):
                return ""
            self.robot.send(None, held_switch=human.held_switch)


def _count(timing: Timing, late_s: float, woke_s: float, seen_s: float, decided_s: float, sent_s: float) -> None:
    values = late_s, seen_s - woke_s, decided_s - seen_s, sent_s - decided_s, time.monotonic() - sent_s
    for part, seconds in zip(PARTS, values, strict=True):
        timing.parts_s[part].append(seconds)
    if late_s > MISSED_S:
        timing.missed += 1
        timing.late_s.append((woke_s - late_s, woke_s))


def _judged(reading: Reading, judge: Judge | None, human: Input) -> tuple[float, bool]:
    """Reward and success: the person's word, else the robot's, else the judge's."""
    if human.success or human.failure:
        return float(human.success), human.success
    if reading.success is not None:
        reward = float(reading.success) if reading.reward is None else reading.reward
        return reward, reading.success
    return judge(reading) if judge is not None else (0.0, False)


def _ended(success: bool, reading: Reading, human: Input, watch: _Watch) -> str:
    if watch.stop.asked:
        return "operator"
    if human.rerecord:
        return "rerecord"
    if success:
        return "success"
    if human.failure:
        return "failure"
    if human.reset:
        return "reset"
    if watch.robot.fault is not None and not watch.waits_for_resume:
        return "fault"
    return "robot" if reading.ended else ""


def rest(robot: Robot) -> None:
    """Bring the commands to rest, at the robot's rate."""
    pace = Pace(robot.action_spec.control_hz, least_share=LEAST_SHARE)
    while not robot.state.at_rest:
        pace.wait()
        robot.observe()
        robot.send(None)
