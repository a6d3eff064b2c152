"""The rollout loop: a controller drives a vector environment through given scenes; simulation and robot share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np

from vla_rl.data.episode import Episode, EpisodeRecorder, Provenance
from vla_rl.inference.controller import Controller
from vla_rl.types import ActionSpec

CLIPPED_BY = "clipped_by/"  # in the provenance: steps that a guard limited, by reason
OnEpisode = Callable[[int, Episode], None]
OnStep = Callable[[gym.vector.VectorEnv, np.ndarray], None]


@runtime_checkable
class Guard(Protocol):
    """Stands between what is wanted and what is executed, as a robot's safety filter does."""

    def begin(self, slot: int, features: Mapping[str, np.ndarray]) -> None:
        """An episode begins in ``slot`` with an observation, without batch."""

    def filter(self, wanted_NA: np.ndarray, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """What is executed, (N, A) float32; rows of slots that are not active do not count."""

    def finish(self, slot: int) -> Provenance:
        """What it did in the episode that ends in ``slot``: ``clipped_steps``, ``CLIPPED_BY`` reasons, ``fault``."""


def rollout(
    env: gym.vector.VectorEnv,
    action_spec: ActionSpec,
    instruction: str,
    controller: Controller,
    scenes_per_slot: Sequence[Sequence[int]],
    on_episode: OnEpisode,
    on_step: OnStep | None = None,
    provenance: Provenance | None = None,
    guard: Guard | None = None,
) -> None:
    """Run every slot through its scenes, one after the other.

    Args:
        env: vector environment of N slots without autoreset, whose ``info`` has ``success``; a robot's has ``executed`` and
            ``intervened`` too.
        action_spec: of the environment; what is executed is clipped to it, and recorded as executed.
        instruction: the task in words.
        controller: decides the actions.
        scenes_per_slot: seeds of the scenes of each of the N slots. A slot's episodes do not depend on the other slots.
        on_episode: called with (scene seed, episode) as each one ends; one that diverged says so in its provenance, and a data set
            refuses it.
        on_step: called after each step with the environment and the slots that are active.
        provenance: of the episodes, beside their source and scene.
        guard: limits what is executed (none: it is clipped to the action spec).
    """
    slots = env.num_envs
    if len(scenes_per_slot) != slots:
        raise ValueError(f"an environment of {slots} slots wants {slots} lists of scenes, got {len(scenes_per_slot)}")
    waiting = [list(scenes)[::-1] for scenes in scenes_per_slot]
    current = [0] * slots
    recorders: list[EpisodeRecorder | None] = [None] * slots
    intervened: list[list[bool]] = [[] for _ in range(slots)]

    def reset(chosen: Sequence[int]) -> dict[str, np.ndarray]:
        """Set the slots to the scenes that are theirs now; an environment that has ended cannot be stepped."""
        seeds: list[int | None] = [None] * slots
        mask = np.zeros(slots, dtype=bool)
        for slot in chosen:
            seeds[slot], mask[slot] = current[slot], True
        observation, _ = env.reset(seed=seeds, options=None if mask.all() else {"reset_mask": mask})  # type: ignore[arg-type]
        return observation

    def begin(chosen: Sequence[int]) -> dict[str, np.ndarray]:
        """Begin the next scene in the slots that have one left; the others idle in their last one."""
        beginning = [slot for slot in chosen if waiting[slot]]
        for slot in beginning:
            current[slot] = waiting[slot].pop()
        observation = reset(chosen)
        for slot in beginning:
            known: Provenance = {"source": "policy", **(provenance or {}), "scene_seed": current[slot]}
            recorders[slot] = EpisodeRecorder(row(observation, slot), instruction, known)
            controller.reset(slot, current[slot])
            if guard is not None:
                guard.begin(slot, row(observation, slot))
        return observation

    if not any(waiting):
        return
    features = begin(range(slots))
    idle: set[int] = set()  # slots that wait for the others, to begin when those plan anew
    active_N = np.array([r is not None for r in recorders])
    while active_N.any():
        intended_NA = controller.act(features, active_N)
        executed_NA = action_spec.clip(intended_NA if guard is None else guard.filter(intended_NA, features, active_N))
        executed_NA[~active_N] = np.clip(0.0, action_spec.low_array(), action_spec.high_array())
        features, reward_N, terminated_N, truncated_N, info = env.step(executed_NA)
        success_N = np.asarray(info["success"], dtype=bool)
        executed_NA = really_executed(info, executed_NA)
        if on_step is not None:
            on_step(env, active_N)
        for slot in map(int, np.flatnonzero(active_N)):
            recorder = recorders[slot]
            assert recorder is not None
            if "intervened" in info:
                intervened[slot].append(bool(info["intervened"][slot]))
            recorder.add(
                executed_A=executed_NA[slot].copy(),
                intended_A=intended_NA[slot].copy(),
                observation=row(features, slot),
                reward=float(reward_N[slot]),
                success=bool(success_N[slot]),
            )
            if "diverged" in info and info["_diverged"][slot]:
                recorder.provenance["diverged"] = str(info["diverged"][slot])
            if "coverage" in info:
                best = float(recorder.provenance.get("max_coverage", 0.0))
                recorder.provenance["max_coverage"] = max(float(info["coverage"][slot]), best)
            if guard is not None and (terminated_N[slot] or truncated_N[slot]):
                recorder.provenance |= guard.finish(slot)
            if terminated_N[slot] or truncated_N[slot]:
                ended = recorder.episode(terminated=bool(terminated_N[slot]), truncated=bool(truncated_N[slot]))
                recorders[slot] = None
                if intervened[slot]:
                    ended, intervened[slot] = replace(ended, intervened_T=np.array(intervened[slot])), []
                on_episode(current[slot], ended)
        active_N = np.array([r is not None for r in recorders])
        ended_slots = [int(slot) for slot in np.flatnonzero(terminated_N | truncated_N)]
        idle |= {slot for slot in ended_slots if waiting[slot]}
        if idle and (not active_N.any() or controller.plans(active_N)):  # so the policy is asked for all slots at once
            features = begin(sorted(idle.union(ended_slots)))
            idle = set()
            active_N = np.array([r is not None for r in recorders])
        elif ended_slots and active_N.any():
            features = reset(ended_slots)


def really_executed(info: Mapping[str, Any], executed_NA: np.ndarray) -> np.ndarray:
    """What an environment says it executed, (N, A) float32: a robot's filter, or a person, may have had the last word."""
    if "executed" not in info:
        return executed_NA
    told_N = np.asarray(info["_executed"], bool)[:, None]
    return np.where(told_N, np.asarray(info["executed"], np.float32), executed_NA)


def row(features: Mapping[str, np.ndarray], slot: int) -> dict[str, np.ndarray]:
    """One slot's observation out of a batch, copied."""
    return {k: np.array(v[slot]) for k, v in features.items()}


def deal(scenes: Sequence[int], slots: int) -> list[list[int]]:
    """Deal scenes to slots like cards: scene i goes to slot i mod N."""
    return [list(scenes[slot::slots]) for slot in range(slots)]
