"""Any Gymnasium environment with a continuous action space as a task: ``gym:<id>``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from sim.task import Outcome, TaskConfig, TaskEnv
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE, ActionSpec

DEFAULT_STEPS = 1000
DEFAULT_HZ = 20.0


@TaskConfig.register_subclass("gym")
@dataclass(frozen=True)
class GymTask(TaskConfig):
    """A Gymnasium environment.

    env_id: Gymnasium's id
    success_return: an episode whose return reaches this is a success too (none: the registered reward threshold)
    """

    env_id: str = "Pendulum-v1"
    instruction: str = ""
    max_episode_steps: int = 0
    success_return: float | None = None

    def __post_init__(self) -> None:
        """Take what is not given from Gymnasium's registry."""
        try:
            registered = gym.spec(self.env_id)
        except (gym.error.Error, ImportError) as error:
            raise UserError(f"no Gymnasium environment {self.env_id!r}: {error}") from error
        if not self.max_episode_steps:
            object.__setattr__(self, "max_episode_steps", registered.max_episode_steps or DEFAULT_STEPS)
        if self.success_return is None:
            object.__setattr__(self, "success_return", registered.reward_threshold)
        super().__post_init__()

    def build_env(self) -> GymEnv:
        """Build the environment."""
        return GymEnv(self)


class GymEnv(TaskEnv):
    """A registered Gymnasium environment behind ``TaskEnv``; its own rewards, its own termination."""

    def __init__(self, config: GymTask) -> None:
        self.config: GymTask = config
        try:
            self.env = gym.make(config.env_id, render_mode="rgb_array", max_episode_steps=config.max_episode_steps)
        except (gym.error.Error, ImportError) as error:
            raise UserError(f"no Gymnasium environment {config.env_id!r}: {error}") from error
        space = self.env.action_space
        if not isinstance(space, gym.spaces.Box) or not np.isfinite([space.low, space.high]).all():
            raise UserError(f"task gym:{config.env_id} wants a continuous, bounded action space, got {space}")
        self._action_shape = space.shape
        rate_hz = self.env.metadata.get("render_fps") or DEFAULT_HZ
        size = int(np.prod(space.shape))
        self.action_spec = ActionSpec(
            names=tuple(f"action_{i}" for i in range(size)),
            units=("1",) * size,
            low=tuple(float(v) for v in space.low.reshape(-1)),
            high=tuple(float(v) for v in space.high.reshape(-1)),
            mode="absolute",
            control_hz=float(rate_hz),
        )
        self.action_space = self.box(self.action_spec)
        flat = gym.spaces.flatten_space(self.env.observation_space)
        if not isinstance(flat, gym.spaces.Box):
            raise UserError(
                f"task gym:{config.env_id} wants observations that flatten to numbers, got {self.env.observation_space}"
            )
        self.observation_space = gym.spaces.Dict({STATE: gym.spaces.Box(-np.inf, np.inf, flat.shape, np.float32)})
        self._return = 0.0

    def _features(self, observation: Any) -> dict[str, np.ndarray]:
        return {STATE: np.asarray(gym.spaces.flatten(self.env.observation_space, observation), dtype=np.float32)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reset to the scene of ``seed``."""
        observation, _ = self.env.reset(seed=seed)
        self._return = 0.0
        self.steps = 0
        return self._features(observation), {"success": False}

    def step(self, action: np.ndarray) -> Outcome:
        """Execute one action in the environment's own units."""
        action_A = self.checked_action(action).reshape(self._action_shape)
        observation, reward, terminated, truncated, info = self.env.step(action_A)
        self._return += float(reward)
        self.steps += 1
        success = bool(info.get("success", info.get("is_success", False)))
        threshold = self.config.success_return
        if threshold is not None and (terminated or truncated):
            success = success or self._return >= threshold
        return (
            self._features(observation),
            float(reward),
            bool(terminated),
            bool(truncated and not terminated),
            {"success": success},
        )

    def render_rgb(self, width: int, height: int) -> np.ndarray:
        """Render at the environment's own size, then scale."""
        import cv2

        try:
            frame = self.env.render()
        except gym.error.Error as error:
            raise UserError(f"task gym:{self.config.env_id} cannot be rendered here: {error}") from error
        return cv2.resize(np.asarray(frame), (width, height), interpolation=cv2.INTER_AREA)

    def close(self) -> None:
        """Close the wrapped environment."""
        self.env.close()
