"""Demonstrator of push_t: drive the T like a car, pushing only the top of its bar, and never reverse.

A push at lateral offset ``d`` of the bar's top makes the T move along its stem and turn with curvature -d / r², where
r² is the ratio of rotational to linear drag. So offset is steering, and steering follows a course field over the plane:
round a loop, always in the same sense, and from it down the line x = 0 onto the target. An approach that misses goes
round once more. The pusher goes round the T always in the same sense too, on an orbit that is clear of it. The law is a
function of pusher position and T pose alone; going round and turning one way only leaves few discontinuities in it,
which is what makes its demonstrations easy to clone: a clone of 100 gained 10 points of success by it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from sim.experts.base import Expert
from sim.tasks.push_t import BAR_HALF_M, BAR_Y_M, PUSHER_RADIUS_M, SUCCESS_COVERAGE, coverage, to_tee_frame

# steering; tuned by random search on the steps to success
DRAG_RATIO_M2 = 0.04 / 10.0  # damping of tee_theta over damping of tee_x
MAX_OFFSET_M = 0.081
TURN_GAIN_PER_M = 70.0
MAX_COURSE_CURVATURE_PER_M = 15.0
PROBE_M = 0.003  # step of the course's curvature by finite difference
TURN_BIAS_RAD = 1.0  # how much longer a turn to the left is accepted, where the pusher is on that side
# course field, metres
LOOP_RADIUS_M = 0.04
LOOP_Y_M = 0.03
CAPTURE_M = 0.066
LINE_M = 0.08
LINE_RIGHT_M = 0.025
LINE_LEFT_M = 0.0137
LINE_SLOPE = 0.5
LINE_END_Y_M = -0.0067
# the pusher, in the T's frame
FACE_Y_M = BAR_Y_M + BAR_HALF_M[1] + PUSHER_RADIUS_M  # its centre, touching the top of the bar
HUB_M = np.array([0.0, -0.02])
ORBIT_M = 0.19  # radius of the way round, clear of the T by 3 cm and more
CUT_SLOPE = 0.8  # right of the bar and above this slope the pusher goes back to the face, not round
BEHIND_M = (0.11, 0.15)  # half width in which the pusher is behind the bar: wholly, not any more
TOUCH_M = (0.01, 0.04)  # misplacement along the bar up to which it pushes: fully, not any more
LIFT_FROM_M, LIFT_SLOPE, MAX_LIFT_M = 0.03, 0.4, 0.04  # it moves off the bar when it is further misplaced
# speeds
FREE_SPEED_M_PER_S = 0.35
PUSH_SPEED_M_PER_S = 0.25
FINE_SPEED_M_PER_S = 0.12
FINE_M = (0.02, 0.07)  # distance to the target over which the push speeds up from fine to full
PUSH_GAIN = 1.3  # makes up for the lag of the servo against the drag
POSITION_GAIN_PER_S = 8.0
LEAD_S = 0.12  # the action is where the pusher would be after this time
# misperception
MISPERCEIVED_M, MISPERCEIVED_RAD = 0.10, 0.40


def _ramp(value: float, start_end: tuple[float, float]) -> float:
    """Rise linearly from 0 at start to 1 at end."""
    start, end = start_end
    return min(max((value - start) / (end - start), 0.0), 1.0)


def _wrap_rad(angle_rad: float) -> float:
    """The same angle in [-π, π)."""
    return float((angle_rad + np.pi) % (2 * np.pi) - np.pi)


def _rotation(angle_rad: float) -> np.ndarray:
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return np.array([[c, -s], [s, c]])


def course_rad(x_m: float, y_m: float) -> float:
    """Direction in which the T should travel: down the line x = 0, elsewhere counter-clockwise round the loop."""
    beside = LINE_END_Y_M + LINE_SLOPE * max(-x_m - LINE_LEFT_M, 0.0)
    if x_m < LINE_RIGHT_M and y_m > beside and (y_m < LOOP_Y_M or x_m < 0.0):
        return float(-np.pi / 2 - np.arctan(x_m / LINE_M))
    x_m, y_m = x_m - LOOP_RADIUS_M, y_m - LOOP_Y_M
    inward_rad = np.arctan((np.hypot(x_m, y_m) - LOOP_RADIUS_M) / CAPTURE_M)
    return float(np.arctan2(y_m, x_m) + np.pi / 2 + inward_rad)


def steering_m(pose: np.ndarray, pusher_x_m: float, bias_rad: float) -> float:
    """Lateral offset at which to push the bar of a T at ``pose``; near half a turn it keeps to the pusher's side."""
    want_rad = course_rad(pose[0], pose[1])
    bias_rad *= 1.0 - np.clip(pusher_x_m / MAX_OFFSET_M, -1.0, 1.0)
    error_rad = _wrap_rad(want_rad - (pose[2] - np.pi / 2) - bias_rad) + bias_rad
    ahead_rad = course_rad(pose[0] + PROBE_M * np.cos(want_rad), pose[1] + PROBE_M * np.sin(want_rad))
    course_curvature = np.clip(
        _wrap_rad(ahead_rad - want_rad) / PROBE_M, -MAX_COURSE_CURVATURE_PER_M, MAX_COURSE_CURVATURE_PER_M
    )
    curvature = course_curvature * max(np.cos(error_rad), 0.0) + TURN_GAIN_PER_M * error_rad
    return float(np.clip(-DRAG_RATIO_M2 * curvature, -MAX_OFFSET_M, MAX_OFFSET_M))


