"""TD error of normal return distributions with the three refinements of DSAC-T (arXiv 2310.05858).

Expected value substitution: the mean learns from the target's mean, not from a sample (eq. 19). Twin distributions: the target is that
of the member with the lower mean (eq. 20). Gradients adjusted by variance: a sampled return is clipped at xi running deviations
(eq. 21-22), and the loss is scaled by the running variance (eq. 23), so that neither depends on the scale of rewards.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.nets.step_critics import DistributionalCritic

EPSILON = 0.1  # of the scaling and of the divisors, as in the paper


def td_loss(
    critic: DistributionalCritic,
    x_BD: Float[Tensor, "B D"],
    following_CBF: Float[Tensor, "C B 2"],
    reward_B: Float[Tensor, " B"],
    discount_B: Float[Tensor, " B"],
    return_range: tuple[float, float],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Surrogate whose gradient is eq. 23's; see ``ensemble_critic.td_loss`` for the arguments (``generator``: of the sampled return)."""
    mean_EB, std_EB = critic.distribution(critic.outputs(x_BD))
    with torch.no_grad():
        next_mean_CB, next_std_CB = critic.distribution(following_CBF)
        lowest_1B = next_mean_CB.argmin(0, keepdim=True)
        next_mean_B = next_mean_CB.gather(0, lowest_1B)[0]
        next_std_B = next_std_CB.gather(0, lowest_1B)[0]
        sample_B = next_mean_B + next_std_B * torch.randn(len(next_mean_B), generator=generator)
        goal_B = (reward_B + discount_B * next_mean_B).clamp(*return_range)
        sampled_B = reward_B + discount_B * sample_B
        _track(critic.mean_std_E, std_EB.mean(1), critic.config.polyak)
        _track(critic.mean_variance_E, std_EB.square().mean(1), critic.config.polyak)
        reach_E1 = critic.config.clip * critic.mean_std_E[:, None]
        sampled_EB = sampled_B.clamp(mean_EB - reach_E1, mean_EB + reach_E1)
        variance_EB = std_EB.square()
        mean_slope_EB = (goal_B - mean_EB) / (variance_EB + EPSILON)
        std_slope_EB = ((sampled_EB - mean_EB).square() - variance_EB) / (std_EB.pow(3) + EPSILON)
        scale_E1 = critic.mean_variance_E[:, None] + EPSILON
    return -(scale_E1 * (mean_slope_EB * mean_EB + std_slope_EB * std_EB)).mean()


def _track(running_E: Tensor, newest_E: Tensor, polyak: float) -> None:
    """Move running means towards the newest batch; the first batch sets them."""
    running_E.copy_(torch.where(running_E < 0, newest_E, torch.lerp(running_E, newest_E, polyak)))
