"""A scripted expert as a base policy: it looks at the environments themselves, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import numpy as np

from sim.experts.base import ExpertConfig, HumanLike, load_expert
from sim.task import TaskConfig
from vla_rl.inference.base_policy import BaseSpec
from vla_rl.runtime.seeding import numpy_generator
from vla_rl.types import Observation


class ExpertBase:
    """Chunks of a single action, decided from the state of each environment; a ``BasePolicy``.

    The environments have to be in this process, and an episode has to have begun when it is asked.
    """

    def __init__(
        self, task: TaskConfig, envs: Sequence[gym.Env], spec: BaseSpec, config: ExpertConfig, seed: int
    ) -> None:
        self.spec = spec
        self._envs, self._seed = envs, seed
        self._experts = [HumanLike(load_expert(task), config) for _ in envs]

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``."""
        for env_id, scene_seed in zip(env_ids, scene_seeds, strict=True):
            rng = numpy_generator(self._seed, "expert", scene_seed)
            self._experts[env_id].reset(self._envs[env_id], rng)  # type: ignore[arg-type]

    def chunk(self, observation: Observation, env_ids: Sequence[int]) -> np.ndarray:
        """See ``BasePolicy``."""
        return np.stack([self._experts[i].act(self._envs[i])[0][None] for i in env_ids])  # type: ignore[arg-type]
