"""Transformer decoder over the chunk's steps that attends to the observation steps, as DP-T (arXiv 2303.04137).

Differs: the noise time is added to each action token instead of being a token of its own, so that it may differ per step; no
dropout (the likelihood path must be a function); no causal mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_rl.nets.base import DenoiserNet, NetConfig, repeat_to
from vla_rl.nets.embed import TimeEmbedding

POSITION_STD = 0.02


@NetConfig.register_subclass("transformer")
@dataclass(frozen=True)
class TransformerConfig(NetConfig):
    """Size of the transformer.

    width: of the tokens
    depth: decoder layers
    heads: attention heads, a divisor of width
    """

    width: int = 64
    depth: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1 or self.heads < 1 or self.width % self.heads:
            raise ValueError(f"a transformer wants a width that its heads divide, got {self.width} and {self.heads}")

    def build(
        self, *, action_dim: int, chunk_steps: int, observation_steps: int, condition_dim: int, jumps: bool = False
    ) -> TransformerNet:
        """Build the net."""
        return TransformerNet(self, action_dim, chunk_steps, observation_steps, condition_dim, jumps)


class TransformerNet(DenoiserNet):
    """Action tokens attend to one another and to one token per observation step."""

    def __init__(
        self,
        config: TransformerConfig,
        action_dim: int,
        chunk_steps: int,
        observation_steps: int,
        condition_dim: int,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        width = config.width
        self.feature_dim = 2 * width
        self.time = TimeEmbedding(width, jumps)
        self.enter = nn.Linear(action_dim, width)
        self.observe = nn.Sequential(nn.Linear(condition_dim, 2 * width), nn.Mish(), nn.Linear(2 * width, width))
        self.position_HD = nn.Parameter(POSITION_STD * torch.randn(chunk_steps, width))
        self.position_OD = nn.Parameter(POSITION_STD * torch.randn(observation_steps, width))
        layer = nn.TransformerDecoderLayer(
            width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.depth, norm=nn.LayerNorm(width))
        self.leave = nn.Linear(width, action_dim)

    def hidden(self, x_BHA: Tensor, tau_BH: Tensor, condition_BOD: Tensor, jump_BH: Tensor | None = None) -> Tensor:
        """See ``DenoiserNet``: (B, H, width)."""
        memory_BOD = repeat_to(self.observe(condition_BOD) + self.position_OD, x_BHA)
        token_BHD = self.enter(x_BHA) + self.time(tau_BH, jump_BH) + self.position_HD[: x_BHA.shape[1]]
        return self.decoder(token_BHD, memory_BOD)

    def output(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``."""
        return self.leave(hidden)

    def features(self, hidden: Tensor) -> Tensor:
        """See ``DenoiserNet``: the first token, which sees all others (TACO), and their mean."""
        return torch.cat([hidden[:, 0], hidden.mean(1)], dim=1)
