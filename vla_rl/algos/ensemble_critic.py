"""TD error of an ensemble of scalar critics: each member on its own, min of a random subset in the target (REDQ, arXiv 2101.05982).

Differs from the released code of ResFiT, whose loss is the square of the mean error and so couples the members.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.nets.step_critics import EnsembleCritic


def td_loss(
    critic: EnsembleCritic,
    x_BD: Float[Tensor, "B D"],
    following_CBF: Float[Tensor, "C B 1"],
    reward_B: Float[Tensor, " B"],
    discount_B: Float[Tensor, " B"],
    return_range: tuple[float, float],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean over members and rows of (Q - y)^2, y = clamp(R + gamma^m min_subset Q').

    Args:
        critic: learns.
        x_BD: its inputs.
        following_CBF: what a random subset of its slow copy's members says of the inputs after m steps.
        reward_B: R, over m steps.
        discount_B: gamma^m, zero at a terminal state.
        return_range: lowest and highest return there can be.
        generator: not needed here.
    """
    with torch.no_grad():
        next_B = following_CBF[..., 0].min(0).values
        goal_B = (reward_B + discount_B * next_B).clamp(*return_range)
    return (critic(x_BD) - goal_B).square().mean()
