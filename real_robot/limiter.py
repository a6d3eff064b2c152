"""One axis of motion in discrete time, kept within velocity, acceleration and jerk, and always able to stop within its bounds.

A command is accepted only if, after it, the fastest jerk-limited stop (the brake) stays within all limits. The brake of a certified
state ends in certified states, so from a safe start there is always something safe to send: a predictive safety filter (Wabersich and
Zeilinger, arXiv 1812.05506) whose backup is in closed form. All derivatives are finite differences of what is sent, as the next controller
sees them: v = (p - p_before) / dt, a = (v - v_before) / dt, j = (a - a_before) / dt.
"""

from __future__ import annotations

import math

import numba
import numpy as np

SLACK = 1e-6  # of a rate limit: policies answer in float32
ROOM = 1e-9  # of a bound, for rounding
BISECTIONS = 40
LONGEST_STOP = 4096  # control steps; limits under which a stop takes longer are refused when they are read


@numba.njit(cache=True)
def brake_velocity(v: float, a: float, a_max: float, j_max: float, dt: float) -> float:
    """The velocity of the next step of the fastest stop.

    The acceleration x that, unwound by j_max dt per step, ends at rest solves dt (x + (x - d) + (x - 2 d) + ...) = -v with d = j_max dt.
    """
    d = j_max * dt
    s = abs(v) / dt
    whole = math.floor((math.sqrt(1.0 + 8.0 * s / d) - 1.0) / 2.0)
    x = (s + d * whole * (whole + 1.0) / 2.0) / (whole + 1.0)
    wanted = -math.copysign(min(x, a_max), v)
    return v + dt * min(max(wanted, a - d), a + d)


@numba.njit(cache=True)
def stop_of(
    p: float, v: float, a: float, low: float, high: float, v_max: float, a_max: float, j_max: float, dt: float
) -> tuple[bool, float]:
    """Whether the fastest stop stays within position and velocity, and where it ends."""
    room = ROOM * max(1.0, abs(p))
    for _ in range(LONGEST_STOP):
        if p < low - room or p > high + room or abs(v) > v_max * (1.0 + SLACK):
            return False, p
        if abs(v) <= ROOM * a_max * dt and abs(a) <= j_max * dt:
            return True, p
        slower = brake_velocity(v, a, a_max, j_max, dt)
        a = (slower - v) / dt
        v = slower
        p += v * dt
    return False, p


@numba.njit(cache=True)
def _is_safe(
    p: float,
    v: float,
    a: float,
    to: float,
    low: float,
    high: float,
    v_max: float,
    a_max: float,
    j_max: float,
    dt: float,
) -> bool:
    pushed = (to - v) / dt
    if abs(pushed) > a_max * (1.0 + SLACK) or abs(pushed - a) > j_max * dt * (1.0 + SLACK):
        return False
    return stop_of(p + to * dt, to, pushed, low, high, v_max, a_max, j_max, dt)[0]


@numba.njit(cache=True)
def _is_caught(v: float, a: float, to: float, goal_v: float, a_max: float, j_max: float, dt: float) -> bool:
    """Whether, arriving with velocity ``to``, the axis can go on with the place it follows: at its velocity in the step after."""
    arriving, after = (to - v) / dt, (goal_v - to) / dt
    return abs(after) <= a_max and abs(after - arriving) <= j_max * dt and abs(after) <= j_max * dt


