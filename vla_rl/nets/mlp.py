"""Residual MLP over the flattened chunk: the fastest of the nets on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_rl.nets.base import DenoiserNet, NetConfig
from vla_rl.nets.embed import TimeEmbedding


@NetConfig.register_subclass("mlp")
@dataclass(frozen=True)
class MLPConfig(NetConfig):
    """Size of the MLP.

    width: hidden units
    depth: residual blocks
    time_dim: size of the noise-time embedding of one action step
    """

    width: int = 512
    depth: int = 3
    time_dim: int = 32

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.time_dim) < 1:
            raise ValueError(
                f"width, depth and time_dim of an mlp want at least 1, got {self.width}, {self.depth}, {self.time_dim}"
            )

    def build(
        self, *, action_dim: int, chunk_steps: int, observation_steps: int, condition_dim: int, jumps: bool = False
    ) -> ResidualMLP:
        """Build the net."""
        return ResidualMLP(self, action_dim, chunk_steps, observation_steps * condition_dim, jumps)


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return the block's output, (B, D)."""
        return x_BD + self.net(x_BD)


class ResidualMLP(DenoiserNet):
    """Chunk, noise times and condition flattened into one vector."""

    def __init__(
        self, config: MLPConfig, action_dim: int, chunk_steps: int, flat_condition_dim: int, jumps: bool = False
    ) -> None:
        super().__init__()
        self.feature_dim = config.width
        self.chunk_shape = (chunk_steps, action_dim)
        self.time = TimeEmbedding(config.time_dim, jumps)
        inputs = chunk_steps * (action_dim + config.time_dim) + flat_condition_dim
        self.enter = nn.Linear(inputs, config.width)
        self.blocks = nn.Sequential(*(ResidualBlock(config.width) for _ in range(config.depth)))
        self.leave = nn.Sequential(
            nn.LayerNorm(config.width), nn.SiLU(), nn.Linear(config.width, chunk_steps * action_dim)
        )

    def hidden(self, x_BHA: Tensor, tau_BH: Tensor, condition_BOD: Tensor, jump_BH: Tensor | None = None) -> Tensor:
        """See ``DenoiserNet``: (B, width)."""
        time_BHD = self.time(tau_BH, jump_BH).expand(x_BHA.shape[0], -1, -1)
        flat_BD = torch.cat([x_BHA.flatten(1), time_BHD.flatten(1), condition_BOD.flatten(1)], dim=1)
        normalize, activate, _ = self.leave
        return activate(normalize(self.blocks(self.enter(flat_BD))))

    def output(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``."""
        return self.leave[2](hidden).unflatten(1, self.chunk_shape)

    def features(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``: all of it."""
        return hidden
