"""Tasks behind Gymnasium's vector API: batch first, seeded, without surprise resets.

Autoreset is disabled by default: the observation that comes with ``terminated`` or ``truncated`` is the true final one,
and the caller resets the finished slots with ``reset(seed=[...], options={"reset_mask": mask})``. A slot whose simulation diverges
is truncated, with its last good observation and the reason in ``info["diverged"]``; the others go on.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from sim.task import InvalidActionError, Outcome, Placement, SimulationDivergedError, TaskConfig, TaskEnv
from sim.workers import enter_worker
from sim.wrappers import TaskWrapper
from vla_rl.types import ActionSpec, ObservationSpec


class Slot(TaskWrapper):
    """One environment of a batch: its divergence ends its episode instead of the batch, and its step may run in a thread."""

    def __init__(self, inner: TaskEnv) -> None:
        super().__init__(inner)
        self._last: dict[str, np.ndarray] = {}
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reset the environment."""
        self._last, info = self.inner.reset(seed=seed, options=options)
        return self._last, info

    def begin(self, action: np.ndarray) -> None:
        """Do the step whose outcome the next call of ``step`` returns."""
        self._outcome = self._step(action)

    def step(self, action: np.ndarray) -> Outcome:
        """Return the outcome of what was begun, or step now."""
        outcome, self._outcome = self._outcome, None
        return self._step(action) if outcome is None else outcome

    def _step(self, action: np.ndarray) -> Outcome:
        try:
            outcome = self.inner.step(action)
        except SimulationDivergedError as error:
            return self._last, 0.0, False, True, {"success": False, "diverged": str(error)}
        self._last = outcome[0]
        return outcome


def _begin_all(waiting: Iterator[tuple[Slot, np.ndarray]]) -> None:
    for env, action in waiting:
        env.begin(action)


def _make(config: TaskConfig) -> Slot:
    enter_worker()
    return Slot(config.make_env())


class ThreadVectorEnv(SyncVectorEnv):
    """Gymnasium's vector environment in one process whose steps run side by side in threads, as far as they hold no GIL."""

    def __init__(self, makers: list[functools.partial[Slot]], autoreset_mode: AutoresetMode, threads: int) -> None:
        super().__init__(makers, autoreset_mode=autoreset_mode)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="simulation")

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments; those that are about to reset themselves wait for Gymnasium to do it."""
        resetting = (
            self._autoreset_envs if self.autoreset_mode is AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, bool)
        )
        slots = zip(self.envs, actions, resetting, strict=True)
        waiting = iter([(env, action) for env, action, resets in slots if not resets])  # shared by the threads
        for work in [self._pool.submit(_begin_all, waiting) for _ in range(self._threads)]:  # type: ignore[arg-type]
            work.result()
        return super().step(actions)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments and their threads."""
        self._pool.shutdown()
        super().close_extras(**kwargs)


class TaskVectorEnv(gym.vector.VectorWrapper):
    """A ``gymnasium.vector.VectorEnv`` of one task that also knows the task, its action spec and its observation spec."""

    def __init__(self, env: gym.vector.VectorEnv, task: TaskConfig) -> None:
        super().__init__(env)
        self.task = task
        self.action_spec: ActionSpec = env.get_attr("action_spec")[0]  # type: ignore[attr-defined]
        self.observation_spec: ObservationSpec = env.get_attr("observation_spec")[0]  # type: ignore[attr-defined]

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all slots.

        Raises:
            InvalidActionError: an action has a wrong shape or is not finite; it names the slot and the step, and no slot has moved.
        """
        shape = self.num_envs, self.action_spec.dim
        if np.shape(actions) != shape:
            raise InvalidActionError(
                f"task {self.task.name!r}: the actions of {shape[0]} environments have shape {shape}, got {np.shape(actions)}"
            )
        for slot in np.flatnonzero(~np.isfinite(actions).all(axis=1)):
            raise InvalidActionError(
                f"task {self.task.name!r}, environment {slot}, step {self.env.get_attr('steps')[slot] + 1}: "  # type: ignore[attr-defined]
                f"an action must be finite, got {np.asarray(actions)[slot].tolist()}"
            )
        return self.env.step(actions)

    def render_rgb(self, width: int, height: int) -> tuple[np.ndarray, ...]:
        """Render every environment: a (height, width, 3) uint8 frame each."""
        return self.env.call("render_rgb", width, height)  # type: ignore[attr-defined]


def make_vector_env(
    task: TaskConfig,
    num_envs: int,
    *,
    placement: Placement | None = None,
    threads: int = 0,
    autoreset_mode: AutoresetMode = AutoresetMode.DISABLED,
) -> TaskVectorEnv:
    """Build ``num_envs`` environments of a task.

    Args:
        task: the task.
        num_envs: size of the batch.
        placement: all in this thread, each step in a thread, or one (spawned) process per environment. None: as the task says.
        threads: of placement threads; 0 for one per core.
        autoreset_mode: Gymnasium's; with SAME_STEP the true final observation is ``info["final_obs"]``.
    """
    if num_envs < 1 or threads < 0:
        raise ValueError(f"num_envs wants at least 1 and threads at least 0, got {num_envs} and {threads}")
    makers = [functools.partial(_make, task) for _ in range(num_envs)]
    if placement is None:
        placement = task.placement if num_envs > 1 else "inline"
    env: Any
    if placement == "processes":
        env = AsyncVectorEnv(makers, context="spawn", autoreset_mode=autoreset_mode)
    elif placement == "threads":
        env = ThreadVectorEnv(makers, autoreset_mode, min(num_envs, threads or os.cpu_count() or 1))
    else:
        env = SyncVectorEnv(makers, autoreset_mode=autoreset_mode)
    return TaskVectorEnv(env, task)
