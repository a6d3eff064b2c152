"""The safety filter: every command to a robot, real or simulated, passes it.

Pure functions of an explicit state. Order: latched fault, fresh observations, inference deadline, heartbeat, dead-man switch; then of the
action: finite, range, change per step, velocity, acceleration, jerk, bounds of position and workspace. What is amiss with the robot or the
policy latches a fault until ``resume``; what is merely too fast is limited. Without an action, or with a fault, the command comes to rest
from the last *command*, within the same limits. After a fault, the speed is ramped up from zero.

This is software without a safety rating. A robot wants a hardware emergency stop within reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.spatial.transform import Rotation

from real_robot.limiter import brake_velocity, limit_velocities, stop_positions
from real_robot.limits import Kind, Rules
from vla_rl.runtime.errors import UserError

REST = 1e-7  # of the velocity that one step of the largest jerk or acceleration makes: less is rest


@dataclass(frozen=True)
class FilterState:
    """All that the filter remembers.

    command_A: what was sent last (movements: in the units of the action; free ones: their value)
    velocity_A, acceleration_A: of the commands
    wanted_A: the last places that were wanted (NaN: none since the start)
    chases_A: axes that could not be where they were wanted
    measured_A: last measured place or point of each axis (NaN: none)
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
    ramp_step: int
    last_s: float
    fault: str | None

    @property
    def at_rest(self) -> bool:
        """Whether the commands have come to rest."""
        return not (self.velocity_A.any() or self.acceleration_A.any())


@dataclass(frozen=True)
class View:
    """What a step knows of the robot.

    now_s: of a monotonic clock
    measured_A: place of each axis, in the action's unit, or the workspace point that a movement moves (NaN: not measured)
    ages_s: of each stream, with its kind
    broken: what the streams themselves report: jumped clocks, frozen cameras, a lost link
    without_s: for how long the policy has given no action
    held_switch: whether the dead-man switch is held
    """

    now_s: float
    measured_A: np.ndarray
    ages_s: Mapping[str, tuple[Kind, float]] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    without_s: float = 0.0
    held_switch: bool = False


@dataclass(frozen=True)
class Decision:
    """What becomes of a wanted action.

    sent_A: in the units of the spec, float64
    wanted_A: None: there was none
    reasons: what limited it, each once
    fault: latched, if any; new_fault: it was latched in this step
    holding: the command comes to rest, or is at rest, whatever was wanted
    """

    sent_A: np.ndarray
    wanted_A: np.ndarray | None
    reasons: tuple[str, ...]
    fault: str | None
    new_fault: bool
    holding: bool


def start(rules: Rules, measured_A: np.ndarray) -> FilterState:
    """Begin at rest where the robot is.

    Args:
        rules: limits.
        measured_A: place of each axis in the action's unit; NaN where it is not measured, which absolute motion wants.

    Raises:
        UserError: an absolute axis is not measured, or is outside its limits.
    """
    spec, nothing = rules.spec, np.zeros(rules.spec.dim)
    command_A = np.clip(nothing, spec.low_array(), spec.high_array()).astype(float)
    for i in np.flatnonzero(rules.follows_A):
        place = measured_A[i]
        if not math.isfinite(place):
            raise UserError(
                f"the place of {spec.names[i]} is not measured, and commands of places have to begin where the robot is"
            )
        beyond = max(rules.low_A[i] - place, place - rules.high_A[i])
        if beyond > rules.config.max_step[i]:
            raise UserError(
                f"{spec.names[i]} is at {place:g} {spec.units[i]}, outside {rules.low_A[i]:g} to {rules.high_A[i]:g}; "
                "move the robot by hand first"
            )
        command_A[i] = min(max(place, rules.low_A[i]), rules.high_A[i])
    unknown_A = np.full(spec.dim, np.nan)
    never_A = np.zeros(spec.dim, bool)
    return FilterState(command_A, nothing, nothing, unknown_A, never_A, measured_A.astype(float), 0, math.nan, None)


def resume(rules: Rules, state: FilterState, measured_A: np.ndarray) -> FilterState:
    """Let go of a latched fault; the commands go on from the last one, or from where the robot is if it was moved meanwhile.

    Raises:
        UserError: the commands have not come to rest, or as ``start``.
    """
    if not state.at_rest:
        raise UserError("the robot is still coming to rest; resume when it has")
    begun = start(rules, measured_A)
    near_A = np.abs(measured_A - state.command_A) <= rules.config.max_tracking_error
    for turn in rules.rotations:  # as a whole: a rotation has two vectors
        near_A[turn] = _angle(state.command_A[turn], measured_A[turn]) <= min(rules.config.max_tracking_error[turn])
    command_A = np.where(rules.follows_A & ~near_A, begun.command_A, state.command_A)
    return replace(begun, command_A=command_A)


