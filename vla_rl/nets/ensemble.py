"""E independent MLPs evaluated at once: critics and dynamics models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class EnsembleLinear(nn.Module):
    """E linear layers, each initialised on its own as ``nn.Linear`` is."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x_EBD: Tensor) -> Tensor:
        """Return (E, B, outputs)."""
        return torch.baddbmm(self.bias, x_EBD, self.weight)


class EnsembleMLP(nn.Module):
    """E MLPs with LayerNorm (per member, without scale) and SiLU between their layers; the same input for all, or one each."""

    def __init__(self, members: int, inputs: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.members = members
        sizes = [inputs, *widths, outputs]
        self.layers = nn.ModuleList(EnsembleLinear(members, a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Float[Tensor, "... B D"]) -> Float[Tensor, "E B Dout"]:
        """Return each member's output.

        Args:
            x: (B, D) for all members, or (E, B, D).
        """
        x_EBD = x.expand(self.members, *x.shape) if x.ndim == 2 else x
        for layer in self.layers[:-1]:
            x_EBD = layer(x_EBD)
            x_EBD = functional.silu(functional.layer_norm(x_EBD, x_EBD.shape[-1:]))
        return self.layers[-1](x_EBD)
