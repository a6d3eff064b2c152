"""Crops, shifts and light changes of pictures in training; every picture of a sample's history is changed alike.

All randomness comes in as numbers in [0, 1). Crops as Diffusion Policy's (arXiv 2303.04137), shifts as DrQ's (2004.13649).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

DRAWS = 5  # numbers per camera and sample: row, column, brightness, contrast, saturation
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class AugmentConfig:
    """How far.

    crop: pixels that are cut off each side length; training cuts at random, all else in the middle
    shift: pixels by which a picture is shifted at most, its edge repeated
    brightness: largest change, as a share
    contrast: likewise
    saturation: likewise
    """

    crop: int = 0
    shift: int = 4
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        if min(self.crop, self.shift) < 0 or not all(
            0 <= v < 1 for v in (self.brightness, self.contrast, self.saturation)
        ):
            raise ValueError(
                "crop and shift want pixels >= 0, brightness, contrast and saturation shares in [0, 1), got "
                f"{self.crop}, {self.shift}, {self.brightness}, {self.contrast}, {self.saturation}"
            )


def to_float(picture: UInt8[Tensor, "*B 3 h w"]) -> Float[Tensor, "*B 3 h w"]:
    """Bytes to [-1, 1]."""
    return picture.float().mul_(2 / 255).sub_(1)


def centre_crop(picture: Tensor, crop: int) -> Tensor:
    """Cut off ``crop`` pixels of each side length, half of them at each end."""
    if not crop:
        return picture
    height, width = picture.shape[-2:]
    top = crop // 2
    return picture[..., top : top + height - crop, top : top + width - crop]


def augment(
    picture_BO3hw: UInt8[Tensor, "B O 3 h w"], uniform_BU: Float[Tensor, "B U"], config: AugmentConfig
) -> Float[Tensor, "B O 3 y x"]:
    """Cut, shift and change the light of each sample's pictures; in [-1, 1].

    Args:
        picture_BO3hw: histories of one camera.
        uniform_BU: ``DRAWS`` numbers in [0, 1) for each sample.
        config: how far.
    """
    moved = to_float(_moved(picture_BO3hw, uniform_BU, config))
    changes = config.brightness, config.contrast, config.saturation
    if not any(changes):
        return moved
    factor_B3 = 1 + (2 * uniform_BU[:, 2:DRAWS] - 1) * torch.tensor(changes, device=uniform_BU.device)
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1, 1) for f in factor_B3.unbind(1))
    light = (moved + 1) / 2 * brightness
    grey = (light * torch.tensor(GREY, device=light.device).view(3, 1, 1)).sum(2, keepdim=True)
    mean = grey.mean((-2, -1), keepdim=True)
    light = torch.lerp(grey, light, saturation)
    return (torch.lerp(mean.expand_as(light), light, contrast).clamp(0, 1)) * 2 - 1


def _moved(picture_BO3hw: Tensor, uniform_BU: Tensor, config: AugmentConfig) -> Tensor:
    """Cut and shift: whole pixels, by slices."""
    if not config.crop and not config.shift:
        return picture_BO3hw
    source, pad = picture_BO3hw, config.shift
    if pad:
        flat = source.flatten(0, 1)
        rows = torch.arange(-pad, flat.shape[-2] + pad, device=flat.device).clamp(0, flat.shape[-2] - 1)
        columns = torch.arange(-pad, flat.shape[-1] + pad, device=flat.device).clamp(0, flat.shape[-1] - 1)
        source = flat.index_select(-2, rows).index_select(-1, columns).unflatten(0, source.shape[:2])
    places = config.crop + 2 * pad + 1
    top_B, left_B = (uniform_BU[:, :2] * places).long().clamp_max(places - 1).cpu().numpy().T
    height, width = (side - config.crop for side in picture_BO3hw.shape[-2:])
    if source.device.type == "cpu":  # numpy's copies cost a tenth of torch's calls
        whole = source.numpy()
        made = np.empty((*whole.shape[:3], height, width), np.uint8)
        for row, (top, left) in enumerate(zip(top_B.tolist(), left_B.tolist(), strict=True)):
            made[row] = whole[row, :, :, top : top + height, left : left + width]
        return torch.from_numpy(made)
    cut = [
        s[..., t : t + height, x : x + width] for s, t, x in zip(source, top_B.tolist(), left_B.tolist(), strict=True)
    ]
    return torch.stack(cut)
