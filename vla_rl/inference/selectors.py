"""Ways to draw the chunk that is run: as the policy is deployed, with the noise of a kernel, or one picked from several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import sample_chain
from vla_rl.policies.path import GuidanceConfig, guided_chunk
from vla_rl.policies.records import Generated, Prefix
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionChunk, Observation


@runtime_checkable
class Sampler(Protocol):
    """Draws a chunk for each observation; the same noise gives the same chunks."""

    @property
    def noise_count(self) -> int:
        """Noise tensors K that it takes."""

    @property
    def own_noise_count(self) -> int:
        """How many of them, the last ones, come from a stream of their own, so that the first ones are what others take too."""

    @property
    def takes_prefix(self) -> bool:
        """Whether a chunk can go on from what is already decided."""

    def __call__(
        self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"], prefix: Prefix | None = None
    ) -> ActionChunk:
        """Return a chunk for each of B observations, which goes on from what a prefix has decided."""


class PlainSampler:
    """The policy's own sampler: how it is deployed."""

    takes_prefix = True

    def __init__(self, policy: ChunkPolicy) -> None:
        self.policy = policy
        self.noise_count, self.own_noise_count = policy.noise_count, 0

    def __call__(
        self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"], prefix: Prefix | None = None
    ) -> ActionChunk:
        """Draw chunks."""
        return self.policy.sample(observation, noise_KBHA, prefix)


class GuidedSampler:
    """The policy's deterministic chain, guided along what is decided: for policies that were trained without prefixes."""

    takes_prefix = True

    def __init__(self, policy: ChunkPolicy, config: GuidanceConfig) -> None:
        self.policy, self.config = policy, config
        self.noise_count, self.own_noise_count = policy.noise_count, 0

    def __call__(
        self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"], prefix: Prefix | None = None
    ) -> ActionChunk:
        """Draw chunks."""
        policy = self.policy
        if (
            prefix is None
        ):  # the same chain, guided by nothing: a row's chunk does not hang on whether others go on from one
            nothing_B = torch.zeros(noise_KBHA.shape[1], dtype=torch.long, device=noise_KBHA.device)
            inside = Prefix(torch.zeros_like(noise_KBHA[0]), nothing_B, nothing_B)
        else:
            inside = policy.normalize_prefix(prefix, observation)
        made = guided_chunk(policy, policy.condition(observation), noise_KBHA, inside, self.config)
        action_BHA = policy.unnormalize_action(made.action_BHA, observation)
        return ActionChunk(action_BHA, policy.config.execute_steps, policy.spec.action_spec)


class NoisySampler:
    """The noisy chain of a kernel: how a policy explores."""

    takes_prefix = False

    def __init__(self, policy: ChunkPolicy, kernel: Kernel) -> None:
        self.policy, self.kernel = policy, kernel
        self.noise_count, self.own_noise_count = kernel.steps + 1, 0

    def __call__(
        self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"], prefix: Prefix | None = None
    ) -> ActionChunk:
        """Draw chunks; a prefix is for deployment and not known here."""
        if prefix is not None:
            raise UserError("a policy explores with whole chunks; it cannot go on from a prefix then")
        policy = self.policy
        chain = sample_chain(policy, self.kernel, policy.condition(observation), noise_KBHA)
        action_BHA = policy.unnormalize_action(chain.chunk, observation)
        return ActionChunk(action_BHA, policy.config.execute_steps, policy.spec.action_spec)


# which of the policy's features describe a chunk. last: what its last layer read in the last step of sampling, which costs nothing, but
# holds the noise that the chunk was made of too; clean: what it reads of the finished chunk, which costs one more pass
FeatureKind = Literal["last", "clean"]


def features_of(
    policy: ChunkPolicy, kind: FeatureKind, condition_COD: Float[Tensor, "C O D"], made: Generated
) -> Float[Tensor, "B F"]:
    """Features of chunks that were just made, equally many of each condition."""
    return made.features_BF if kind == "last" else policy.clean_features(condition_COD, made.action_BHA)


