"""What a task is: a frozen config that builds a seeded Gymnasium environment with a success signal.

A task is one file in ``sim/tasks/`` (a ``TaskConfig`` subclass and its environment) and one YAML file in
``configs/task/``. Both are found by name; there is no list to edit.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import draccus
import gymnasium as gym
import numpy as np

from sim.randomization import Randomization
from sim.sensors import Sensors
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import numpy_generator
from vla_rl.types import ActionSpec, FeatureSpec, ObservationSpec

# where the environments of a batch are stepped: one after the other, each by a thread, or each in a process of its own
Placement = Literal["inline", "threads", "processes"]
# observation, reward, terminated, truncated, info
Outcome = tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]


class InvalidActionError(UserError):
    """An action has a wrong shape or is not finite; no environment has moved."""


class SimulationDivergedError(RuntimeError):
    """The physics of an episode broke down; what it returned before stands, the episode cannot go on."""


class ModelMismatchError(UserError):
    """A simulation model lacks a body, joint or site that the task is made of."""


@dataclass(frozen=True)
class TaskConfig(draccus.ChoiceRegistry):
    """Base of all task configs.

    name: how the task is called on the command line and in data sets
    instruction: the task in words, stored with every episode
    max_episode_steps: control steps after which an episode is truncated
    randomization: how the model, sensing and actuation vary from episode to episode; off by default
    sensors: cameras and point clouds that are observed; by default what the task itself observes
    expert: name of the task whose expert demonstrates this one (empty: its own)
    wordings: other ways to say the instruction; each demonstration is told in one of them or in the instruction itself
    unseen_wordings: ways to say it that no demonstration is told in, to try a policy's understanding
    """

    name: str
    instruction: str
    max_episode_steps: int
    randomization: Randomization = field(default_factory=Randomization)
    sensors: Sensors = field(default_factory=Sensors)
    expert: str = ""
    wordings: tuple[str, ...] = ()
    unseen_wordings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps of task {self.name!r} wants at least 1, got {self.max_episode_steps}")
        told = set(self.unseen_wordings) & {self.instruction, *self.wordings}
        if told or not all(w.strip() for w in (*self.wordings, *self.unseen_wordings)):
            raise ValueError(
                f"wordings of task {self.name!r} want words, and unseen_wordings others than demonstrations are told in, got {sorted(told)}"
            )

    def wording(self, scene_seed: int) -> str:
        """In which words the demonstration of a scene is told."""
        said = (self.instruction, *self.wordings)
        return said[numpy_generator(scene_seed, "wording").integers(len(said))] if self.wordings else self.instruction

    @property
    def placement(self) -> Placement:
        """Where a batch is stepped when the caller does not say; a step of more than a millisecond is worth a thread."""
        return "inline"

    @property
    def batch(self) -> int:
        """Environments of an evaluation.

        Not the number of cores: the batch a policy is called with decides the last bits of its actions, and the same seed is to give
        the same numbers on every machine.
        """
        return 16

    @property
    def exact_physics(self) -> bool:
        """Whether policies may be judged in it."""
        return True

    def make_env(self) -> TaskEnv:
        """Build the environment with its sensors, varied as ``randomization`` says."""
        env = self.build_env()
        if self.sensors.enabled:
            from sim.sensed_env import SensedEnv  # which is a TaskEnv itself

            env = SensedEnv(env, self.sensors)
        if not self.randomization.enabled:
            return env
        from sim.randomized_env import RandomizedEnv  # which is a TaskEnv itself

        return RandomizedEnv(env, self.randomization)

    def build_env(self) -> TaskEnv:
        """Build the nominal environment; costs seconds for robosuite."""
        raise TypeError(f"{type(self).__name__} builds no environment")


class TaskEnv(gym.Env[dict[str, np.ndarray], np.ndarray], ABC):
    """A single environment of a task: Gymnasium's five-tuple ``step``, a dict of float32 features as observation.

    ``reset(seed=s)`` determines the scene wholly: the same seed and the same actions give the same episode,
    whatever ran before and on every machine. ``step`` takes an action in the units of ``action_spec``. Every
    ``info`` has ``success``; an episode that succeeds is terminated, one that runs out of steps is truncated.
    Autoreset is not the environment's business, so the last observation is always the true final one.
    """

    metadata = {"render_modes": ["rgb_array"]}
    config: TaskConfig
    steps = 0  # since the reset
    action_spec: ActionSpec
    action_space: gym.spaces.Box
    observation_space: gym.spaces.Dict  # type: ignore[assignment]

    @property
    def observation_spec(self) -> ObservationSpec:
        """Shape of each feature of an observation."""
        return {k: FeatureSpec(tuple(s.shape or ())) for k, s in self.observation_space.spaces.items()}

    @abstractmethod
    def step(self, action: np.ndarray) -> Outcome:
        """Execute one action; raises InvalidActionError and SimulationDivergedError."""

    @abstractmethod
    def render_rgb(self, width: int, height: int) -> np.ndarray:
        """Render the scene as it is now: (height, width, 3) uint8."""

    def checked_action(self, action_A: np.ndarray) -> np.ndarray:
        """Return the action within its limits.

        Raises:
            InvalidActionError: its shape is wrong, or a number is not finite.
        """
        action_A = np.asarray(action_A, dtype=np.float32)
        if action_A.shape != (self.action_spec.dim,):
            raise InvalidActionError(
                f"task {self.config.name!r}, step {self.steps + 1}: an action has shape {(self.action_spec.dim,)}, got {action_A.shape}"
            )
        if not np.isfinite(action_A).all():
            raise InvalidActionError(
                f"task {self.config.name!r}, step {self.steps + 1}: an action must be finite, got {action_A.tolist()}"
            )
        return self.action_spec.clip(action_A)

    @staticmethod
    def box(spec: ActionSpec) -> gym.spaces.Box:
        """The Gymnasium space of an action spec."""
        return gym.spaces.Box(spec.low_array(), spec.high_array(), dtype=np.float32)


def discover_tasks() -> None:
    """Import every module of ``sim.tasks`` so that its task types are registered."""
    import sim.tasks

    for module in pkgutil.iter_modules(sim.tasks.__path__):
        importlib.import_module(f"sim.tasks.{module.name}")


def load_task(name: str, **overrides: Any) -> TaskConfig:
    """Read the task ``name`` from ``configs/task/NAME.yaml``, or make one of ``gym:<id>``.

    Raises:
        UserError: there is no such task, or an override does not fit.
    """
    from vla_rl.runtime.config import decode, load_named

    discover_tasks()
    if name.startswith("gym:"):
        return decode(TaskConfig, {"type": "gym", "name": name, "env_id": name.removeprefix("gym:"), **overrides})
    return decode(TaskConfig, {**load_named("task", name), "name": name, **overrides})
