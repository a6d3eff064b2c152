"""The expert of the stack task: grasp the small cube, set it on the large one, let go and withdraw."""

from __future__ import annotations

import numpy as np

from sim.experts.base import Expert
from sim.experts.grasp import (
    HOME_YAW_RAD,
    UP,
    Grasp,
    approach,
    carry,
    close_on,
    grasp_yaw,
    grips,
    random_offset,
    release,
    surrounds,
    tilted_approach,
    yaw_of,
)
from sim.tasks.robosuite_task import Pose, RobosuiteEnv

CUBE_WIDTH_M = 0.040
CUBE_SYMMETRY_RAD = np.pi / 2
STACKED_HEIGHT_M = 0.045  # from the centre of the large cube to that of the small one upon it
TOUCHING_M = 0.004  # the cube is let go at most this much above its seat
CENTRED_M, STILL_CENTRED_M = 0.010, 0.022  # off the large cube's axis: to open the fingers, and to keep them open
HOVER_M = 0.06
LOW_ARC_M, HIGH_ARC_M = 0.05, 0.12
TURN_RAD = np.pi / 3
TILT_RAD = np.pi / 6
FINGER_ROOM_M = 0.11  # cubes nearer than this leave no room for a finger between them
MISJUDGED_M = (0.07, 0.10)  # beyond the sum of the half diagonals, so that the cubes do not touch in falling


class StackExpert(Expert):
    """Carry the cube low, carry it low with the hand turned across, or come in leaning and carry it in a high arc."""

    tasks = ("stack",)
    strategies = ("low", "turned", "high")

    def reset(self, env: RobosuiteEnv, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Start an episode; a misperceived large cube is some centimetres beside the true one."""
        self._turn_rad = TURN_RAD if strategy == "turned" else 0.0
        self._tilt_rad = TILT_RAD if strategy == "high" else 0.0
        self._arc_m = HIGH_ARC_M if strategy == "high" else LOW_ARC_M
        self._offset_m = misperception * random_offset(rng, *MISJUDGED_M)

    def act(self, env: RobosuiteEnv) -> np.ndarray:
        """Approach, close, carry or let go, by where the cubes and the fingers are."""
        tool, cube, opening_m = env.tool_pose(), env.body_pose("cubeA_main"), env.gripper_width_m()
        seat_m = env.body_pose("cubeB_main").position_m + STACKED_HEIGHT_M * UP + self._offset_m
        grasp = self._grasp(tool, cube, seat_m)
        error_m = seat_m - cube.position_m
        centred_m = STILL_CENTRED_M if opening_m > CUBE_WIDTH_M + TOUCHING_M else CENTRED_M
        if np.linalg.norm(error_m[:2]) < centred_m and -TOUCHING_M < error_m[2] < CUBE_WIDTH_M / 2:
            return release(tool, grasp, opening_m, error_m)
        if not surrounds(tool, grasp, opening_m):
            return approach(tool, grasp, HOVER_M)
        if not grips(grasp, opening_m):
            return close_on(tool, grasp)
        return carry(tool, cube.position_m, seat_m, yaw_of(tool.rotation_33), self._arc_m)

    def _grasp(self, tool: Pose, cube: Pose, seat_m: np.ndarray) -> Grasp:
        """Return the strategy's pair of sides, or the other one where a finger would hit the large cube."""
        yaw_rad = grasp_yaw(yaw_of(cube.rotation_33), CUBE_SYMMETRY_RAD, tool, self._turn_rad)
        beside_m = (seat_m - cube.position_m)[:2]
        along_m = abs(beside_m @ [np.cos(yaw_rad), np.sin(yaw_rad)])
        if np.linalg.norm(beside_m) < FINGER_ROOM_M and along_m > np.linalg.norm(beside_m) * np.cos(np.pi / 4):
            yaw_rad += np.pi / 2 if yaw_rad < HOME_YAW_RAD + self._turn_rad else -np.pi / 2
        return Grasp(cube.position_m, yaw_rad, CUBE_WIDTH_M, tilted_approach(yaw_rad, self._tilt_rad))
