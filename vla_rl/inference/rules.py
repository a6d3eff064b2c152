"""Which of N candidates is run: the first, the one with the highest Q, the most seen one (TACO), or the best of those seen often enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_rl.algos.pseudo_count.base import PseudoCount
from vla_rl.inference.selectors import Candidates, FeatureKind, Rule

SMALLEST_COUNT = 1e-3  # counts below it are as good as none

# candidates -> a number for each, higher is better
Score = Callable[[Candidates], Float[Tensor, "B N"]]
RuleName = Literal["first", "q", "taco", "constrained", "consensus"]


@dataclass(frozen=True)
class SelectorConfig:
    """How a chunk is picked: docs/inference.md has the rules.

    rule: first, q (highest), taco (largest pseudo-count), constrained (best objective of those seen often), consensus (densest)
    features: last (a by-product of sampling) or clean (of the finished chunk, one more pass of the net)
    candidates: N
    objective: of constrained: q, or progress (expected discounted success of what the data did from there)
    percentile: of constrained: of the training data's own counts, that a candidate's count has to reach
    margin: what the pick has to be better by than candidate 0, which is run otherwise: in Q or progress, for taco in the count's logarithm
    """

    rule: RuleName = "taco"
    features: FeatureKind = "clean"
    candidates: int = 32
    objective: Literal["q", "progress"] = "progress"
    percentile: float = 10.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates wants at least 1, got {self.candidates}")
        if not 0 <= self.percentile <= 100 or not self.margin >= 0:
            raise ValueError(
                f"percentile wants a number in [0, 100], margin one >= 0, got {self.percentile}, {self.margin}"
            )

    @property
    def asks_q(self) -> bool:
        """Whether a critic is needed."""
        return self.rule == "q" or (self.rule == "constrained" and self.objective == "q")

    @property
    def asks_count(self) -> bool:
        """Whether a pseudo-count is needed."""
        return self.rule in ("taco", "constrained")

    @property
    def asks_progress(self) -> bool:
        """Whether what the data led to is needed."""
        return self.rule == "constrained" and self.objective == "progress"


def first(candidates: Candidates) -> Int[Tensor, " B"]:
    """Candidate 0: what the policy alone does."""
    return torch.zeros(candidates.shape[0], dtype=torch.long)


def highest(score: Score, margin: float = 0.0) -> Rule:
    """The candidate with the highest score, or candidate 0 unless it is beaten by more than the margin."""

    def rule(candidates: Candidates) -> Int[Tensor, " B"]:
        return _or_first(score(candidates), margin)

    return rule


def consensus(margin: float = 0.0) -> Rule:
    """The candidate in the densest place among the others: a Gaussian kernel as wide as the typical distance of two of them."""

    def score(candidates: Candidates) -> Tensor:
        steps = candidates.policy.config.execute_steps
        action_BND = candidates.chunk_BNHA[:, :, :steps].flatten(2)
        # for so few the plain way is exact, and takes half of what one big product does
        distance_BNN = torch.cdist(action_BND, action_BND, compute_mode="donot_use_mm_for_euclid_dist")
        width_B11 = distance_BNN.flatten(1).median(1).values.clamp_min_(SMALLEST_COUNT).view(-1, 1, 1)
        return distance_BNN.div_(width_B11).square_().neg_().exp_().sum(2).log_()

    return highest(score, margin)


def constrained(count: Score, threshold: float, objective: Score, margin: float = 0.0) -> Rule:
    """Of the candidates seen often enough the one with the highest objective; where none is, the most seen one.

    Candidate 0 is run unless it is beaten by more than the margin, or is itself not seen often enough.
    """

    def rule(candidates: Candidates) -> Int[Tensor, " B"]:
        count_BN = count(candidates)
        enough_BN = count_BN >= threshold
        value_BN = torch.where(enough_BN, objective(candidates), -torch.inf)
        best_B = torch.where(enough_BN[:, 0], _or_first(value_BN, margin), value_BN.argmax(1))
        return torch.where(enough_BN.any(1), best_B, count_BN.argmax(1))

    return rule


def _or_first(score_BN: Tensor, margin: float) -> Tensor:
    if not margin:
        return score_BN.argmax(1)  # the first of equals
    best = score_BN.max(1)
    return torch.where(best.values > score_BN[:, 0] + margin, best.indices, 0)


def log_count(estimator: PseudoCount) -> Score:
    """Logarithm of the pseudo-count."""

    def score(candidates: Candidates) -> Tensor:
        count = estimator.score(candidates.features_BNF.flatten(0, 1))
        return count.clamp_min(SMALLEST_COUNT).log().view(candidates.shape)

    return score


def least_q(q_values: Callable[..., Tensor]) -> Score:
    """The most pessimistic member of a critic: of IDQL (arXiv 2304.10573)."""

    def score(candidates: Candidates) -> Tensor:
        return q_values(candidates.repeated(), candidates.executed()).min(0).values.view(candidates.shape)

    return score
