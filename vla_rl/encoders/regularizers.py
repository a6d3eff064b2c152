"""What keeps an encoder's features compact and telling (RL-100, arXiv 2510.14830): an information bottleneck, and reconstruction.

Differs from its code: pictures are reconstructed at a quarter of their resolution; the joint state is told from what is seen of the
scene, as it needs no encoder of its own here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

REDUCTION = 4  # of a picture that is reconstructed
STRETCH = 4  # of the decoder's convolutions
DECODED_POINTS = 256
SMALLEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE = -10.0, 4.0


def gaussian_kl(mean_BD: Float[Tensor, "*B D"], log_variance_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
    """KL(N(mean, variance) || N(0, 1)), summed over D."""
    return 0.5 * (mean_BD.square() + log_variance_BD.exp() - 1 - log_variance_BD).sum(-1)


def chamfer(a_BP3: Float[Tensor, "B P 3"], b_BQ3: Float[Tensor, "B Q 3"]) -> Float[Tensor, " B"]:
    """Mean squared distance from each point to the other cloud's nearest one, both ways."""
    squared_BPQ = torch.cdist(a_BP3, b_BQ3).square()
    return squared_BPQ.amin(2).mean(1) + squared_BPQ.amin(1).mean(1)


class Bottleneck(nn.Module):
    """Mean and variance of a latent (variational information bottleneck, arXiv 1612.00410)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.heads = nn.Linear(features, 2 * features)

    def forward(self, features_BD: Float[Tensor, "*B D"]) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, each as large as the features."""
        mean, log_variance = self.heads(features_BD).chunk(2, dim=-1)
        return mean, log_variance.clamp(SMALLEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)


class PictureDecoder(nn.Module):
    """A camera's features back to its picture, coarsely."""

    def __init__(self, features: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.target = -(-size[0] // REDUCTION), -(-size[1] // REDUCTION)
        self.coarse = -(-self.target[0] // STRETCH), -(-self.target[1] // STRETCH)
        self.enter = nn.Linear(features, 32 * self.coarse[0] * self.coarse[1])
        self.leave = nn.Sequential(
            nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh()
        )

    def error(self, features_BD: Float[Tensor, "B D"], picture_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, " B"]:
        """Mean squared error of the pixels, in [-1, 1]."""
        wanted = functional.adaptive_avg_pool2d(picture_B3hw, self.target)
        grid = functional.relu(self.enter(features_BD)).unflatten(1, (32, *self.coarse))
        made = self.leave(grid)[..., : self.target[0], : self.target[1]]
        return (made - wanted).square().mean((1, 2, 3))


class PointDecoder(nn.Module):
    """A cloud's features back to points."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 3 * DECODED_POINTS)
        )

    def error(self, features_BD: Float[Tensor, "B D"], points_BP3: Float[Tensor, "B P 3"]) -> Float[Tensor, " B"]:
        """Chamfer distance, in the normaliser's units."""
        return chamfer(self.net(features_BD).unflatten(1, (DECODED_POINTS, 3)), points_BP3)
