"""A robot as a Gymnasium environment of one, so that every stage that learns from a vector environment learns on it unchanged.

The control loop of ``real_robot.loop`` runs in a thread of its own, at the robot's rate, with its filter, its person and its clean stop.
``step`` hands it the next action and returns what it led to. Who is not there in time with an action leaves the robot to come to rest, as
a policy that hangs does: a learner may stop for as long as it likes between episodes, and in one the robot holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from real_robot.loop import Judge, Outcome, Timing, Transition, run_episode
from real_robot.operators.base import Input, Nobody, Operator, Situation
from real_robot.robot import Robot, RobotError
from real_robot.stopping import StopRequest
from vla_rl.types import ActionSpec, ObservationSpec

PATIENCE = 0.5  # of a control step, for the next action


@dataclass(frozen=True)
class Habits:
    """How episodes begin and end on a robot.

    steps: after which an episode is truncated
    instruction: the task in words
    operator: a person (None: nobody)
    judge: of reward and success, where neither the robot nor a person says
    waits_for_ready: a person sets each scene
    stop: ends everything when asked
    """

    steps: int
    instruction: str
    operator: Operator | None = None
    judge: Judge | None = None
    waits_for_ready: bool = False
    stop: StopRequest = field(default_factory=StopRequest)


class RobotEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """One robot.

    ``info`` has ``success``, ``executed`` (what was really sent), ``intervened`` (a person acted) and, at an end, ``ended_by``.

    Steps that nobody was in time for are part of the next one. An episode that a person forgets (re-record) ends with ``diverged``,
    which keeps it out of all data.
    """

    metadata = {"render_modes": []}

    def __init__(self, robot: Robot, habits: Habits) -> None:
        """Set up; the robot is connected, and is stopped by ``close``."""
        self.robot, self.habits = robot, habits
        self.action_spec: ActionSpec = robot.action_spec
        self.observation_spec: ObservationSpec = robot.observation_spec
        spec = robot.action_spec
        self.action_space = gym.spaces.Box(spec.low_array(), spec.high_array(), dtype=np.float32)
        seen = robot.observe().features
        spaces: dict[str, gym.Space[Any]] = {k: _space(seen[k]) for k in self.observation_spec}
        self.observation_space = gym.spaces.Dict(spaces)  # type: ignore[assignment]
        self.timing = Timing()
        self.stop = habits.stop
        self._handover = _Handover(PATIENCE / spec.control_hz)
        self._person = _Person(habits.operator or Nobody())
        self._thread: threading.Thread | None = None
        self._ended: Outcome | BaseException | None = None
        self._runs = False  # as far as who asks for steps knows

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Bring the robot to where an episode begins, and begin it.

        Raises:
            RobotError: the robot is held by a fault and nobody is there to look after it, or a person has stopped.
        """
        super().reset(seed=seed)
        self._break_off()
        self._person.leaves, self._ended = False, None
        self._handover.begin()
        scene = int(self.np_random.integers(2**31)) if seed is None else seed
        self._thread = threading.Thread(target=self._episode, args=(scene,), name="robot-episode", daemon=True)
        self._thread.start()
        seen = self._handover.seen()
        if seen is None:
            self._require_episode()
            raise RobotError(f"the episode of scene {scene} ended before it began")
        self._runs = True
        return seen, {"success": False}

    def _episode(self, scene: int) -> None:
        habits, watched = self.habits, self.habits.operator is not None
        try:
            self._ended = run_episode(
                self.robot,
                self._handover,
                seed=scene,
                steps=habits.steps,
                instruction=habits.instruction,
                timing=self.timing,
                stop=self.stop,
                operator=self._person,
                judge=habits.judge,
                on_transition=self._handover.happened,
                waits_for_ready=habits.waits_for_ready,
                waits_for_resume=watched,
            )
        except BaseException as error:  # noqa: BLE001 - goes up in the learner's thread
            self._ended = error
        finally:
            self._handover.end()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Have an action executed, as far as the filter and the person let it, and return what came of it.

        Raises:
            RobotError: no episode is running, or a person has stopped.
        """
        if not self._runs:
            raise RobotError("no episode is running on the robot; reset it")
        self._handover.give(np.asarray(action, float))
        seen = self._handover.seen()
        happened, own = self._handover.take()
        info: dict[str, Any] = {
            "success": any(t.success for t in happened),
            "executed": np.asarray(
                (happened[min(own, len(happened) - 1)].executed_A if happened else action), np.float32
            ),
            "intervened": any(t.intervened for t in happened),
        }
        reward = float(sum(t.reward for t in happened))
        if seen is not None:
            return seen, reward, False, False, info
        self._runs = False
        outcome = self._require_episode()
        info["ended_by"] = outcome.ended_by
        if outcome.fault is not None:
            info["fault"] = outcome.fault
        if outcome.episode is None:
            info["diverged"] = "a person wanted it recorded again"
            return self._handover.last(), reward, False, True, info
        last = {k: v[-1] for k, v in outcome.episode.observations.items()}
        return last, reward, outcome.episode.terminated, outcome.episode.truncated, info

    def _require_episode(self) -> Outcome:
        """What the loop came to; raises what it raised."""
        assert self._thread is not None
        self._thread.join()
        if isinstance(self._ended, BaseException):
            raise self._ended
        assert self._ended is not None
        if self._ended.ended_by == "operator":
            raise RobotError(f"a person stopped robot {self.robot.config.name!r}; the same command goes on")
        return self._ended

    def _break_off(self) -> None:
        """End an episode that runs still; the robot comes to rest."""
        if self._thread is not None:
            self._person.leaves = True
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Bring the robot to rest and leave it; may be called again."""
        self._break_off()
        self.robot.stop()


