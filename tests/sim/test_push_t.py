"""Geometry of Push-T against Monte-Carlo areas, and quasi-static physics."""

from __future__ import annotations

import numpy as np
import pytest

from sim.task import load_task
from sim.tasks.push_t import AREA_M2, OUTLINE_M, RECTANGLES_M, SUCCESS_COVERAGE, coverage, signed_distance_m


def points_of(tee_m: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Points of the T's frame in the world."""
    c, s = np.cos(pose[2]), np.sin(pose[2])
    return tee_m @ np.array([[c, s], [-s, c]]) + pose[:2]


def inside(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    c, s = np.cos(pose[2]), np.sin(pose[2])
    local = (points - pose[:2]) @ np.array([[c, -s], [s, c]])
    return np.any([(local >= r.min(0)).all(1) & (local <= r.max(0)).all(1) for r in RECTANGLES_M], axis=0)


@pytest.mark.parametrize("pose", [(0, 0, 0), (0.01, -0.02, 0.3), (0.05, 0.03, 2.0), (-0.1, 0.1, -1.0), (0, 0, np.pi)])
def test_coverage_is_the_area_that_monte_carlo_counts(pose: tuple[float, float, float]) -> None:
    points = np.random.default_rng(0).uniform(-0.3, 0.3, (400_000, 2))
    here = inside(points, np.zeros(3))
    estimate = (here & inside(points, np.array(pose, float))).sum() / here.sum()
    assert coverage(np.array(pose, float)) == pytest.approx(estimate, abs=0.01)


def test_coverage_is_one_at_the_target_and_zero_far_away() -> None:
    assert coverage(np.zeros(3)) == pytest.approx(1.0)
    assert coverage(np.array([0.25, 0.0, 0.0])) == 0.0
    assert coverage(np.array([1.0, 0.0, 0.0])) == 0.0


def test_the_body_frame_is_the_centre_of_area_and_the_outline_encloses_the_area() -> None:
    points = np.random.default_rng(1).uniform(-0.2, 0.2, (400_000, 2))
    assert np.abs(points[inside(points, np.zeros(3))].mean(0)).max() < 1e-3
    x, y = OUTLINE_M.T
    shoelace = 0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))
    assert shoelace == pytest.approx(AREA_M2)


def test_signed_distance_vanishes_on_the_outline_and_changes_sign() -> None:
    pose = np.array([0.03, -0.05, 0.7])
    for corner in points_of(OUTLINE_M, pose):
        assert signed_distance_m(corner, pose) == pytest.approx(0.0, abs=1e-9)
    assert signed_distance_m(pose[:2], pose) < 0
    assert signed_distance_m(pose[:2] + 0.5, pose) > 0


def test_starts_are_unsolved_clear_of_the_pusher_and_in_all_headings() -> None:
    env = load_task("push_t").make_env()
    headings = []
    for seed in range(200):
        _, info = env.reset(seed=seed)
        assert info["coverage"] < SUCCESS_COVERAGE
        assert signed_distance_m(env.pusher_m, env.tee_pose) > 0.02  # type: ignore[attr-defined]
        headings.append(env.tee_pose[2])  # type: ignore[attr-defined]
    assert np.histogram(headings, 8, (-np.pi, np.pi))[0].min() > 10


def test_the_t_moves_when_pushed_and_stops_when_not() -> None:
    env = load_task("push_t").make_env()
    env.reset(seed=0)
    pose = env.tee_pose  # type: ignore[attr-defined]
    for _ in range(10):
        env.step(env.pusher_m)  # type: ignore[attr-defined]
    assert np.allclose(env.tee_pose, pose)  # type: ignore[attr-defined]
    for _ in range(40):
        env.step(env.tee_pose[:2])  # type: ignore[attr-defined]
    assert np.abs(env.tee_pose - pose).max() > 0.005  # type: ignore[attr-defined]
    for _ in range(40):
        env.step(np.array([0.3, 0.3]))
    still = env.tee_pose  # type: ignore[attr-defined]
    for _ in range(20):
        env.step(np.array([0.3, 0.3]))
    assert np.abs(env.tee_pose - still).max() < 1e-4  # type: ignore[attr-defined]
