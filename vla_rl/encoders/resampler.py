"""A few queries that read the patches of all cameras and the instruction: tokens of a fixed number, whatever is seen.

Cross-attention as in Flamingo's resampler (arXiv 2204.14198) and Octo's readouts (2405.12213), without the queries' attention to themselves
in the first layer, where they have read nothing yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

POSITION_STD = 0.02


@dataclass(frozen=True)
class ResamplerConfig:
    """Size.

    queries: tokens that are made
    depth: layers of queries that read
    heads: of the attention, a divisor of the encoder's features
    """

    queries: int = 8
    depth: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.queries, self.depth, self.heads) < 1:
            raise ValueError(
                f"queries, depth and heads want at least 1, got {self.queries}, {self.depth} and {self.heads}"
            )


class Resampler(nn.Module):
    """Grids of features to tokens."""

    def __init__(
        self, config: ResamplerConfig, channels: int, grids: dict[str, tuple[int, int]], features: int
    ) -> None:
        """Build.

        Args:
            config: size.
            channels: of the grids.
            grids: rows and columns of each camera's grid, by name.
            features: D of the tokens.
        """
        super().__init__()
        self.enter = nn.Linear(channels, features)
        self.position = nn.ParameterDict(
            {name: POSITION_STD * torch.randn(rows * columns, features) for name, (rows, columns) in grids.items()}
        )
        self.query_MD = nn.Parameter(POSITION_STD * torch.randn(config.queries, features))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                features, config.heads, 2 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.depth)
        )
        self.leave = nn.LayerNorm(features)

    def forward(
        self, grids: dict[str, Float[Tensor, "B C y x"]], words_BD: Float[Tensor, "B D"] | None
    ) -> Float[Tensor, "B M D"]:
        """Return the tokens."""
        seen = [self.enter(g.flatten(2).transpose(1, 2)) + self.position[name] for name, g in grids.items()]
        if words_BD is not None:
            seen.append(words_BD[:, None])
        memory_BTD = torch.cat(seen, dim=1)
        token_BMD = self.query_MD.expand(len(memory_BTD), -1, -1)
        for layer in self.layers:
            token_BMD = layer(token_BMD, memory_BTD)
        return self.leave(token_BMD)
