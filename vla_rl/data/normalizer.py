"""Affine normalisers, fitted on the data and stored with the weights.

Raises nothing for a channel that does not vary: it is centred and left at its own scale, since dividing by a range of
nearly nothing would turn rounding into signal.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["min_max", "mean_std"]
SMALLEST_RANGE = 1e-4


class Normalizer(nn.Module):
    """``normalize`` maps data to about [-1, 1] (min_max) or zero mean and unit variance (mean_std); ``unnormalize`` undoes it.

    ``center_D`` and ``scale_D`` are buffers, so they travel with the weights.
    """

    center_D: Tensor
    scale_D: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("center_D", torch.zeros(dim))
        self.register_buffer("scale_D", torch.ones(dim))

    @classmethod
    def fit(cls, values_ND: Tensor, mode: Mode) -> Normalizer:
        """Fit on all N rows.

        Raises:
            ValueError: there is no row, or a number is not finite.
        """
        if values_ND.ndim != 2 or not len(values_ND):
            raise ValueError(f"a normaliser is fitted on (N, D) with N >= 1, got {tuple(values_ND.shape)}")
        if not torch.isfinite(values_ND).all():
            raise ValueError("a normaliser is fitted on finite numbers, got NaN or infinity")
        values_ND = values_ND.double()
        if mode == "min_max":
            low_D, high_D = values_ND.amin(0), values_ND.amax(0)
            center_D, scale_D = (low_D + high_D) / 2, (high_D - low_D) / 2
        else:
            center_D, scale_D = values_ND.mean(0), values_ND.std(0, correction=0)
        fitted = cls(values_ND.shape[1])
        fitted.center_D.copy_(center_D)
        fitted.scale_D.copy_(torch.where(scale_D < SMALLEST_RANGE / 2, torch.ones_like(scale_D), scale_D))
        return fitted

    def normalize(self, x: Tensor) -> Tensor:
        """Map (..., D) from data to normalised units."""
        return (x - self.center_D) / self.scale_D

    def unnormalize(self, x: Tensor) -> Tensor:
        """Map (..., D) from normalised units to data."""
        return x * self.scale_D + self.center_D
