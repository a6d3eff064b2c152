"""One step of commands within the limits of a robot: towards what is wanted, or to rest. Pure functions of an explicit state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from real_robot.limiter import brake_velocity, limit_velocities, stop_path
from real_robot.limits import Rules

REST = 1e-7  # of the velocity that one step of the largest jerk or acceleration makes: less is rest
LOOKS = 16  # at the point of an arm on the way of a stop


@dataclass(frozen=True)
class FilterState:
    """All that the filter remembers.

    command_A: what was sent last (movements: in the units of the action; free ones: their value)
    velocity_A, acceleration_A: of the commands
    wanted_A: the last places that were wanted (NaN: none since the start)
    chases_A: axes that could not be where they were wanted
    measured_A: last measured place or point of each axis (NaN: none)
    owed_WA: movements of the last W steps, which the measured place need not hold yet (places: W = 0)
    ramp_step: steps since the start or the last fault
    last_s: when the last step was (NaN: none since the start or resume)
    fault: why the robot is held until ``resume``
    """

    command_A: np.ndarray
    velocity_A: np.ndarray
    acceleration_A: np.ndarray
    wanted_A: np.ndarray
    chases_A: np.ndarray
    measured_A: np.ndarray
    owed_WA: np.ndarray
    ramp_step: int
    last_s: float
    fault: str | None

    @property
    def at_rest(self) -> bool:
        """Whether the commands have come to rest."""
        return not (self.velocity_A.any() or self.acceleration_A.any())


def move(
    rules: Rules,
    state: FilterState,
    wanted_A: np.ndarray,
    measured_A: np.ndarray,
    owed_A: np.ndarray | float = 0.0,
) -> tuple[FilterState, tuple[str, ...]]:
    """One step towards what is wanted, as far as the limits let it; and what limited it.

    Args:
        rules: limits.
        state: of the last step.
        wanted_A: a place, a movement or a velocity.
        measured_A: see ``View``.
        owed_A: movements that were sent after what is measured happened.
    """
    spec, dt = rules.spec, rules.dt
    in_range_A = np.clip(wanted_A, spec.low_array(), spec.high_array())
    for turn in rules.rotations:
        in_range_A[turn] = wanted_A[turn]
    reasons = ["range"] if (in_range_A != wanted_A).any() else []
    at_A, low_A, high_A = _axes(rules, state, measured_A, owed_A)
    if spec.mode == "absolute":
        to_A = (in_range_A - at_A) / dt
        goal_v_A = np.where(np.isfinite(state.wanted_A), (in_range_A - state.wanted_A) / dt, 0.0)
        for turn in rules.rotations:
            to_A[turn] = _turn(state.command_A[turn], in_range_A[turn]) / dt
            known = np.isfinite(state.wanted_A[turn]).all()
            goal_v_A[turn] = _turn(state.wanted_A[turn], in_range_A[turn]) / dt if known else 0.0
    else:
        to_A, goal_v_A = (in_range_A / dt if spec.mode == "delta" else in_range_A), np.zeros(spec.dim)
    ramp = _ramp(rules, state)
    v_max_A = np.maximum(rules.v_max_A * ramp, np.abs(state.velocity_A))
    free_A = ~rules.moving_A
    velocity_A = limit_velocities(
        at_A,
        state.velocity_A,
        state.acceleration_A,
        np.where(free_A, 0.0, to_A),
        np.where(free_A, -np.inf, low_A),
        np.where(free_A, np.inf, high_A),
        np.where(free_A, 1.0, v_max_A),
        np.where(free_A, 1.0, rules.a_max_A),
        np.where(free_A, 1.0, rules.j_max_A),
        dt,
        rules.follows_A,
        state.chases_A,
        goal_v_A,
    )
    limited_A = rules.moving_A & (velocity_A != to_A)
    if limited_A.any():
        reasons += _why(rules, state, to_A, limited_A, ramp)
    near_A = np.abs(in_range_A - state.command_A) <= rules.step_A
    gripper_A = np.where(near_A, in_range_A, state.command_A + np.sign(in_range_A - state.command_A) * rules.step_A)
    if (free_A & ~near_A).any():
        reasons.append("step")
    placed_A = np.where(limited_A, _moved(rules, state.command_A, velocity_A), in_range_A)
    for turn in rules.rotations:
        if limited_A[turn].any():
            placed_A[turn] = _moved(rules, state.command_A, velocity_A)[turn]
    command_A = np.where(free_A, gripper_A, placed_A if spec.mode == "absolute" else state.command_A)
    after = replace(
        state,
        command_A=command_A,
        velocity_A=np.where(free_A, 0.0, velocity_A),
        acceleration_A=np.where(free_A, 0.0, (velocity_A - state.velocity_A) / dt),
        wanted_A=in_range_A,
        chases_A=limited_A,
    )
    return after, tuple(dict.fromkeys(reasons))


def come_to_rest(rules: Rules, state: FilterState) -> FilterState:
    """One step of the fastest stop."""
    slower_A = state.velocity_A.copy()
    for i in np.flatnonzero(rules.moving_A & ((state.velocity_A != 0) | (state.acceleration_A != 0))):
        slower_A[i] = brake_velocity(
            state.velocity_A[i], state.acceleration_A[i], rules.a_max_A[i], rules.j_max_A[i], rules.dt
        )
    slower_A[np.abs(slower_A) < REST * np.minimum(rules.j_max_A * rules.dt, rules.a_max_A) * rules.dt] = 0.0
    command_A = _moved(rules, state.command_A, slower_A)
    return replace(
        state,
        command_A=np.where(rules.moving_A, command_A, state.command_A),
        velocity_A=slower_A,
        acceleration_A=(slower_A - state.velocity_A) / rules.dt,
        wanted_A=np.full_like(state.wanted_A, np.nan),
        chases_A=rules.follows_A.copy(),
    )


def leaves_workspace(rules: Rules, state: FilterState, moved: FilterState) -> bool:
    """Whether the point of a joint-commanded arm would be outside its workspace now or on the way of a stop, and not on its way back."""
    if not rules.reaches:
        return False
    every = max(1, math.ceil(float(np.max(np.abs(moved.velocity_A) / rules.a_max_A)) / rules.dt / LOOKS))
    path_TA = stop_path(
        moved.command_A, moved.velocity_A, moved.acceleration_A, rules.a_max_A, rules.j_max_A, rules.dt, every
    )
    for reach in rules.reaches:
        beyond_m = max(map(reach.beyond_m, (moved.command_A, *path_TA)))
        if beyond_m > 0 and beyond_m >= reach.beyond_m(state.command_A):
            return True
    return False


def _axes(
    rules: Rules, state: FilterState, measured_A: np.ndarray, owed_A: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each axis is, and the bounds that hold from there: what is outside already may only come back.

    A measured place is of a while ago: the bounds of a movement are nearer by what was sent since then.
    """
    known_A = np.where(np.isfinite(measured_A), measured_A, 0.0)
    at_A = np.where(rules.follows_A, state.command_A, known_A)
    for turn in rules.rotations:
        at_A[turn] = 0.0  # turns are counted from the last command
    low_A, high_A = rules.low_A - np.minimum(owed_A, 0.0), rules.high_A - np.maximum(owed_A, 0.0)
    return at_A, np.minimum(low_A, at_A), np.maximum(high_A, at_A)


