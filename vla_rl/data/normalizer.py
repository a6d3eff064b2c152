"""Affine normalisers, fitted on the data and stored with the weights.

Raises nothing for a channel that does not vary: it is centred and left at its own scale, since dividing by a range of
nearly nothing would turn rounding into signal.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Mode = Literal["min_max", "mean_std", "quantile"]
OUTLIERS = 0.01  # share of the data at either end that a quantile range leaves outside
SMALLEST_RANGE = 1e-4


class Normalizer(nn.Module):
    """``normalize`` maps data to about [-1, 1], ``unnormalize`` undoes it.

    min_max: all of it to [-1, 1]; quantile: all but outliers to [-1, 1]; mean_std: to zero mean and unit variance.

    Data are (..., D), or (..., T, D) with T up to ``steps`` where each step has a range of its own. ``center_SD`` and
    ``scale_SD`` are buffers, so they travel with the weights.
    """

    center_SD: Tensor
    scale_SD: Tensor

    def __init__(self, dim: int, steps: int = 1) -> None:
        super().__init__()
        self.register_buffer("center_SD", torch.zeros(steps, dim))
        self.register_buffer("scale_SD", torch.ones(steps, dim))

    @classmethod
    def fit(cls, values_NSD: Tensor, mode: Mode) -> Normalizer:
        """Fit on all N rows of S steps.

        Raises:
            ValueError: there is no row, or a number is not finite.
        """
        if values_NSD.ndim != 3 or not len(values_NSD):
            raise ValueError(f"a normaliser is fitted on (N, S, D) with N >= 1, got {tuple(values_NSD.shape)}")
        if not torch.isfinite(values_NSD).all():
            raise ValueError("a normaliser is fitted on finite numbers, got NaN or infinity")
        values_NSD = values_NSD.double()
        if mode == "mean_std":
            center_SD, scale_SD = values_NSD.mean(0), values_NSD.std(0, correction=0)
        else:
            outside = OUTLIERS if mode == "quantile" else 0.0
            ends = np.quantile(values_NSD.numpy(force=True), (outside, 1 - outside), axis=0)
            low_SD, high_SD = torch.as_tensor(ends, device=values_NSD.device)
            center_SD, scale_SD = (low_SD + high_SD) / 2, (high_SD - low_SD) / 2
        fitted = cls(values_NSD.shape[2], values_NSD.shape[1])
        fitted.center_SD.copy_(center_SD)
        fitted.scale_SD.copy_(torch.where(scale_SD < SMALLEST_RANGE / 2, torch.ones_like(scale_SD), scale_SD))
        return fitted

    def normalize(self, x: Tensor) -> Tensor:
        """Map from data to normalised units."""
        center, scale = self._for(x)
        return (x - center) / scale

    def unnormalize(self, x: Tensor) -> Tensor:
        """Map from normalised units to data."""
        center, scale = self._for(x)
        return x * scale + center

    def _for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.center_SD) == 1:
            return self.center_SD[0], self.scale_SD[0]
        return self.center_SD[: x.shape[-2]], self.scale_SD[: x.shape[-2]]
