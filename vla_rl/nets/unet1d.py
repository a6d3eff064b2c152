"""Conditional 1-D U-Net over the chunk's steps, as in Diffusion Policy (arXiv 2303.04137), with a noise time per step.

Differs: the noise time is embedded per action step and pooled to each level's resolution, so that a clean prefix can be told
from the noisy rest; chunks whose length is no multiple of the strides are padded inside.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.nets.base import DenoiserNet, NetConfig, repeat_to
from vla_rl.nets.embed import TimeEmbedding

GROUPS = 8


@NetConfig.register_subclass("unet1d")
@dataclass(frozen=True)
class UNet1DConfig(NetConfig):
    """Size of the U-Net.

    channels: of each level, each level halving the time resolution
    kernel: width of the convolutions
    time_dim: size of the noise-time embedding
    """

    channels: tuple[int, ...] = (32, 64, 128)
    kernel: int = 5
    time_dim: int = 64

    def __post_init__(self) -> None:
        if not self.channels or any(c % GROUPS or c < GROUPS for c in self.channels):
            raise ValueError(f"channels of a unet1d want multiples of {GROUPS}, got {self.channels}")
        if self.kernel % 2 == 0 or self.kernel < 1:
            raise ValueError(f"kernel of a unet1d wants an odd number, got {self.kernel}")
        if self.time_dim < 4:
            raise ValueError(f"time_dim of a unet1d wants at least 4, got {self.time_dim}")

    def build(
        self, *, action_dim: int, chunk_steps: int, observation_steps: int, condition_dim: int, jumps: bool = False
    ) -> UNet1D:
        """Build the net."""
        return UNet1D(self, action_dim, observation_steps * condition_dim, jumps)


class FilmBlock(nn.Module):
    """Two convolutions with GroupNorm; scale and shift from the condition between them, and a residual path."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(GROUPS, outputs), nn.Mish()
        )
        self.film = nn.Conv1d(condition_dim, 2 * outputs, 1)
        self.second = nn.Sequential(
            nn.Conv1d(outputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(GROUPS, outputs), nn.Mish()
        )
        self.residual = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCT: Tensor, condition_BDT: Tensor) -> Tensor:
        """Return (B, outputs, T)."""
        scale_BCT, shift_BCT = self.film(functional.mish(condition_BDT)).chunk(2, dim=1)
        return self.second(self.first(x_BCT) * (1 + scale_BCT) + shift_BCT) + self.residual(x_BCT)


class UNet1D(DenoiserNet):
    """Down, middle, up with skip connections."""

    def __init__(self, config: UNet1DConfig, action_dim: int, flat_condition_dim: int, jumps: bool = False) -> None:
        super().__init__()
        self.feature_dim = 2 * config.channels[0]
        self.time = TimeEmbedding(config.time_dim, jumps)
        condition_dim = config.time_dim + flat_condition_dim
        widths = config.channels
        self.multiple = 2 ** (len(widths) - 1)
        self.enter = nn.Conv1d(action_dim, widths[0], 1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        self.upsample = nn.ModuleList()
        self.up = nn.ModuleList()
        for shallow, deep in itertools.pairwise(widths):
            self.down.append(FilmBlock(shallow, shallow, condition_dim, config.kernel))
            self.downsample.append(nn.Conv1d(shallow, deep, 3, stride=2, padding=1))
            self.upsample.append(nn.ConvTranspose1d(deep, shallow, 4, stride=2, padding=1))
            self.up.append(FilmBlock(2 * shallow, shallow, condition_dim, config.kernel))
        self.middle = FilmBlock(widths[-1], widths[-1], condition_dim, config.kernel)
        self.leave = nn.Sequential(
            nn.Conv1d(widths[0], widths[0], config.kernel, padding=config.kernel // 2),
            nn.GroupNorm(GROUPS, widths[0]),
            nn.Mish(),
            nn.Conv1d(widths[0], action_dim, 1),
        )

    def hidden(self, x_BHA: Tensor, tau_BH: Tensor, condition_BOD: Tensor, jump_BH: Tensor | None = None) -> Tensor:
        """See ``DenoiserNet``: (B, C, H)."""
        steps = x_BHA.shape[1]
        missing = -steps % self.multiple
        time_BDT = functional.pad(
            self.time(tau_BH, jump_BH).expand(x_BHA.shape[0], -1, -1).transpose(1, 2), (0, missing), mode="replicate"
        )
        flat_BD1 = repeat_to(condition_BOD, x_BHA).flatten(1)[:, :, None]
        x_BCT = self.enter(functional.pad(x_BHA.transpose(1, 2), (0, missing), mode="replicate"))

        def condition(level: int) -> Tensor:
            pooled_BDT = functional.avg_pool1d(time_BDT, 2**level) if level else time_BDT
            return torch.cat([pooled_BDT, flat_BD1.expand(-1, -1, pooled_BDT.shape[2])], dim=1)

        conditions = [condition(level) for level in range(len(self.down) + 1)]
        skips = []
        for level, (block, shrink) in enumerate(zip(self.down, self.downsample, strict=True)):
            x_BCT = block(x_BCT, conditions[level])
            skips.append(x_BCT)
            x_BCT = shrink(x_BCT)
        x_BCT = self.middle(x_BCT, conditions[-1])
        for level in reversed(range(len(self.down))):
            x_BCT = torch.cat([self.upsample[level](x_BCT), skips[level]], dim=1)
            x_BCT = self.up[level](x_BCT, conditions[level])
        convolve, normalize, activate, _ = self.leave
        return activate(normalize(convolve(x_BCT)))[:, :, :steps]

    def output(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``."""
        return self.leave[3](hidden).transpose(1, 2)

    def features(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``: the first step, and the mean of all."""
        return torch.cat([hidden[:, :, 0], hidden.mean(2)], dim=1)