def _moved(rules: Rules, command_A: np.ndarray, velocity_A: np.ndarray) -> np.ndarray:
    """Absolute commands after one step with a velocity; turns are composed."""
    moved_A = np.where(rules.follows_A, command_A + velocity_A * rules.dt, command_A)
    for turn in rules.rotations:
        turned = Rotation.from_rotvec(velocity_A[turn] * rules.dt) * Rotation.from_rotvec(command_A[turn])
        moved_A[turn] = turned.as_rotvec()
    return moved_A


def _turn(from_3: np.ndarray, to_3: np.ndarray) -> np.ndarray:
    """Rotation vector in the world frame that leads from one rotation to another, at most half a turn: relative, so no branch can jump."""
    return (Rotation.from_rotvec(to_3) * Rotation.from_rotvec(from_3).inv()).as_rotvec()


def angle_between(one_3: np.ndarray, other_3: np.ndarray) -> float:
    """Angle between two rotation vectors' rotations, rad; 0 where one is not known."""
    if not (np.isfinite(one_3).all() and np.isfinite(other_3).all()):
        return 0.0
    return float((Rotation.from_rotvec(other_3) * Rotation.from_rotvec(one_3).inv()).magnitude())


def _ramp(rules: Rules, state: FilterState) -> float:
    """Share of the speed that is allowed so soon after the start or a fault."""
    steps = math.ceil(rules.config.ramp_s / rules.dt)
    return min(1.0, (state.ramp_step + 1) / steps) if steps else 1.0


def _why(rules: Rules, state: FilterState, to_A: np.ndarray, limited_A: np.ndarray, ramp: float) -> list[str]:
    """Which limits the wanted velocity breaks by itself; bounds of place or workspace where it breaks none."""
    pushed_A = (to_A - state.velocity_A) / rules.dt
    jerk_A = (pushed_A - state.acceleration_A) / rules.dt
    broken = {
        "step": np.abs(to_A) > rules.step_A / rules.dt,
        "ramp": (np.abs(to_A) > ramp * rules.v_max_A) & (np.abs(to_A) <= rules.v_max_A),
        "velocity": np.abs(to_A) > rules.config.max_velocity,
        "acceleration": np.abs(pushed_A) > rules.a_max_A,
        "jerk": np.abs(jerk_A) > rules.j_max_A,
    }
    reasons = [name for name, broken_A in broken.items() if (broken_A & limited_A).any()]
    unexplained_A = limited_A & ~np.any(list(broken.values()), axis=0)
    chased_A = unexplained_A & state.chases_A
    if chased_A.any():
        reasons.append("catching up")
    if (unexplained_A & ~chased_A).any():
        reasons.append("bounds")
    return reasons
