"""Off-screen RGB frames of a MuJoCo scene, cheap enough for a CPU: no shadows, no reflections."""

from __future__ import annotations

import mujoco
import numpy as np


class OffscreenRenderer:
    """Render one model at one size. Owns an OpenGL context: close it, and use it in the process that made it."""

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        self.size = (width, height)
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        self._renderer = mujoco.Renderer(model, height, width)
        self._option = mujoco.MjvOption()
        if (model.geom_group == 1).any():
            self._option.geomgroup[0] = 0  # robosuite: group 0 is for collisions, group 1 for the eye
        self._option.sitegroup[:] = 0

    def render(self, data: mujoco.MjData, camera: str | int) -> np.ndarray:
        """Return (height, width, 3) uint8."""
        self._renderer.update_scene(data, camera, self._option)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return self._renderer.render().copy()

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()
