"""What decides chunks for a batch of environments: the interface behind which policies, experts and servers are the same.

``reset``, ``chunk`` and ``spec`` are all that a controller, a residual stage or a robot asks for. A chunk is asked for once per executed
chunk and never while learning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vla_rl.inference.selectors import GuidedSampler, PlainSampler, Sampler
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.records import PolicySpec, Prefix
from vla_rl.runtime.seeding import torch_generator
from vla_rl.types import Observation, kind_of


class PolicyOutputError(RuntimeError):
    """A policy's action is not finite; the message names the episode."""


@dataclass(frozen=True)
class BaseSpec:
    """What a base was made for.

    policy: observations it reads, actions it gives, task
    observation_steps: history O that it sees
    execute_steps: actions of a chunk that run before the next is asked for
    chunk_steps: actions of a chunk (0: not known)
    guided: chunks are guided along what is left of the last one (method rtc)
    prefix_steps: longest clean prefix that it was trained to go on from (method rtc_prefix)
    """

    policy: PolicySpec
    observation_steps: int
    execute_steps: int
    chunk_steps: int = 0
    guided: bool = False
    prefix_steps: int = 0


@dataclass(frozen=True)
class Leftover:
    """What is left of a chunk that still runs while the next one is computed.

    action_LA: its actions from now on
    fixed: how many of them will have run when the next chunk is there, as far as can be foreseen
    """

    action_LA: np.ndarray
    fixed: int


@runtime_checkable
class BasePolicy(Protocol):
    """Decides the next actions of every environment of a batch."""

    @property
    def spec(self) -> BaseSpec:
        """What it was made for."""

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """New episodes begin in some environments; what is random in them follows from the scene's seed."""

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """Return chunks (len(env_ids), at least execute_steps, A) in the units of the action spec.

        Args:
            observation: histories of all environments of the batch, so that a row's chunk does not depend on which others want one.
            env_ids: the environments that want a chunk.
            leftovers: what their chunks go on from, by environment; for bases that say they can continue.
        """


class OwnBase:
    """One of this project's policies; each episode draws its noise from its own seed."""

    def __init__(self, policy: ChunkPolicy, num_envs: int, seed: int, sampler: Sampler | None = None) -> None:
        """Set up.

        Args:
            policy: decides.
            num_envs: N.
            seed: of the noise.
            sampler: draws the chunks in the policy's place, to explore or to select.
        """
        config = policy.config
        guided = isinstance(sampler, GuidedSampler)
        self._sampler = sampler or PlainSampler(policy)
        self.spec = BaseSpec(
            policy.spec,
            config.observation_steps,
            config.execute_steps,
            config.chunk_steps,
            guided,
            0 if guided or not self._sampler.takes_prefix else config.max_prefix_steps,
        )
        self._seed = seed
        self._policy = policy
        self._device = next(policy.parameters()).device
        self._generator = [torch_generator(seed, "unused") for _ in range(num_envs)]
        self._further = [torch_generator(seed, "unused") for _ in range(num_envs)]
        self._noise_KNHA = torch.zeros(self._sampler.noise_count, num_envs, *policy.chunk_shape)

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``."""
        for env_id, scene_seed in zip(env_ids, scene_seeds, strict=True):
            self._generator[env_id] = torch_generator(self._seed, "policy", scene_seed)
            self._further[env_id] = torch_generator(self._seed, "further noise", scene_seed)

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``: whole chunks."""
        for env_id in env_ids:
            mine_KHA = self._noise_KNHA[:, env_id]
            first = len(mine_KHA) - self._sampler.own_noise_count
            mine_KHA[:first] = torch.randn(mine_KHA[:first].shape, generator=self._generator[env_id])
            mine_KHA[first:] = torch.randn(mine_KHA[first:].shape, generator=self._further[env_id])
        prefix = self._prefix(leftovers) if leftovers else None
        chunk = self._sampler(observation.to(self._device), self._noise_KNHA.to(self._device), prefix)
        return chunk.action_BHA[list(env_ids)].cpu().numpy()

    def _prefix(self, leftovers: Mapping[int, Leftover]) -> Prefix:
        """What is left of the chunks, for all rows; where it ends its last action is held, though it does not count as known."""
        count, (steps, dim) = self._noise_KNHA.shape[1], self._policy.chunk_shape
        action_NHA = torch.zeros(count, steps, dim)
        fixed_N, known_N = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        for env_id, left in leftovers.items():
            known = min(len(left.action_LA), steps)
            if known:
                action_NHA[env_id, :known] = torch.from_numpy(left.action_LA[:known])
                action_NHA[env_id, known:] = action_NHA[env_id, known - 1]
            most = known if self.spec.guided else self.spec.prefix_steps  # of longer ones it has learnt nothing
            known_N[env_id], fixed_N[env_id] = known, min(left.fixed, known, most)
        return Prefix(action_NHA.to(self._device), fixed_N.to(self._device), known_N.to(self._device))


