"""E independent MLPs evaluated at once: critics and dynamics models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class EnsembleLinear(nn.Module):
    """E linear layers, each initialised on its own as ``nn.Linear`` is."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x_EBD: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return (E, B, outputs), of the chosen members only where some are chosen."""
        if chosen is None:
            return torch.baddbmm(self.bias, x_EBD, self.weight)
        return torch.baddbmm(self.bias[chosen], x_EBD, self.weight[chosen])


class EnsembleMLP(nn.Module):
    """E MLPs with LayerNorm (per member, without scale) and an activation between their layers; the same input for all, or one each."""

    def __init__(
        self,
        members: int,
        inputs: int,
        widths: Sequence[int],
        outputs: int,
        activation: Callable[[Tensor], Tensor] = functional.silu,
    ) -> None:
        super().__init__()
        self.members = members
        self.activation = activation
        sizes = [inputs, *widths, outputs]
        self.layers = nn.ModuleList(EnsembleLinear(members, a, b) for a, b in itertools.pairwise(sizes))

    def forward(
        self, x: Float[Tensor, "... B D"], chosen: Int[Tensor, " C"] | None = None
    ) -> Float[Tensor, "E B Dout"]:
        """Return each member's output.

        Args:
            x: (B, D) for all members, or (E, B, D).
            chosen: numbers of the members that are asked (None: all).
        """
        members = self.members if chosen is None else len(chosen)
        x_EBD = x.expand(members, *x.shape) if x.ndim == 2 else x
        for layer in self.layers[:-1]:
            x_EBD = layer(x_EBD, chosen)
            x_EBD = self.activation(functional.layer_norm(x_EBD, x_EBD.shape[-1:]))
        return self.layers[-1](x_EBD, chosen)
