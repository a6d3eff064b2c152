"""A small convolutional encoder: what two CPU cores can train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from vla_rl.encoders.base import GROUPS, Film, ImageEncoder, ImageEncoderConfig


@ImageEncoderConfig.register_subclass("cnn")
@dataclass(frozen=True)
class CNNConfig(ImageEncoderConfig):
    """Layers, each a convolution with GroupNorm and ReLU.

    channels: of each layer
    kernels: width of each one's kernel
    strides: of each
    """

    channels: tuple[int, ...] = (32, 32, 64)
    kernels: tuple[int, ...] = (7, 3, 3)
    strides: tuple[int, ...] = (4, 1, 2)

    def __post_init__(self) -> None:
        if not self.channels or not len(self.channels) == len(self.kernels) == len(self.strides):
            raise ValueError(
                f"a cnn wants as many channels as kernels and strides, got {self.channels}, {self.kernels}, {self.strides}"
            )
        if any(c % GROUPS or c < GROUPS for c in self.channels) or min(*self.kernels, *self.strides) < 1:
            raise ValueError(
                f"a cnn wants channels that are multiples of {GROUPS} and kernels and strides of at least 1, got "
                f"{self.channels}, {self.kernels}, {self.strides}"
            )

    def build(self, size: tuple[int, int], words: int = 0) -> SmallCNN:
        """Build the encoder."""
        return SmallCNN(self, words)


class SmallCNN(ImageEncoder):
    """Convolutions, GroupNorm, FiLM where there are words, ReLU."""

    def __init__(self, config: CNNConfig, words: int) -> None:
        super().__init__()
        self.channels = config.channels[-1]
        inputs = (3, *config.channels[:-1])
        layers = list(zip(inputs, config.channels, config.kernels, config.strides, strict=True))
        self.convolve = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2) for i, o, k, s in layers)
        self.normalize = nn.ModuleList(nn.GroupNorm(GROUPS, o) for _, o, _, _ in layers)
        self.film = nn.ModuleList(Film(words, o) for _, o, _, _ in layers) if words else None

    def forward(self, picture_B3hw: Tensor, words_BD: Tensor | None = None) -> Tensor:
        """See ``ImageEncoder``."""
        x = picture_B3hw
        for index, (convolve, normalize) in enumerate(zip(self.convolve, self.normalize, strict=True)):
            x = normalize(convolve(x))
            if self.film is not None and words_BD is not None:
                x = self.film[index](x, words_BD)
            x = functional.relu(x)
        return x
