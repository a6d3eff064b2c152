"""Sinusoidal features of the noise time."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

MAX_FREQUENCY = 1000.0  # tau lies in [0, 1]; the finest wave resolves 1/1000 of it, as 1000 integer steps would


class TimeEmbedding(nn.Module):
    """Embed tau in [0, 1] (0 noise, 1 action) with sines and cosines of geometric frequencies, then a two-layer MLP.

    With ``jumps`` the size of a jump in tau is embedded too, by an MLP that begins at zero, and added (SnapFlow, arXiv 2604.05656): a net
    that was trained without goes on from where it was.
    """

    frequency_D: Tensor

    def __init__(self, dim: int, jumps: bool = False) -> None:
        super().__init__()
        half = dim // 2
        exponent_D = torch.arange(half) / max(half - 1, 1)
        self.register_buffer("frequency_D", torch.exp(exponent_D * math.log(MAX_FREQUENCY)), persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * half, dim), nn.Mish(), nn.Linear(dim, dim))
        self.jump = nn.Sequential(nn.Linear(2 * half, dim), nn.Mish(), nn.Linear(dim, dim)) if jumps else None
        if self.jump is not None:
            nn.init.zeros_(self.jump[2].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.jump[2].bias)  # type: ignore[arg-type]

    def forward(self, tau: Float[Tensor, "*B"], jump: Float[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """Return one embedding per entry of ``tau``, and of ``jump`` where the embedding was built for them."""
        embedded = self.net(self._waves(tau))
        return embedded if jump is None or self.jump is None else embedded + self.jump(self._waves(jump))

    def _waves(self, tau: Tensor) -> Tensor:
        angle = tau[..., None] * self.frequency_D
        return torch.cat([angle.sin(), angle.cos()], dim=-1)
