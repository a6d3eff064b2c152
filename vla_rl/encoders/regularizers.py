"""What keeps an encoder's features compact and telling (RL-100, arXiv 2510.14830): an information bottleneck, and reconstruction.

Differs from its code: pictures are reconstructed at a quarter of their resolution; the joint state is told from what is seen of the
scene, as it needs no encoder of its own here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.encoders.config import EncoderConfig

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


class Regularizer(nn.Module):
    """Bottleneck and reconstruction of what the nets made of pictures and points."""

    def __init__(
        self, config: EncoderConfig, seen_dim: int, sizes: dict[str, tuple[int, int]], points: bool, state_dim: int
    ) -> None:
        """Build.

        Args:
            config: weights of both.
            seen_dim: numbers of the latent.
            sizes: height and width of each camera's pictures, by name.
            points: whether there is a cloud.
            state_dim: S (0: no state is told).
        """
        super().__init__()
        self.config = config
        self.bottleneck = Bottleneck(seen_dim) if config.kl_weight else None
        rebuilds = config.reconstruction_weight > 0
        self.pictures = nn.ModuleDict({n: PictureDecoder(seen_dim, size) for n, size in sizes.items() if rebuilds})
        self.cloud = PointDecoder(seen_dim) if rebuilds and points else None
        self.state = nn.Linear(seen_dim, state_dim) if rebuilds and state_dim else None

    def forward(
        self,
        features_BOL: Float[Tensor, "B O L"],
        normal_BOL: Float[Tensor, "B O L"] | None,
        pictures: dict[str, Float[Tensor, "R 3 y x"]],
        cloud_RP3: Float[Tensor, "R P 3"] | None,
        state_BOS: Float[Tensor, "B O S"] | None,
    ) -> tuple[Float[Tensor, "B O L"], Float[Tensor, " B"]]:
        """The latent, drawn where there is noise to draw it with and else its mean; and what is added to each sample's loss."""
        latent_BOL, rows = features_BOL, len(features_BOL)
        penalty_B = torch.zeros(rows, device=features_BOL.device)
        if self.bottleneck is not None:
            latent_BOL, log_variance_BOL = self.bottleneck(features_BOL)
            penalty_B = penalty_B + self.config.kl_weight * gaussian_kl(latent_BOL, log_variance_BOL).mean(1)
            if normal_BOL is not None:
                latent_BOL = latent_BOL + (0.5 * log_variance_BOL).exp() * normal_BOL
        if not self.training or not self.config.reconstruction_weight:
            return latent_BOL, penalty_B
        flat_RL = latent_BOL.flatten(0, 1)
        error_R = torch.zeros(len(flat_RL), device=flat_RL.device)
        for name, decoder in self.pictures.items():
            error_R = error_R + decoder.error(flat_RL, pictures[name])  # type: ignore[operator]
        if self.cloud is not None and cloud_RP3 is not None:
            error_R = error_R + self.cloud.error(flat_RL, cloud_RP3)
        if self.state is not None and state_BOS is not None:
            error_R = error_R + (self.state(latent_BOL) - state_BOS).square().mean(-1).flatten()
        return latent_BOL, penalty_B + self.config.reconstruction_weight * error_R.unflatten(0, (rows, -1)).mean(1)
