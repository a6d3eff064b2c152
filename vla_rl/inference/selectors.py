"""Ways to draw the chunk that is run: as the policy is deployed, with the noise of a kernel, or the best of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import sample_chain
from vla_rl.types import ActionChunk, Observation

# observations of B * N rows and their chunks' executed actions -> a score for each row
Scorer = Callable[[Observation, Tensor], Tensor]


@runtime_checkable
class Sampler(Protocol):
    """Draws a chunk for each observation; the same noise gives the same chunks."""

    @property
    def noise_count(self) -> int:
        """Noise tensors K that it takes."""

    def __call__(self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"]) -> ActionChunk:
        """Return a chunk for each of B observations."""


class PlainSampler:
    """The policy's own sampler: how it is deployed."""

    def __init__(self, policy: ChunkPolicy) -> None:
        self.policy = policy
        self.noise_count = policy.noise_count

    def __call__(self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"]) -> ActionChunk:
        """Draw chunks."""
        return self.policy.sample(observation, noise_KBHA)


class NoisySampler:
    """The noisy chain of a kernel: how a policy explores."""

    def __init__(self, policy: ChunkPolicy, kernel: Kernel) -> None:
        self.policy, self.kernel = policy, kernel
        self.noise_count = kernel.steps + 1

    def __call__(self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"]) -> ActionChunk:
        """Draw chunks."""
        policy = self.policy
        chain = sample_chain(policy, self.kernel, policy.condition(observation), noise_KBHA)
        action_BHA = policy.unnormalize_action(chain.chunk, observation)
        return ActionChunk(action_BHA, policy.config.execute_steps, policy.spec.action_spec)


class BestOfN:
    """Of N candidates run the one that scores highest: IDQL (arXiv 2304.10573) where the score is a critic's min Q.

    Candidates of one row differ in their noise only.
    """

    def __init__(self, policy: ChunkPolicy, candidates: int, score: Scorer) -> None:
        """Set up.

        Args:
            policy: draws the candidates.
            candidates: N, at least 1.
            score: higher is better.
        """
        if candidates < 1:
            raise ValueError(f"candidates wants at least 1, got {candidates}")
        self.policy, self.candidates, self.score = policy, candidates, score

        self.noise_count = policy.noise_count * candidates

    def __call__(self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"]) -> ActionChunk:
        """Draw the candidates and return the best of each row."""
        count, rows = self.candidates, observation.batch_size
        many = repeat(observation, count)
        noise = noise_KBHA.unflatten(0, (self.policy.noise_count, count)).movedim(1, 2).flatten(1, 2)
        chunk = self.policy.sample(many, noise)
        executed = chunk.spec.clip_tensor(chunk.action_BHA[:, : chunk.execute_steps])
        score_BN = self.score(many, executed).view(rows, count)
        best_B = torch.arange(rows) * count + score_BN.argmax(1)
        return replace(chunk, action_BHA=chunk.action_BHA[best_B])


def repeat(observation: Observation, count: int) -> Observation:
    """Each row ``count`` times, one after the other."""

    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(count, 0)

    return Observation(
        state_BOS=observation.state_BOS.repeat_interleave(count, 0),
        environment_state_BOS=again(observation.environment_state_BOS),
        images={k: v.repeat_interleave(count, 0) for k, v in observation.images.items()},
        points_BOP3=again(observation.points_BOP3),
        task=None if observation.task is None else tuple(t for t in observation.task for _ in range(count)),
    )
