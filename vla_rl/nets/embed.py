"""Sinusoidal features of the noise time."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

MAX_FREQUENCY = 1000.0  # tau lies in [0, 1]; the finest wave resolves 1/1000 of it, as 1000 integer steps would


class TimeEmbedding(nn.Module):
    """Embed tau in [0, 1] (0 noise, 1 action) with sines and cosines of geometric frequencies, then a two-layer MLP."""

    frequency_D: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        exponent_D = torch.arange(half) / max(half - 1, 1)
        self.register_buffer("frequency_D", torch.exp(exponent_D * math.log(MAX_FREQUENCY)), persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * half, dim), nn.Mish(), nn.Linear(dim, dim))

    def forward(self, tau: Float[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        """Return one embedding per entry of ``tau``."""
        angle = tau[..., None] * self.frequency_D
        return self.net(torch.cat([angle.sin(), angle.cos()], dim=-1))
