"""Residual MLP over the flattened chunk: the fastest of the nets on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.nets.base import DenoiserNet, NetConfig, repeat_to
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
        if min(self.width, self.depth) < 1 or self.time_dim < 4:  # fewer waves say too little of the noise time
            raise ValueError(
                f"width and depth of an mlp want at least 1, time_dim 4, got {self.width}, {self.depth}, {self.time_dim}"
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
        normalize, activate, _ = self.leave
        return activate(normalize(self.blocks(self._entered(x_BHA, self.time(tau_BH, jump_BH), condition_BOD))))

    def _entered(self, x_BHA: Tensor, time_BHD: Tensor, condition_BOD: Tensor) -> Tensor:
        """The first layer; what several rows have in common goes through it once."""
        rows, seen = x_BHA.shape[0], condition_BOD.shape[0]
        if seen == rows or time_BHD.shape[0] > 1:
            parts = x_BHA, time_BHD.expand(rows, -1, -1), repeat_to(condition_BOD, x_BHA)
            return self.enter(torch.cat([part.flatten(1) for part in parts], dim=1))
        common_BD = torch.cat([time_BHD.expand(seen, -1, -1).flatten(1), condition_BOD.flatten(1)], dim=1)
        own, common = self.enter.weight.tensor_split([x_BHA[0].numel()], dim=1)
        entered_BD = functional.linear(common_BD, common, self.enter.bias)
        return torch.addmm(repeat_to(entered_BD, x_BHA), x_BHA.flatten(1), own.T)

    def output(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``."""
        return self.leave[2](hidden).unflatten(1, self.chunk_shape)

    def features(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``: all of it."""
        return hidden
