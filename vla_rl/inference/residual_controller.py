"""The composed policy at work: the base decides chunks, the residual corrects every step; the same for learning, evaluation and robot."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vla_rl.data.episode import Episode
from vla_rl.data.steps import StepContext, StepEpisode
from vla_rl.inference.base_policy import BasePolicy, BaseSpec, ChunkQueue
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.perception import latent_features
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.records import PolicySpec
from vla_rl.policies.residual import Choice, ResidualPolicy
from vla_rl.runtime.seeding import numpy_generator
from vla_rl.types import ActionSpec, SpecMismatchError


@dataclass(frozen=True)
class NoiseConfig:
    """Noise that explores, on the residual, and so in proportion to what a residual may do.

    std: standard deviation, as a share of the largest residual
    correlation: from one step to the next
    """

    std: float = 0.2
    correlation: float = 0.7

    def __post_init__(self) -> None:
        if self.std < 0 or not 0 <= self.correlation < 1:
            raise ValueError(f"std wants a number >= 0, correlation one in [0, 1), got {self.std}, {self.correlation}")


@runtime_checkable
class Corrector(Protocol):
    """Turns base actions into executed ones; what differs between learning and use of a residual."""

    def reset(self, slot: int, scene_seed: int) -> None:
        """A new episode begins in ``slot``."""

    def correct(self, step: StepContext, slots: list[int]) -> Choice:
        """Choose for the active slots; ``step`` holds a row for every slot, so that no choice depends on how many are active."""


class Greedy:
    """The residual as it is deployed."""

    def __init__(self, policy: ResidualPolicy) -> None:
        self.policy = policy

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Corrector``."""

    def correct(self, step: StepContext, slots: list[int]) -> Choice:
        """See ``Corrector``."""
        return self.policy.decide(step).rows(slots)


class CorrelatedNoise:
    """An autoregressive process in each slot; an episode's noise follows from its scene's seed."""

    def __init__(self, config: NoiseConfig, dim: int, seed: int) -> None:
        self.config, self.dim, self.seed = config, dim, seed
        self._generator: dict[int, np.random.Generator] = {}
        self._state: dict[int, np.ndarray] = {}

    def reset(self, slot: int, scene_seed: int) -> None:
        """Start anew."""
        self._generator[slot] = numpy_generator(self.seed, "explore", scene_seed)
        self._state[slot] = self._generator[slot].standard_normal(self.dim)

    def next(self, slots: list[int]) -> torch.Tensor:
        """One step of each of some slots: (len(slots), A)."""
        keep = self.config.correlation
        rows = [self._state[slot] for slot in slots]
        for slot in slots:
            fresh = self._generator[slot].standard_normal(self.dim)
            self._state[slot] = keep * self._state[slot] + math.sqrt(1 - keep**2) * fresh
        return torch.from_numpy(self.config.std * np.stack(rows)).float()


