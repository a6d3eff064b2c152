"""Ridge leverage on random Fourier features: a coin-flipping network with infinitely many coins, solved.

For a head that is linear in features phi, with weights pulled towards a random prior of variance 1 / lambda, the coin-flipping
network's expected read-out is phi' A^-1 phi with A = Phi' Phi + lambda I: the posterior variance of Bayesian linear regression. So
nothing is trained, no coin is drawn, and rows are added and taken away exactly. m copies of a unit feature read 1 / (m + lambda), and
1 / score - lambda is m. Random Fourier features of the Gaussian kernel (Rahimi & Recht, 2007), as pairs of cosine and sine, are unit
vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.algos.pseudo_count.base import CountConfig, PseudoCount
from vla_rl.runtime.seeding import torch_generator

MEDIAN_ROWS = 1024  # of which the median distance is taken


@CountConfig.register_subclass("leverage")
@dataclass(frozen=True)
class LeverageConfig(CountConfig):
    """The kernel and the prior.

    waves: random frequencies, each with a cosine and a sine (0: the features themselves, unscaled)
    bandwidth: of the kernel, as a share of the median distance between training features
    ridge: lambda, how many samples the prior is worth
    """

    waves: int = 256
    bandwidth: float = 0.35
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.waves < 0 or not (self.bandwidth > 0 and self.ridge > 0):
            raise ValueError(
                f"waves wants a number >= 0, bandwidth and ridge positive ones, got {self.waves}, {self.bandwidth}, {self.ridge}"
            )

    def build(self, feature_dim: int) -> Leverage:
        """Build the estimator."""
        return Leverage(feature_dim, self)


class Leverage(PseudoCount):
    """Keeps A in double precision and its inverse in single."""

    config: LeverageConfig
    frequency_FW: Tensor
    bandwidth: Tensor
    gram_DD: Tensor
    inverse_DD: Tensor

    def __init__(self, feature_dim: int, config: LeverageConfig) -> None:
        super().__init__(feature_dim, config)
        generator = torch_generator(config.seed, "leverage")
        size = 2 * config.waves or feature_dim
        frequency_FW = torch.randn(feature_dim, config.waves, generator=generator)
        self.register_buffer("frequency_FW", frequency_FW)
        self.register_buffer("bandwidth", torch.tensor(1.0))
        self.register_buffer("gram_DD", config.ridge * torch.eye(size, dtype=torch.float64))
        self.register_buffer("inverse_DD", torch.eye(size) / config.ridge)

    def represent(self, features_NF: Float[Tensor, "N F"]) -> Float[Tensor, "N D"]:
        """Phi: unit vectors whose products are the kernel's values."""
        if not self.config.waves:
            return features_NF
        angle_NW = features_NF @ (self.frequency_FW / self.bandwidth)
        return torch.cat([angle_NW.cos(), angle_NW.sin()], 1) / math.sqrt(self.config.waves)

    def forget(self, features_NF: Float[Tensor, "N F"]) -> None:
        """Take rows away that were seen: the exact inverse of ``update``."""
        self._check(features_NF, needs_fit=True)
        self._add(self.standardized(features_NF), -1.0)

    def _fit(self, features_NF: Tensor) -> None:
        generator = torch_generator(self.config.seed, "leverage median")
        some_NF = features_NF[torch.randperm(len(features_NF), generator=generator)[:MEDIAN_ROWS]]
        distance = torch.pdist(some_NF).median() if len(some_NF) > 1 else torch.tensor(0.0)
        self.bandwidth.fill_(self.config.bandwidth * float(distance) or 1.0)
        self.gram_DD.copy_(self.config.ridge * torch.eye(len(self.gram_DD), dtype=torch.float64))
        self._add(features_NF, 1.0)

    def _update(self, features_NF: Tensor) -> None:
        self._add(features_NF, 1.0)

    def _add(self, features_NF: Tensor, sign: float) -> None:
        phi_ND = self.represent(features_NF).double()
        self.gram_DD.add_(phi_ND.T @ phi_ND, alpha=sign)
        self.inverse_DD.copy_(torch.cholesky_inverse(torch.linalg.cholesky(self.gram_DD)))

    def _score(self, features_MF: Tensor) -> Tensor:
        phi_MD = self.represent(features_MF)
        leverage_M = ((phi_MD @ self.inverse_DD) * phi_MD).sum(1)
        return 1 / leverage_M.clamp_min(torch.finfo(leverage_M.dtype).tiny) - self.config.ridge
