"""A task's environment inside another one that adds to it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from sim.task import Outcome, TaskEnv
from vla_rl.types import ObservationSpec


class TaskWrapper(TaskEnv):
    """``inner`` with something changed; all that is not said by the wrapper is ``inner``'s, its own methods and attributes too.

    Attributes:
        inner: the environment inside.
    """

    def __init__(self, inner: TaskEnv) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: this object is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Control steps since the reset."""
        return self.inner.steps

    @property
    def observation_spec(self) -> ObservationSpec:
        """That of the inner environment."""
        return self.inner.observation_spec

    @property
    def unwrapped(self) -> gym.Env:
        """The environment inside, as with Gymnasium's wrappers."""
        return self.inner.unwrapped

    def checked_action(self, action_A: np.ndarray) -> np.ndarray:
        """Check an action as the inner environment does."""
        return self.inner.checked_action(action_A)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reset the inner environment."""
        return self.inner.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> Outcome:
        """Step the inner environment."""
        return self.inner.step(action)

    def render_rgb(self, width: int, height: int) -> np.ndarray:
        """Render the scene as it is now: (height, width, 3) uint8."""
        return self.inner.render_rgb(width, height)

    def render(self) -> Any:
        """Gymnasium's own rendering of the inner environment."""
        return self.inner.render()

    def close(self) -> None:
        """Close the inner environment."""
        self.inner.close()
