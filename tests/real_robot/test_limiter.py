"""One axis: nothing beyond the limits, always able to stop, what is allowed passes unchanged, what is chased is reached."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from real_robot.limiter import ROOM, SLACK, brake_velocity, limit_velocity, stop_of, stop_steps

RATES = (1.0, 5.0, 50.0, 0.05)  # v, a, j, dt
TINY = 2 * SLACK


def drive(goals, v_max, a_max, j_max, dt, *, follows=True, low=-math.inf, high=math.inf, start=0.0):
    """Run the limiter over places (or velocities) that are wanted; return commanded places and velocities."""
    p, v, a, chases, last = start, 0.0, 0.0, False, None
    places, velocities = [p], [v]
    for goal in goals:
        to = (goal - p) / dt if follows else goal
        goal_v = 0.0 if last is None or not follows else (goal - last) / dt
        last = goal
        now = limit_velocity(p, v, a, to, low, high, v_max, a_max, j_max, dt, follows, chases, goal_v)
        chases, a, v, p = now != to, (now - v) / dt, now, p + now * dt
        places.append(p)
        velocities.append(v)
    return np.array(places), np.array(velocities)


def worst(places, velocities, v_max, a_max, j_max, dt):
    """How far each rate is beyond its limit, as a share of it."""
    a = np.diff(velocities, prepend=0.0) / dt
    j = np.diff(a, prepend=0.0) / dt
    return max(abs(velocities).max() / v_max, abs(a).max() / a_max, abs(j).max() / j_max) - 1


@given(
    goals=st.lists(st.floats(-3, 3) | st.sampled_from([1e30, -1e30, 0.0]), min_size=1, max_size=80),
    v_max=st.floats(0.05, 5),
    a_max=st.floats(0.2, 50),
    j_max=st.floats(5, 5000),
    dt=st.sampled_from([0.002, 0.01, 0.05, 0.1]),
    follows=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_no_wish_leads_beyond_a_limit(goals, v_max, a_max, j_max, dt, follows) -> None:
    if not math.isfinite(stop_steps(v_max, a_max, j_max, dt)):
        return
    places, velocities = drive(goals, v_max, a_max, j_max, dt, follows=follows, low=-1.0, high=1.0)
    assert worst(places, velocities, v_max, a_max, j_max, dt) < TINY
    assert abs(places).max() <= 1 + 2 * ROOM


@given(v=st.floats(-1, 1), a=st.floats(-5, 5), dt=st.sampled_from([0.01, 0.05]), j_max=st.floats(20, 2000))
@settings(deadline=None)
def test_the_brake_comes_to_rest_within_its_limits(v, a, dt, j_max) -> None:
    p, velocities, accelerations = 0.0, [v], [a]
    for _ in range(5000):
        if velocities[-1] == 0 and abs(accelerations[-1]) <= j_max * dt:
            break
        now = brake_velocity(velocities[-1], accelerations[-1], 5.0, j_max, dt)
        now = 0.0 if abs(now) < 1e-12 else now
        accelerations.append((now - velocities[-1]) / dt)
        velocities.append(now)
        p += now * dt
    assert velocities[-1] == 0
    assert abs(np.array(accelerations)).max() <= 5 * (1 + 1e-9)
    assert abs(np.diff(accelerations)).max(initial=0.0) <= j_max * dt * (1 + 1e-6)
    assert stop_of(0.0, v, a, -math.inf, math.inf, math.inf, 5.0, j_max, dt)[1] == pytest.approx(p, abs=1e-6)


def test_what_is_within_the_limits_passes_to_the_last_bit() -> None:
    t = np.arange(400) * 0.05
    goals = 0.3 * (1 - np.cos(1.5 * t)) / 2
    places, _ = drive(goals, *RATES)
    assert np.abs(places[1:] - goals).max() < 1e-12


@pytest.mark.parametrize("j_max", [20.0, 50.0, 500.0])
def test_a_place_that_jumps_is_reached_without_passing_it(j_max: float) -> None:
    places, velocities = drive([0.9] * 100, 1.0, 5.0, j_max, 0.05)
    assert places.max() <= 0.9 + 1e-7
    assert places[-1] == pytest.approx(0.9, abs=1e-7)
    assert velocities[-1] == pytest.approx(0, abs=1e-6)
    assert np.diff(places).min() > -1e-6, "it turned back on its way"


def test_a_moving_place_is_caught_up_with() -> None:
    t = np.arange(200) * 0.05
    goals = 0.6 + 0.3 * np.sin(1.0 * t)  # begins 0.6 away from where the axis is
    places, _ = drive(goals, *RATES)
    assert np.abs(places[1:] - goals)[60:].max() < 0.01
    assert np.abs(places[1:] - goals)[60:].mean() < 0.002


def test_a_bound_is_approached_only_as_fast_as_it_can_stop() -> None:
    places, velocities = drive([1.0] * 60, *RATES, follows=False, high=0.5)
    assert places.max() <= 0.5 + ROOM
    assert places.max() > 0.5 - 1e-3, "it stopped early"
    assert velocities.max() > 0.9


def test_the_brake_is_chosen_where_nothing_is_safe() -> None:
    """Beyond a bound with speed left: no command is safe, and the fastest stop is what remains."""
    v = limit_velocity(2.0, 0.5, 0.0, 1.0, -1.0, 1.0, *RATES, False, False, 0.0)
    assert v == brake_velocity(0.5, 0.0, 5.0, 50.0, 0.05)


def test_limits_that_need_too_long_to_stop_are_seen() -> None:
    assert math.isfinite(stop_steps(1.0, 5.0, 50.0, 0.05))
    assert stop_steps(1.0, 1e-4, 50.0, 0.002) == math.inf
