"""Episodes with the base's action in every step: collected by order of a learner, or made of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from vla_rl.data.episode import Episode
from vla_rl.data.reader import EpisodeData
from vla_rl.data.steps import Source, StepEpisode
from vla_rl.inference.base_policy import ChunkQueue
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.residual_controller import (
    BaseOnly,
    Corrector,
    CorrelatedNoise,
    Greedy,
    NoiseConfig,
    Noisy,
    ResidualController,
    Supervised,
    Teacher,
)
from vla_rl.inference.rollout import deal, rollout
from vla_rl.policies.residual import ResidualPolicy
from vla_rl.runtime.seeding import derive_seed, numpy_generator
from vla_rl.types import ActionSpec

LABEL_BATCH = 32  # demonstrations that the base is asked about at once


@dataclass(frozen=True)
class Order:
    """What an actor is to collect; with the weights it determines the episodes.

    number: of the order, from 0
    source: who acts (deployed: as it is judged, without noise)
    scenes: seeds of the scenes, in the order in which episodes are handed back
    seed: of the base's noise and of exploration
    noise: that explores
    """

    number: int
    source: Source
    scenes: tuple[int, ...]
    seed: int
    noise: NoiseConfig


def collect_steps(
    order: Order,
    env: gym.vector.VectorEnv,
    action_spec: ActionSpec,
    instruction: str,
    base: BaseSource,
    policy: ResidualPolicy,
    teacher: Teacher | None = None,
) -> list[StepEpisode]:
    """Carry out an order; episodes whose simulation diverged are left out.

    Args:
        order: what to collect.
        env: vector environment without autoreset.
        action_spec: of the environment.
        instruction: the task in words.
        base: what is corrected.
        policy: corrects it.
        teacher: watches and may take over.
    """
    slots = env.num_envs
    noise = CorrelatedNoise(order.noise, action_spec.dim, order.seed)
    corrector: Corrector
    if order.source == "base":
        corrector = BaseOnly(policy)
    elif order.source == "noise":
        corrector = BaseOnly(policy, noise)
    elif order.source == "deployed":
        corrector = Greedy(policy)
    else:
        corrector = Noisy(policy, noise)
    if teacher is not None:
        corrector = Supervised(corrector, teacher, action_spec)
    controller = ResidualController(base.open(slots, order.seed), corrector, slots)
    found: dict[int, StepEpisode] = {}

    def keep(scene: int, episode: Episode) -> None:
        steps = controller.finish(scene, episode)
        if "diverged" not in episode.provenance:
            found[scene] = steps

    rollout(env, action_spec, instruction, controller, deal(order.scenes, slots), keep)
    return [found[scene] for scene in order.scenes if scene in found]


def label_demonstrations(data: EpisodeData, base: BaseSource, copies: int, seed: int) -> list[StepEpisode]:
    """Ask the base what it would have done in every step of demonstrations.

    Each demonstration is gone through ``copies`` times; every time the base's first chunk is cut after another number of steps, so that
    it is known how the base goes on from a state in the middle of a chunk as well as at its beginning. There are no more copies than places
    in a chunk. The queue begins anew with each one.

    Args:
        data: demonstrations.
        base: is asked.
        copies: at least 1.
        seed: of the base's noise and of the cuts.
    """
    rng = numpy_generator(seed, "label")
    steps = base.spec.execute_steps
    copies = min(copies, steps)
    labelled: list[StepEpisode] = []
    for first in range(0, data.num_episodes, LABEL_BATCH):
        episodes = [data.episode(i) for i in range(first, min(first + LABEL_BATCH, data.num_episodes))]
        start_E, places = np.zeros(len(episodes), int), np.zeros(1, int)
        if copies > 1:
            start_E, places = rng.integers(steps, size=len(episodes)), rng.permutation(steps)[:copies]
        for copy, place in enumerate(places):
            labelled += _label(episodes, base, (start_E + place) % steps, derive_seed(seed, "label", first, copy))
    return labelled


def _label(episodes: Sequence[Episode], base: BaseSource, offset_E: np.ndarray, seed: int) -> list[StepEpisode]:
    queue = ChunkQueue(base.open(len(episodes), seed), len(episodes))
    for slot in range(len(episodes)):
        queue.reset(slot, slot)
    base_actions: list[list[np.ndarray]] = [[] for _ in episodes]
    phases: list[list[int]] = [[] for _ in episodes]
    for t in range(max(e.length for e in episodes) + 1):
        slots = [slot for slot, e in enumerate(episodes) if t <= e.length]
        rows = {k: np.stack([e.observations[k][min(t, e.length)] for e in episodes]) for k in episodes[0].observations}
        for slot in slots:
            if t == offset_E[slot]:
                queue.drop(slot)
        queue.see(rows, slots)
        action_BA, phase_B = queue.take(slots)
        for slot, action_A, phase in zip(slots, base.spec.policy.action_spec.clip(action_BA), phase_B, strict=True):
            base_actions[slot].append(action_A)
            phases[slot].append(int(phase))
    return [
        StepEpisode(episode, np.stack(base_TA), np.array(phase_T))
        for episode, base_TA, phase_T in zip(episodes, base_actions, phases, strict=True)
    ]
