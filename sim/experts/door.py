"""Expert for robosuite's Door: hold the handle from the front, turn it down until the latch is free, pull.

The law has no clock. The grip point is fixed to the handle, so it travels along the handle's arc and along the door's
arc; the target is the grip point led along the one arc, the other, or neither, depending on the handle's angle, the
hinge's angle and how well the hand holds. The width of the gripper is the only memory: a half-closed hand stays closed
in a wider zone. The hand is turned by half a turn on its way, so that the wrist has the range to follow the handle.
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

UP = np.array([0.0, 0.0, 1.0])
HANDLE_OUT_M = 0.10  # the bar's distance from the middle of the panel, from robosuite's door_lock.xml
TRANSLATION_GAIN = 1.6  # the OSC goal is relative to the current pose and is reached by 0.23 per step
ROTATION_GAIN = 1.2
HALF_TURN_RAD = 2.2  # from here on a rotation is a half turn, whose direction the range of the wrist decides

CLEARANCE_M = 0.08  # distance of the tool before the grip point while it travels
ASTRAY_IN_M = 0.012  # the hand approaches within this deviation from the line through the grip point ...
ASTRAY_OUT_M = 0.045  # ... and keeps its full clearance outside of this one
ASTRAY_M_PER_RAD = 0.05  # what an error of the hand's orientation counts
WAIT_IN_M = 0.12  # within this deviation the hand moves sideways only as far as it has clearance ...
WAIT_OUT_M = 0.22  # ... and beyond this one freely
WAIT_BAND_M = 0.05  # lack of clearance that stops the sideways movement

CLOSE_ASTRAY_M = 0.016  # an open hand closes within this deviation ...
CLOSE_DEPTH_M = 0.010  # ... and this distance before the grip point
KEEP_M = 0.035  # a hand that is not open stays closed within this distance of the grip point
OPEN_WIDTH_M = 0.07  # a gripper wider than this counts as open
HELD_WIDTH_M = (0.050, 0.044)  # between these widths the hand goes from closing to holding the 4 cm bar
EMPTY_WIDTH_M = 0.036  # a narrower gripper holds nothing

FREE_RAD = (1.2, 1.4)  # between these handle angles the latch comes free of the frame
TURNED_RAD = 1.5  # the handle is turned to here; it stops at 1.57
TURN_LEAD_RAD = 0.5
AJAR_RAD = (0.15, 0.22)  # between these hinge angles the door comes free of the latch, whatever the handle does
PULL_LEAD_RAD = 0.2

MISJUDGED_M = (0.06, 0.09)  # error of the perceived handle at misperception 1


@dataclass(frozen=True)
class Way:
    """A way of holding the bar.

    along_m: distance of the grip point from the handle's axis
    slant_rad: from how far to the side of the bar's tip the hand comes (0: straight from the front)
    """

    along_m: float
    slant_rad: float


WAYS = {
    "grasp_end": Way(along_m=0.12, slant_rad=0.0),
    "grasp_middle": Way(along_m=0.085, slant_rad=0.0),
    "grasp_slanted": Way(along_m=0.115, slant_rad=0.35),
}


def ramp(value: float, start: float, end: float) -> float:
    """Rise from 0 at ``start`` to 1 at ``end`` (either may be the larger one)."""
    return float(np.clip((value - start) / (end - start), 0.0, 1.0))


class DoorExpert(Expert):
    """Grasp the handle, turn it, pull."""

    tasks: ClassVar[tuple[str, ...]] = ("door",)
    strategies: ClassVar[tuple[str, ...]] = tuple(WAYS)

    def reset(self, env: RobosuiteEnv, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Choose the way and draw the error of the perceived handle, away from the door or upwards."""
        self._way = WAYS[strategy]
        angle_rad = rng.uniform(0.0, np.pi / 2)
        size_m = misperception * rng.uniform(*MISJUDGED_M)
        self._error_m = size_m * np.array([0.0, -np.cos(angle_rad), np.sin(angle_rad)])

    def act(self, env: RobosuiteEnv) -> np.ndarray:
        """Return the displacement (m), the rotation vector (rad) and the gripper command."""
        way, door, tool = self._way, env.robosuite.door, env.tool_pose()
        hinge, latch = (env.data.joint(name) for name in door.joints)
        hinge_rad, handle_rad = float(hinge.qpos[0]), float(latch.qpos[0])
        panel_33 = env.body_pose(door.door_body).rotation_33
        handle = env.body_pose(door.latch_body)  # x along the bar, y into the door
        grip_m = handle.position_m + handle.rotation_33 @ [way.along_m, -HANDLE_OUT_M, 0.0] + panel_33 @ self._error_m

        approach_3 = handle.rotation_33 @ [
            np.sin(way.slant_rad),
            -np.cos(way.slant_rad),
            0.0,
        ]  # from the grip, outwards
        opening_3 = handle.rotation_33[:, 2]  # the fingers open along the tool's x axis, which points along its z axis
        wanted = Rotation.from_matrix(np.stack([opening_3, np.cross(opening_3, approach_3), -approach_3], axis=1))
        turn_rad_3 = (wanted * Rotation.from_matrix(tool.rotation_33).inv()).as_rotvec()
        turn_rad_3 = _one_way(turn_rad_3, UP - panel_33[:, 1])

        error_m = tool.position_m - grip_m
        depth_m = float(approach_3 @ error_m)
        astray_m = float(np.linalg.norm(error_m - depth_m * approach_3) + ASTRAY_M_PER_RAD * np.linalg.norm(turn_rad_3))
        width_m = env.gripper_width_m()
        arrived = astray_m < CLOSE_ASTRAY_M and depth_m < CLOSE_DEPTH_M
        closes = bool(np.linalg.norm(error_m) < KEEP_M) and (width_m < OPEN_WIDTH_M or arrived)
        if closes and width_m > EMPTY_WIDTH_M:
            held, ajar = ramp(width_m, *HELD_WIDTH_M), ramp(hinge_rad, *AJAR_RAD)
            lead_rad = held * (1.0 - ajar) * float(np.clip(TURNED_RAD - handle_rad, 0.0, TURN_LEAD_RAD))
            target_m = _turned(grip_m, latch.xanchor, lead_rad * latch.xaxis)
            lead_rad = held * max(ajar, ramp(handle_rad, *FREE_RAD)) * PULL_LEAD_RAD
            move_m = _turned(target_m, hinge.xanchor, lead_rad * hinge.xaxis) - tool.position_m
        else:
            clearance_m = CLEARANCE_M * max(
                ramp(astray_m, ASTRAY_IN_M, ASTRAY_OUT_M), ramp(width_m, OPEN_WIDTH_M, HELD_WIDTH_M[0])
            )
            lag = ramp(clearance_m - depth_m, 0.0, WAIT_BAND_M) * ramp(astray_m, WAIT_OUT_M, WAIT_IN_M)
            forward_m = (clearance_m - depth_m) * approach_3
            move_m = forward_m - (1.0 - lag) * (error_m - depth_m * approach_3)

        move_m = TRANSLATION_GAIN * move_m
        move_m *= MAX_TRANSLATION_M / max(float(np.linalg.norm(move_m)), MAX_TRANSLATION_M)
        turn_rad_3 = ROTATION_GAIN * turn_rad_3
        turn_rad_3 *= MAX_ROTATION_RAD / max(float(np.abs(turn_rad_3).max()), MAX_ROTATION_RAD)
        return np.concatenate([move_m, turn_rad_3, [1.0 if closes else -1.0]])


def _turned(point_m: np.ndarray, anchor_m: np.ndarray, rotvec_rad: np.ndarray) -> np.ndarray:
    """Turn a point about an axis through an anchor."""
    return anchor_m + Rotation.from_rotvec(rotvec_rad).apply(point_m - anchor_m)


def _one_way(rotvec_rad: np.ndarray, prefer_3: np.ndarray) -> np.ndarray:
    """Turn the long way round if the short way is nearly as long and turns against the preferred axis."""
    angle_rad = float(np.linalg.norm(rotvec_rad))
    if angle_rad > HALF_TURN_RAD and rotvec_rad @ prefer_3 < 0.0:
        return rotvec_rad * (1.0 - 2.0 * np.pi / angle_rad)
    return rotvec_rad
