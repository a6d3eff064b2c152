"""The expert of the square task: grasp the nut by its handle, bring it over the peg and lower it, let go and withdraw."""

from __future__ import annotations

import numpy as np

from sim.experts.base import Expert
from sim.experts.grasp import (
    UP,
    Grasp,
    approach,
    carry,
    close_on,
    grasp_yaw,
    grips,
    nearest_turn,
    random_offset,
    release,
    surrounds,
    tilted_approach,
    yaw_of,
)
from sim.tasks.robosuite_task import Pose, RobosuiteEnv

HANDLE_WIDTH_M = 0.0318
HANDLE_REACH_M = 0.060  # from the nut's centre to the middle of the handle's free part
GRASP_ABOVE_CENTRE_M = 0.004  # keeps the finger tips off the table
SEATED_Z_M = 0.86  # robosuite counts the nut as on the peg below 0.87
LET_GO_BELOW_M = 0.92  # the peg's top is at 0.95
ON_PEG_M = 0.012
PEG_FUNNEL_M = (0.004, 0.020)  # the nut has 7 mm of play around the peg
HANDLE_YAWS_RAD = (np.pi, np.pi / 2, -np.pi / 2)  # a handle pointing away from the robot would be out of reach
HOVER_M = 0.06
LOW_ARC_M, HIGH_ARC_M = 0.115, 0.145
TURN_RAD = np.pi / 3
TILT_RAD = np.pi / 6
MISJUDGED_M = (0.05, 0.08)


class SquareExpert(Expert):
    """Carry the nut low, carry it low with the hand turned across, or come in leaning and carry it in a high arc."""

    tasks = ("square",)
    strategies = ("low", "turned", "high")

    def reset(self, env: RobosuiteEnv, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Start an episode; a misperceived peg is some centimetres beside the true one."""
        self._turn_rad = TURN_RAD if strategy == "turned" else 0.0
        self._tilt_rad = TILT_RAD if strategy == "high" else 0.0
        self._arc_m = HIGH_ARC_M if strategy == "high" else LOW_ARC_M
        self._offset_m = misperception * random_offset(rng, *MISJUDGED_M)

    def act(self, env: RobosuiteEnv) -> np.ndarray:
        """Approach, close, carry or let go, by where the nut and the fingers are."""
        tool, nut, opening_m = env.tool_pose(), env.body_pose("SquareNut_main"), env.gripper_width_m()
        seat_m = np.append((env.body_pose("peg1").position_m + self._offset_m)[:2], SEATED_Z_M)
        grasp = self._grasp(tool, nut)
        if np.linalg.norm((nut.position_m - seat_m)[:2]) < ON_PEG_M and nut.position_m[2] < LET_GO_BELOW_M:
            return release(tool, grasp, opening_m, seat_m - nut.position_m)
        if not surrounds(tool, grasp, opening_m):
            return approach(tool, grasp, HOVER_M)
        if not grips(grasp, opening_m):
            return close_on(tool, grasp)
        turn_rad = min(
            (nearest_turn(goal_rad - yaw_of(nut.rotation_33), 0.0, 2 * np.pi) for goal_rad in HANDLE_YAWS_RAD), key=abs
        )
        yaw_rad = yaw_of(tool.rotation_33) + turn_rad
        return carry(tool, nut.position_m, seat_m, yaw_rad, self._arc_m, PEG_FUNNEL_M)

    def _grasp(self, tool: Pose, nut: Pose) -> Grasp:
        """Return the grasp of the handle with the fingers at its sides."""
        position_m = nut.position_m + nut.rotation_33 @ [HANDLE_REACH_M, 0.0, 0.0] + GRASP_ABOVE_CENTRE_M * UP
        yaw_rad = grasp_yaw(yaw_of(nut.rotation_33) + np.pi / 2, np.pi, tool, self._turn_rad)
        return Grasp(position_m, yaw_rad, HANDLE_WIDTH_M, tilted_approach(yaw_rad, self._tilt_rad))
