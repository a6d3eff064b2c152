"""Diffusion policy (arXiv 2303.04137) on the schedulers of diffusers: DDPM and DDIM; epsilon, sample or v prediction.

Differs: noise time is given to the net as tau = 1 - (t + 1) / T (0 noise, 1 action) per action step; all noise of the chain is an
argument; steps are spaced "trailing", so that sampling starts where training ended, at pure noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float
from torch import Tensor

from vla_rl.data.windows import WindowBatch
from vla_rl.kernels import Grid, Kernel, KernelConfig, LearnedKernel, MarginalKernel, ddim_std
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.flow import hold_prefix
from vla_rl.policies.records import Draw, Generated, PolicySpec, Prefix
from vla_rl.runtime.errors import UserError


@PolicyConfig.register_subclass("diffusion")
@dataclass(frozen=True)
class DiffusionConfig(PolicyConfig):
    """Scheduler of the chain.

    train_steps: T, steps of the forward process
    sample_steps: steps of the sampler
    sampler: ddpm or ddim
    prediction: what the net predicts: epsilon (the noise), sample (the action) or v
    eta: noise of DDIM, 0 deterministic
    """

    train_steps: int = 100
    sample_steps: int = 10
    sampler: Literal["ddpm", "ddim"] = "ddim"
    prediction: Literal["epsilon", "sample", "v"] = "epsilon"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.sample_steps <= self.train_steps:
            raise ValueError(f"sample_steps wants 1 to train_steps = {self.train_steps}, got {self.sample_steps}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta wants a number in [0, 1], got {self.eta}")

    def build(self, spec: PolicySpec) -> DiffusionPolicy:
        """Build the policy."""
        return DiffusionPolicy(self, spec)


class MeanDDPMScheduler(DDPMScheduler):
    """DDPM whose step returns the posterior mean; ``posterior_std`` gives the noise level to add."""

    def _get_variance(self, t: int, predicted_variance: Any = None, variance_type: Any = None) -> Tensor:
        return torch.zeros(())

    def posterior_std(self, t: int) -> Tensor:
        """Standard deviation of p(x_{t-1} | x_t), eq. 7 of arXiv 2006.11239; zero at the last step."""
        return super()._get_variance(t).sqrt() if t > 0 else torch.zeros(())


class DiffusionPolicy(ChunkPolicy):
    """Predicts the noise, the action or v, at integer noise steps t (T - 1 noise, 0 action)."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, spec: PolicySpec) -> None:
        super().__init__(config, spec)
        arguments = {
            "num_train_timesteps": config.train_steps,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction" if config.prediction == "v" else config.prediction,
            "clip_sample": True,
            "timestep_spacing": "trailing",
        }
        self.ddpm = MeanDDPMScheduler(**arguments)
        self.ddim = DDIMScheduler(**arguments)
        for scheduler in (self.ddpm, self.ddim):
            scheduler.set_timesteps(config.sample_steps)
        self._timesteps = [(int(t), float(self._tau(t))) for t in self.ddim.timesteps]

    def denoising_error(self, batch: WindowBatch, draw: Draw, condition_BOD: Tensor) -> Float[Tensor, "B H"]:
        """Denoising error (eq. 14 of arXiv 2006.11239) of each action step."""
        action_BHA = self.normalize_action(batch.action_BHA, batch.observation)
        t_B = (draw.uniform_B * self.config.train_steps).long()
        noisy_BHA = self.ddpm.add_noise(action_BHA, draw.noise_BHA, t_B)
        x_BHA = torch.where(draw.prefix_BH[..., None], action_BHA, noisy_BHA)
        tau_BH = torch.where(draw.prefix_BH, 1.0, self._tau(t_B)[:, None])
        target_BHA = {
            "epsilon": lambda: draw.noise_BHA,
            "sample": lambda: action_BHA,
            "v": lambda: self.ddpm.get_velocity(action_BHA, draw.noise_BHA, t_B),
        }[self.config.prediction]()
        output_BHA = self.net(x_BHA, tau_BH, condition_BOD)
        return (output_BHA - target_BHA).square().mean(-1)

    def _tau(self, t: Tensor) -> Tensor:
        return 1.0 - (t + 1.0) / self.config.train_steps

    def grid(self, steps: int = 0) -> Grid:
        """Levels of evenly spaced timesteps, and the clean action after them."""
        train, sample = self.config.train_steps, steps or self.config.sample_steps
        if train % sample:
            raise UserError(f"a chain of even steps wants a divisor of train_steps = {train}, got {sample} steps")
        timestep_K = torch.arange(train, 0, -(train // sample)) - 1
        level_K = self.ddim.alphas_cumprod[timestep_K].double()
        level_K1 = torch.cat([level_K, torch.ones(1, dtype=torch.float64)])
        tau_K = self._tau(timestep_K.float())
        return Grid(level_K1.sqrt().float(), (1 - level_K1).sqrt().float(), tau_K)

    def make_kernel(self, config: KernelConfig) -> Kernel:
        """Ddim (also auto), ddpm or learned."""
        grid = self.grid()
        if config.kind in ("auto", "ddim"):
            return MarginalKernel(config, grid, ddim_std(grid, config.noise_scale))
        if config.kind == "ddpm":
            return MarginalKernel(config, grid, ddim_std(grid, 1.0), posterior=True)
        if config.kind == "learned":
            return LearnedKernel(config, grid, self.condition_dim, self.chunk_shape)
        raise UserError(f"a diffusion policy wants the kernel ddim, ddpm or learned, got {config.kind!r}")

    def estimates(
        self, x_BHA: Tensor, output_BHA: Tensor, signal_B11: Tensor, noise_B11: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As diffusers: the action is clipped to [-1, 1], the noise is what the net says."""
        signal, noise = signal_B11, noise_B11
        if self.config.prediction == "epsilon":
            epsilon_BHA, action_BHA = output_BHA, (x_BHA - noise * output_BHA) / signal
        elif self.config.prediction == "sample":
            epsilon_BHA, action_BHA = (x_BHA - signal * output_BHA) / noise, output_BHA
        else:
            epsilon_BHA, action_BHA = signal * output_BHA + noise * x_BHA, signal * x_BHA - noise * output_BHA
        return action_BHA.clamp(-1.0, 1.0), epsilon_BHA

    @property
    def noise_count(self) -> int:
        """The start of the chain, and each step's noise where the sampler is stochastic."""
        stochastic = self.config.sampler == "ddpm" or self.config.eta > 0
        return 1 + (self.config.sample_steps if stochastic else 0)

    def generate(self, condition_BOD: Tensor, noise_KBHA: Tensor, prefix: Prefix | None) -> Generated:
        """Run the reverse chain."""
        x_BHA, fixed_BH = hold_prefix(noise_KBHA[0], prefix)
        clean_BHA, hidden = x_BHA, x_BHA
        for k, (t, tau) in enumerate(self._timesteps):
            tau_BH = torch.where(fixed_BH, 1.0, tau)
            hidden = self.net.hidden(x_BHA, tau_BH, condition_BOD)
            output_BHA = self.net.output(hidden)
            if self.config.sampler == "ddpm":
                x_BHA = self.ddpm.step(output_BHA, t, x_BHA).prev_sample
                x_BHA = x_BHA + self.ddpm.posterior_std(t) * noise_KBHA[k + 1]
            else:
                noise = noise_KBHA[k + 1] if self.config.eta > 0 else None
                x_BHA = self.ddim.step(
                    output_BHA,
                    t,
                    x_BHA,
                    eta=self.config.eta,
                    variance_noise=noise,
                ).prev_sample
            x_BHA = torch.where(fixed_BH[..., None], clean_BHA, x_BHA)
        return Generated(x_BHA, self.net.features(hidden))
