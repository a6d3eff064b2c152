"""A policy's deterministic chain on the straight line from noise to action, and guided along what is already decided.

A state x = signal * action + noise * epsilon of any chain, divided by signal + noise, lies on the line x = (1 - tau) noise + tau action of
rectified flow, with the velocity action - noise. So distillation and real-time chunking are written once for diffusion and flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.flow import hold_prefix
from vla_rl.policies.records import Generated, Prefix


@dataclass(frozen=True)
class GuidanceConfig:
    """Real-time chunking by guidance (arXiv 2506.07339, eq. 1-4).

    largest_weight: beta, cap of the guidance's weight
    jacobian: exact (the paper) or identity (what LeRobot 0.4.4's code does: cheaper, no gradient)
    spread: of the data's actions (1: the paper; smaller ones lean more on the policy, as A. Soare's variant)
    """

    largest_weight: float = 5.0
    jacobian: Literal["exact", "identity"] = "exact"
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not (self.largest_weight > 0 and self.spread > 0):
            raise ValueError(
                f"largest_weight and spread want positive numbers, got {self.largest_weight} and {self.spread}"
            )


def soft_mask(fixed_B: Int[Tensor, " B"], known_B: Int[Tensor, " B"], steps: int) -> Float[Tensor, "B H"]:
    """W of eq. 5: 1 for what is decided, falling to 0 at the end of what is known of the last chunk, 0 after that."""
    index_H = torch.arange(steps, device=fixed_B.device)
    fixed_B1, known_B1 = fixed_B[:, None], known_B[:, None]
    share_BH = ((known_B1 - index_H) / (known_B1 - fixed_B1 + 1)).clamp(0.0, 1.0)
    falling_BH = share_BH * torch.expm1(share_BH) / (torch.e - 1)
    return torch.where(index_H < fixed_B1, 1.0, torch.where(index_H < known_B1, falling_BH, 0.0))


class LinearPath:
    """A policy's deterministic chain (DDIM, or Euler's steps) as states on the line from noise to action."""

    def __init__(self, policy: ChunkPolicy, steps: int = 0) -> None:
        """Set up; raises UserError for a policy without such a chain."""
        self.policy = policy
        grid = policy.grid(steps)
        self.steps = grid.steps
        self._signal_K1, self._noise_K1, self._told_K = grid.signal, grid.noise, grid.tau
        self._scale_K1 = grid.signal + grid.noise
        self.tau_K1 = grid.signal / self._scale_K1

    def estimate(
        self, x_BHA: Tensor, k_B: Tensor, condition_BOD: Tensor, fixed_BH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the net's last layer reads in step k, and the action and the noise that the policy sees in x."""
        state_BHA = torch.where(fixed_BH[..., None], x_BHA, _at(self._scale_K1, k_B) * x_BHA)
        told_BH = torch.where(fixed_BH, 1.0, _at(self._told_K, k_B)[..., 0])
        hidden = self.policy.net.hidden(state_BHA, told_BH, condition_BOD)
        levels = _at(self._signal_K1, k_B), _at(self._noise_K1, k_B)
        return hidden, *self.policy.estimates(state_BHA, self.policy.net.output(hidden), *levels)

    @torch.no_grad()
    def step(
        self,
        x_BHA: Float[Tensor, "B H A"],
        k_B: Int[Tensor, " B"],
        condition_BOD: Float[Tensor, "B O D"],
        fixed_BH: Bool[Tensor, "B H"],
    ) -> Float[Tensor, "B H A"]:
        """The state of each row after step k; what is fixed stays."""
        _, action_BHA, noise_BHA = self.estimate(x_BHA, k_B, condition_BOD, fixed_BH)
        tau_B11 = _at(self.tau_K1, k_B + 1)
        return torch.where(fixed_BH[..., None], x_BHA, (1 - tau_B11) * noise_BHA + tau_B11 * action_BHA)

    @torch.no_grad()
    def end(self, x_BHA: Tensor, k_B: Tensor, condition_BOD: Tensor, fixed_BH: Tensor) -> Float[Tensor, "B H A"]:
        """Where the chain ends that each row enters at step k."""
        for step in range(int(k_B.min()), self.steps):
            on_B = k_B <= step
            at_B = torch.full_like(k_B, step)
            x_BHA = torch.where(on_B[:, None, None], self.step(x_BHA, at_B, condition_BOD, fixed_BH), x_BHA)
        return x_BHA


def _at(table_K: Tensor, k_B: Tensor) -> Tensor:
    return table_K.to(k_B.device)[k_B].view(-1, 1, 1)


def guided_chunk(
    policy: ChunkPolicy,
    condition_BOD: Float[Tensor, "B O D"],
    noise_KBHA: Float[Tensor, "K B H A"],
    prefix: Prefix,
    config: GuidanceConfig,
) -> Generated:
    """Sample a chunk that begins as the last one goes on: inpainting by guidance, for a policy that was trained without prefixes.

    Args:
        policy: with a deterministic chain.
        condition_BOD: what it sees.
        noise_KBHA: where it starts (the first one).
        prefix: what is decided, and what the last chunk meant to do after that, in normalised units.
        config: strength.
    """
    path = LinearPath(policy)
    weight_BH1 = soft_mask(prefix.fixed_B, prefix.known_B, noise_KBHA.shape[2])[..., None]
    free_BH = torch.zeros_like(prefix.mask())
    exact = config.jacobian == "exact" and bool(weight_BH1.any())
    x_BHA, hidden = noise_KBHA[0], noise_KBHA[0]
    for k in range(path.steps):
        k_B = torch.full_like(prefix.known_B, k)
        tau, after = float(path.tau_K1[k]), float(path.tau_K1[k + 1])
        with torch.enable_grad() if exact else torch.no_grad():
            at_BHA = x_BHA.detach().requires_grad_(exact)
            hidden, action_BHA, epsilon_BHA = path.estimate(at_BHA, k_B, condition_BOD, free_BH)
            missing_BHA = (weight_BH1 * (prefix.action_BHA - action_BHA)).detach()
            if exact:
                (pull_BHA,) = torch.autograd.grad(action_BHA, at_BHA, missing_BHA)
            else:
                pull_BHA = missing_BHA
        variance = config.spread**2
        r_square = (1 - tau) ** 2 * variance / ((1 - tau) ** 2 + tau**2 * variance)
        strength = min(config.largest_weight, (1 - tau) / max(tau * r_square, 1e-9))
        landing_BHA = ((1 - after) * epsilon_BHA + after * action_BHA).detach()  # the step without guidance
        x_BHA = landing_BHA + (after - tau) * strength * pull_BHA
    held_BHA, _ = hold_prefix(x_BHA, prefix)
    return Generated(held_BHA, policy.net.features(hidden.detach()))
