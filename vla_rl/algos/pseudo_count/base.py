"""What a pseudo-count is: fitted on features of the training data, it says of other features how often they were seen.

Features are standardised by the mean and spread of those it was fitted on, so that no unit counts more than another. A new estimator is a
file in this package with a config that registers itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass

import draccus
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.runtime.errors import UserError

SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class CountConfig(draccus.ChoiceRegistry):
    """Base of the estimators' configs.

    seed: of what is random in an estimator
    """

    seed: int = 0

    def build(self, feature_dim: int) -> PseudoCount:
        """Build the estimator for features of so many numbers."""
        raise TypeError(f"{type(self).__name__} builds no estimator")


def discover_counts() -> None:
    """Import every module of this package, so that its configs are registered."""
    import vla_rl.algos.pseudo_count as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


class PseudoCount(nn.Module, ABC):
    """An estimator; all that it learns is in ``state_dict``."""

    mean_F: Tensor
    spread_F: Tensor
    fitted: Tensor

    def __init__(self, feature_dim: int, config: CountConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean_F", torch.zeros(feature_dim))
        self.register_buffer("spread_F", torch.ones(feature_dim))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, features_NF: Float[Tensor, "N F"], *, standardize: bool = True) -> None:
        """Forget what was seen, and see these.

        Args:
            features_NF: one row per sample of the training data.
            standardize: measure features by their own mean and spread; without it, they are taken as they are.

        Raises:
            UserError: none, of another width, or not finite.
        """
        self._check(features_NF)
        if standardize:
            self.mean_F.copy_(features_NF.mean(0))
            self.spread_F.copy_(features_NF.std(0, correction=0).clamp_min(SMALLEST_SPREAD))
        self._fit(self.standardized(features_NF))
        self.fitted.fill_(True)

    def update(self, features_NF: Float[Tensor, "N F"]) -> None:
        """See more, in the units of the first fit; raises as ``fit``."""
        self._check(features_NF, needs_fit=True)
        self._update(self.standardized(features_NF))

    @torch.no_grad()
    def score(self, features_MF: Float[Tensor, "M F"]) -> Float[Tensor, " M"]:
        """The pseudo-count of each row, higher where more like it was seen; raises as ``fit``."""
        self._check(features_MF, needs_fit=True)
        return self._score(self.standardized(features_MF))

    def _check(self, features: Tensor, *, needs_fit: bool = False) -> None:
        width = len(self.mean_F)
        if features.ndim != 2 or features.shape[1] != width or not len(features):
            raise UserError(f"features want at least one row of {width} numbers, got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features).all(1)).sum())
            raise UserError(f"features want finite numbers; {bad} of {len(features)} rows hold NaN or infinity")
        if needs_fit and not self.fitted:
            raise UserError("a pseudo-count is asked before it was fitted")

    def standardized(self, features: Tensor) -> Tensor:
        """Features in the units of the fit."""
        return (features - self.mean_F) / self.spread_F

    @abstractmethod
    def _fit(self, features_NF: Tensor) -> None: ...

    @abstractmethod
    def _update(self, features_NF: Tensor) -> None: ...

    @abstractmethod
    def _score(self, features_MF: Tensor) -> Tensor: ...
