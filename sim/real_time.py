"""A task's environment as a robot: it moves by the clock whether or not somebody commands it, and holds by itself when nobody does."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sim.task import SimulationDivergedError, TaskEnv
from vla_rl.runtime.pace import Pace
from vla_rl.types import MOVES, STATE


@dataclass(frozen=True)
class Faults:
    """What can go wrong with a robot, for tests; all off by default.

    observation_latency_s: observations are given out so much later
    command_latency_s: commands take effect so much later
    mute: no observations are given out
    freeze: observations stay as they are, with new stamps
    repeat: observations are given out again with their old stamp
    clock_offset_s: added to the stamps
    nan: observations are not numbers
    stall_s: the robot does nothing at all for so long, once
    """

    observation_latency_s: float = 0.0
    command_latency_s: float = 0.0
    mute: bool = False
    freeze: bool = False
    repeat: bool = False
    clock_offset_s: float = 0.0
    nan: bool = False
    stall_s: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """What the robot gives out after a step.

    number: of the step since the process began
    stamp_s: by the robot's own clock
    scene: seed of the episode's scene
    token: that the reset came with, which began it
    """

    number: int
    stamp_s: float
    scene: int
    token: int
    features: dict[str, np.ndarray]
    success: bool
    ended: bool
    reward: float
    holding: bool


class RealTimeArm:
    """Steps an environment at its control rate with the newest command.

    A command that is older than ``watchdog_s`` moves nothing any more: movements and velocities become zero, places stay where they are,
    grippers (unit 1) keep their value. An episode that has ended stands still until it is reset.
    """

    def __init__(self, env: TaskEnv, watchdog_s: float = 0.1, speed: float = 1.0) -> None:
        """Set up.

        Args:
            env: the environment.
            watchdog_s: how old a command may be.
            speed: of the robot's time; tests without a clock of their own may run it faster.
        """
        self.env, self.watchdog_s = env, watchdog_s
        self.faults = Faults()
        self._pace = Pace(env.action_spec.control_hz * speed, spin_s=0.0)
        self._lock = threading.Condition()
        self._commands: deque[tuple[float, np.ndarray]] = deque(maxlen=64)
        self._last_A: np.ndarray | None = None
        self._place_A = np.zeros(env.action_spec.dim)
        self._last_s = -math.inf
        self._reset_to: tuple[int, int] | None = (0, 0)
        self._newest: Snapshot | None = None
        self._late: deque[tuple[float, Snapshot]] = deque()
        self._number = 0
        self._ends = False
        self.executed: list[tuple[float, np.ndarray, bool]] = []  # time, action, holding: what tests look at
        self.keeps_record = False

    def command(self, action_A: np.ndarray) -> None:
        """Take a command; what is not finite or has another shape is what a robot's own controller refuses, and is ignored."""
        action_A = np.asarray(action_A, float)
        if action_A.shape == (self.env.action_spec.dim,) and np.isfinite(action_A).all():
            with self._lock:
                self._commands.append((time.monotonic() + self.faults.command_latency_s, action_A))

    def reset(self, scene: int, token: int) -> None:
        """Begin another episode with the next step; the token tells its snapshots from those before."""
        with self._lock:
            self._reset_to = scene, token

    def newest(self, after: int = -1, timeout_s: float = 0.0) -> Snapshot | None:
        """What is given out, as soon as its number is beyond ``after``; None where that takes longer than ``timeout_s``."""
        with self._lock:
            self._lock.wait_for(lambda: self._newest is not None and self._newest.number > after, timeout_s)
            found = self._newest
        return found if found is not None and found.number > after else None

    def close(self) -> None:
        """End ``run``."""
        self._ends = True

    def run(self) -> None:
        """Step until closed."""
        features: dict[str, np.ndarray] = {}
        success = ended = False
        reward, scene, token = 0.0, 0, 0
        while not self._ends:
            self._pace.wait()
            if self.faults.stall_s:
                stall_s, self.faults = self.faults.stall_s, replace(self.faults, stall_s=0.0)
                time.sleep(stall_s)
            with self._lock:
                reset_to, self._reset_to = self._reset_to, None
            if reset_to is not None:
                scene, token = reset_to
                features, _ = self.env.reset(seed=scene)
                success = ended = False
                reward = 0.0
                self._last_A = None
                # where an arm that takes places stands before the first command: its state begins with them
                self._place_A = features[STATE][: self.env.action_spec.dim].astype(float)
                with self._lock:
                    self._commands.clear()
            action_A, holding = self._action()
            if not ended:
                try:
                    features, reward, terminated, truncated, info = self.env.step(action_A)
                except SimulationDivergedError:
                    terminated, truncated, info = False, True, {"success": False}
                success, ended = success or bool(info["success"]), terminated or truncated
            if self.keeps_record:
                self.executed.append((time.monotonic(), action_A.copy(), holding))
            made = Snapshot(self._number + 1, 0.0, scene, token, features, success, ended, reward, holding)
            self._give_out(made)

    def _action(self) -> tuple[np.ndarray, bool]:
        now_s, spec = time.monotonic(), self.env.action_spec
        with self._lock:
            while self._commands and self._commands[0][0] <= now_s:
                self._last_s, self._last_A = self._commands.popleft()
        holding = now_s - self._last_s > self.watchdog_s
        still_A = np.clip(np.zeros(spec.dim), spec.low_array(), spec.high_array())
        if self._last_A is None:
            return (still_A if spec.mode in MOVES else self._place_A), True
        if holding and spec.mode in MOVES:
            free_A = np.array([unit == "1" for unit in spec.units])
            return np.where(free_A, self._last_A, still_A), True
        return self._last_A, holding

    def _give_out(self, made: Snapshot) -> None:
        now_s, faults = time.monotonic(), self.faults
        self._number = made.number
        made = replace(made, stamp_s=now_s + faults.clock_offset_s)
        if faults.nan:
            made = replace(made, features={k: np.full_like(v, np.nan) for k, v in made.features.items()})
        if faults.mute:
            return
        with self._lock:
            if self._newest is not None and faults.freeze:
                made = replace(made, features=self._newest.features)
            if self._newest is not None and faults.repeat:
                made = replace(self._newest, number=self._number)
            self._late.append((now_s + faults.observation_latency_s, made))
            while self._late and self._late[0][0] <= now_s:
                self._newest = self._late.popleft()[1]
                self._lock.notify_all()


def as_message(snapshot: Snapshot) -> dict[str, Any]:
    """Plain data, for a wire."""
    return {
        "number": snapshot.number,
        "stamp_s": snapshot.stamp_s,
        "scene": snapshot.scene,
        "token": snapshot.token,
        "features": snapshot.features,
        "success": snapshot.success,
        "ended": snapshot.ended,
        "reward": float(snapshot.reward),
        "holding": snapshot.holding,
    }
