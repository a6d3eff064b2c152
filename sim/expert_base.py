"""A scripted expert as a base policy, or in the place of a human who takes over: it looks at the environments themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gymnasium as gym
import numpy as np

from sim.experts.base import ExpertConfig, HumanLike, load_expert
from sim.task import TaskConfig
from vla_rl.data.steps import StepContext
from vla_rl.inference.base_policy import BaseSpec, Leftover
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

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``."""
        return np.stack([self._experts[i].act(self._envs[i])[0][None] for i in env_ids])  # type: ignore[arg-type]


class ExpertTeacher:
    """An expert that now and then takes over for some steps: a ``Teacher``."""

    def __init__(
        self, task: TaskConfig, envs: Sequence[gym.Env], config: ExpertConfig, chance: float, hold_steps: int, seed: int
    ) -> None:
        """Set up.

        Args:
            task: its task.
            envs: what it looks at, one per slot.
            config: its knobs.
            chance: per step, that it takes over.
            hold_steps: how long it does.
            seed: of when, and of its own flaws.
        """
        self._envs, self._chance, self._hold_steps, self._seed = envs, chance, hold_steps, seed
        self._experts = [HumanLike(load_expert(task), config) for _ in envs]
        self._rng = [numpy_generator(seed, "unused") for _ in envs]
        self._left = [0] * len(envs)

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Teacher``."""
        self._rng[slot] = numpy_generator(self._seed, "teacher", scene_seed)
        self._left[slot] = 0
        self._experts[slot].reset(self._envs[slot], self._rng[slot])  # type: ignore[arg-type]

    def watch(self, step: StepContext, slots: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Teacher``."""
        actions, holds = [], []
        for slot in slots:
            actions.append(self._experts[slot].act(self._envs[slot])[0])  # type: ignore[arg-type]
            if not self._left[slot] and self._rng[slot].random() < self._chance:
                self._left[slot] = self._hold_steps
            holds.append(self._left[slot] > 0)
            self._left[slot] = max(self._left[slot] - 1, 0)
        return np.stack(actions), np.array(holds)
