"""What tasks in MuJoCo share: pictures and point clouds of the scene, and a check of the physics."""

from __future__ import annotations

import mujoco
import numpy as np

from sim.point_cloud import PointCloud, RayCaster
from sim.rendering import Look, OffscreenRenderer
from sim.stepping import BAD_NUMBERS, is_healthy
from sim.task import SimulationDivergedError, TaskEnv


class MujocoEnv(TaskEnv):
    """An environment with a MuJoCo model. Pictures are drawn in the thread that asks first, and only there.

    Attributes:
        model: the compiled model.
        data: the state.
        camera: name of the camera of ``render_rgb``.
    """

    model: mujoco.MjModel
    data: mujoco.MjData
    camera: str

    def __init__(self) -> None:
        self._renderers: dict[tuple[int, int, Look], OffscreenRenderer] = {}
        self._casters: dict[PointCloud, RayCaster] = {}

    def require_healthy(self) -> None:
        """Raise SimulationDivergedError where MuJoCo has met bad numbers (it resets its state then) or positions are not finite."""
        counters = self.data.warning.number
        if not is_healthy(counters, self.data.qpos):
            bad = [mujoco.mjtWarning(w).name for w in BAD_NUMBERS if counters[w]] or ["positions that are not finite"]
            raise SimulationDivergedError(
                f"task {self.config.name!r}, step {self.steps}: the simulation diverged ({', '.join(bad)})"
            )

    def _renderer(self, width: int, height: int, look: Look) -> OffscreenRenderer:
        key = width, height, look
        if key not in self._renderers:
            self._renderers[key] = OffscreenRenderer(self.model, width, height, look)
        return self._renderers[key]

    def image(self, camera: str, width: int, height: int, look: Look = "light") -> np.ndarray:
        """What a camera sees: (height, width, 3) uint8.

        Raises:
            ValueError: there is no such camera.
            MissingOpenGLError: there is no way to draw off-screen on this machine.
        """
        return self._renderer(width, height, look).rgb(self.data, camera)

    def depth(self, camera: str, width: int, height: int, look: Look = "light") -> np.ndarray:
        """Distance along a camera's axis: (height, width) float32, m. Raises as ``image`` does."""
        return self._renderer(width, height, look).depth(self.data, camera)

    def point_cloud(self, config: PointCloud, generator: np.random.Generator) -> np.ndarray:
        """Points that rays from cameras meet: (points, 4) float32, position in the world (m) and label; needs no OpenGL.

        Args:
            config: cameras, number of points, workspace, noise.
            generator: of the choice of rays and of the noise.
        """
        if config not in self._casters:
            self._casters[config] = RayCaster(self.model, config)
        return self._casters[config].cast(self.data, generator)

    def render_rgb(self, width: int, height: int) -> np.ndarray:
        """Draw the task's camera in the full look, for people: (height, width, 3) uint8."""
        return self.image(self.camera, width, height, "full")

    def close(self) -> None:
        """Free the OpenGL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
