"""ResNet-18 (arXiv 1512.03385) with GroupNorm in place of BatchNorm everywhere, as Diffusion Policy (2303.04137) uses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet18

from vla_rl.encoders.base import Film, ImageEncoder, ImageEncoderConfig
from vla_rl.runtime.errors import UserError

CHANNELS_PER_GROUP = 16
STAGES = (64, 128, 256, 512)


@ImageEncoderConfig.register_subclass("resnet18")
@dataclass(frozen=True)
class ResNet18Config(ImageEncoderConfig):
    """Where its weights begin.

    weights: safetensors file with torchvision's names, read when a fresh policy is built (none: random weights). R3M's and ImageNet's are
        of a net with BatchNorm: convolutions are taken over, norms begin anew
    """

    weights: Path | None = None

    def build(self, size: tuple[int, int], words: int = 0) -> ResNet18:
        """Build the encoder; raises UserError where ``weights`` names no such file."""
        encoder = ResNet18(words)
        if self.weights is not None:
            encoder.load_convolutions(self.weights)
        return encoder


class ResNet18(ImageEncoder):
    """The trunk; FiLM after each stage where there are words."""

    channels = STAGES[-1]

    def __init__(self, words: int) -> None:
        super().__init__()
        net = resnet18(weights=None, norm_layer=lambda c: nn.GroupNorm(c // CHANNELS_PER_GROUP, c))
        self.enter = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.film = nn.ModuleList(Film(words, c) for c in STAGES) if words else None

    def load_convolutions(self, path: Path) -> None:
        """Take the convolutions of a torchvision ResNet-18; raises UserError where they are not there."""
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"encoder.image.weights names {str(path)!r}, which is no safetensors file here ({error}); leave it out for random weights"
            ) from error
        names = {"conv1.": "enter.0."} | {f"layer{i + 1}.": f"stages.{i}." for i in range(len(STAGES))}
        renamed: dict[str, Tensor] = {}
        for old, new in names.items():
            renamed |= {new + k.removeprefix(old): v for k, v in found.items() if k.startswith(old)}
        mine = self.state_dict()
        wanted = [k for k, v in mine.items() if v.ndim == 4]
        missing = [k for k in wanted if k not in renamed or renamed[k].shape != mine[k].shape]
        if missing:
            raise UserError(
                f"{path} lacks {missing[0]!r} of a ResNet-18 (torchvision's names); it has {len(found)} tensors"
            )
        self.load_state_dict({k: renamed[k] for k in wanted}, strict=False)

    def forward(self, picture_B3hw: Tensor, words_BD: Tensor | None = None) -> Tensor:
        """See ``ImageEncoder``."""
        x = self.enter(picture_B3hw)
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if self.film is not None and words_BD is not None:
                x = self.film[index](x, words_BD)
        return x