@dataclass(frozen=True)
class Candidates:
    """N chunks for each of B observations.

    policy: that drew them
    observation: B rows
    chunk_BNHA: the chunks, in normalised units
    features_BNF: what the policy's net makes of each
    """

    policy: ChunkPolicy
    observation: Observation
    chunk_BNHA: Float[Tensor, "B N H A"]
    features_BNF: Float[Tensor, "B N F"]

    @property
    def shape(self) -> tuple[int, int]:
        """B and N."""
        return self.chunk_BNHA.shape[0], self.chunk_BNHA.shape[1]

    def repeated(self) -> Observation:
        """Each observation N times: B * N rows."""
        return repeat(self.observation, self.shape[1])

    def executed(self) -> Float[Tensor, "BN He A"]:
        """What of each chunk would be executed, within the spec's limits and in its units: B * N rows."""
        policy = self.policy
        action_BHA = policy.unnormalize_action(self.chunk_BNHA.flatten(0, 1), self.repeated())
        return policy.spec.action_spec.clip_tensor(action_BHA[:, : policy.config.execute_steps])


# candidates -> the number of the one that is run, for each observation
Rule = Callable[[Candidates], Int[Tensor, " B"]]


class SelectingSampler:
    """Draw N candidates in one pass from an observation that is encoded once, and run the one that a rule picks.

    Candidate 0 is the chunk that the policy alone would have run: its noise comes first.
    """

    takes_prefix = True

    def __init__(self, policy: ChunkPolicy, candidates: int, rule: Rule, features: FeatureKind = "last") -> None:
        """Set up.

        Args:
            policy: draws the candidates.
            candidates: N, at least 1.
            rule: picks.
            features: see ``FeatureKind``.
        """
        if candidates < 1:
            raise UserError(f"candidates wants at least 1, got {candidates}")
        self.policy, self.candidates, self.rule = policy, candidates, rule
        self.features = features
        self.generate: Callable[[Tensor, Tensor, Prefix | None], Generated] = policy.generate  # or onnxruntime's
        self.noise_count = policy.noise_count * candidates
        self.own_noise_count = self.noise_count - policy.noise_count

    @torch.no_grad()
    def __call__(
        self, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"], prefix: Prefix | None = None
    ) -> ActionChunk:
        """Draw the candidates and return the one picked for each row."""
        policy, count, rows = self.policy, self.candidates, observation.batch_size
        observation = policy.read(observation)
        condition_BOD, inside = policy.condition(observation), self._repeat_prefix(prefix, observation)
        if count == 1:
            chunk_BHA = self.generate(condition_BOD, noise_KBHA, inside).action_BHA
        else:
            noise = noise_KBHA.unflatten(0, (count, policy.noise_count)).movedim(0, 2).flatten(1, 2)
            made = self.generate(condition_BOD, noise, inside)
            features_BF = features_of(policy, self.features, condition_BOD, made)
            chunk_BNHA = made.action_BHA.unflatten(0, (rows, count))
            chosen_B = self.rule(Candidates(policy, observation, chunk_BNHA, features_BF.unflatten(0, (rows, count))))
            chunk_BHA = chunk_BNHA[torch.arange(rows), chosen_B]
        action_BHA = policy.unnormalize_action(chunk_BHA, observation)
        return ActionChunk(action_BHA, policy.config.execute_steps, policy.spec.action_spec)

    def _repeat_prefix(self, prefix: Prefix | None, observation: Observation) -> Prefix | None:
        if prefix is None:
            return None
        inside = self.policy.normalize_prefix(prefix, observation)
        return Prefix(*(repeat_rows(x, self.candidates) for x in (inside.action_BHA, inside.fixed_B, inside.known_B)))


def repeat_rows(x: Tensor, count: int) -> Tensor:
    """Each row ``count`` times, one after the other."""
    return x.repeat_interleave(count, 0)


def repeat(observation: Observation, count: int) -> Observation:
    """Each row ``count`` times, one after the other."""
    features = {k: repeat_rows(v, count) for k, v in observation.features().items()}
    task = None if observation.task is None else tuple(t for t in observation.task for _ in range(count))
    return Observation.from_features(features, task)
