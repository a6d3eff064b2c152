"""What several commands share: options common to all, and tasks turned into arenas."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sim.randomization import Randomization
from sim.task import TaskConfig, load_task
from sim.vector import default_num_envs, make_vector_env
from vla_rl.evaluate import Arena
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Options of every command.

    json: file for the numbers
    """

    json: Path | None = None


@dataclass(frozen=True)
class Simulation:
    """How a task is simulated; what is not set is as the task's file says.

    physics: exact, or fast for training only (robosuite tasks)
    stepping: compiled, or robosuite for its own step (robosuite tasks)
    randomization: how model, sensing and actuation vary from episode to episode
    """

    physics: Literal["exact", "fast"] | None = None
    stepping: Literal["compiled", "robosuite"] | None = None
    randomization: Randomization = field(default_factory=Randomization)


def open_task(name: str, simulation: Simulation, max_episode_steps: int | None = None) -> TaskConfig:
    """Read a task, with a run's own settings laid over it."""
    overrides: dict[str, Any] = {
        "max_episode_steps": max_episode_steps,
        "physics": simulation.physics,
        "stepping": simulation.stepping,
        "randomization": encode(simulation.randomization) if simulation.randomization.enabled else None,
    }
    return load_task(name, **{k: v for k, v in overrides.items() if v is not None})


def open_arena(task: TaskConfig, num_envs: int) -> Arena:
    """Build the vector environment in which policies are judged (0 environments: as many as suit the task).

    Raises:
        UserError: its physics are not exact, or the number is negative.
    """
    if num_envs < 0:
        raise UserError(f"num_envs wants a number >= 0 (0: as many as suit the task), got {num_envs}")
    if not task.exact_physics:
        raise UserError(f"policies are judged in exact physics, got physics 'fast' for task {task.name!r}")
    env = make_vector_env(task, num_envs or default_num_envs(task))
    return Arena(env, env.action_spec, env.observation_spec, task.name, task.instruction, encode(task))
