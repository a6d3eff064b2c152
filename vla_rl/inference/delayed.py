"""Latency without a clock: a controller whose policy takes a number of control steps, drawn from each episode's own seed.

Deterministic: a chunk is computed from what was seen when it was begun and handed over so many steps later. So success can be plotted
against latency, scene by scene, and every rule of the schedule tested. An episode's first chunk is there at once: the robot does not move
before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_rl.inference.base_policy import BasePolicy, Histories, Leftover, OwnBase, checked_chunks
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.selectors import GuidedSampler, Sampler
from vla_rl.inference.timeline import DelayEstimate, ExecutionConfig, Tally, Timeline, require_method, steps_of
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import numpy_generator


@dataclass(frozen=True)
class LatencyConfig:
    """How long the policy takes.

    delay_s: at least, per chunk
    jitter_s: mean of what comes on top, exponentially distributed
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.delay_s < math.inf and 0 <= self.jitter_s < math.inf):
            raise ValueError(f"delay_s and jitter_s want numbers >= 0, got {self.delay_s} and {self.jitter_s}")

    def draw(self, rng: np.random.Generator) -> float:
        """Latency of a call, in seconds."""
        return self.delay_s + (float(rng.exponential(self.jitter_s)) if self.jitter_s else 0.0)


def execution_sampler(policy: ChunkPolicy, config: ExecutionConfig, sampler: Sampler | None) -> Sampler | None:
    """How chunks are drawn for a method.

    Raises:
        UserError: the policy has no chain to guide, or a selector picks.
    """
    if config.method != "rtc":
        return sampler
    if sampler is not None:
        raise UserError(
            "method rtc guides a policy's own chunk; a selector's goes on by rtc_prefix, a graph's by neither"
        )
    policy.grid()  # raises for a student
    return GuidedSampler(policy, config.guidance)


class DelayedController:
    """See ``Controller``: executes a base's chunks by a method, while each takes its time."""

    def __init__(
        self, base: BasePolicy, num_slots: int, config: ExecutionConfig, latency: LatencyConfig, seed: int
    ) -> None:
        """Set up.

        Args:
            base: decides chunks.
            num_slots: N.
            config: the method.
            latency: of a call.
            seed: of what is random in it.

        Raises:
            UserError: the method, or the latency, wants another base.
        """
        require_method(config, base.spec, latency.delay_s)
        self.base, self.config, self.latency, self.seed = base, config, latency, seed
        self.seconds, self.calls = 0.0, 0
        spec = base.spec.policy.action_spec
        self._hz = spec.control_hz
        self._histories = Histories(base.spec, num_slots)
        self._timelines = [Timeline(spec, base.spec.execute_steps, config) for _ in range(num_slots)]
        self._estimates = [DelayEstimate(self._hz) for _ in range(num_slots)]
        self._rng = [numpy_generator(seed, "unused") for _ in range(num_slots)]
        self._coming: list[tuple[int, np.ndarray] | None] = [None] * num_slots  # steps to go, and the chunk
        self._scene = [0] * num_slots

    @property
    def tallies(self) -> list[Tally]:
        """What happened in each slot."""
        return [timeline.tally for timeline in self._timelines]

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Controller``."""
        self._histories.reset(slot)
        self._timelines[slot].reset()
        self._coming[slot] = None
        self._scene[slot] = scene_seed
        self._rng[slot] = numpy_generator(self.seed, "latency", scene_seed)
        self._estimates[slot] = DelayEstimate(self._hz, warm_up=0)
        self._estimates[slot].add(self.latency.delay_s)  # as a warm-up would have measured
        self.base.reset([slot], [scene_seed])

    def plans(self, active_N: np.ndarray) -> bool:
        """See ``Controller``."""
        return any(self._wants(int(slot)) for slot in np.flatnonzero(active_N))

    def _wants(self, slot: int) -> bool:
        return self._timelines[slot].wants(self._estimates[slot].steps())

    def act(self, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """See ``Controller``; raises PolicyOutputError for an action that is not finite."""
        started = time.perf_counter()
        slots = [int(slot) for slot in np.flatnonzero(active_N)]
        self._histories.see(features, slots)
        for slot in slots:
            coming = self._coming[slot]
            if coming is not None and coming[0] <= 0:
                self._timelines[slot].deliver(coming[1])
                self._coming[slot] = None
        self._begin([slot for slot in slots if self._wants(slot)])
        action_NA = np.zeros((len(active_N), self.base.spec.policy.action_spec.dim), np.float32)
        for slot in slots:
            action_A = self._timelines[slot].next()
            assert action_A is not None  # an episode's first chunk is there at once
            action_NA[slot] = action_A
            coming = self._coming[slot]
            if coming is not None:
                self._coming[slot] = (coming[0] - 1, coming[1])
        self.seconds += time.perf_counter() - started
        return action_NA

    def _begin(self, slots: list[int]) -> None:
        if not slots:
            return
        first = {slot: self._timelines[slot].empty for slot in slots}
        leftovers: dict[int, Leftover] = {}
        for slot in slots:
            left = self._timelines[slot].begin(self._estimates[slot].steps())
            if left is not None:
                leftovers[slot] = left
        chunk_BHA = self.base.chunk(self._histories.observation(), slots, leftovers or None)
        checked_chunks(chunk_BHA, self.base.spec, [self._scene[slot] for slot in slots])
        self.calls += 1
        for slot, chunk_HA in zip(slots, chunk_BHA, strict=True):
            latency_s = 0.0 if first[slot] else self.latency.draw(self._rng[slot])
            if not first[slot]:
                self._estimates[slot].add(latency_s)
            steps = steps_of(latency_s, self._hz)
            if steps == 0:
                self._timelines[slot].deliver(chunk_HA)
            else:
                self._coming[slot] = (steps, chunk_HA)


@dataclass(frozen=True)
class DelayedAgent:
    """A chunk policy whose calls take time, as ``evaluate`` takes it."""

    agent: PolicyAgent
    config: ExecutionConfig
    latency: LatencyConfig

    @property
    def spec(self) -> PolicySpec:
        """See ``Agent``."""
        return self.agent.spec

    def instruct(self, words: str) -> None:
        """See ``Agent``."""
        self.agent.instruct(words)

    def controller(self, num_slots: int, seed: int) -> DelayedController:
        """See ``Agent``; raises UserError as ``execution_sampler``."""
        sampler = execution_sampler(self.agent.policy, self.config, self.agent.sampler)
        base = OwnBase(self.agent.policy, num_slots, seed, sampler)
        return DelayedController(base, num_slots, self.config, self.latency, seed)
