"""From chunks to actions: histories and chunk queues for a batch of slots, each running its own episode."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vla_rl.inference.selectors import PlainSampler, Sampler
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.seeding import torch_generator
from vla_rl.types import Observation


class PolicyOutputError(RuntimeError):
    """A policy's action is not finite; the message names the episode."""


@runtime_checkable
class Controller(Protocol):
    """Decides the next action of every slot."""

    def reset(self, slot: int, scene_seed: int) -> None:
        """A new episode begins in ``slot``."""

    def plans(self, active_N: np.ndarray) -> bool:
        """Whether the next ``act`` asks the policy for some active slot, so that others may begin at no further cost."""

    def act(self, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """Return actions (N, A) in the units of the action spec; rows of slots that are not active do not count."""


class PolicyController:
    """Receding-horizon execution of a chunk policy.

    The policy is always called with all N rows, of which only the slots that ran out of actions take theirs, and each
    episode draws its noise from its own seed. So a slot's episodes do not depend on what its neighbours do: an evaluation that was cut
    and goes on gives the same numbers.
    """

    def __init__(self, policy: ChunkPolicy, num_slots: int, seed: int, sampler: Sampler | None = None) -> None:
        """Set up.

        Args:
            policy: decides.
            num_slots: N.
            seed: of the noise.
            sampler: draws the chunks in the policy's place, to explore or to select.
        """
        self.policy = policy
        self.sampler = sampler or PlainSampler(policy)
        self.seed = seed
        self.calls = 0
        self.seconds = 0.0
        config = policy.config
        self._device = next(policy.parameters()).device
        self._history: list[deque[dict[str, np.ndarray]]] = [
            deque(maxlen=config.observation_steps) for _ in range(num_slots)
        ]
        self._queue: list[deque[np.ndarray]] = [deque() for _ in range(num_slots)]
        self._generator = [torch_generator(seed, "unused") for _ in range(num_slots)]
        self._scene = [0] * num_slots
        self._noise_KNHA = torch.zeros(self.sampler.noise_count, num_slots, *policy.chunk_shape)

    def reset(self, slot: int, scene_seed: int) -> None:
        """Forget the slot's last episode."""
        self._history[slot].clear()
        self._queue[slot].clear()
        self._generator[slot] = torch_generator(self.seed, "policy", scene_seed)
        self._scene[slot] = scene_seed

    def plans(self, active_N: np.ndarray) -> bool:
        """See ``Controller``."""
        return any(active and not queue for active, queue in zip(active_N, self._queue, strict=True))

    def act(self, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """See ``Controller``; raises PolicyOutputError for an action that is not finite."""
        for slot, history in enumerate(self._history):
            row = {k: features[k][slot].copy() for k in self.policy.spec.observation_spec}
            missing = self.policy.config.observation_steps - len(history)
            history.extend([row] * max(missing, 1))  # an episode's first observation stands for those before it
        wanting = [slot for slot, queue in enumerate(self._queue) if active_N[slot] and not queue]
        if wanting:
            self._refill(wanting)
        dim = self.policy.spec.action_spec.dim
        return np.stack([queue.popleft() if queue else np.zeros(dim, np.float32) for queue in self._queue])

    def _refill(self, slots: list[int]) -> None:
        started = time.perf_counter()
        stacked = {
            k: torch.from_numpy(np.stack([[row[k] for row in history] for history in self._history])).to(self._device)
            for k in self.policy.spec.observation_spec
        }
        for slot in slots:
            shape = self._noise_KNHA[:, slot].shape
            self._noise_KNHA[:, slot] = torch.randn(shape, generator=self._generator[slot])
        chunk = self.sampler(Observation.from_features(stacked), self._noise_KNHA.to(self._device))
        action_NHA = chunk.action_BHA[:, : chunk.execute_steps].cpu().numpy()
        for slot in slots:
            if not np.isfinite(action_NHA[slot]).all():
                raise PolicyOutputError(f"the policy's action is not finite in scene {self._scene[slot]}")
            self._queue[slot].extend(action_NHA[slot])
        self.calls += 1
        self.seconds += time.perf_counter() - started
