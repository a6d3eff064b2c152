"""An arm that is only its topics: it is at once where it is told to be. To try a robot's file, and the way to it, without the robot."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np

from real_robot.parts import PartConfig
from real_robot.robots.ros import RosRobotConfig
from vla_rl.runtime.pace import Pace

WATCHDOG_S = 0.1  # after which movements end that nobody renews
AT_REST = {"rotation6": (1, 0, 0, 0, 1, 0), "quaternion": (0, 0, 0, 1)}


@dataclass(frozen=True)
class Snapshot:
    """See ``real_robot.bridge.Seen``."""

    number: int
    stamp_s: float
    token: int
    features: dict[str, np.ndarray] = field(default_factory=dict)
    success: bool = False
    ended: bool = False
    reward: float = 0.0


class MirrorArm:
    """See ``real_robot.bridge.Arm``. Each axis begins in the middle of what is allowed."""

    def __init__(self, config: RosRobotConfig) -> None:
        self.config = config
        spec, rules = config.action, config.rules()
        low_A, high_A = np.maximum(rules.low_A, -1e3), np.minimum(rules.high_A, 1e3)
        self.place_A = (low_A + high_A) / 2
        self._velocity_A = np.zeros(spec.dim)
        self._command_A: np.ndarray | None = None
        self._commanded_s = 0.0
        self._token = 0
        self._changed = threading.Condition()
        self._newest: Snapshot | None = None
        self._ends = False
        self._axes = {
            part: [spec.names.index(name) for name in names.split()] for names, part in config.map.measured.items()
        }
        rng = np.random.default_rng(0)
        shapes = {p: p.feature_shape for parts in config.map.observations.values() for p in parts}
        self._seen = {
            part: rng.integers(0, 256, shape, np.uint8)
            if part.source == "picture"
            else rng.uniform(0.3, 1.0, shape).astype(np.float32)
            for part, shape in shapes.items()
            if part.source in ("picture", "depth", "points")
        }

    def command(self, action_A: np.ndarray) -> None:
        """See ``Arm``."""
        with self._changed:
            self._command_A, self._commanded_s = np.asarray(action_A, float), time.monotonic()

    def reset(self, scene: int, token: int) -> None:
        """See ``Arm``; there is no scene."""
        del scene
        with self._changed:
            self._token = token

    def newest(self, after: int = -1, timeout_s: float = 0.0) -> Snapshot | None:
        """See ``Arm``."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None and self._newest.number > after, timeout_s)
            found = self._newest
        return found if found is not None and found.number > after else None

    def close(self) -> None:
        """End ``run``."""
        self._ends = True

    def run(self, seconds: float = 0.0) -> None:
        """Move at the rate of the fastest topic until closed, or for so long (0: until closed)."""
        hz = max(topic.hz for topic in self.config.map.sensed().values())
        pace, begun_s, number = Pace(hz, spin_s=0.0), time.monotonic(), 0
        while not self._ends and (not seconds or time.monotonic() - begun_s < seconds):
            pace.wait()
            with self._changed:
                self._move(1 / hz)
                number += 1
                self._newest = Snapshot(number, time.monotonic(), self._token, self._features(number))
                self._changed.notify_all()

    def _move(self, dt: float) -> None:
        spec, command_A = self.config.action, self._command_A
        before_A = self.place_A
        if command_A is not None and spec.mode == "absolute":
            self.place_A = command_A.copy()
        elif command_A is not None and time.monotonic() - self._commanded_s <= WATCHDOG_S:
            self.place_A = before_A + command_A * (1.0 if spec.mode == "delta" else dt)
            if spec.mode == "delta":
                self._command_A = None  # a movement is made once
        self._velocity_A = (self.place_A - before_A) / dt

    def _features(self, number: int) -> dict[str, np.ndarray]:
        made = {}
        for name, parts in self.config.map.observations.items():
            values = [self._values(part, number) for part in parts]
            made[name] = values[0] if len(values) == 1 else np.concatenate([v.ravel() for v in values])
        return made

    def _values(self, part: PartConfig, number: int) -> np.ndarray:
        """What a part of a message says in a step."""
        if part in self._axes:
            return self.place_A[self._axes[part]]
        for measured, axes in self._axes.items():
            if part.source == "velocity" and part.names and part.names == measured.names:
                return self._velocity_A[axes]
        if part in self._seen:
            return np.roll(self._seen[part], number, axis=0 if part.source == "points" else -1)
        return np.array(AT_REST.get(part.source, np.zeros(part.feature_shape)), float)
