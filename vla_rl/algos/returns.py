"""Returns over policy decisions: a decision runs up to H control steps and its reward and discount count the steps it really ran."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def generalized_advantage(
    reward_TN: Float[Tensor, "T N"],
    steps_TN: Int[Tensor, "T N"],
    terminated_TN: Bool[Tensor, "T N"],
    ended_TN: Bool[Tensor, "T N"],
    value_TN: Float[Tensor, "T N"],
    next_value_TN: Float[Tensor, "T N"],
    discount: float,
    gae_lambda: float,
) -> Float[Tensor, "T N"]:
    """GAE (arXiv 1506.02438, eq. 16) of each decision.

    Args:
        reward_TN: discounted inside the decision.
        steps_TN: control steps n that the decision ran; the next value counts gamma^n.
        terminated_TN: the task ended; nothing follows.
        ended_TN: terminated, timed out or cut: credit does not flow back over it.
        value_TN: of the observation decided on.
        next_value_TN: of the true observation after the decision, also at a time-out.
        discount: gamma per control step.
        gae_lambda: lambda per decision.
    """
    discount_TN = discount**steps_TN * ~terminated_TN
    delta_TN = reward_TN + discount_TN * next_value_TN - value_TN
    advantage_TN = torch.zeros_like(delta_TN)
    following_N = torch.zeros_like(delta_TN[0])
    for t in reversed(range(len(delta_TN))):
        following_N = delta_TN[t] + discount_TN[t] * gae_lambda * ~ended_TN[t] * following_N
        advantage_TN[t] = following_N
    return advantage_TN