def filter_step(
    rules: Rules, state: FilterState, wanted_A: np.ndarray | None, view: View
) -> tuple[FilterState, Decision]:
    """Decide what is sent in one control step.

    Args:
        rules: limits.
        state: of the last step.
        wanted_A: action of the policy (None: it has none).
        view: what is known of the robot.
    """
    fault = state.fault or find_fault(rules, state, wanted_A, view)
    released = rules.config.dead_man and not view.held_switch
    holding = fault is not None or released or wanted_A is None
    reasons: tuple[str, ...] = ()
    if holding:
        moved = _rest(rules, state)
    else:
        moved, reasons = _move(rules, state, np.asarray(wanted_A, float), view.measured_A)
        if _leaves(rules, state, moved):
            moved, reasons = _rest(rules, state), (*reasons, "workspace")
    paused = fault is not None or released
    kept_A = np.where(np.isfinite(view.measured_A), view.measured_A, state.measured_A)
    after = replace(
        moved, measured_A=kept_A, ramp_step=0 if paused else state.ramp_step + 1, last_s=view.now_s, fault=fault
    )
    sent_A = np.where(rules.moving_A, _as_action(rules, after), after.command_A)
    if not holding and not reasons:
        sent_A = np.asarray(wanted_A, float)  # to the last bit
    shown_A = None if wanted_A is None else np.asarray(wanted_A, float)
    return after, Decision(sent_A, shown_A, reasons, fault, fault != state.fault, holding)


def _as_action(rules: Rules, state: FilterState) -> np.ndarray:
    if rules.spec.mode == "delta":
        return state.velocity_A * rules.dt
    return state.velocity_A if rules.spec.mode == "velocity" else state.command_A


def find_fault(rules: Rules, state: FilterState, wanted_A: np.ndarray | None, view: View) -> str | None:
    """The first thing that is wrong with the robot, its observations, the policy or the loop."""
    config, spec = rules.config, rules.spec
    if view.broken:
        return view.broken[0]
    for name, (kind, age_s) in view.ages_s.items():
        if not age_s <= config.max_age_s(kind):
            return f"stale observation: {name!r} is {_shown_ms(age_s)} old, {1e3 * config.max_age_s(kind):.0f} ms are allowed"
    if not view.without_s <= config.inference_s:
        return f"inference deadline: no action for {_shown_ms(view.without_s)}, {1e3 * config.inference_s:.0f} ms are allowed"
    if math.isfinite(state.last_s) and not 0 <= view.now_s - state.last_s <= config.heartbeat_s:
        return f"heartbeat: {_shown_ms(view.now_s - state.last_s)} between two steps, {1e3 * config.heartbeat_s:.0f} ms are allowed"
    if wanted_A is not None and not (np.shape(wanted_A) == (spec.dim,) and np.isfinite(wanted_A).all()):
        return f"not finite: the policy wants {np.asarray(wanted_A).tolist()}"
    for i in np.flatnonzero(np.isfinite(rules.low_A) & ~np.isfinite(view.measured_A)):
        return f"not measured: where {spec.names[i]} is, which has to stay above {rules.low_A[i]:g}"
    error_A = np.abs(view.measured_A - state.command_A)
    for i in np.flatnonzero(rules.follows_A & (error_A > config.max_tracking_error)):
        if not any(turn.start <= i < turn.stop for turn in rules.rotations):
            allowed = config.max_tracking_error[i]
            return (
                f"tracking: {spec.names[i]} is {error_A[i]:g} {spec.units[i]} from its command, {allowed:g} are allowed"
            )
    for turn in rules.rotations:
        angle = _angle(state.command_A[turn], view.measured_A[turn])
        allowed = min(config.max_tracking_error[turn])
        if angle > allowed:
            return f"tracking: {spec.names[turn.start]} is {angle:g} rad from its command, {allowed:g} are allowed"
    jump_A = np.abs(view.measured_A - state.measured_A)
    for i in np.flatnonzero(jump_A > rules.jump_A):
        return f"measured jump: {spec.names[i]} moved by {jump_A[i]:g} m in a step, {rules.jump_A[i]:g} are allowed"
    return None


