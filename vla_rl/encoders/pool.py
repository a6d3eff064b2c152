"""From a grid of features to one vector."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

FLAT_CHANNELS = 16


class Keypoints(nn.Module):
    """Expected coordinates of some maps' softmax (arXiv 1504.00702), which say where things are, through a linear layer."""

    coordinate_2T: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], points: int, features: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, points, 1)
        rows, columns = (torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in grid)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        self.register_buffer("coordinate_2T", torch.stack([x.flatten(), y.flatten()]), persistent=False)
        self.leave = nn.Sequential(nn.Linear(2 * points, features), nn.LayerNorm(features))

    def forward(self, grid_BCyx: Float[Tensor, "B C y x"]) -> Float[Tensor, "B D"]:
        """Return the vector."""
        return self.leave(self.where(grid_BCyx).flatten(1))

    def where(self, grid_BCyx: Float[Tensor, "B C y x"]) -> Float[Tensor, "B K 2"]:
        """Each map's expected column and row, in [-1, 1]."""
        share_BKT = self.maps(grid_BCyx).flatten(2).float().softmax(-1)
        return share_BKT @ self.coordinate_2T.T


class Flatten(nn.Module):
    """Fewer channels, and all of the grid through a linear layer: what is where, without a prior that things are points."""

    def __init__(self, channels: int, grid: tuple[int, int], features: int) -> None:
        super().__init__()
        self.fewer = nn.Conv2d(channels, FLAT_CHANNELS, 1)
        self.leave = nn.Sequential(nn.Linear(FLAT_CHANNELS * grid[0] * grid[1], features), nn.LayerNorm(features))

    def forward(self, grid_BCyx: Float[Tensor, "B C y x"]) -> Float[Tensor, "B D"]:
        """Return the vector."""
        return self.leave(torch.relu(self.fewer(grid_BCyx)).float().flatten(1))
