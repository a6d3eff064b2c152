"""An environment whose observations hold pictures of cameras and point clouds, around any MuJoCo task's environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from sim.mujoco_env import MujocoEnv
from sim.sensors import Sensors
from sim.task import Outcome, TaskEnv
from sim.wrappers import TaskWrapper
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import numpy_generator
from vla_rl.types import ENVIRONMENT_STATE, IMAGE_PREFIX, POINTS, FeatureSpec, ObservationSpec


class SensedEnv(TaskWrapper):
    """``inner`` with its sensors. Draw in one thread only: pictures want the OpenGL context of the thread that drew the first."""

    inner: MujocoEnv

    def __init__(self, inner: TaskEnv, sensors: Sensors) -> None:
        """Wrap ``inner``.

        Raises:
            UserError: the task has no MuJoCo model, or its model lacks a camera; the message lists those that it has.
        """
        super().__init__(inner)
        name, model = inner.config.name, getattr(inner, "model", None)
        wanted = (*sensors.cameras, *(sensors.points.cameras if sensors.points else ()))
        if wanted and model is None:
            raise UserError(f"task {name!r} has no MuJoCo model, so that cameras and points cannot look at it")
        there = [model.camera(i).name for i in range(model.ncam)] if model is not None else []
        for camera in wanted:
            if camera not in there:
                raise UserError(f"task {name!r} has no camera named {camera!r}; there are {', '.join(there)}")
        self.sensors = sensors
        self._rays = np.random.default_rng(0)
        spaces = {k: v for k, v in inner.observation_space.spaces.items() if self._kept(k)}
        picture = gym.spaces.Box(0, 255, (3, sensors.height, sensors.width), np.uint8)
        spaces |= {IMAGE_PREFIX + camera: picture for camera in sensors.cameras}
        if sensors.points is not None:
            spaces[POINTS] = gym.spaces.Box(-np.inf, np.inf, (sensors.points.points, 3), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)

    def _kept(self, key: str) -> bool:
        return self.sensors.environment_state or key != ENVIRONMENT_STATE

    @property
    def observation_spec(self) -> ObservationSpec:
        """That of the inner environment, and the sensors'."""
        spaces = self.observation_space.spaces
        known = self.inner.observation_spec
        return {k: known.get(k) or FeatureSpec(tuple(space.shape or ())) for k, space in spaces.items()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reset the inner environment; which rays are cast in the episode follows from the seed."""
        gym.Env.reset(self, seed=seed)
        observation, info = self.inner.reset(seed=seed, options=options)
        if self.sensors.points is not None:
            self._rays = numpy_generator(int(self.np_random.integers(2**31)) if seed is None else seed, "rays")
        return self._sensed(observation), info

    def step(self, action: np.ndarray) -> Outcome:
        """Step the inner environment."""
        observation, *outcome = self.inner.step(action)
        return (self._sensed(observation), *outcome)  # type: ignore[return-value]

    def _sensed(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sensors = self.sensors
        seen = {k: v for k, v in observation.items() if self._kept(k)}
        for camera in sensors.cameras:
            picture = self.inner.image(camera, sensors.width, sensors.height)
            seen[IMAGE_PREFIX + camera] = np.ascontiguousarray(picture.transpose(2, 0, 1))
        if sensors.points is not None:
            seen[POINTS] = self.inner.point_cloud(sensors.points, self._rays)[:, :3].copy()
        return seen
