"""The honest baseline: the k nearest training features, each counted by a Gaussian kernel of its distance.

m copies of an input read m (up to k), and what is far from all reads 0. Nothing is learned but the kernel's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_rl.algos.pseudo_count.base import CountConfig, PseudoCount
from vla_rl.runtime.seeding import torch_generator

WIDTH_ROWS = 1024  # of which the typical distance to a k-th neighbour is taken


@CountConfig.register_subclass("nearest")
@dataclass(frozen=True)
class NearestConfig(CountConfig):
    """How many neighbours count.

    neighbours: k
    largest: training features that are kept, drawn at random (0: all)
    """

    neighbours: int = 8
    largest: int = 8192

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.largest < 0:
            raise ValueError(
                f"neighbours wants at least 1, largest a number >= 0, got {self.neighbours} and {self.largest}"
            )

    def build(self, feature_dim: int) -> Nearest:
        """Build the estimator."""
        return Nearest(feature_dim, self)


class Nearest(PseudoCount):
    """Keeps the training features themselves."""

    config: NearestConfig
    seen_NF: Tensor
    width: Tensor

    def __init__(self, feature_dim: int, config: NearestConfig) -> None:
        super().__init__(feature_dim, config)
        self.register_buffer("seen_NF", torch.zeros(0, feature_dim))
        self.register_buffer("width", torch.tensor(1.0))

    def _fit(self, features_NF: Tensor) -> None:
        self.seen_NF = self._kept(features_NF)
        some_NF = self._kept(features_NF, WIDTH_ROWS)
        distance = self._distances(some_NF, min(self.config.neighbours + 1, len(self.seen_NF)))[:, -1].median()
        self.width.fill_(float(distance) or 1.0)

    def _update(self, features_NF: Tensor) -> None:
        self.seen_NF = self._kept(torch.cat([self.seen_NF, features_NF]))

    def _kept(self, features_NF: Tensor, largest: int = 0) -> Tensor:
        largest = largest or self.config.largest or len(features_NF)
        generator = torch_generator(self.config.seed, "nearest", len(features_NF))
        return features_NF[torch.randperm(len(features_NF), generator=generator)[:largest]].clone()

    def _distances(self, features_MF: Tensor, count: int) -> Tensor:
        return torch.cdist(features_MF, self.seen_NF).topk(count, largest=False).values

    def _score(self, features_MF: Tensor) -> Tensor:
        distance_MK = self._distances(features_MF, min(self.config.neighbours, len(self.seen_NF)))
        return (-(distance_MK / self.width).square() / 2).exp().sum(1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        self.seen_NF = torch.zeros_like(state_dict[prefix + "seen_NF"])  # as many rows as were kept
        super()._load_from_state_dict(state_dict, prefix, *arguments)
