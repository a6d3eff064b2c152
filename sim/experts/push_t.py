"""draft"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from sim.experts.base import Expert
from sim.tasks.push_t import BAR_HALF_M, BAR_Y_M, OUTLINE_M, PUSHER_RADIUS_M, coverage

FACE_Y_M = BAR_Y_M + BAR_HALF_M[1] + PUSHER_RADIUS_M
DRAG_RATIO_M2 = 0.04 / 10.0
MAX_OFFSET_M = .081
LOOP_RADIUS_M = .04
LOOP_Y_M = .03
CAPTURE_M = .066
TURN_GAIN = 70.
FREE_SPEED = 0.30
PUSH_SPEED = 0.25
FINE_SPEED = 0.12
LEAD_S = 0.12
CLEARANCE_M = .065
LOOKAHEAD_M = 0.06
GAP_M = 0.02
LINE_M = .08
KEEP_RAD = 1.0
CUT = 0.8
SLOPE = .5
GATE_HI = .025
GATE_LO = .0137
GATE_Y = -.0067

HUB_M = np.array([0.0, -0.02])
ORBIT_M = 0.19


def wrap(a):
    return (a + np.pi) % (2 * np.pi) - np.pi


def course(xy):
    """Desired travel direction (rad) of the T at xy: down the line x = 0, else counter-clockwise round the loop."""
    x, y = xy
    if x < GATE_HI and y > GATE_Y + SLOPE * max(-x - GATE_LO, 0) and (y < LOOP_Y_M or x < 0):
        return -np.pi / 2 - np.arctan(x / LINE_M)
    rel = np.array([x - LOOP_RADIUS_M, y - LOOP_Y_M])
    r = np.linalg.norm(rel)
    return np.arctan2(rel[1], rel[0]) + np.pi / 2 + np.arctan((r - LOOP_RADIUS_M) / CAPTURE_M)


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
        m = np.array([self.side(xy, theta), 1.0])
        vel = m * self.law(m * xy, m[0] * theta, m * p)
        return pusher + LEAD_S * (R @ vel)

    def side(self, xy, theta):
        if self.strategy == "ccw":
            return 1.0
        if self.strategy == "cw":
            return -1.0
        return 1.0 if xy[0] + LOOKAHEAD_M * np.sin(theta) > 0 else -1.0

    def offset(self, xy, theta, arc):
        psi = theta - np.pi / 2
        want = course(xy)
        keep = KEEP_RAD * (np.clip(arc / MAX_OFFSET_M, -1, 1) - 1)
        error = wrap(want - psi + keep) - keep
        eps = 0.003
        ahead = course(xy + eps * np.array([np.cos(want), np.sin(want)]))
        ff = wrap(ahead - want) / eps
        curvature = np.clip(ff, -15, 15) * max(np.cos(error), 0) + TURN_GAIN * error
        return float(np.clip(-DRAG_RATIO_M2 * curvature, -MAX_OFFSET_M, MAX_OFFSET_M))

    def law(self, xy, theta, p):
        d = self.offset(xy, theta, p[0])
        lat = d - p[0]
        radius = np.linalg.norm(p - HUB_M)
        radial = (p - HUB_M) / radius
        behind = np.clip((0.15 - abs(p[0])) / 0.04, 0, 1) * np.clip((p[1] - FACE_Y_M) / 0.01 + 1.5, 0, 1)
        gap = np.clip(0.4 * (abs(lat) - 0.03), 0, 0.04) - (p[1] - FACE_Y_M)
        error = behind * gap + (1 - behind) * (ORBIT_M - radius)
        n = behind * np.array([0.0, 1.0]) + (1 - behind) * radial
        n /= np.linalg.norm(n)
        tangent = np.array([n[1], -n[0]])
        pull = behind * lat - (1 - behind) * (1.0 if p[0] > 0 and p[1] > CUT * p[0] else -1.0)
        near = behind * np.clip(1 - (abs(lat) - 0.01) / 0.03, 0, 1)
        fine = np.clip((np.hypot(*xy) - 0.02) / 0.05, 0, 1)
        speed = FINE_SPEED + (PUSH_SPEED - FINE_SPEED) * fine
        # surface velocity of the T under a normal force at p
        F = speed / (1 + p[0] ** 2 / DRAG_RATIO_M2)
        w = -p[0] * F / DRAG_RATIO_M2
        surface = np.array([-w * p[1], -F + w * p[0]])
        v = near * 1.3 * surface + np.clip(8 * pull, -FREE_SPEED, FREE_SPEED) * tangent + (1 - near) * np.clip(8 * error, -FREE_SPEED, FREE_SPEED) * n
        return v * min(1, FREE_SPEED / np.linalg.norm(v))
