"""The rollout loop: a controller drives a vector environment through given scenes; simulation and robot share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from vla_rl.data.episode import Episode
from vla_rl.inference.controller import Controller
from vla_rl.types import ActionSpec

OnEpisode = Callable[[int, Episode], None]
OnStep = Callable[[gym.vector.VectorEnv, np.ndarray], None]


class _Recorder:
    """Columns of the episode that a slot is running."""

    def __init__(self, first: dict[str, np.ndarray]) -> None:
        self.observations = {k: [v] for k, v in first.items()}
        self.actions: list[np.ndarray] = []
        self.intended: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.successes: list[bool] = []
        self.extras: dict[str, float] = {}

    def add(
        self,
        intended: np.ndarray,
        executed: np.ndarray,
        observation: dict[str, np.ndarray],
        reward: float,
        success: bool,
    ) -> None:
        self.intended.append(intended)
        self.actions.append(executed)
        self.rewards.append(reward)
        self.successes.append(success)
        for key, value in observation.items():
            self.observations[key].append(value)

    def episode(self, terminated: bool, truncated: bool, instruction: str, scene_seed: int) -> Episode:
        return Episode(
            observations={k: np.stack(v) for k, v in self.observations.items()},
            action_TA=np.stack(self.actions),
            intended_TA=np.stack(self.intended),
            reward_T=np.asarray(self.rewards, np.float32),
            success_T=np.asarray(self.successes),
            terminated=terminated,
            truncated=truncated,
            instruction=instruction,
            provenance={"source": "policy", "scene_seed": scene_seed, **self.extras},
        )


def rollout(
    env: gym.vector.VectorEnv,
    action_spec: ActionSpec,
    instruction: str,
    controller: Controller,
    scenes_per_slot: Sequence[Sequence[int]],
    on_episode: OnEpisode,
    on_step: OnStep | None = None,
) -> None:
    """Run every slot through its scenes, one after the other.

    Args:
        env: vector environment of N slots without autoreset, whose ``info`` has ``success``.
        action_spec: of the environment; what is executed is clipped to it, and recorded as executed.
        instruction: the task in words.
        controller: decides the actions.
        scenes_per_slot: seeds of the scenes of each of the N slots. A slot's episodes do not depend on the other slots.
        on_episode: called with (scene seed, episode) as each one ends.
        on_step: called after each step with the environment and the slots that are active.
    """
    slots = env.num_envs
    if len(scenes_per_slot) != slots:
        raise ValueError(f"an environment of {slots} slots wants {slots} lists of scenes, got {len(scenes_per_slot)}")
    waiting = [list(scenes)[::-1] for scenes in scenes_per_slot]
    current = [0] * slots
    recorders: list[_Recorder | None] = [None] * slots

    def start(ended: list[int]) -> dict[str, np.ndarray]:
        """Reset the slots whose episode has ended: to their next scene, or to the last one again to idle in."""
        seeds: list[int | None] = [None] * slots
        mask = np.zeros(slots, dtype=bool)
        begin = [slot for slot in ended if waiting[slot]]
        for slot in begin:
            current[slot] = waiting[slot].pop()
        for slot in ended:
            seeds[slot], mask[slot] = current[slot], True
        observation, _ = env.reset(seed=seeds, options=None if mask.all() else {"reset_mask": mask})  # type: ignore[arg-type]
        for slot in begin:
            recorders[slot] = _Recorder(_row(observation, slot))
            controller.reset(slot, current[slot])
        return observation

    if not any(waiting):
        return
    features = start(list(range(slots)))
    active_N = np.array([r is not None for r in recorders])
    while active_N.any():
        intended_NA = controller.act(features, active_N)
        executed_NA = action_spec.clip(intended_NA)
        executed_NA[~active_N] = np.clip(0.0, action_spec.low_array(), action_spec.high_array())
        features, reward_N, terminated_N, truncated_N, info = env.step(executed_NA)
        success_N = np.asarray(info["success"], dtype=bool)
        if on_step is not None:
            on_step(env, active_N)
        for slot in map(int, np.flatnonzero(active_N)):
            recorder = recorders[slot]
            assert recorder is not None
            row = _row(features, slot)
            recorder.add(
                intended_NA[slot].copy(), executed_NA[slot].copy(), row, float(reward_N[slot]), bool(success_N[slot])
            )
            if "coverage" in info:
                best = recorder.extras.get("max_coverage", 0.0)
                recorder.extras["max_coverage"] = max(float(info["coverage"][slot]), best)
            if terminated_N[slot] or truncated_N[slot]:
                ended = recorder.episode(bool(terminated_N[slot]), bool(truncated_N[slot]), instruction, current[slot])
                recorders[slot] = None
                on_episode(current[slot], ended)
        done = np.flatnonzero(terminated_N | truncated_N)
        if len(done) and (any(waiting) or any(recorders)):
            features = start([int(slot) for slot in done])
        active_N = np.array([r is not None for r in recorders])


def _row(features: dict[str, Any], slot: int) -> dict[str, np.ndarray]:
    return {k: np.array(v[slot]) for k, v in features.items()}


def deal(scenes: Sequence[int], slots: int) -> list[list[int]]:
    """Deal scenes to slots like cards: scene i goes to slot i mod N."""
    return [list(scenes[slot::slots]) for slot in range(slots)]
