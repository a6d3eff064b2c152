"""What the grasping experts share: driving the robosuite arm to a pose, and closing the fingers on an object.

All functions are feedback laws on the present poses and finger opening. A movement is a funnel: far from its goal the
tool keeps a height above it, and the nearer it comes the lower it may go, so there is no clock and hardly a switch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from sim.tasks.robosuite_task import MAX_TRANSLATION_M, Pose

OPEN, CLOSE = -1.0, 1.0  # gripper commands
HOME_YAW_RAD = np.pi / 2  # of the tool in the initial pose; the last joint turns 110 degrees and more to either side
UP = np.array([0.0, 0.0, 1.0])

POSITION_GAIN = 2.5  # action per error; the arm covers about 40 % of a commanded delta in one control step
ROTATION_GAIN = 1.3
FASTEST_TURN_RAD = 0.3  # of the 0.5 an action allows: the controller's torques for turning push the hand aside
YAW_LEVER_M_PER_RAD = 0.04  # a wrong yaw counts as much as being this far off, so the tool turns before it descends
RISE_FIRST_M = 0.03  # no sideways movement when this much below the funnel
SINK_FUNNEL_M = (0.007, 0.022)  # this far from the axis the tool goes all the way down, stays at full height
RISE_FUNNEL_M = (0.025, 0.050)  # this far from the axis the tool may stay down, goes up to full height
REACHED_M = 0.012  # open fingers this near to the grasp point begin to close
KEPT_M = 0.030  # closing fingers this near to the grasp point go on, closed ones still have the object
OPENED_M, CLOSING_M = 0.077, 0.072  # fingers farther apart than the first are open, nearer than the second are closing
GRIPPED_M = 0.006  # fingers at most this much farther apart than the object is wide hold it


@dataclass(frozen=True)
class Grasp:
    """Where the tool has to be in the world to close its fingers on an object.

    position_m: of the tool
    yaw_rad: of the tool; the fingers move along the tool's x axis
    width_m: of the object between the fingers
    approach_3: unit vector from the grasp point to where the tool comes from
    """

    position_m: np.ndarray
    yaw_rad: float
    width_m: float
    approach_3: np.ndarray


def down_rotation(yaw_rad: float) -> np.ndarray:
    """Return the orientation (3, 3) of a tool that points straight down with its x axis at a yaw."""
    x_3 = np.array([np.cos(yaw_rad), np.sin(yaw_rad), 0.0])
    return np.column_stack([x_3, np.cross(-UP, x_3), -UP])


def yaw_of(rotation_33: np.ndarray) -> float:
    """Return the angle in rad of a rotation's x axis in the horizontal plane."""
    return float(np.arctan2(rotation_33[1, 0], rotation_33[0, 0]))


def nearest_turn(yaw_rad: float, near_rad: float, symmetry_rad: float) -> float:
    """Return the angle nearest to ``near_rad`` that differs from ``yaw_rad`` by a multiple of ``symmetry_rad``."""
    return yaw_rad + symmetry_rad * round((near_rad - yaw_rad) / symmetry_rad)


def grasp_yaw(object_yaw_rad: float, symmetry_rad: float, tool: Pose, turn_rad: float) -> float:
    """Return the yaw for grasping a symmetric object that is nearest to the tool's.

    The tool's own yaw is only followed half a symmetry to either side of ``HOME_YAW_RAD + turn_rad``, so that the
    choice stays with what was begun but never winds up the last joint.
    """
    middle_rad, half_rad = HOME_YAW_RAD + turn_rad, symmetry_rad / 2
    now_rad = nearest_turn(yaw_of(tool.rotation_33), middle_rad, 2 * np.pi)
    return nearest_turn(
        object_yaw_rad, float(np.clip(now_rad, middle_rad - half_rad, middle_rad + half_rad)), symmetry_rad
    )


def tilted_approach(yaw_rad: float, tilt_rad: float) -> np.ndarray:
    """Return the direction (3,) that leans from the vertical to the robot's side, between the two fingers."""
    side_3 = np.array([-np.sin(yaw_rad), np.cos(yaw_rad), 0.0])
    return np.cos(tilt_rad) * UP + np.sin(tilt_rad) * side_3 * (-1.0 if side_3[0] > 0 else 1.0)


def random_offset(rng: np.random.Generator, shortest_m: float, longest_m: float) -> np.ndarray:
    """Draw a horizontal vector (3,) of random direction, for an expert that misjudges where something is."""
    angle_rad, length_m = rng.uniform(-np.pi, np.pi), rng.uniform(shortest_m, longest_m)
    return length_m * np.array([np.cos(angle_rad), np.sin(angle_rad), 0.0])


