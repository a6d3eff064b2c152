"""Expert for robosuite's Door: hold the handle from above, turn it down until the latch is free, pull the door open.

The law has no clock. The grip point is fixed to the handle, so it travels along the handle's arc and along the door's arc;
the target is the grip point led along the one arc, the other, or neither, depending on the handle angle, the hinge angle and
how well the hand holds. The width of the gripper is the only memory: a half-closed hand stays closed in a wider zone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from sim.experts.base import Expert
from sim.tasks.robosuite_task import MAX_ROTATION_RAD, MAX_TRANSLATION_M

if TYPE_CHECKING:
    from sim.tasks.robosuite_task import RobosuiteEnv

HANDLE_OUT_M = 0.10  # the bar's distance from the middle of the panel, from robosuite's door_lock.xml
TRANSLATION_GAIN = 1.6  # the OSC goal is relative to the current pose and is reached by 0.23 per step
ROTATION_GAIN = 1.2

CLEARANCE_M = 0.08  # distance of the tool before the grip point while it travels
ASTRAY_IN_M = 0.012  # the hand approaches within this deviation from the line through the grip point ...
ASTRAY_OUT_M = 0.045  # ... and keeps its full clearance outside of this one
WAIT_OUT_M = 0.16  # beyond this deviation the hand travels without waiting for its clearance
WAIT_BAND_M = 0.05  # lack of clearance that stops the sideways movement near the handle
ASTRAY_M_PER_RAD = 0.05  # what an error of the hand's orientation counts

CLOSE_ASTRAY_M = 0.016  # an open hand closes within this deviation ...
CLOSE_DEPTH_M = 0.010  # ... and this distance from the grip point
KEEP_M = 0.035  # a hand that is not open stays closed within this distance of the grip point
OPEN_WIDTH_M = 0.07  # a gripper wider than this counts as open
HELD_WIDTH_M = (0.050, 0.044)  # between these widths the hand goes from closing to holding the 4 cm bar
EMPTY_WIDTH_M = 0.03  # a narrower gripper holds nothing

FREE_RAD = (1.05, 1.2)  # between these handle angles the latch comes free of the frame (it is clear at 1.16)
TURNED_RAD = 1.35  # the handle is turned to here
TURN_LEAD_RAD = 0.5
AJAR_RAD = (0.02, 0.06)  # between these hinge angles the door goes from latched to free, whatever the handle does
PULL_LEAD_RAD = 0.2

MISJUDGED_M = (0.06, 0.09)  # error of the perceived handle at misperception 1


@dataclass(frozen=True)
class Way:
    """A way of holding the handle, in the handle's frame: x along the bar, y into the door, z up.

    grip_m: where the tool goes, from the handle's axis at the panel
    approach: unit vector from the grip point to where the tool comes from
    tool_33: orientation of the tool (it points along its z axis, the fingers open along x)
    tilt: share of the handle's turn that the hand follows
    closes: hold the bar between the fingers, or press it with the palm and hook it with the fingers
    """

    grip_m: tuple[float, float, float]
    approach: tuple[float, float, float]
    tool_33: tuple[tuple[float, float, float], ...]
    tilt: float
    closes: bool


WAYS = {
    "grasp_end": Way((0.12, -0.10, 0.0), (0.0, -1.0, 0.0), ((0, -1, 0), (0, 0, 1), (-1, 0, 0)), 1.0, True),
    "grasp_middle": Way((0.085, -0.10, 0.0), (0.0, -1.0, 0.0), ((0, -1, 0), (0, 0, 1), (-1, 0, 0)), 1.0, True),
    "hook": Way((0.10, -0.07, -0.01), (0.0, 0.0, 1.0), ((-1, 0, 0), (0, 1, 0), (0, 0, -1)), 0.5, False),
}


def ramp(value: float, start: float, end: float) -> float:
    """Rise from 0 at ``start`` to 1 at ``end`` (either may be the larger one)."""
    return float(np.clip((value - start) / (end - start), 0.0, 1.0))


class DoorExpert(Expert):
    """Grasp or hook the handle, turn it, pull."""

    tasks: ClassVar[tuple[str, ...]] = ("door",)
    strategies: ClassVar[tuple[str, ...]] = tuple(WAYS)

    def reset(self, env: RobosuiteEnv, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Choose the way and draw the error of the perceived handle, away from the door or upwards."""
        self._way = WAYS[strategy]
        angle_rad = rng.uniform(0.0, np.pi / 2)
        self._error_m = misperception * rng.uniform(*MISJUDGED_M) * np.array([0.0, -np.cos(angle_rad), np.sin(angle_rad)])

    def act(self, env: RobosuiteEnv) -> np.ndarray:
        """Return the displacement (m), the rotation vector (rad) and the gripper command."""
        way, door, tool = self._way, env.robosuite.door, env.tool_pose()
        hinge, latch = (env.data.joint(name) for name in door.joints)
        hinge_rad, handle_rad = float(hinge.qpos[0]), float(latch.qpos[0])
        panel_33 = env.body_pose(door.door_body).rotation_33
        handle = env.body_pose(door.latch_body)
        hand_33 = Rotation.from_rotvec(way.tilt * handle_rad * latch.xaxis).as_matrix() @ panel_33
        grip_m = handle.position_m + handle.rotation_33 @ np.array(way.grip_m) + panel_33 @ self._error_m
        wanted = Rotation.from_matrix(hand_33 @ np.array(way.tool_33))
        turn_rad_3 = (wanted * Rotation.from_matrix(tool.rotation_33).inv()).as_rotvec()

        error_m = tool.position_m - grip_m
        approach_3 = hand_33 @ np.array(way.approach)
        depth_m = float(approach_3 @ error_m)
        astray_m = float(np.linalg.norm(error_m - depth_m * approach_3) + ASTRAY_M_PER_RAD * np.linalg.norm(turn_rad_3))
        width_m = env.gripper_width_m()
        near = bool(np.linalg.norm(error_m) < KEEP_M)
        if way.closes:
            arrived = astray_m < CLOSE_ASTRAY_M and depth_m < CLOSE_DEPTH_M
            closes = near and EMPTY_WIDTH_M < width_m and (width_m < OPEN_WIDTH_M or arrived)
            held = ramp(width_m, *HELD_WIDTH_M) if closes else 0.0
        else:
            closes = True
            held = ramp(astray_m, ASTRAY_OUT_M, ASTRAY_IN_M) * ramp(depth_m, KEEP_M, CLOSE_DEPTH_M)

        ajar = ramp(hinge_rad, *AJAR_RAD)
        turn_rad = held * (1.0 - ajar) * float(np.clip(TURNED_RAD - handle_rad, 0.0, TURN_LEAD_RAD))
        pull_rad = held * max(ajar, ramp(handle_rad, *FREE_RAD)) * PULL_LEAD_RAD
        target_m = _turned(grip_m, latch.xanchor, turn_rad * latch.xaxis)
        target_m = _turned(target_m, hinge.xanchor, pull_rad * hinge.xaxis)

        error_m = tool.position_m - target_m
        if not (way.closes and closes):
            clearance_m = CLEARANCE_M * ramp(astray_m, ASTRAY_IN_M, ASTRAY_OUT_M) * (1.0 - held)
            lag = ramp(clearance_m - depth_m, 0.0, WAIT_BAND_M) * ramp(astray_m, WAIT_OUT_M, ASTRAY_OUT_M) * (1.0 - held)
            error_m = error_m - clearance_m * approach_3
            error_m = error_m - lag * (error_m - (approach_3 @ error_m) * approach_3)
        move_m = -TRANSLATION_GAIN * error_m
        move_m *= min(1.0, MAX_TRANSLATION_M / max(float(np.linalg.norm(move_m)), MAX_TRANSLATION_M))
        turn_rad_3 = np.clip(ROTATION_GAIN * turn_rad_3, -MAX_ROTATION_RAD, MAX_ROTATION_RAD)
        return np.concatenate([move_m, turn_rad_3, [1.0 if closes else -1.0]])


def _turned(point_m: np.ndarray, anchor_m: np.ndarray, rotvec_rad: np.ndarray) -> np.ndarray:
    """Turn a point about an axis through an anchor."""
    return anchor_m + Rotation.from_rotvec(rotvec_rad).apply(point_m - anchor_m)
