"""The expert of the lift task: grasp the cube by a pair of its sides and raise it."""

from __future__ import annotations

import numpy as np

from sim.experts.base import Expert
from sim.experts.grasp import (
    CLOSE,
    UP,
    Grasp,
    approach,
    close_on,
    grasp_yaw,
    grips,
    random_offset,
    servo,
    surrounds,
    tilted_approach,
    yaw_of,
)
from sim.tasks.robosuite_task import MAX_TRANSLATION_M, RobosuiteEnv

CUBE = "cube_main"  # of the task of one cube
CUBE_WIDTH_M = {CUBE: 0.042, "cubeA_main": 0.040, "cubeB_main": 0.050}
CUBE_SYMMETRY_RAD = np.pi / 2
HOVER_M = 0.06
TURN_RAD = np.pi / 3
TILT_RAD = np.pi / 3
MISJUDGED_M = (0.06, 0.09)


class LiftExpert(Expert):
    """Grasp from above, with the hand turned to the cube's other sides, or coming in low from the robot."""

    tasks = ("lift",)
    strategies = ("above", "turned", "low")

    def reset(self, env: RobosuiteEnv, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Start an episode; a misperceived cube is some centimetres beside the true one."""
        self._turn_rad = TURN_RAD if strategy == "turned" else 0.0
        self._tilt_rad = TILT_RAD if strategy == "low" else 0.0
        self._offset_m = misperception * random_offset(rng, *MISJUDGED_M)

    def act(self, env: RobosuiteEnv) -> np.ndarray:
        """Approach, close or raise, by where the cube and the fingers are."""
        name = env.config.lifts or CUBE
        tool, cube, opening_m = env.tool_pose(), env.body_pose(name), env.gripper_width_m()
        yaw_rad = grasp_yaw(yaw_of(cube.rotation_33), CUBE_SYMMETRY_RAD, tool, self._turn_rad)
        grasp = Grasp(
            cube.position_m + self._offset_m, yaw_rad, CUBE_WIDTH_M[name], tilted_approach(yaw_rad, self._tilt_rad)
        )
        if not surrounds(tool, grasp, opening_m):
            return approach(tool, grasp, HOVER_M)
        if not grips(grasp, opening_m):
            return close_on(tool, grasp)
        return servo(tool, tool.position_m + MAX_TRANSLATION_M * UP, yaw_rad, CLOSE)
