"""Point clouds to a vector: DP3's encoder (arXiv 2403.03954), a shared MLP with LayerNorm over the points and a maximum over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class PointNetConfig:
    """Size of the net, and how many points it reads.

    widths: of each layer
    train_points: points drawn of each cloud in training (0: all)
    """

    widths: tuple[int, ...] = (64, 128, 256)
    train_points: int = 0

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.train_points < 0:
            raise ValueError(
                f"a point net wants widths of at least 1 and train_points >= 0, got {self.widths} and {self.train_points}"
            )


class PointNet(nn.Module):
    """The order of the points does not matter, and neither does a point that is there twice."""

    def __init__(self, config: PointNetConfig, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *config.widths[:-1]), config.widths, strict=True):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
        self.points = nn.Sequential(*layers)
        self.leave = nn.Sequential(nn.Linear(config.widths[-1], features), nn.LayerNorm(features))

    def forward(self, points_BP3: Float[Tensor, "B P 3"]) -> Float[Tensor, "B D"]:
        """Return the cloud's features; the points are normalised."""
        return self.leave(torch.amax(self.points(points_BP3), dim=1))
