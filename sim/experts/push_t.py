"""draft"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from sim.experts.base import Expert
from sim.tasks.push_t import BAR_HALF_M, BAR_Y_M, PUSHER_RADIUS_M, coverage, OUTLINE_M

FACE_Y_M = BAR_Y_M + BAR_HALF_M[1] + PUSHER_RADIUS_M
DRAG_RATIO_M2 = 0.04 / 10.0
MAX_OFFSET_M = 0.085
LOOP_RADIUS_M = 0.07
LOOP_Y_M = 0.05
CAPTURE_M = 0.05
TURN_GAIN = 30.0
FREE_SPEED = 0.30
PUSH_SPEED = 0.25
FINE_SPEED = 0.12
LEAD_S = 0.1
CLEARANCE_M = 0.04
LOOKAHEAD_M = 0.06
GAP_M = 0.02
LINE_M = 0.03
GATE_HI = 0.02
GATE_LO = 0.05
GATE_Y = -0.005

HULL_M = OUTLINE_M[[0, 1, 3, 4, 5, 6]]


def wrap(a):
    return (a + np.pi) % (2 * np.pi) - np.pi


def hull_gradient(p):
    """distance and outward normal"""
    a = HULL_M
    b = np.roll(HULL_M, -1, axis=0)
    ab = b - a
    t = np.clip(((p - a) * ab).sum(1) / (ab**2).sum(1), 0, 1)
    q = a + t[:, None] * ab
    dist = np.linalg.norm(p - q, axis=1)
    i = int(dist.argmin())
    n = np.stack([ab[:, 1], -ab[:, 0]], 1) / np.linalg.norm(ab, axis=1)[:, None]
    inside = ((p - a) * n).sum(1)
    if inside.max() <= 0:
        i = int(inside.argmax())
        return inside[i], n[i]
    return dist[i], (p - q[i]) / max(dist[i], 1e-9)


def course(xy, side):
    """Desired travel direction angle of the T at xy, using the loop on ``side``."""
    # mirrored so that the loop is at +x, counter-clockwise
    x, y = xy[0] * side, xy[1] - LOOP_Y_M
    rel = np.array([x - LOOP_RADIUS_M, y])
    r = np.linalg.norm(rel)
    phi = np.arctan2(rel[1], rel[0])
    if y < 0 and x < GATE_HI and x > -GATE_LO and xy[1] > GATE_Y:  # final
        ang = -np.pi / 2 - np.arctan(x / LINE_M)
    else:
        ang = phi + np.pi / 2 + np.arctan((r - LOOP_RADIUS_M) / CAPTURE_M)
    return ang if side > 0 else np.pi - ang


class PushTExpert(Expert):
    tasks: ClassVar[tuple[str, ...]] = ("push_t",)
    strategies: ClassVar[tuple[str, ...]] = ("nearest", "ccw", "cw")

    def reset(self, env: Any, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        self.strategy = strategy
        self.goal = np.zeros(3)
        if misperception:
            a = rng.uniform(-np.pi, np.pi)
            s = rng.choice([-1.0, 1.0])
            self.goal = misperception * np.array([0.06 * np.cos(a), 0.06 * np.sin(a), s * 0.4])

    def act(self, env: Any) -> np.ndarray:
        pose, pusher = env.tee_pose, env.pusher_m
        c, s = np.cos(self.goal[2]), np.sin(self.goal[2])
        G = np.array([[c, -s], [s, c]])
        xy = G.T @ (pose[:2] - self.goal[:2])
        theta = wrap(pose[2] - self.goal[2])
        if self.goal.any() and coverage(np.array([*xy, theta])) > 0.9:
            return pusher
        c, s = np.cos(pose[2]), np.sin(pose[2])
        R = np.array([[c, -s], [s, c]])
        p = R.T @ (pusher - pose[:2])
        vel = self.law(xy, theta, p)
        return pusher + LEAD_S * (R @ vel)

    def side(self, xy, theta):
        if self.strategy == "ccw":
            return 1.0
        if self.strategy == "cw":
            return -1.0
        return 1.0 if xy[0] + LOOKAHEAD_M * np.sin(theta) > 0 else -1.0

    def offset(self, xy, theta):
        side = self.side(xy, theta)
        psi = theta - np.pi / 2
        want = course(xy, side)
        error = wrap(want - psi)
        eps = 0.003
        ahead = course(xy + eps * np.array([np.cos(want), np.sin(want)]), side)
        ff = wrap(ahead - want) / eps
        curvature = np.clip(ff, -15, 15) * max(np.cos(error), 0) + TURN_GAIN * error
        return float(np.clip(-DRAG_RATIO_M2 * curvature, -MAX_OFFSET_M, MAX_OFFSET_M)), error

    def law(self, xy, theta, p):
        d, error = self.offset(xy, theta)
        if p[1] < FACE_Y_M - 0.008:  # beside or below the bar: go round
            dist, n = hull_gradient(p)
            turn = 1.0 if p[0] > 0 else -1.0
            t = turn * np.array([-n[1], n[0]])
            out = np.clip((CLEARANCE_M + PUSHER_RADIUS_M - dist) / 0.03, -1, 1)
            v = t * np.sqrt(1 - min(out * out, 0.99)) + out * n
            return FREE_SPEED * v / np.linalg.norm(v)
        lat = d - p[0]
        gap = p[1] - FACE_Y_M
        near = np.clip(1 - (abs(lat) - 0.01) / 0.03, 0, 1)
        want_gap = GAP_M * np.clip((abs(lat) - 0.03) / 0.03, 0, 1)
        fine = np.clip((np.hypot(*xy) - 0.02) / 0.05, 0, 1)
        speed = FINE_SPEED + (PUSH_SPEED - FINE_SPEED) * fine
        # surface velocity of the T under a normal force at p
        F = speed / (1 + p[0] ** 2 / DRAG_RATIO_M2)
        w = -p[0] * F / DRAG_RATIO_M2
        surface = np.array([-w * p[1], -F + w * p[0]])
        v = near * 1.3 * surface + np.array([np.clip(8 * lat, -FREE_SPEED, FREE_SPEED), (1 - near) * np.clip(8 * (want_gap - gap), -FREE_SPEED, FREE_SPEED)])
        n = np.linalg.norm(v)
        return v * min(1, FREE_SPEED / n)
