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

from real_robot.limiter import brake_velocity
from real_robot.limits import Kind, Rules
from real_robot.motion import FilterState, angle_between, come_to_rest, leaves_workspace, move
from vla_rl.runtime.errors import UserError

LONGEST_TURN = 100.0  # of a rotation vector's parts, rad


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
    command_A = np.clip(np.where(np.isfinite(measured_A), measured_A, 0.0), spec.low_array(), spec.high_array())
    command_A = np.where(rules.moving_A, np.clip(nothing, spec.low_array(), spec.high_array()), command_A).astype(float)
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
        command_A[i] = place  # not what is nearest within the limits, which would be a jump: it may come back only
    unknown_A = np.full(spec.dim, np.nan)
    never_A = np.zeros(spec.dim, bool)
    owed_WA = np.zeros((rules.owed_steps, spec.dim))
    return FilterState(
        command_A, nothing, nothing, unknown_A, never_A, measured_A.astype(float), owed_WA, 0, math.nan, None
    )


def resume(rules: Rules, state: FilterState, measured_A: np.ndarray, astray: bool = False) -> FilterState:
    """Let go of a latched fault; the commands go on from the last one, or from where the robot is if that was moved meanwhile.

    Args:
        rules: limits.
        state: at rest.
        measured_A: see ``start``.
        astray: the last commands may not have reached the robot, or it was reset: where it stands more than a step away from them, it
            counts as moved; otherwise beyond the allowed tracking error.

    Raises:
        UserError: the commands have not come to rest, or as ``start``.
    """
    if not state.at_rest:
        raise UserError("the robot is still coming to rest; resume when it has")
    begun = start(rules, measured_A)
    step_A = rules.v_max_A * rules.dt if astray else np.full(rules.spec.dim, np.inf)
    near_A = np.abs(measured_A - state.command_A) <= np.minimum(rules.config.max_tracking_error, step_A)
    for turn in rules.rotations:  # as a whole: a rotation has two vectors
        allowed = min(*rules.config.max_tracking_error[turn], *step_A[turn])
        near_A[turn] = angle_between(state.command_A[turn], measured_A[turn]) <= allowed
    command_A = np.where(rules.follows_A & ~near_A, begun.command_A, state.command_A)
    return replace(begun, command_A=command_A, owed_WA=state.owed_WA)


def following(rules: Rules, state: FilterState, measured_A: np.ndarray) -> FilterState:
    """The state that an action is judged from where somebody else moves the robot (shadow mode): at full speed, where it is."""
    return replace(start(rules, measured_A), last_s=state.last_s, ramp_step=10**9)


def warm_up(rules: Rules, measured_A: np.ndarray) -> None:
    """Go through the filter once, so that its first, slow call is not the robot's."""
    middle_A = (rules.spec.low_array() + rules.spec.high_array()) / 2
    state = start(rules, np.where(rules.follows_A, middle_A, measured_A))
    chunk_fault(rules, state, middle_A[None])
    moving, _ = filter_step(rules, state, middle_A, View(0.0, measured_A))
    filter_step(rules, moving, None, View(0.0, measured_A))
    brake_velocity(1.0, 0.0, 1.0, 1.0, 1.0)


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
        moved = come_to_rest(rules, state)
    else:
        moved, reasons = move(rules, state, np.asarray(wanted_A, float), view.measured_A, _owed(rules, state, view))
        if leaves_workspace(rules, state, moved):
            moved, reasons = come_to_rest(rules, state), (*reasons, "workspace")
    paused = fault is not None or released
    kept_A = np.where(np.isfinite(view.measured_A), view.measured_A, state.measured_A)
    after = replace(
        moved,
        measured_A=kept_A,
        owed_WA=np.concatenate([state.owed_WA[1:], moved.velocity_A[None] * rules.dt])
        if rules.owed_steps
        else state.owed_WA,
        ramp_step=0 if paused else state.ramp_step + 1,
        last_s=view.now_s,
        fault=fault,
    )
    sent_A = np.where(rules.moving_A, _as_action(rules, after), after.command_A)
    if not holding and not reasons:
        sent_A = np.asarray(wanted_A, float)  # to the last bit
    shown_A = None if wanted_A is None else np.asarray(wanted_A, float)
    return after, Decision(sent_A, shown_A, reasons, fault, fault != state.fault, holding)


