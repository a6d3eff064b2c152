"""Limits of a robot: all of them required, none that switches a check off; and the same as arrays over the actions of a spec."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from real_robot.limiter import stop_steps
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec

FREE_UNIT = "1"  # of actions that are no motion of the arm: grippers, switches
Kind = Literal["joints", "camera", "other"]  # of observation streams, which age differently


@dataclass(frozen=True)
class WorkspaceConfig:
    """A box that a point of the robot stays in.

    names: of the actions that move the point along x, y, z (for joint commands: none; the point is then found by ``kinematics``)
    low_m: corner of the box
    high_m: opposite corner
    jump_m: that the measured point moves at most between two steps; more is a fault
    """

    names: tuple[str, ...]
    low_m: tuple[float, float, float]
    high_m: tuple[float, float, float]
    jump_m: float

    def __post_init__(self) -> None:
        if not all(lo < hi for lo, hi in zip(self.low_m, self.high_m, strict=True)) or not self.jump_m > 0:
            raise ValueError(
                f"a workspace wants low < high and a jump > 0, got {self.low_m}, {self.high_m}, {self.jump_m}"
            )
        if len(self.names) not in (0, 3):
            raise ValueError(f"a workspace is moved along x, y, z by three actions, or by none, got {self.names}")


@dataclass(frozen=True)
class SafetyConfig:
    """Limits of a robot, all of them required; one number per action, in its unit (actions of unit 1 are limited in range and step only).

    max_step: change of a command from one control step to the next
    max_velocity: of the command, per second
    max_acceleration: per second^2
    max_jerk: per second^3
    max_tracking_error: between the last command and what is measured (absolute commands)
    max_chunk_deviation: of a chunk from what the limits leave of it, summed up for movements; a chunk beyond is refused as a whole
    rotations: names of the first of the three numbers of each absolute rotation vector (delta and velocity: none needed)
    workspaces: boxes that points of the robot stay in
    joints_age_s: that joint states may have
    camera_age_s: that images, depth and points may have
    other_age_s: that other observations may have
    clock_jump_s: by which stamps of a stream may advance more or less than the time between their arrivals
    inference_s: that the policy may leave the robot without an action
    heartbeat_s: between two control steps
    ramp_s: in which the speed rises from zero after a fault or a released dead-man switch
    dead_man: whether a switch has to be held for the robot to move
    """

    max_step: tuple[float, ...]
    max_velocity: tuple[float, ...]
    max_acceleration: tuple[float, ...]
    max_jerk: tuple[float, ...]
    max_tracking_error: tuple[float, ...]
    max_chunk_deviation: tuple[float, ...]
    rotations: tuple[str, ...]
    workspaces: tuple[WorkspaceConfig, ...]
    joints_age_s: float
    camera_age_s: float
    other_age_s: float
    clock_jump_s: float
    inference_s: float
    heartbeat_s: float
    ramp_s: float
    dead_man: bool

    def __post_init__(self) -> None:
        for name in ("joints_age_s", "camera_age_s", "other_age_s", "clock_jump_s", "inference_s", "heartbeat_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} wants a time > 0, got {getattr(self, name)}")
        if not 0 <= self.ramp_s < math.inf:
            raise ValueError(f"ramp_s wants a time >= 0, got {self.ramp_s}")

    def max_age_s(self, kind: Kind) -> float:
        """How old an observation of a kind may be."""
        return {"joints": self.joints_age_s, "camera": self.camera_age_s, "other": self.other_age_s}[kind]


@dataclass(frozen=True)
class Reach:
    """A point of the robot that follows from the places of its axes, and the box that it stays in."""

    point: Callable[[np.ndarray], np.ndarray]
    box: WorkspaceConfig

    def beyond_m(self, places_A: np.ndarray) -> float:
        """How far the point is outside the box; 0 inside."""
        point_3 = self.point(places_A)
        return float(
            np.max(np.maximum(np.asarray(self.box.low_m) - point_3, point_3 - np.asarray(self.box.high_m)).clip(0))
        )


@dataclass(frozen=True)
class Rules:
    """Limits as arrays over the A actions of a spec. Use ``make_rules``."""

    spec: ActionSpec
    config: SafetyConfig
    dt: float
    moving_A: np.ndarray  # all but free ones
    follows_A: np.ndarray  # absolute places
    low_A: np.ndarray  # of the axis that is limited: a place, or the point that a movement moves
    high_A: np.ndarray
    v_max_A: np.ndarray
    a_max_A: np.ndarray
    j_max_A: np.ndarray
    step_A: np.ndarray
    jump_A: np.ndarray
    rotations: tuple[slice, ...]
    reaches: tuple[Reach, ...]
    owed_steps: int  # of movements that are remembered, for a measured place need not hold them yet


def make_rules(
    spec: ActionSpec, config: SafetyConfig, kinematics: Callable[[np.ndarray], np.ndarray] | None = None
) -> Rules:
    """Bring limits and actions together; raises UserError that names the first limit that is missing, infinite or makes no sense.

    Args:
        spec: of the actions.
        config: limits.
        kinematics: from the places of all axes to the point (m) of the workspaces that name no actions.
    """
    if spec.mode == "effort":
        raise UserError(
            "the safety filter knows places, movements and velocities; actions of mode 'effort' are not let through"
        )
    moving_A = np.array([unit != FREE_UNIT for unit in spec.units])
    arrays: dict[str, np.ndarray] = {}
    limits = {
        "max_step": config.max_step,
        "max_velocity": config.max_velocity,
        "max_acceleration": config.max_acceleration,
        "max_jerk": config.max_jerk,
        "max_tracking_error": config.max_tracking_error,
        "max_chunk_deviation": config.max_chunk_deviation,
    }
    for name, given in limits.items():
        values = np.asarray(given, float)
        if values.shape != (spec.dim,):
            raise UserError(
                f"{name} wants one number for each of the actions {', '.join(spec.names)}, got {values.size}"
            )
        bad = [
            n for n, v, m in zip(spec.names, values, moving_A, strict=True) if not v > 0 or (m and not math.isfinite(v))
        ]
        if bad:
            raise UserError(f"{name} of {bad[0]} wants a finite number > 0, got {values[spec.names.index(bad[0])]}")
        arrays[name] = values
    dt = 1 / spec.control_hz
    # a movement or velocity is one step's worth of motion itself; a place changes by what it moves
    v_max_A = np.minimum(arrays["max_velocity"], arrays["max_step"] / dt)
    for i in np.flatnonzero(moving_A):
        if not math.isfinite(stop_steps(v_max_A[i], arrays["max_acceleration"][i], arrays["max_jerk"][i], dt)):
            raise UserError(
                f"from {v_max_A[i]:g} {spec.units[i]}/s, {spec.names[i]} "
                "would not come to rest within thousands of steps; raise max_acceleration or max_jerk"
            )
    low_A, high_A, jump_A = np.full(spec.dim, -np.inf), np.full(spec.dim, np.inf), np.full(spec.dim, np.inf)
    absolute = spec.mode == "absolute"
    if absolute:
        low_A, high_A = spec.low_array().astype(float), spec.high_array().astype(float)
    if not absolute and any(not box.names for box in config.workspaces):
        raise UserError(
            f"actions of mode {spec.mode!r} want the names of those that move the workspace's point along x, y, z"
        )
    if kinematics is None and any(not box.names for box in config.workspaces):
        raise UserError(
            "a workspace without names of actions wants the robot's model (URDF or MJCF), to know where its point is"
        )
    for name in (*config.rotations, *(n for box in config.workspaces for n in box.names)):
        if name not in spec.names:
            raise UserError(f"the limits speak of an action {name!r}; there are {', '.join(spec.names)}")
    for box in config.workspaces:
        for axis, name in enumerate(box.names):
            at = spec.names.index(name)
            low_A[at], high_A[at] = max(low_A[at], box.low_m[axis]), min(high_A[at], box.high_m[axis])
            jump_A[at] = box.jump_m
    rotations = tuple(slice(spec.names.index(n), spec.names.index(n) + 3) for n in config.rotations) if absolute else ()
    for turn in rotations:
        low_A[turn], high_A[turn] = -np.inf, np.inf
    return Rules(
        spec,
        config,
        dt,
        moving_A,
        moving_A & absolute,
        low_A,
        high_A,
        v_max_A,
        arrays["max_acceleration"],
        arrays["max_jerk"],
        arrays["max_step"],
        jump_A,
        rotations,
        () if kinematics is None else tuple(Reach(kinematics, box) for box in config.workspaces if not box.names),
        0 if absolute else 1 + math.ceil(config.joints_age_s / dt),
    )
