"""Run a policy's denoising chain with noise, keep it, and say how likely it is: the policy as an inner decision process.

State (x_k, k, condition), inner action x_{k+1}, a Gaussian (DPPO, arXiv 2409.00588; RL-100, 2510.14830). Only the executed steps of
a chunk have a likelihood: the others never reach the environment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_rl.kernels import Kernel, Transition
from vla_rl.policies.base import ChunkPolicy


@dataclass(frozen=True)
class Chain:
    """States of B chains and the log-densities that their steps had when they were drawn.

    x_BKHA: K + 1 states, the last one is the chunk
    log_prob_BKH: of the trained steps (``kernel.trained``), summed over A; the executed action steps only
    """

    x_BKHA: Float[Tensor, "B K1 H A"]
    log_prob_BKH: Float[Tensor, "B Kt He"]

    @property
    def chunk(self) -> Float[Tensor, "B H A"]:
        """The actions, in normalised units."""
        return self.x_BKHA[:, -1]

    def rows(self, index: Tensor | slice) -> Chain:
        """Return some of the chains."""
        return Chain(self.x_BKHA[index], self.log_prob_BKH[index])


def transition(
    policy: ChunkPolicy,
    kernel: Kernel,
    condition_BOD: Float[Tensor, "B O D"],
    x_BHA: Float[Tensor, "B H A"],
    k_B: Int[Tensor, " B"],
) -> Transition:
    """The Gaussian of step k of each row."""
    tau_BH = kernel.tau_K[k_B][:, None].expand(x_BHA.shape[:2])
    output_BHA = policy.net(x_BHA, tau_BH, condition_BOD)
    action_BHA, noise_BHA = policy.estimates(x_BHA, output_BHA, *kernel.levels(k_B))
    return kernel.transition(x_BHA, action_BHA, noise_BHA, k_B, condition_BOD)


def step_log_prob(
    policy: ChunkPolicy,
    kernel: Kernel,
    condition_BOD: Float[Tensor, "B O D"],
    x_BHA: Float[Tensor, "B H A"],
    next_BHA: Float[Tensor, "B H A"],
    k_B: Int[Tensor, " B"],
) -> Float[Tensor, "B He"]:
    """Log-density of each executed action step of x_{k+1}, summed over A."""
    steps = policy.config.execute_steps
    density_BHA = transition(policy, kernel, condition_BOD, x_BHA, k_B).log_prob(next_BHA)
    return density_BHA[:, :steps].sum(-1)


@torch.no_grad()
def sample_chain(
    policy: ChunkPolicy, kernel: Kernel, condition_BOD: Float[Tensor, "B O D"], noise_KBHA: Float[Tensor, "K1 B H A"]
) -> Chain:
    """Draw chains; the same noise gives the same chains.

    Args:
        policy: the policy.
        kernel: of the policy.
        condition_BOD: what it sees.
        noise_KBHA: K + 1 standard normal tensors: the start, and each step's noise.
    """
    x_BHA = noise_KBHA[0]
    states, densities = [x_BHA], []
    for k in range(kernel.steps):
        k_B = torch.full((len(x_BHA),), k, device=x_BHA.device)
        step = transition(policy, kernel, condition_BOD, x_BHA, k_B)
        x_BHA = step.sample(noise_KBHA[k + 1])
        states.append(x_BHA)
        if k in kernel.trained:
            densities.append(step.log_prob(x_BHA)[:, : policy.config.execute_steps].sum(-1))
    return Chain(torch.stack(states, 1), torch.stack(densities, 1))


def log_ratio(
    new_BH: Float[Tensor, "B H"],
    old_BH: Float[Tensor, "B H"],
    executed_BH: Bool[Tensor, "B H"],
    reduction: str,
    action_dim: int,
) -> Float[Tensor, "B R"]:
    """Log of the likelihood ratio of a step of the chain, reduced over the executed action steps.

    joint: over all of them, R = 1 (RL-100); action_step: one ratio each, R = H; mean: per dimension, R = 1 (DPPO's geometric mean).
    """
    difference_BH = (new_BH - old_BH) * executed_BH
    if reduction == "action_step":
        return difference_BH
    total_B1 = difference_BH.sum(1, keepdim=True)
    if reduction == "joint":
        return total_B1
    return total_B1 / (action_dim * executed_BH.sum(1, keepdim=True).clamp_min(1))
