"""Rectified-flow policy: a velocity field carries noise (tau = 0) to actions (tau = 1) on straight lines.

Flow matching: arXiv 2210.02747, 2209.03003. Differs: every action step has its own tau, so that a clean prefix can be
conditioned on (as in Diffusion Forcing, arXiv 2407.01392).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vla_rl.data.windows import WindowBatch
from vla_rl.kernels import Grid, Kernel, KernelConfig, LearnedKernel, MarginalKernel, SDEKernel, cps_std
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.records import Draw, Generated, PolicySpec, Prefix
from vla_rl.runtime.errors import UserError


@PolicyConfig.register_subclass("flow")
@dataclass(frozen=True)
class FlowConfig(PolicyConfig):
    """Integration of the ODE.

    sample_steps: integration steps
    solver: euler (one net call per step) or midpoint (two)
    """

    sample_steps: int = 10
    solver: Literal["euler", "midpoint"] = "euler"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_steps < 1:
            raise ValueError(f"sample_steps wants at least 1, got {self.sample_steps}")

    def build(self, spec: PolicySpec) -> FlowPolicy:
        """Build the policy."""
        return FlowPolicy(self, spec)


def interpolate(
    noise_BHA: Float[Tensor, "B H A"], action_BHA: Float[Tensor, "B H A"], tau_BH: Float[Tensor, "B H"]
) -> Float[Tensor, "B H A"]:
    """The point at tau on the straight line from noise to action."""
    tau_BH1 = tau_BH[..., None]
    return (1 - tau_BH1) * noise_BHA + tau_BH1 * action_BHA


class FlowPolicy(ChunkPolicy):
    """Predicts the velocity d x / d tau = action - noise."""

    config: FlowConfig

    def denoising_error(self, batch: WindowBatch, draw: Draw, condition_BOD: Tensor) -> Float[Tensor, "B H"]:
        """Flow-matching error (eq. 1 of arXiv 2209.03003) of each action step."""
        action_BHA = self.normalize_action(batch.action_BHA, batch.observation)
        tau_BH = torch.where(draw.prefix_BH, 1.0, draw.uniform_B[:, None])
        x_BHA = interpolate(draw.noise_BHA, action_BHA, tau_BH)
        velocity_BHA = self.net(x_BHA, tau_BH, condition_BOD)
        return (velocity_BHA - (action_BHA - draw.noise_BHA)).square().mean(-1)

    def grid(self, steps: int = 0) -> Grid:
        """Tau = 0, 1/K, ... 1: Euler's steps."""
        if not steps and self.config.solver != "euler":
            raise UserError(f"a chain of Gaussian steps wants the solver euler, got {self.config.solver!r}")
        tau_K1 = torch.linspace(0.0, 1.0, (steps or self.config.sample_steps) + 1)
        return Grid(tau_K1, 1 - tau_K1, tau_K1[:-1])

    def make_kernel(self, config: KernelConfig) -> Kernel:
        """Cps (also auto), sde or learned."""
        grid = self.grid()
        if config.kind in ("auto", "cps"):
            return MarginalKernel(config, grid, cps_std(grid, config.noise_scale))
        if config.kind == "sde":
            return SDEKernel(config, grid)
        if config.kind == "learned":
            return LearnedKernel(config, grid, self.condition_dim, self.chunk_shape)
        raise UserError(f"a flow policy wants the kernel cps, sde or learned, got {config.kind!r}")

    def estimates(
        self, x_BHA: Tensor, output_BHA: Tensor, signal_B11: Tensor, noise_B11: Tensor
    ) -> tuple[Tensor, Tensor]:
        """X is on the line from noise to action, which the velocity points along."""
        return x_BHA + noise_B11 * output_BHA, x_BHA - signal_B11 * output_BHA

    @property
    def noise_count(self) -> int:
        """The start of the ODE."""
        return 1

    def generate(self, condition_BOD: Tensor, noise_KBHA: Tensor, prefix: Prefix | None) -> Generated:
        """Integrate the ODE from tau = 0 to 1."""
        x_BHA, fixed_BH = hold_prefix(noise_KBHA[0], prefix)
        step, hidden = 1.0 / self.config.sample_steps, x_BHA
        step_BH1 = torch.where(fixed_BH, 0.0, step)[..., None]
        for k in range(self.config.sample_steps):
            tau, from_BHA = k * step, x_BHA
            if self.config.solver == "midpoint":
                velocity_BHA = self.net.output(self.net.hidden(x_BHA, torch.where(fixed_BH, 1.0, tau), condition_BOD))
                tau, from_BHA = tau + step / 2, x_BHA + step_BH1 / 2 * velocity_BHA
            hidden = self.net.hidden(from_BHA, torch.where(fixed_BH, 1.0, tau), condition_BOD)
            x_BHA = x_BHA + step_BH1 * self.net.output(hidden)
        return Generated(x_BHA, self.net.features(hidden))


def hold_prefix(x_BHA: Tensor, prefix: Prefix | None) -> tuple[Tensor, Bool[Tensor, "B H"]]:
    """Put what a prefix has decided over the first steps of a chunk; return it and which steps are held (one row for all if none)."""
    if prefix is None:
        return x_BHA, torch.zeros(1, x_BHA.shape[1], dtype=torch.bool, device=x_BHA.device)
    return torch.where(prefix.mask()[..., None], prefix.action_BHA, x_BHA), prefix.mask()
