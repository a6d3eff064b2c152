"""How far along is a chunk: ridge regression of the discounted success that followed it in the data, on the policy's own features.

The posterior mean of the same Bayesian linear model whose posterior variance is the leverage (``vla_rl/algos/pseudo_count/leverage.py``):
closed form, nothing is trained. It judges candidates of a policy without a critic; what the data did from there is all it knows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_rl.algos.pseudo_count.leverage import Leverage, LeverageConfig
from vla_rl.data.windows import Windows

DISCOUNT = 0.99  # per control step


class ProgressHead(nn.Module):
    """A linear read-out of random features."""

    weight_D: Tensor
    mean: Tensor

    def __init__(self, feature_dim: int, config: LeverageConfig) -> None:
        super().__init__()
        self.kernel = Leverage(feature_dim, config)
        self.register_buffer("weight_D", torch.zeros(len(self.kernel.gram_DD)))
        self.register_buffer("mean", torch.tensor(0.0))

    def fit(self, features_NF: Float[Tensor, "N F"], progress_N: Float[Tensor, " N"]) -> None:
        """Solve the normal equations; raises UserError as ``PseudoCount.fit``."""
        self.kernel.fit(features_NF)
        phi_ND = self.kernel.represent(self.kernel.standardized(features_NF)).double()
        self.mean.fill_(float(progress_N.mean()))
        centred_N = progress_N.double() - progress_N.double().mean()
        self.weight_D.copy_(torch.linalg.solve(self.kernel.gram_DD, phi_ND.T @ centred_N))

    @torch.no_grad()
    def forward(self, features_MF: Float[Tensor, "M F"]) -> Float[Tensor, " M"]:
        """The expected discounted success of each row."""
        return self.kernel.represent(self.kernel.standardized(features_MF)) @ self.weight_D + self.mean


def progress_of(windows: Windows, window_W: Int[Tensor, " W"]) -> Float[Tensor, " W"]:
    """What windows of the data led to: gamma to the number of steps until success, zero where the episode failed."""
    data = windows.data
    frame_W = windows.frames_W[window_W]
    episode_W = data.frame_episode()[frame_W]
    success_E = torch.tensor(data.episodes["success"].to_numpy(bool))
    left_W = data.episode_to_E[episode_W] - 1 - frame_W
    return torch.where(success_E[episode_W], DISCOUNT ** left_W.float(), 0.0)