def servo(tool: Pose, position_m: np.ndarray, yaw_rad: float, gripper: float) -> np.ndarray:
    """Return the action (7,) that drives a tool pointing down straight to a position and yaw at limited speed."""
    move_m = POSITION_GAIN * (position_m - tool.position_m)
    turn_rad = ROTATION_GAIN * Rotation.from_matrix(down_rotation(yaw_rad) @ tool.rotation_33.T).as_rotvec()
    move_m *= min(1.0, MAX_TRANSLATION_M / max(float(np.abs(move_m).max()), MAX_TRANSLATION_M))
    turn_rad *= min(1.0, FASTEST_TURN_RAD / max(float(np.abs(turn_rad).max()), FASTEST_TURN_RAD))
    return np.concatenate([move_m, turn_rad, [gripper]])


def funnel(
    tool: Pose,
    goal_m: np.ndarray,
    yaw_rad: float,
    axis_3: np.ndarray,
    height_m: float,
    sink_m: tuple[float, float] = SINK_FUNNEL_M,
) -> np.ndarray:
    """Return where to go next (3,) to come to the goal along an axis, clearing what is around it."""
    error_m = tool.position_m - goal_m
    along_m = float(error_m @ axis_3)
    aside_m = error_m - along_m * axis_3
    yaw_error_rad = abs(nearest_turn(yaw_of(tool.rotation_33), yaw_rad, 2 * np.pi) - yaw_rad)
    off_m = float(np.hypot(np.linalg.norm(aside_m), YAW_LEVER_M_PER_RAD * yaw_error_rad))
    lowest_m, highest_m = (float(np.interp(off_m, edge_m, (0.0, height_m))) for edge_m in (RISE_FUNNEL_M, sink_m))
    sideways = float(np.clip(1.0 - (lowest_m - along_m) / RISE_FIRST_M, 0.0, 1.0))
    return tool.position_m - sideways * aside_m + (np.clip(along_m, lowest_m, highest_m) - along_m) * axis_3


def surrounds(tool: Pose, grasp: Grasp, opening_m: float) -> bool:
    """Tell whether the object is between the fingers: with a looser tolerance once they are closing."""
    off_m = float(np.linalg.norm(tool.position_m - grasp.position_m))
    return off_m < float(np.interp(opening_m, (CLOSING_M, OPENED_M), (KEPT_M, REACHED_M)))


def grips(grasp: Grasp, opening_m: float) -> bool:
    """Tell whether fingers around the object are closed on it."""
    return opening_m < grasp.width_m + GRIPPED_M


def approach(tool: Pose, grasp: Grasp, height_m: float) -> np.ndarray:
    """Return the action (7,) that brings open fingers to the grasp point from a height above it."""
    target_m = funnel(tool, grasp.position_m, grasp.yaw_rad, grasp.approach_3, height_m)
    return servo(tool, target_m, grasp.yaw_rad, OPEN)


def close_on(tool: Pose, grasp: Grasp) -> np.ndarray:
    """Return the action (7,) that closes the fingers at the grasp point; they turn a loose object, not the hand."""
    return servo(tool, grasp.position_m, yaw_of(tool.rotation_33), CLOSE)


def release(tool: Pose, grasp: Grasp, opening_m: float, error_m: np.ndarray) -> np.ndarray:
    """Return the action (7,) that opens the fingers and withdraws upwards the more, the wider they are open.

    Until they are free of the object they keep it where it belongs, ``error_m`` away from where it is.
    """
    freed = float(np.interp(opening_m, (grasp.width_m, CLOSING_M), (0.0, 1.0)))
    target_m = tool.position_m + (1.0 - freed) * error_m + freed * MAX_TRANSLATION_M * UP
    return servo(tool, target_m, yaw_of(tool.rotation_33), OPEN)


def carry(
    tool: Pose,
    held_m: np.ndarray,
    goal_m: np.ndarray,
    yaw_rad: float,
    height_m: float,
    sink_m: tuple[float, float] = SINK_FUNNEL_M,
) -> np.ndarray:
    """Return the action (7,) that brings what is held from ``held_m`` to a goal in an arc, and the tool to a yaw."""
    now_rad = yaw_of(tool.rotation_33)
    turn_33 = Rotation.from_rotvec((nearest_turn(yaw_rad, now_rad, 2 * np.pi) - now_rad) * UP).as_matrix()
    tool_goal_m = goal_m + turn_33 @ (tool.position_m - held_m)
    return servo(tool, funnel(tool, tool_goal_m, yaw_rad, UP, height_m, sink_m), yaw_rad, CLOSE)