def _owed(rules: Rules, state: FilterState, view: View) -> np.ndarray:
    """Movements that were sent after what is measured happened: it does not hold them yet."""
    age_s = max((age_s for kind, age_s in view.ages_s.values() if kind == "joints"), default=0.0)
    steps = min(math.ceil(age_s / rules.dt - 1e-6), rules.owed_steps)
    return state.owed_WA[len(state.owed_WA) - steps :].sum(axis=0)


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
    if wanted_A is not None and _turns_beyond(rules, np.asarray(wanted_A, float)):
        return f"not a turn: the policy wants {np.asarray(wanted_A).tolist()}"
    bounded_A = rules.follows_A | np.isfinite(rules.low_A) | np.isfinite(rules.high_A)
    for i in np.flatnonzero(bounded_A & ~np.isfinite(view.measured_A)):
        return f"not measured: where {spec.names[i]} is, which has to stay within its limits"
    error_A = np.abs(view.measured_A - state.command_A)
    for i in np.flatnonzero(rules.follows_A & (error_A > config.max_tracking_error)):
        if not any(turn.start <= i < turn.stop for turn in rules.rotations):
            allowed = config.max_tracking_error[i]
            return (
                f"tracking: {spec.names[i]} is {error_A[i]:g} {spec.units[i]} from its command, {allowed:g} are allowed"
            )
    for turn in rules.rotations:
        angle = angle_between(state.command_A[turn], view.measured_A[turn])
        allowed = min(config.max_tracking_error[turn])
        if angle > allowed:
            return f"tracking: {spec.names[turn.start]} is {angle:g} rad from its command, {allowed:g} are allowed"
    jump_A = np.abs(view.measured_A - state.measured_A)
    for i in np.flatnonzero(jump_A > rules.jump_A):
        return f"measured jump: {spec.names[i]} moved by {jump_A[i]:g} m in a step, {rules.jump_A[i]:g} are allowed"
    for reach in rules.reaches:
        jump_m = float(np.abs(reach.point(view.measured_A) - reach.point(state.measured_A)).max())
        if jump_m > reach.box.jump_m:
            return f"measured jump: the arm's point moved by {jump_m:g} m in a step, {reach.box.jump_m:g} are allowed"
    return None


def _turns_beyond(rules: Rules, wanted_HA: np.ndarray) -> bool:
    """Whether a rotation vector is too long to mean anything: its angle would be lost in rounding."""
    return any((np.abs(wanted_HA[..., turn]) > LONGEST_TURN).any() for turn in rules.rotations)


def chunk_fault(rules: Rules, state: FilterState, chunk_HA: np.ndarray) -> str | None:
    """Why a whole chunk is refused before any of it is queued; None if it is not.

    It goes through the limits from the last *command* on. Where they would leave it by more than ``max_chunk_deviation`` behind what it
    wants, it was planned for another robot, or from another place, and cutting it short would be another motion than was planned.
    """
    if chunk_HA.ndim != 2 or chunk_HA.shape[1] != rules.spec.dim or not len(chunk_HA):
        return f"chunk refused: it has shape {chunk_HA.shape}, wanted are (steps, {rules.spec.dim})"
    if not np.isfinite(chunk_HA).all():
        return "chunk refused: it is not finite"
    if _turns_beyond(rules, chunk_HA):
        return "chunk refused: its turns are longer than any"
    at_full_speed, wanted_A = replace(state, ramp_step=10**9, fault=None), np.zeros(rules.spec.dim)
    left_A = wanted_A.copy()
    for step, action_A in enumerate(np.asarray(chunk_HA, float)):
        # where movements lead is not known before they are made: an arm need not go as far as it is told
        at_full_speed, _ = move(rules, at_full_speed, action_A, state.measured_A)
        if rules.spec.mode == "absolute":
            behind_A = np.abs(action_A - at_full_speed.command_A)
            for turn in rules.rotations:
                behind_A[turn] = angle_between(at_full_speed.command_A[turn], action_A[turn])
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
