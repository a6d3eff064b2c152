"""The expert of the can task: grasp the can, carry it over the walls into its compartment, let go and withdraw."""

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
)
from sim.tasks.robosuite_task import Pose, RobosuiteEnv

CAN_WIDTH_M = 0.050
GRASP_ABOVE_CENTRE_M = 0.015  # keeps the palm off the lid
UPRIGHT_COSINE = 0.7  # of the can's axis with the vertical
LET_GO_M = np.array([0.145, 0.350, 0.870])  # the compartment's near corner: the hand cannot reach its middle upright
BIN_CENTRE_M, BIN_HALF_M = np.array([0.1, -0.25]), np.array([0.19, 0.24])  # inside of the bin where the can is found
BIN_WALL_Z_M = 0.90
OPEN_HAND_M = (0.065, 0.035)  # room between tool and wall: in the direction of the fingers, and across it
IN_COMPARTMENT_M = 0.025
LET_GO_BELOW_M = 0.89  # the can stands at 0.86, and 0.90 is where robosuite's compartment ends
HOVER_M = 0.07
LOW_ARC_M, HIGH_ARC_M = 0.11, 0.17  # above the compartment's floor; its walls are 8 cm high
TURN_RAD = np.pi / 3
MISJUDGED_M = (0.06, 0.09)


class CanExpert(Expert):
    """Carry the can low, low with the hand turned across, or in a high arc with the hand turned the other way."""

    tasks = ("can",)
    strategies = ("low", "turned", "high")

    def reset(self, env: RobosuiteEnv, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Start an episode; a misperceived can is some centimetres beside the true one."""
        self._turn_rad = {"low": 0.0, "turned": TURN_RAD, "high": -TURN_RAD}[strategy]
        self._arc_m = HIGH_ARC_M if strategy == "high" else LOW_ARC_M
        self._offset_m = misperception * random_offset(rng, *MISJUDGED_M)

    def act(self, env: RobosuiteEnv) -> np.ndarray:
        """Approach, close, carry or let go, by where the can and the fingers are."""
        tool, can, opening_m = env.tool_pose(), env.body_pose("Can_main"), env.gripper_width_m()
        can_m = can.position_m + self._offset_m
        grasp = self._grasp(tool, can, can_m)
        if np.linalg.norm((can_m - LET_GO_M)[:2]) < IN_COMPARTMENT_M and can_m[2] < LET_GO_BELOW_M:
            return release(tool, grasp, opening_m, LET_GO_M - can_m)
        if not surrounds(tool, grasp, opening_m):
            return approach(tool, grasp, HOVER_M)
        if not grips(grasp, opening_m):
            return close_on(tool, grasp)
        return carry(tool, can_m, LET_GO_M, HOME_YAW_RAD, self._arc_m)

    def _grasp(self, tool: Pose, can: Pose, can_m: np.ndarray) -> Grasp:
        """Return the strategy's yaw for a can that stands, and fingers across its axis for one that lies."""
        axis_3 = can.rotation_33[:, 2]
        if abs(axis_3[2]) > UPRIGHT_COSINE:
            position_m, yaw_rad = can_m + GRASP_ABOVE_CENTRE_M * UP, HOME_YAW_RAD + self._turn_rad
        else:
            across_rad = float(np.arctan2(axis_3[1], axis_3[0])) + np.pi / 2
            position_m, yaw_rad = can_m.copy(), grasp_yaw(across_rad, np.pi, tool, 0.0)
        if can_m[2] < BIN_WALL_Z_M and can_m[1] < 0:  # keep the hand off the walls
            along_2 = np.abs([np.cos(yaw_rad), np.sin(yaw_rad)])
            room_m = BIN_HALF_M - OPEN_HAND_M[0] * along_2 - OPEN_HAND_M[1] * along_2[::-1]
            position_m[:2] = np.clip(position_m[:2], BIN_CENTRE_M - room_m, BIN_CENTRE_M + room_m)
        return Grasp(position_m, yaw_rad, CAN_WIDTH_M, UP)