def chunk_fault(rules: Rules, state: FilterState, chunk_HA: np.ndarray) -> str | None:
    """Why a whole chunk is refused before any of it is queued; None if it is not.

    It goes through the limits from the last *command* on. Where they would leave it by more than ``max_chunk_deviation`` behind what it
    wants, it was planned for another robot, or from another place, and cutting it short would be another motion than was planned.
    """
    if chunk_HA.ndim != 2 or chunk_HA.shape[1] != rules.spec.dim or not len(chunk_HA):
        return f"chunk refused: it has shape {chunk_HA.shape}, wanted are (steps, {rules.spec.dim})"
    if not np.isfinite(chunk_HA).all():
        return "chunk refused: it is not finite"
    at_full_speed, wanted_A = replace(state, ramp_step=10**9, fault=None), np.zeros(rules.spec.dim)
    left_A = wanted_A.copy()
    for step, action_A in enumerate(np.asarray(chunk_HA, float)):
        # where movements lead is not known before they are made: an arm need not go as far as it is told
        at_full_speed, _ = _move(rules, at_full_speed, action_A, state.measured_A)
        if rules.spec.mode == "absolute":
            behind_A = np.abs(action_A - at_full_speed.command_A)
            for turn in rules.rotations:
                behind_A[turn] = _angle(at_full_speed.command_A[turn], action_A[turn])
        else:
            scale = 1.0 if rules.spec.mode == "delta" else rules.dt
            wanted_A, left_A = wanted_A + action_A * scale, left_A + at_full_speed.velocity_A * rules.dt
            behind_A = np.abs(wanted_A - left_A)
        for i in np.flatnonzero(rules.moving_A & (behind_A > rules.config.max_chunk_deviation)):
            return (
                f"chunk refused: within the limits, {rules.spec.names[i]} would be {behind_A[i]:.3g} behind in step {step + 1} of it, "
                f"{rules.config.max_chunk_deviation[i]:g} are allowed"
            )
    return None


def _shown_ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if math.isfinite(seconds) else "infinitely"


def _angle(one_3: np.ndarray, other_3: np.ndarray) -> float:
    """Angle between two rotation vectors' rotations, rad; 0 where one is not known."""
    if not (np.isfinite(one_3).all() and np.isfinite(other_3).all()):
        return 0.0
    return float((Rotation.from_rotvec(other_3) * Rotation.from_rotvec(one_3).inv()).magnitude())


def _axes(rules: Rules, state: FilterState, measured_A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each axis is, and the bounds that hold from there: what is outside already may only come back."""
    known_A = np.where(np.isfinite(measured_A), measured_A, 0.0)
    at_A = np.where(rules.follows_A, state.command_A, known_A)
    for turn in rules.rotations:
        at_A[turn] = 0.0  # turns are counted from the last command
    return at_A, np.minimum(rules.low_A, at_A), np.maximum(rules.high_A, at_A)


def _rest(rules: Rules, state: FilterState) -> FilterState:
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


def _moved(rules: Rules, command_A: np.ndarray, velocity_A: np.ndarray) -> np.ndarray:
    """Absolute commands after one step with a velocity; turns are composed."""
    moved_A = np.where(rules.follows_A, command_A + velocity_A * rules.dt, command_A)
    for turn in rules.rotations:
        turned = Rotation.from_rotvec(velocity_A[turn] * rules.dt) * Rotation.from_rotvec(command_A[turn])
        moved_A[turn] = turned.as_rotvec()
    return moved_A


def _leaves(rules: Rules, state: FilterState, moved: FilterState) -> bool:
    """Whether the point of a joint-commanded arm would be, or come to rest, outside its workspace, and not on its way back."""
    for reach in rules.reaches:
        rest_A = stop_positions(
            moved.command_A, moved.velocity_A, moved.acceleration_A, rules.a_max_A, rules.j_max_A, rules.dt
        )
        beyond_m = max(reach.beyond_m(moved.command_A), reach.beyond_m(rest_A))
        if beyond_m > 0 and beyond_m >= reach.beyond_m(state.command_A):
            return True
    return False


def _turn(from_3: np.ndarray, to_3: np.ndarray) -> np.ndarray:
    """Rotation vector in the world frame that leads from one rotation to another, at most half a turn: relative, so no branch can jump."""
    return (Rotation.from_rotvec(to_3) * Rotation.from_rotvec(from_3).inv()).as_rotvec()


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


def _move(
    rules: Rules, state: FilterState, wanted_A: np.ndarray, measured_A: np.ndarray
) -> tuple[FilterState, tuple[str, ...]]:
    """One step towards what is wanted, as far as the limits let it; and what limited it."""
    spec, dt = rules.spec, rules.dt
    in_range_A = np.clip(wanted_A, spec.low_array(), spec.high_array())
    for turn in rules.rotations:
        in_range_A[turn] = wanted_A[turn]
    reasons = ["range"] if (in_range_A != wanted_A).any() else []
    at_A, low_A, high_A = _axes(rules, state, measured_A)
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
