"""Specs and limits for tests."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from real_robot.limits import Rules, SafetyConfig, WorkspaceConfig, make_rules
from real_robot.robot import Reading, Robot, RobotConfig
from vla_rl.types import STATE, ActionMode, ActionSpec, FeatureSpec, ObservationSpec


def arm_spec(mode: ActionMode = "absolute", hz: float = 20.0, joints: int = 3, gripper: bool = True) -> ActionSpec:
    unit = {"absolute": "rad", "delta": "m", "velocity": "m/s"}[mode]
    reach = {"absolute": 2.0, "delta": 0.05, "velocity": 1.0}[mode]
    names = tuple(f"a{i}" for i in range(joints)) + (("gripper",) if gripper else ())
    free = int(gripper)
    return ActionSpec(
        names,
        (unit,) * joints + ("1",) * free,
        (-reach,) * joints + (-1.0,) * free,
        (reach,) * joints + (1.0,) * free,
        mode,
        hz,
    )


def limits(actions: int, **changes: Any) -> SafetyConfig:
    values: dict[str, Any] = {
        "max_step": (0.2,) * actions,
        "max_velocity": (1.0,) * actions,
        "max_acceleration": (5.0,) * actions,
        "max_jerk": (100.0,) * actions,
        "max_tracking_error": (0.3,) * actions,
        "max_chunk_deviation": (0.2,) * actions,
        "rotations": (),
        "workspaces": (),
        "joints_age_s": 0.1,
        "camera_age_s": 0.2,
        "other_age_s": 0.5,
        "clock_jump_s": 0.2,
        "inference_s": 0.5,
        "heartbeat_s": 0.1,
        "ramp_s": 0.0,
        "dead_man": False,
    }
    return SafetyConfig(**{**values, **changes})


def arm_rules(mode: ActionMode = "absolute", hz: float = 20.0, gripper: bool = True, **changes: Any) -> Rules:
    spec = arm_spec(mode, hz, gripper=gripper)
    return make_rules(spec, limits(spec.dim, **changes))


def box(low: float = -0.5, high: float = 0.5, jump_m: float = 0.2) -> WorkspaceConfig:
    return WorkspaceConfig(("a0", "a1", "a2"), (low,) * 3, (high,) * 3, jump_m)


def rates(
    sent_TA: np.ndarray, rules: Rules, start_A: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Velocity, acceleration and jerk of what was sent, from rest: (T, A) each."""
    if rules.spec.mode == "absolute":
        begin_A = np.zeros(rules.spec.dim) if start_A is None else start_A
        v_TA = np.diff(sent_TA, axis=0, prepend=begin_A[None]) / rules.dt
    else:
        v_TA = sent_TA / rules.dt if rules.spec.mode == "delta" else sent_TA
    zero_A = np.zeros((1, rules.spec.dim))
    a_TA = np.diff(v_TA, axis=0, prepend=zero_A) / rules.dt
    return v_TA, a_TA, np.diff(a_TA, axis=0, prepend=zero_A) / rules.dt


class ToyDriver:
    """A robot that is at once where it is sent; tests set what it says."""

    def __init__(self, spec: ActionSpec) -> None:
        self.spec = spec
        self.place_A = np.zeros(spec.dim)
        self.written: list[tuple[float, np.ndarray]] = []
        self.says: dict[str, Any] = {}
        self.refuses: Exception | None = None

    def open(self, silent: bool) -> None:
        self.silent = silent

    def read(self) -> Reading | None:
        features = {STATE: self.place_A.astype(np.float32)}
        return replace(Reading(features, self.place_A.copy(), {"arm": ("joints", 0.0)}), **self.says)

    def missing(self) -> str:
        return "nothing"

    def write(self, action_A: np.ndarray) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.written.append((time.monotonic(), action_A.copy()))
        self.place_A = action_A.copy()

    def reset(self, seed: int) -> None:
        pass

    def acknowledge(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class ToyRobotConfig(RobotConfig):
    """Of a ``ToyDriver``."""

    @property
    def observation_spec(self) -> ObservationSpec:
        return {STATE: FeatureSpec((self.action.dim,))}

    def driver(self) -> ToyDriver:
        return ToyDriver(self.action)


def toy_robot(
    log: Path | None = None, silent: bool = False, hz: float = 50.0, **changes: Any
) -> tuple[Robot, ToyDriver]:
    """A connected robot that follows places."""
    spec = arm_spec("absolute", hz)
    robot = Robot(ToyRobotConfig(name="toy", action=spec, safety=limits(spec.dim, **changes)), log, silent)
    robot.connect()
    assert isinstance(robot.driver, ToyDriver)
    return robot, robot.driver
