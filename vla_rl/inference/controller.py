"""From chunks to actions for a batch of slots, each running its own episode; and what an evaluation runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from vla_rl.inference.base_policy import BasePolicy, ChunkQueue, OwnBase
from vla_rl.inference.selectors import Sampler
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.records import PolicySpec


@runtime_checkable
class Controller(Protocol):
    """Decides the next action of every slot.

    Attributes:
        seconds: time spent on deciding.
    """

    seconds: float

    @property
    def calls(self) -> int:
        """How often the policy was asked for chunks."""

    def reset(self, slot: int, scene_seed: int) -> None:
        """A new episode begins in ``slot``."""

    def plans(self, active_N: np.ndarray) -> bool:
        """Whether the next ``act`` asks the policy for some active slot, so that others may begin at no further cost."""

    def act(self, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """Return actions (N, A) in the units of the action spec; rows of slots that are not active do not count."""


class ChunkController:
    """Receding-horizon execution of a base.

    The base always sees all N rows, of which only the slots that ran out of actions take theirs. So a slot's episodes do not depend on
    what its neighbours do: an evaluation that was cut and goes on gives the same numbers.
    """

    def __init__(self, base: BasePolicy, num_slots: int) -> None:
        self.queue = ChunkQueue(base, num_slots)
        self.seconds = 0.0

    @property
    def calls(self) -> int:
        """See ``Controller``."""
        return self.queue.calls

    def reset(self, slot: int, scene_seed: int) -> None:
        """See ``Controller``."""
        self.queue.reset(slot, scene_seed)

    def plans(self, active_N: np.ndarray) -> bool:
        """See ``Controller``."""
        return any(self.queue.wants(int(slot)) for slot in np.flatnonzero(active_N))

    def act(self, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """See ``Controller``; raises PolicyOutputError for an action that is not finite."""
        started = time.perf_counter()
        slots = [int(slot) for slot in np.flatnonzero(active_N)]
        action_NA = np.zeros((len(active_N), self.queue.base.spec.policy.action_spec.dim), np.float32)
        self.queue.see(features, slots)
        action_NA[slots] = self.queue.take(slots)[0]
        self.seconds += time.perf_counter() - started
        return action_NA


@runtime_checkable
class Agent(Protocol):
    """What can be evaluated: it says what it was made for and acts for any number of slots."""

    @property
    def spec(self) -> PolicySpec:
        """Observations it reads, actions it gives, task."""

    def instruct(self, words: str) -> None:
        """Say what is to be done; raises UserError where a policy that reads it cannot understand."""

    def controller(self, num_slots: int, seed: int) -> Controller:
        """Return a controller of fresh episodes; ``seed`` is of the policy's noise."""


@dataclass(frozen=True)
class PolicyAgent:
    """A chunk policy, in evaluation mode; ``sampler`` draws the chunks in its place."""

    policy: ChunkPolicy
    sampler: Sampler | None = None

    @property
    def spec(self) -> PolicySpec:
        """See ``Agent``: what it was made for, whether it sees latents at the moment or not."""
        return self.policy.full_spec

    def instruct(self, words: str) -> None:
        """See ``Agent``."""
        self.policy.instruct(words)

    def controller(self, num_slots: int, seed: int) -> ChunkController:
        """See ``Agent``."""
        return ChunkController(OwnBase(self.policy, num_slots, seed, self.sampler), num_slots)
