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
from vla_rl.policies.base import ChunkPolicy, Draw, PolicyConfig, PolicySpec
from vla_rl.policies.flow import hold_prefix


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

    def error(self, batch: WindowBatch, draw: Draw) -> Float[Tensor, "B H"]:
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
        output_BHA = self.net(x_BHA, tau_BH, self.condition(batch.observation))
        return (output_BHA - target_BHA).square().mean(-1)

    def _tau(self, t: Tensor) -> Tensor:
        return 1.0 - (t + 1.0) / self.config.train_steps

    @property
    def noise_count(self) -> int:
        """The start of the chain, and each step's noise where the sampler is stochastic."""
        stochastic = self.config.sampler == "ddpm" or self.config.eta > 0
        return 1 + (self.config.sample_steps if stochastic else 0)

    def sample_normalized(
        self, condition_BOD: Tensor, noise_KBHA: Tensor, prefix_BPA: Tensor | None
    ) -> Float[Tensor, "B H A"]:
        """Run the reverse chain."""
        x_BHA, fixed_BH = hold_prefix(noise_KBHA[0], prefix_BPA)
        clean_BHA = x_BHA
        for k, t in enumerate(self.ddim.timesteps):
            tau_BH = torch.where(fixed_BH, 1.0, float(self._tau(t)))
            output_BHA = self.net(x_BHA, tau_BH, condition_BOD)
            if self.config.sampler == "ddpm":
                x_BHA = self.ddpm.step(output_BHA, int(t), x_BHA).prev_sample
                x_BHA = x_BHA + self.ddpm.posterior_std(int(t)) * noise_KBHA[k + 1]
            else:
                noise = noise_KBHA[k + 1] if self.config.eta > 0 else None
                x_BHA = self.ddim.step(
                    output_BHA,
                    int(t),
                    x_BHA,
                    eta=self.config.eta,
                    variance_noise=noise,
                ).prev_sample
            x_BHA = torch.where(fixed_BH[..., None], clean_BHA, x_BHA)
        return x_BHA