class _Handover:
    """Between the control loop, whose ``Actor`` it is, and who asks the environment for steps."""

    def __init__(self, patience_s: float) -> None:
        self.failure: Exception | None = None
        self.standing = False
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._given_A: np.ndarray | None = None
        self._seen: dict[str, np.ndarray] | None = None
        self._newest: dict[str, np.ndarray] = {}
        self._happened: list[Transition] = []
        self._own = 0
        self._ends = False

    # of the loop

    def reset(self, seed: int) -> None:
        """See ``Actor``."""

    def drop(self) -> None:
        """See ``Actor``: actions are not planned ahead."""

    def act(self, features: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """See ``Actor``: the next action, if it comes in a part of the step."""
        with self._changed:
            self._seen = self._newest = {k: np.array(v) for k, v in features.items()}
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._given_A is not None, self._patience_s)
            action_A, self._given_A = self._given_A, None
            self.standing = action_A is None
            if action_A is not None:
                self._seen, self._own = None, len(self._happened)  # what is seen from now on is what the action led to
            return action_A

    def happened(self, transition: Transition) -> None:
        """A step is over."""
        with self._changed:
            self._happened.append(transition)

    def end(self) -> None:
        """The episode is over."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()

    # of the environment

    def begin(self) -> None:
        """Forget the last episode."""
        with self._changed:
            self._given_A, self._seen, self._happened, self._ends = None, None, [], False

    def give(self, action_A: np.ndarray) -> None:
        """The next action; what was seen so far is what it was chosen for."""
        with self._changed:
            self._given_A, self._seen, self._own = action_A, None, 0
            self._changed.notify_all()

    def seen(self) -> dict[str, np.ndarray] | None:
        """Wait for what is seen after the action that was given; None where the episode has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ends or (self._seen is not None and self._given_A is None))
            return None if self._ends else self._seen

    def last(self) -> dict[str, np.ndarray]:
        """The newest observation that an action was asked for."""
        return self._newest

    def take(self) -> tuple[list[Transition], int]:
        """Steps since the last call, and which of them had the action that was given."""
        with self._changed:
            happened, self._happened = self._happened, []
            return happened, self._own


class _Person:
    """The person, or nobody, and the environment that may end an episode before its time."""

    def __init__(self, inner: Operator) -> None:
        self.inner = inner
        self.leaves = False

    def poll(self, situation: Situation) -> Input:
        """See ``Operator``."""
        human = self.inner.poll(situation)
        return replace(human, reset=True, ready=True) if self.leaves else human


def _space(value: np.ndarray) -> gym.spaces.Box:
    low, high = (0, 255) if value.dtype == np.uint8 else (-np.inf, np.inf)
    return gym.spaces.Box(low, high, value.shape, value.dtype.type)


def vector_of_one(make: Callable[[], RobotEnv]) -> SyncVectorEnv:
    """The robot behind Gymnasium's vector interface, batch first, without autoreset."""
    return SyncVectorEnv([make], autoreset_mode=AutoresetMode.DISABLED)
