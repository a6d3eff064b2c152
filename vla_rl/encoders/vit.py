"""A small vision transformer (arXiv 2010.11929) whose patches are the cells of a short convolutional stem (2106.14881)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_rl.encoders.base import GROUPS, Film, ImageEncoder, ImageEncoderConfig

POSITION_STD = 0.02


@ImageEncoderConfig.register_subclass("vit")
@dataclass(frozen=True)
class ViTConfig(ImageEncoderConfig):
    """Size of the transformer.

    patch: pixels along each side of a patch, a multiple of 4
    width: of the tokens
    depth: layers
    heads: attention heads, a divisor of width
    """

    patch: int = 12
    width: int = 96
    depth: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if self.patch < 4 or self.patch % 4:
            raise ValueError(f"patch of a vit wants a multiple of 4, got {self.patch}")
        if self.depth < 1 or self.heads < 1 or self.width < 1 or self.width % self.heads or self.width % (2 * GROUPS):
            raise ValueError(
                f"a vit wants a width that its heads and {2 * GROUPS} divide, and depth and heads of at least 1, got "
                f"{self.width}, {self.heads} and {self.depth}"
            )

    def build(self, size: tuple[int, int], words: int = 0) -> SmallViT:
        """Build the encoder."""
        return SmallViT(self, size, words)


class SmallViT(ImageEncoder):
    """Stem, position, transformer layers; FiLM before each where there are words."""

    def __init__(self, config: ViTConfig, size: tuple[int, int], words: int) -> None:
        super().__init__()
        width, stride = config.width, config.patch // 4
        self.channels = width
        self.enter = nn.Sequential(
            nn.Conv2d(3, width // 2, 7, 4, 3),
            nn.GroupNorm(GROUPS, width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, stride, stride),
        )
        with torch.no_grad():
            self.grid = tuple(self.enter(torch.zeros(1, 3, *size)).shape[2:])
        self.position_1TD = nn.Parameter(POSITION_STD * torch.randn(1, self.grid[0] * self.grid[1], width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.depth)
        )
        self.film = nn.ModuleList(Film(words, width) for _ in range(config.depth)) if words else None
        self.leave = nn.LayerNorm(width)

    def forward(self, picture_B3hw: Tensor, words_BD: Tensor | None = None) -> Tensor:
        """See ``ImageEncoder``."""
        token_BTD = self.enter(picture_B3hw).flatten(2).transpose(1, 2) + self.position_1TD
        for index, layer in enumerate(self.layers):
            if self.film is not None and words_BD is not None:
                token_BTD = self.film[index](token_BTD.transpose(1, 2), words_BD).transpose(1, 2)
            token_BTD = layer(token_BTD)
        return self.leave(token_BTD).transpose(1, 2).unflatten(2, self.grid)