def pusher_velocity(pose: np.ndarray, pusher_m: np.ndarray, one_way: bool) -> np.ndarray:
    """Velocity (m/s) of a pusher at ``pusher_m``, both in the frame of a T at ``pose`` relative to the target."""
    x_m, y_m = pusher_m
    radius_m = float(np.linalg.norm(pusher_m - HUB_M))
    behind = (1.0 - _ramp(abs(x_m), BEHIND_M)) * _ramp(y_m - FACE_Y_M, (-0.015, -0.005))
    along_m = steering_m(pose, x_m, TURN_BIAS_RAD if one_way else 0.5 * TURN_BIAS_RAD) - x_m
    lift_m = min(max(LIFT_SLOPE * (abs(along_m) - LIFT_FROM_M), 0.0), MAX_LIFT_M)
    off_m = behind * (FACE_Y_M + lift_m - y_m) + (1.0 - behind) * (ORBIT_M - radius_m)
    back = x_m > 0.0 and (y_m > CUT_SLOPE * x_m or not one_way)
    along = POSITION_GAIN_PER_S * (behind * along_m + (1.0 - behind) * (-1.0 if back else 1.0))
    normal = behind * np.array([0.0, 1.0]) + (1.0 - behind) * (pusher_m - HUB_M) / max(radius_m, 1e-6)
    normal /= max(float(np.linalg.norm(normal)), 1e-6)
    tangent = np.array([normal[1], -normal[0]])

    # where the T yields to a push without friction, the point of contact moves like this
    fine = _ramp(float(np.hypot(pose[0], pose[1])), FINE_M)
    push = FINE_SPEED_M_PER_S + (PUSH_SPEED_M_PER_S - FINE_SPEED_M_PER_S) * fine
    tee_speed = push / (1.0 + x_m**2 / DRAG_RATIO_M2)
    tee_rad_per_s = -x_m * tee_speed / DRAG_RATIO_M2
    contact = np.array([-tee_rad_per_s * y_m, tee_rad_per_s * x_m - tee_speed])

    touch = behind * (1.0 - _ramp(abs(along_m), TOUCH_M))
    limit = FREE_SPEED_M_PER_S
    velocity = touch * PUSH_GAIN * contact + np.clip(along, -limit, limit) * tangent
    velocity += (1.0 - touch) * np.clip(POSITION_GAIN_PER_S * off_m, -limit, limit) * normal
    return velocity * min(1.0, limit / max(float(np.linalg.norm(velocity)), 1e-6))


class PushTExpert(Expert):
    """Steers the T round the loop right of the target, or round its mirror image.

    left: turns left, the pusher goes clockwise round the T; right: the mirror image
    nearest: left or right, whichever needs the smaller turn from the start
    short_way: turns left, the pusher goes round the T the shorter way
    """

    tasks: ClassVar[tuple[str, ...]] = ("push_t",)
    strategies: ClassVar[tuple[str, ...]] = ("left", "right", "nearest", "short_way")

    def reset(self, env: Any, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Choose the side of the loop and the perceived target."""
        direction_rad = rng.uniform(0.0, np.pi)  # beyond the target, else it would pass over it
        shift_m = MISPERCEIVED_M * np.array([np.cos(direction_rad), np.sin(direction_rad)])
        self._goal = misperception * np.array([*shift_m, MISPERCEIVED_RAD * rng.choice([-1.0, 1.0])])
        self._one_way = strategy != "short_way"
        pose = self._perceived(env)
        turns_rad = [abs(_wrap_rad(course_rad(s * pose[0], pose[1]) + np.pi / 2 - s * pose[2])) for s in (1.0, -1.0)]
        mirrored = strategy == "right" or (strategy == "nearest" and turns_rad[1] < turns_rad[0])
        self._mirror = np.array([-1.0 if mirrored else 1.0, 1.0])

    def act(self, env: Any) -> np.ndarray:
        """Return the pusher's next set point (x m, y m)."""
        pose, pusher_m = self._perceived(env), env.pusher_m
        if coverage(pose) >= SUCCESS_COVERAGE:
            return pusher_m
        R_world_tee = _rotation(env.tee_pose[2])
        mirrored_pose = pose * np.array([self._mirror[0], 1.0, self._mirror[0]])
        local_m = self._mirror * to_tee_frame(pusher_m, env.tee_pose)
        velocity = self._mirror * pusher_velocity(mirrored_pose, local_m, self._one_way)
        return pusher_m + LEAD_S * (R_world_tee @ velocity)

    def _perceived(self, env: Any) -> np.ndarray:
        """Pose of the T relative to the perceived target."""
        return np.array([*to_tee_frame(env.tee_pose[:2], self._goal), env.tee_pose[2] - self._goal[2]])