class Noisy:
    """The residual with noise."""

    def __init__(self, policy: ResidualPolicy, noise: CorrelatedNoise) -> None:
        self.policy, self.noise = policy, noise

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Corrector``."""
        self.noise.reset(slot, scene_seed)

    def correct(self, step: StepContext, slots: list[int]) -> Choice:
        """See ``Corrector``."""
        noise_NA = torch.zeros_like(step.base_BA)
        noise_NA[slots] = self.noise.next(slots)
        return self.policy.decide(step, noise_NA).rows(slots)


class BaseOnly:
    """The base as it is, or with noise in the residual's place: what a critic is warmed up on."""

    def __init__(self, policy: ResidualPolicy, noise: CorrelatedNoise | None = None) -> None:
        self.policy, self.noise = policy, noise

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Corrector``."""
        if self.noise is not None:
            self.noise.reset(slot, scene_seed)

    def correct(self, step: StepContext, slots: list[int]) -> Choice:
        """See ``Corrector``."""
        everywhere_B = torch.ones(len(slots), dtype=torch.bool)
        base_BA = step.base_BA[slots]
        if self.noise is None:
            return Choice(base_BA, torch.zeros_like(base_BA), ~everywhere_B)
        residual_BA = self.noise.next(slots)
        return Choice(self.policy.composition.disturb(base_BA, residual_BA.clamp(-1, 1)), residual_BA, everywhere_B)


@runtime_checkable
class Teacher(Protocol):
    """Somebody who watches and may take over: a human at a keyboard, or an expert in a human's place."""

    def reset(self, slot: int, scene_seed: int) -> None:
        """A new episode begins in ``slot``."""

    def watch(self, step: StepContext, slots: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return what the teacher would do, (len(slots), A) in the units of the action spec, and where it takes over, (len(slots),).

        ``step`` holds a row for every slot, active or not.
        """


class Supervised:
    """A corrector under the eyes of a teacher, whose actions run where it takes over."""

    def __init__(self, corrector: Corrector, teacher: Teacher, spec: ActionSpec) -> None:
        self.corrector, self.teacher, self._spec = corrector, teacher, spec

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Corrector``."""
        self.corrector.reset(slot, scene_seed)
        self.teacher.reset(slot, scene_seed)

    def correct(self, step: StepContext, slots: list[int]) -> Choice:
        """See ``Corrector``."""
        choice = self.corrector.correct(step, slots)
        action_BA, holds_B = self.teacher.watch(step, slots)
        taken_B = torch.from_numpy(holds_B)
        shown_BA = torch.from_numpy(self._spec.clip(action_BA))
        return replace(
            choice,
            action_BA=torch.where(taken_B[:, None], shown_BA, choice.action_BA),
            composed_B=choice.composed_B & ~taken_B,
            intervened_B=taken_B,
        )


class ResidualController:
    """See ``Controller``: the base's queue, and the corrector on every step of it; keeps what an episode's learner wants."""

    def __init__(self, base: BasePolicy, corrector: Corrector, num_slots: int, eyes: ChunkPolicy | None = None) -> None:
        """Set up.

        Args:
            base: is corrected.
            corrector: decides on each of its actions.
            num_slots: environments of the batch.
            eyes: policy whose encoder reads what is observed, where that is not encoded yet.
        """
        self.queue = ChunkQueue(base, num_slots)
        self._eyes = eyes
        self.corrector = corrector
        self.seconds = 0.0
        self._spec = base.spec.policy
        self._base: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
        self._phase: list[list[int]] = [[] for _ in range(num_slots)]
        self._drawn: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
        self._taken: list[list[bool]] = [[] for _ in range(num_slots)]
        self._slot_of: dict[int, int] = {}

    @property
    def calls(self) -> int:
        """See ``Controller``."""
        return self.queue.calls

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Controller``."""
        self.queue.reset(slot, scene_seed)
        self.corrector.reset(slot, scene_seed)
        self._base[slot], self._phase[slot], self._drawn[slot], self._taken[slot] = [], [], [], []
        self._slot_of[scene_seed] = slot

    def plans(self, active_N: np.ndarray) -> bool:
        """See ``Controller``."""
        return any(self.queue.wants(int(slot)) for slot in np.flatnonzero(active_N))

    def act(self, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """See ``Controller``; raises PolicyOutputError for a base that is not finite."""
        started = time.perf_counter()
        slots = [int(slot) for slot in np.flatnonzero(active_N)]
        features = features if self._eyes is None else latent_features(self._eyes, features)
        base_BA, phase_B = self._ask(features, slots)
        base_NA = np.zeros((len(active_N), self._spec.action_spec.dim), np.float32)
        phase_N = np.zeros(len(active_N), np.int64)
        base_NA[slots], phase_N[slots] = base_BA, phase_B
        seen = {k: torch.from_numpy(np.asarray(features[k])) for k in self._spec.observation_spec}
        with torch.no_grad():
            step = StepContext(seen, torch.from_numpy(base_NA), torch.from_numpy(phase_N))
            choice = self.corrector.correct(step, slots)
        for slot, drawn_A in zip(slots, choice.residual_BA.numpy(), strict=True):
            self._drawn[slot].append(drawn_A)
        if choice.intervened_B is not None:
            for slot, taken in zip(slots, choice.intervened_B.tolist(), strict=True):
                self._taken[slot].append(taken)
        action_NA = np.zeros((len(active_N), self._spec.action_spec.dim), np.float32)
        action_NA[slots] = choice.action_BA.numpy()
        self.seconds += time.perf_counter() - started
        return action_NA

    def _ask(self, features: Mapping[str, np.ndarray], slots: list[int]) -> tuple[np.ndarray, np.ndarray]:
        self.queue.see(features, slots)
        base_BA, phase_B = self.queue.take(slots)
        base_BA = self._spec.action_spec.clip(base_BA)
        for slot, base_A, phase in zip(slots, base_BA, phase_B, strict=True):
            self._base[slot].append(base_A)
            self._phase[slot].append(int(phase))
        return base_BA, phase_B

    def finish(self, scene_seed: int, episode: Episode) -> StepEpisode:
        """The episode that has just ended, with the base's actions; after a time-out the base is asked what it would do next."""
        slot = self._slot_of.pop(scene_seed)
        if episode.terminated:
            self._base[slot].append(self._base[slot][-1])
            self._phase[slot].append(0)
        else:
            slots = len(self._base)
            last = {k: np.repeat(episode.observations[k][-1:], slots, 0) for k in self._spec.observation_spec}
            self._ask(last, [slot])
        if self._taken[slot]:
            episode = replace(episode, intervened_T=np.asarray(self._taken[slot]))
        return StepEpisode(
            episode, np.stack(self._base[slot]), np.array(self._phase[slot]), np.stack(self._drawn[slot])
        )


@dataclass(frozen=True)
class ResidualAgent:
    """A residual on its base, as deployed: an ``Agent``.

    Raises:
        SpecMismatchError: the residual was made for a base with other actions, or one that runs more or fewer of a chunk.
    """

    base: BaseSource
    policy: ResidualPolicy

    def __post_init__(self) -> None:
        require_same_base(self.policy, self.base.spec)

    @property
    def spec(self) -> PolicySpec:
        """See ``Agent``: what is observed before it is encoded."""
        return self.base.spec.policy if self.base.policy is None else self.base.policy.full_spec

    def instruct(self, words: str) -> None:
        """See ``Agent``."""
        if self.base.policy is not None:
            self.base.policy.instruct(words)

    def controller(self, num_slots: int, seed: int) -> ResidualController:
        """See ``Agent``."""
        return ResidualController(self.base.open(num_slots, seed), Greedy(self.policy), num_slots, self.base.policy)


def require_same_base(policy: ResidualPolicy, base: BaseSpec) -> None:
    """Raise SpecMismatchError where a residual was made for another base than this."""
    encoder = policy.encoder
    encoder.action_spec.require_equal(base.policy.action_spec, mine="the residual", theirs="the base")
    if encoder.chunk_steps != base.execute_steps:
        raise SpecMismatchError(
            f"the residual was trained on a base that runs {encoder.chunk_steps} actions of a chunk, this one runs "
            f"{base.execute_steps}"
        )
