"""What several commands share: options common to all, and tasks turned into arenas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sim.task import TaskConfig, load_task
from sim.vector import default_num_envs, make_vector_env
from vla_rl.evaluate import Arena


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Options of every command.

    json: file for the numbers
    """

    json: Path | None = None


def open_arena(task_name: str, num_envs: int, max_episode_steps: int | None = None) -> Arena:
    """Build the vector environment of a task by name (0 environments: as many as suit the machine)."""
    task: TaskConfig = load_task(
        task_name, **({} if max_episode_steps is None else {"max_episode_steps": max_episode_steps})
    )
    env = make_vector_env(task, num_envs or default_num_envs(task))
    return Arena(env, env.action_spec, env.observation_spec, task.name, task.instruction)
