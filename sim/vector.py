"""Tasks behind Gymnasium's vector API: batch first, seeded, without surprise resets.

Autoreset is disabled by default: the observation that comes with ``terminated`` or ``truncated`` is the true final one,
and the caller resets the finished slots with ``reset(seed=[...], options={"reset_mask": mask})``.
"""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from sim.task import TaskConfig, TaskEnv
from sim.workers import enter_worker
from vla_rl.types import ActionSpec, ObservationSpec


def _make(config: TaskConfig) -> TaskEnv:
    enter_worker()
    return config.make_env()


class TaskVectorEnv(gym.vector.VectorWrapper):
    """A ``gymnasium.vector.VectorEnv`` of one task that also knows the task, its action spec and its observation spec."""

    def __init__(self, env: gym.vector.VectorEnv, task: TaskConfig) -> None:
        super().__init__(env)
        self.task = task
        self.action_spec: ActionSpec = env.get_attr("action_spec")[0]  # type: ignore[attr-defined]
        self.observation_spec: ObservationSpec = env.get_attr("observation_spec")[0]  # type: ignore[attr-defined]

    def render_rgb(self, width: int, height: int) -> tuple[np.ndarray, ...]:
        """Render every environment: a (height, width, 3) uint8 frame each."""
        return self.env.call("render_rgb", width, height)  # type: ignore[attr-defined]


def make_vector_env(
    task: TaskConfig,
    num_envs: int,
    *,
    processes: bool | None = None,
    autoreset_mode: AutoresetMode = AutoresetMode.DISABLED,
) -> TaskVectorEnv:
    """Build ``num_envs`` environments of a task.

    Args:
        task: the task.
        num_envs: size of the batch.
        processes: one process per environment (spawned), or all in this one. None: as the task says.
        autoreset_mode: Gymnasium's; with SAME_STEP the true final observation is ``info["final_obs"]``.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs wants at least 1, got {num_envs}")
    makers = [functools.partial(_make, task) for _ in range(num_envs)]
    if processes is None:
        processes = num_envs > 1 and task.own_process
    env: Any
    if processes:
        env = AsyncVectorEnv(makers, context="spawn", autoreset_mode=autoreset_mode)
    else:
        env = SyncVectorEnv(makers, autoreset_mode=autoreset_mode)
    return TaskVectorEnv(env, task)


def default_num_envs(task: TaskConfig) -> int:
    """Environments per evaluation: 4 processes for robosuite, a batch of 16 in this process otherwise.

    Not the number of cores: the batch a policy is called with decides the last bits of its actions, and the same seed is to give
    the same numbers on every machine.
    """
    return 4 if task.own_process else 16
