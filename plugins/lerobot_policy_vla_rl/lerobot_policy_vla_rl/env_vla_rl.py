"""Every task of vla-rl as an environment of LeRobot's: ``--env.type=vla_rl --env.task=push_t``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from sim.task import TaskConfig, load_task
from vla_rl.types import ACTION, ENVIRONMENT_STATE, IMAGE_PREFIX, STATE

GYM_ID = "lerobot_policy_vla_rl/task-v0"
NAMES = {STATE: "agent_pos", ENVIRONMENT_STATE: "environment_state"}  # as LeRobot's environments call them
RENDER_SIZE = 256


class LeRobotTaskEnv(gym.Env):
    """A task with LeRobot's names: agent_pos, environment_state, pixels by camera (height, width, 3), is_success."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task: str, episode_length: int | None = None, render_mode: str = "rgb_array") -> None:
        """Build the task; ``episode_length`` overrides its own limit."""
        limit = {} if episode_length is None else {"max_episode_steps": episode_length}
        self.config: TaskConfig = load_task(task, **limit)
        self.inner = self.config.make_env()
        self.render_mode = render_mode
        self.task = task
        self.task_description = self.config.instruction
        self._max_episode_steps = self.config.max_episode_steps
        self.metadata = {**self.metadata, "render_fps": int(self.inner.action_spec.control_hz)}
        self.action_space = self.inner.action_space
        spaces: dict[str, Any] = {NAMES[k]: s for k, s in self.inner.observation_space.spaces.items() if k in NAMES}
        pixels = {
            k.removeprefix(IMAGE_PREFIX): s
            for k, s in self.inner.observation_space.spaces.items()
            if k.startswith(IMAGE_PREFIX)
        }
        if pixels:
            spaces["pixels"] = gym.spaces.Dict(
                {k: gym.spaces.Box(0, 255, (*(s.shape or ())[1:], 3), np.uint8) for k, s in pixels.items()}
            )
        self.observation_space = gym.spaces.Dict(spaces)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Place the scene of ``seed``."""
        super().reset(seed=seed)
        observation, info = self.inner.reset(seed=seed, options=options)
        return self._named(observation), {**info, "is_success": bool(info["success"])}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute an action in the units of the task."""
        observation, reward, terminated, truncated, info = self.inner.step(action)
        return self._named(observation), reward, terminated, truncated, {**info, "is_success": bool(info["success"])}

    def _named(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        named: dict[str, Any] = {NAMES[k]: v for k, v in observation.items() if k in NAMES}
        pixels = {k.removeprefix(IMAGE_PREFIX): v for k, v in observation.items() if k.startswith(IMAGE_PREFIX)}
        if pixels:
            named["pixels"] = {k: np.ascontiguousarray(v.transpose(1, 2, 0)) for k, v in pixels.items()}
        return named

    def render(self) -> np.ndarray:
        """A picture of the scene, for people."""
        return self.inner.render_rgb(RENDER_SIZE, RENDER_SIZE)

    def close(self) -> None:
        """Free what the task holds."""
        self.inner.close()


if GYM_ID not in gym.registry:
    gym.register(GYM_ID, entry_point=f"{__name__}:LeRobotTaskEnv", disable_env_checker=True, order_enforce=False)


@EnvConfig.register_subclass("vla_rl")
@dataclass
class VlaRlEnvConfig(EnvConfig):
    """A task of vla-rl.

    task: its name in configs/task
    episode_length: overrides its own limit
    """

    task: str | None = "push_t"
    episode_length: int | None = None
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        env = load_task(str(self.task)).make_env()
        self.fps = int(env.action_spec.control_hz)
        self.features = {ACTION: PolicyFeature(FeatureType.ACTION, (env.action_spec.dim,))}
        self.features_map = {ACTION: ACTION}
        for key, feature in env.observation_spec.items():
            if key in NAMES:
                kind = FeatureType.STATE if key == STATE else FeatureType.ENV
                self.features[NAMES[key]], self.features_map[NAMES[key]] = PolicyFeature(kind, feature.shape), key
            elif key.startswith(IMAGE_PREFIX):
                name = f"pixels/{key.removeprefix(IMAGE_PREFIX)}"
                _, height, width = feature.shape
                self.features[name] = PolicyFeature(FeatureType.VISUAL, (height, width, 3))
                self.features_map[name] = key
        env.close()

    @property
    def gym_id(self) -> str:
        """One id for all tasks; which one is an argument."""
        return GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment."""
        return {"task": self.task, "episode_length": self.episode_length}