@numba.njit(cache=True)
def limit_velocity(
    p: float,
    v: float,
    a: float,
    to: float,
    low: float,
    high: float,
    v_max: float,
    a_max: float,
    j_max: float,
    dt: float,
    follows: bool,
    chases: bool,
    goal_v: float,
) -> float:
    """The velocity nearest to what is wanted, on the way from the brake to it, that is safe; what is safe is returned as it is.

    Args:
        p: where the axis is.
        v: velocity of the last command.
        a: its acceleration.
        to: wanted velocity of this step.
        low: least position (infinite: no bound).
        high: largest position.
        v_max: limit of the velocity.
        a_max: of the acceleration.
        j_max: of the jerk.
        dt: control step, s.
        follows: p + dt to is a place to be at. What cannot be there at once heads for where that place would come to rest, so that it
            neither passes by nor lags behind for ever.
        chases: it could not be there in the step before.
        goal_v: velocity of that place.
    """
    safe = _is_safe(p, v, a, to, low, high, v_max, a_max, j_max, dt)
    if safe and (not (follows and chases) or _is_caught(v, a, to, goal_v, a_max, j_max, dt)):
        return to
    brake = brake_velocity(v, a, a_max, j_max, dt)
    if follows:
        goal_v = min(max(goal_v, -v_max), v_max)
        aim = stop_of(p + to * dt, goal_v, 0.0, -np.inf, np.inf, np.inf, a_max, j_max, dt)[1]
        rest = stop_of(p, v, a, -np.inf, np.inf, np.inf, a_max, j_max, dt)[1]
        to = (aim - p) / dt
        low, high = max(low, min(aim, rest, p)), min(high, max(aim, rest, p))
    least, most = max(a - j_max * dt, -a_max), min(a + j_max * dt, a_max)
    far = min(max(min(max(to, v + dt * least), v + dt * most), -v_max), v_max)
    if _is_safe(p, v, a, far, low, high, v_max, a_max, j_max, dt):
        return far
    near_share, far_share = 0.0, 1.0
    for _ in range(BISECTIONS):
        share = 0.5 * (near_share + far_share)
        if _is_safe(p, v, a, brake + share * (far - brake), low, high, v_max, a_max, j_max, dt):
            near_share = share
        else:
            far_share = share
    return brake + near_share * (far - brake)


@numba.njit(cache=True)
def limit_velocities(
    p_A: np.ndarray,
    v_A: np.ndarray,
    a_A: np.ndarray,
    to_A: np.ndarray,
    low_A: np.ndarray,
    high_A: np.ndarray,
    v_max_A: np.ndarray,
    a_max_A: np.ndarray,
    j_max_A: np.ndarray,
    dt: float,
    follows_A: np.ndarray,
    chases_A: np.ndarray,
    goal_v_A: np.ndarray,
) -> np.ndarray:
    """``limit_velocity`` for every axis: (A,)."""
    out_A = np.empty_like(to_A)
    for i in range(len(to_A)):
        out_A[i] = limit_velocity(
            p_A[i],
            v_A[i],
            a_A[i],
            to_A[i],
            low_A[i],
            high_A[i],
            v_max_A[i],
            a_max_A[i],
            j_max_A[i],
            dt,
            follows_A[i],
            chases_A[i],
            goal_v_A[i],
        )
    return out_A


@numba.njit(cache=True)
def stop_path(
    p_A: np.ndarray, v_A: np.ndarray, a_A: np.ndarray, a_max_A: np.ndarray, j_max_A: np.ndarray, dt: float, every: int
) -> np.ndarray:
    """Where the axes are in every so many steps of the fastest stop of each, and at its end: (T, A)."""
    p_A, v_A, a_A = p_A.copy(), v_A.copy(), a_A.copy()
    path_TA = np.empty((LONGEST_STOP // every + 2, len(p_A)))
    count, moving = 0, True
    for step in range(LONGEST_STOP):
        if not moving:
            break
        moving = False
        for i in range(len(p_A)):
            if abs(v_A[i]) > ROOM * a_max_A[i] * dt or abs(a_A[i]) > j_max_A[i] * dt:
                slower = brake_velocity(v_A[i], a_A[i], a_max_A[i], j_max_A[i], dt)
                a_A[i], v_A[i] = (slower - v_A[i]) / dt, slower
                p_A[i] += slower * dt
                moving = True
        if moving and step % every == 0:
            path_TA[count] = p_A
            count += 1
    path_TA[count] = p_A
    return path_TA[: count + 1]


def stop_steps(v_max: float, a_max: float, j_max: float, dt: float) -> float:
    """Steps that a stop from full speed takes at most; infinite where it is longer than the limiter looks ahead."""
    steps = v_max / (a_max * dt) + 2 * a_max / (j_max * dt) + 2
    return steps if steps < LONGEST_STOP else math.inf
