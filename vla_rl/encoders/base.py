"""What an image encoder is: pictures in, a grid of features out, modulated by words where there are any."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass

import draccus
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = 8  # of GroupNorm


class Film(nn.Module):
    """Scale and shift of each channel from a vector (FiLM, arXiv 1709.07871); it begins as the identity."""

    def __init__(self, words: int, channels: int) -> None:
        super().__init__()
        self.net = nn.Linear(words, 2 * channels)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, x_BC: Tensor, words_BD: Float[Tensor, "B D"]) -> Tensor:
        """Return ``x_BC``, of any further axes, modulated."""
        scale_BC, shift_BC = self.net(words_BD).chunk(2, dim=1)
        further = (1,) * (x_BC.ndim - 2)
        return x_BC * (1 + scale_BC.unflatten(1, (-1, *further))) + shift_BC.unflatten(1, (-1, *further))


class ImageEncoder(nn.Module, ABC):
    """Maps pictures to a grid of features. No BatchNorm: the likelihood path must be a function of one observation.

    Attributes:
        channels: C of the grid.
    """

    channels: int

    @abstractmethod
    def forward(
        self, picture_B3hw: Float[Tensor, "B 3 h w"], words_BD: Float[Tensor, "B D"] | None = None
    ) -> Float[Tensor, "B C y x"]:
        """Return the grid.

        Args:
            picture_B3hw: RGB in [-1, 1].
            words_BD: embedding of the instruction, for encoders that were built with ``words``.
        """


@dataclass(frozen=True)
class ImageEncoderConfig(draccus.ChoiceRegistry):
    """Base of the image encoders' configs."""

    def build(self, size: tuple[int, int], words: int = 0) -> ImageEncoder:
        """Build the encoder.

        Args:
            size: height and width of the pictures it gets.
            words: size of the instruction's embedding that modulates it (0: none does).
        """
        raise TypeError(f"{type(self).__name__} builds no image encoder")


def discover_encoders() -> None:
    """Import every module of this package, so that its configs are registered."""
    import vla_rl.encoders

    for module in pkgutil.iter_modules(vla_rl.encoders.__path__):
        importlib.import_module(f"vla_rl.encoders.{module.name}")
