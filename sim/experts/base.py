"""Scripted demonstrators, and the knobs that make their data human-like.

An expert is a feedback law on privileged state: it looks at where things are now, not at a clock, so that after a
mistake it recovers by itself. ``HumanLike`` wraps any expert with correlated action noise, pauses, mistakes and
failures; the action that is executed is the one that is recorded.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sim.task import TaskConfig, TaskEnv
from vla_rl.runtime.errors import UserError


class Expert(ABC):
    """A demonstrator of one or several tasks.

    Subclasses list the names of their tasks in ``tasks`` and of their ways to do it in ``strategies`` (the first one is the
    cleanest). They keep no clock: ``act`` decides from the state of ``env`` and from what it was reset with.
    """

    tasks: ClassVar[tuple[str, ...]]
    strategies: ClassVar[tuple[str, ...]] = ("default",)

    @abstractmethod
    def reset(self, env: Any, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Start an episode.

        Args:
            env: the task's environment, freshly reset.
            strategy: one of ``strategies``.
            rng: all randomness of the expert in this episode.
            misperception: 0 sees the scene as it is; 1 misjudges where the goal is so badly that the episode fails.
        """

    @abstractmethod
    def act(self, env: Any) -> np.ndarray:
        """Return the next action (A,) in the units of the env's action spec."""


@dataclass(frozen=True)
class ExpertConfig:
    """Knobs of the demonstrations. The default is the clean expert.

    strategies: how many of the expert's strategies are mixed (0: all of them)
    action_noise: standard deviation of correlated noise on the action, as a share of half the action range
    noise_correlation: correlation of that noise from one step to the next
    pause_probability: chance per step to begin a pause of up to half a second
    mistake_probability: chance per step to begin a wrong movement of up to half a second, followed by recovery
    failure_share: share of episodes in which the expert misjudges the scene and fails
    """

    strategies: int = 1
    action_noise: float = 0.0
    noise_correlation: float = 0.8
    pause_probability: float = 0.0
    mistake_probability: float = 0.0
    failure_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pause_probability", "mistake_probability", "failure_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} wants a number in [0, 1], got {getattr(self, name)}")
        if not 0.0 <= self.noise_correlation < 1.0:
            raise ValueError(f"noise_correlation wants a number in [0, 1), got {self.noise_correlation}")
        if self.action_noise < 0:
            raise ValueError(f"action_noise wants a number >= 0, got {self.action_noise}")
        if self.strategies < 0:
            raise ValueError(f"strategies wants a number >= 0 (0: all), got {self.strategies}")


class HumanLike:
    """An expert with human flaws. Everything is determined by the generator given to ``reset``."""

    longest_lapse_s = 0.5

    def __init__(self, expert: Expert, config: ExpertConfig) -> None:
        self.expert = expert
        self.config = config
        self.strategy = expert.strategies[0]
        self.fails = False

    def reset(self, env: TaskEnv, rng: np.random.Generator) -> None:
        """Draw strategy and flaws of an episode."""
        names = self.expert.strategies
        pool = names[: self.config.strategies] if self.config.strategies else names
        self._rng = rng
        self.strategy = str(pool[rng.integers(len(pool))])
        self.fails = bool(rng.random() < self.config.failure_share)
        self._noise_A = np.zeros(env.action_spec.dim)
        self._begun = False
        self._pause_left = 0
        self._mistake_left = 0
        self._last_A = np.zeros(env.action_spec.dim)
        self._mistake_A = np.zeros(env.action_spec.dim)
        self.expert.reset(env, self.strategy, rng, 1.0 if self.fails else 0.0)

    def act(self, env: TaskEnv) -> tuple[np.ndarray, np.ndarray]:
        """Return the action to execute and the one the flawless expert wanted, both (A,) in the spec's units."""
        spec, config, rng = env.action_spec, self.config, self._rng
        half_A = self._roughness(spec.mode) * (spec.high_array() - spec.low_array()) / 2
        wanted_A = np.asarray(self.expert.act(env), dtype=np.float64)
        lapse_steps = max(int(self.longest_lapse_s * spec.control_hz), 2)
        if self._begun and self._pause_left == 0 and self._mistake_left == 0:
            if rng.random() < config.pause_probability:
                self._pause_left = int(rng.integers(2, lapse_steps + 1))
            elif rng.random() < config.mistake_probability:
                self._mistake_left = int(rng.integers(2, lapse_steps + 1))
                self._mistake_A = rng.uniform(-1.0, 1.0, spec.dim) * half_A
        innovation = np.sqrt(1 - config.noise_correlation**2) * config.action_noise
        self._noise_A = config.noise_correlation * self._noise_A + innovation * rng.standard_normal(spec.dim)
        if self._pause_left:
            self._pause_left -= 1
            executed_A = self._hold(env)
        else:
            if self._mistake_left:
                self._mistake_left -= 1
                aim_A = self._hold(env) + self._mistake_A if spec.mode == "absolute" else self._mistake_A
            else:
                aim_A = wanted_A
            executed_A = aim_A + self._noise_A * half_A
        self._begun = True  # a lapse holds the last action, so there has to be one
        self._last_A = spec.clip(executed_A)
        return self._last_A, spec.clip(wanted_A)

    def _hold(self, env: TaskEnv) -> np.ndarray:
        """The action that keeps still: no movement for deltas (the gripper keeps its command), the last target for positions."""
        if env.action_spec.mode == "absolute":
            return self._last_A.astype(np.float64)
        keep = np.array([name == "gripper" for name in env.action_spec.names])
        return np.where(keep, self._last_A, 0.0)

    @staticmethod
    def _roughness(mode: str) -> float:
        """Half the range of an absolute target is half the workspace; a tenth is as rough as half the range of a delta."""
        return 0.1 if mode == "absolute" else 1.0


def load_expert(task: TaskConfig) -> Expert:
    """Return the expert of a task, found among the modules of this package by the task's name or type.

    Raises:
        UserError: no expert knows the task.
    """
    import sim.experts

    known, wanted = [], task.expert or task.name
    for module in pkgutil.iter_modules(sim.experts.__path__):
        for value in vars(importlib.import_module(f"sim.experts.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Expert) and "tasks" in vars(value):
                known += list(value.tasks)
                if wanted in value.tasks or f"{wanted.partition(':')[0]}:*" in value.tasks:
                    return value()
    raise UserError(f"no expert for task {wanted!r}; there are experts for {', '.join(sorted(set(known)))}")