class NoBase:
    """Nothing to go by: the middle of the action's range, always. What learns from scratch has it for a base."""

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = BaseSpec(spec, observation_steps=1, execute_steps=1)
        low_A, high_A = spec.action_spec.low_array(), spec.action_spec.high_array()
        self._middle_A = (low_A + high_A) / 2

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``."""

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``."""
        return np.tile(self._middle_A, (len(env_ids), 1, 1))


class Histories:
    """The last O observations of each of N slots, as a base wants them."""

    def __init__(self, spec: BaseSpec, num_slots: int) -> None:
        self._spec = spec
        self._rows: list[deque[dict[str, np.ndarray]]] = [
            deque(maxlen=spec.observation_steps) for _ in range(num_slots)
        ]

    def reset(self, slot: int) -> None:
        """Forget the slot's last episode."""
        self._rows[slot].clear()

    def see(self, features: Mapping[str, np.ndarray], slots: Sequence[int]) -> None:
        """Append the newest observation, (N, ...) by feature, to the histories of some slots."""
        for slot in slots:
            row = {k: features[k][slot].copy() for k in self._spec.policy.observation_spec}
            missing = self._spec.observation_steps - len(self._rows[slot])
            self._rows[slot].extend([row] * max(missing, 1))  # an episode's first one stands for those before it

    def observation(self) -> Observation:
        """Of all slots; zeros stand for those that have seen nothing."""
        spec = self._spec
        empty = {
            k: np.zeros((spec.observation_steps, *f.shape), kind_of(k)) for k, f in spec.policy.observation_spec.items()
        }
        stacked = {
            k: torch.from_numpy(np.stack([[row[k] for row in rows] if rows else blank for rows in self._rows]))
            for k, blank in empty.items()
        }
        return Observation.from_features(stacked)


def checked_chunks(chunk_BHA: np.ndarray, spec: BaseSpec, scenes: Sequence[int]) -> np.ndarray:
    """What a base answered for some episodes, if it is what was asked for.

    Raises:
        PolicyOutputError: an action is not finite, or the shape is another one than promised.
    """
    wanted = len(scenes), spec.execute_steps, spec.policy.action_spec.dim
    if chunk_BHA.ndim != 3 or chunk_BHA.shape[0] != wanted[0] or chunk_BHA.shape[2] != wanted[2]:
        raise PolicyOutputError(f"the policy's chunks have shape {chunk_BHA.shape} where {wanted} was wanted")
    if chunk_BHA.shape[1] < wanted[1]:
        raise PolicyOutputError(f"the policy's chunks have shape {chunk_BHA.shape} where {wanted} was wanted")
    for scene, chunk_HA in zip(scenes, chunk_BHA, strict=True):
        if not np.isfinite(chunk_HA).all():
            raise PolicyOutputError(f"the policy's action is not finite in scene {scene}")
    return chunk_BHA


class ChunkQueue:
    """Histories and queued actions of N slots over a base; a slot's queue is emptied whenever its episode ends, however it ends."""

    def __init__(self, base: BasePolicy, num_slots: int) -> None:
        self.base = base
        self.calls = 0
        self._histories = Histories(base.spec, num_slots)
        self._scene = [0] * num_slots
        self._queue: list[deque[np.ndarray]] = [deque() for _ in range(num_slots)]

    def reset(self, slot: int, scene_seed: int) -> None:
        """Forget the slot's last episode."""
        self._histories.reset(slot)
        self._queue[slot].clear()
        self._scene[slot] = scene_seed
        self.base.reset([slot], [scene_seed])

    def drop(self, slot: int) -> None:
        """Forget what is left of the slot's chunk: the next action comes from a fresh one."""
        self._queue[slot].clear()

    def wants(self, slot: int) -> bool:
        """Whether the slot's next action costs a call of the base."""
        return not self._queue[slot]

    def see(self, features: Mapping[str, np.ndarray], slots: Sequence[int]) -> None:
        """Append the newest observation, (N, ...) by feature, to the histories of some slots."""
        self._histories.see(features, slots)

    def take(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the next action of each of some slots, (len(slots), A), and its place in its chunk, (len(slots),).

        Raises:
            PolicyOutputError: the base gave an action that is not finite, or chunks of another shape than it promised.
        """
        wanting = [slot for slot in slots if not self._queue[slot]]
        if wanting:
            self._refill(wanting)
        steps = self.base.spec.execute_steps
        phase = np.array([steps - len(self._queue[slot]) for slot in slots])
        return np.stack([self._queue[slot].popleft() for slot in slots]), phase

    def _refill(self, slots: list[int]) -> None:
        spec = self.base.spec
        chunk_BHA = self.base.chunk(self._histories.observation(), slots)
        checked_chunks(chunk_BHA, spec, [self._scene[slot] for slot in slots])
        for slot, chunk_HA in zip(slots, chunk_BHA[:, : spec.execute_steps], strict=True):
            self._queue[slot].extend(chunk_HA)
        self.calls += 1
