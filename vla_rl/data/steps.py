"""Single steps as a residual learns from them: what is seen, an episode with the base's action in every step, a batch of returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_rl.data.episode import Episode

# who acted: the base alone, the base with noise, the composed policy with noise; or it was a demonstration
Source = Literal["base", "noise", "policy", "deployed", "demonstration"]


@dataclass(frozen=True)
class StepContext:
    """What is seen in a step.

    features: newest observation by name, (B, ...)
    base_BA: the base's action, within the limits of the action spec
    phase_B: its place in its chunk, from 0
    """

    features: Mapping[str, Tensor]
    base_BA: Float[Tensor, "B A"]
    phase_B: Int[Tensor, " B"]

    def rows(self, index: Tensor | slice) -> StepContext:
        """Some rows."""
        return StepContext({k: v[index] for k, v in self.features.items()}, self.base_BA[index], self.phase_B[index])

    @classmethod
    def cat(cls, parts: list[StepContext]) -> StepContext:
        """One after the other."""
        features = {k: torch.cat([p.features[k] for p in parts]) for k in parts[0].features}
        return cls(features, torch.cat([p.base_BA for p in parts]), torch.cat([p.phase_B for p in parts]))


@dataclass(frozen=True)
class StepEpisode:
    """An episode of T steps, and beside each observation, the final one included, what the base would do there.

    base_TA: (T + 1, A), within the limits of the action spec; at a terminated end, after which nothing follows, it repeats the last one
    phase_T: (T + 1,), place of the base's action in its chunk
    residual_TA: (T, A), residual that was drawn, before limits and switches (None: nobody drew one)
    """

    episode: Episode
    base_TA: np.ndarray
    phase_T: np.ndarray
    residual_TA: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Number of steps T."""
        return self.episode.length


@dataclass(frozen=True)
class StepBatch:
    """Steps with their returns over up to n steps.

    reward_B: discounted sum of the rewards of the m <= n steps that the episode still had
    discount_B: gamma^m, zero where the task ended within them; a time-out goes on from its true final observation
    following: what is seen after the m steps
    intervened_B: a human acted
    shown_B: it is of a demonstration that succeeded
    """

    now: StepContext
    action_BA: Float[Tensor, "B A"]
    reward_B: Float[Tensor, " B"]
    discount_B: Float[Tensor, " B"]
    following: StepContext
    intervened_B: Bool[Tensor, " B"]
    shown_B: Bool[Tensor, " B"]

    @classmethod
    def cat(cls, a: StepBatch, b: StepBatch) -> StepBatch:
        """One batch after the other."""
        return replace(
            a,
            now=StepContext.cat([a.now, b.now]),
            following=StepContext.cat([a.following, b.following]),
            **{
                k: torch.cat([getattr(a, k), getattr(b, k)])
                for k in ("action_BA", "reward_B", "discount_B", "intervened_B", "shown_B")
            },
        )
