"""Denoising chains as Gaussian transitions x_k -> x_{k+1}: mean, std, sample, log-density, deterministic step.

Policies and learners know no more than this of a chain. A state of the chain is x = signal * action + noise * epsilon on a grid of K + 1
levels, from noise (k = 0) to action (k = K); a policy head splits its net's output into estimates of the two. Sources: DDPM (arXiv
2006.11239), DDIM (2010.02502, eq. 12), coefficient-preserving and SDE noise for flow (Flow-GRPO, 2505.05470; RL-100, 2510.14830), learned
noise (ReinFlow, 2505.22094). Differs from RL-100's code: a std that is clipped to its floor or cap goes into the mean too, so that
the chain stays on the noise levels the net was trained on; the last step's noise is explicit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import initial_weights

KernelKind = Literal["auto", "ddpm", "ddim", "cps", "sde", "learned"]
SDE_LARGEST_NOISE = 0.9  # the SDE's strength sqrt(noise / signal) is infinite at pure noise (RL-100 caps it here too)
NOISE_NET_WIDTH = 64


@dataclass(frozen=True)
class KernelConfig:
    """The chain that reinforcement learning works in; stds are in normalised action units.

    kind: cps, sde or learned for flow, ddim, ddpm or learned for diffusion; auto: cps or ddim
    noise_scale: nu of cps (0 none, 1 all noise fresh), eta of ddim, strength of sde; ddpm and learned have none
    std_min: floor of each step's std but the last
    std_max: cap of each step's std but the last
    last_std: std of the last step (0: no noise there, and no likelihood)
    trained_steps: how many of the last steps are noisy and trained, the others are deterministic (0: all)
    """

    kind: KernelKind = "auto"
    noise_scale: float = 0.5
    std_min: float = 0.1
    std_max: float = 0.8
    last_std: float = 0.1
    trained_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise_scale <= 1:
            raise ValueError(f"noise_scale wants a number in [0, 1], got {self.noise_scale}")
        if not 0 < self.std_min <= self.std_max:
            raise ValueError(f"stds want 0 < std_min <= std_max, got {self.std_min} and {self.std_max}")
        if self.last_std < 0 or self.trained_steps < 0:
            raise ValueError(
                f"last_std and trained_steps want numbers >= 0, got {self.last_std} and {self.trained_steps}"
            )


@dataclass(frozen=True)
class Grid:
    """Noise levels of a chain of K steps: x_k = signal_k * action + noise_k * epsilon; tau_k is what the net is told in step k."""

    signal: Float[Tensor, " K1"]
    noise: Float[Tensor, " K1"]
    tau: Float[Tensor, " K"]

    @property
    def steps(self) -> int:
        """K."""
        return len(self.tau)


@dataclass(frozen=True)
class Transition:
    """A Gaussian over the chain's next state with one mean and std per entry."""

    mean_BHA: Float[Tensor, "B H A"]
    std_BHA: Float[Tensor, "B H A"]

    def sample(self, noise_BHA: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """The state that standard normal noise leads to."""
        return self.mean_BHA + self.std_BHA * noise_BHA

    def log_prob(self, next_BHA: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Log-density of each entry; where the std is zero there is no density, and 0 stands for it."""
        noisy = self.std_BHA > 0
        std = torch.where(noisy, self.std_BHA, 1.0)
        z = (next_BHA - self.mean_BHA) / std
        density = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
        return torch.where(noisy, density, 0.0)


class Kernel(nn.Module, ABC):
    """Transitions of a chain on a grid. Abstract: the subclasses differ in std and mean."""

    signal_K: Tensor
    noise_K: Tensor
    tau_K: Tensor

    def __init__(self, config: KernelConfig, grid: Grid) -> None:
        super().__init__()
        if config.trained_steps > grid.steps:
            raise UserError(f"trained_steps wants 0 to the chain's {grid.steps} steps, got {config.trained_steps}")
        self.config = config
        self.steps = grid.steps
        self.register_buffer("signal_K", grid.signal, persistent=False)
        self.register_buffer("noise_K", grid.noise, persistent=False)
        self.register_buffer("tau_K", grid.tau, persistent=False)
        first = grid.steps - config.trained_steps if config.trained_steps else 0
        last = grid.steps if config.last_std > 0 else grid.steps - 1
        self.trained = tuple(range(first, last))
        if not self.trained:
            raise UserError("no step of the chain is noisy: give a last_std above 0, or train more than the last step")

    def step_std(self, std_K: Tensor) -> Tensor:
        """Clip a table of stds to floor and cap, and set the last step's and those of steps that are not trained."""
        std_K = std_K.clamp(self.config.std_min, self.config.std_max)
        std_K[-1] = self.config.last_std
        std_K[: self.trained[0]] = 0.0
        return std_K

    def levels(self, k_B: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """Signal and noise of each row's state, (B, 1, 1)."""
        return _at(self.signal_K, k_B), _at(self.noise_K, k_B)

    def deterministic_step(self, action_BHA: Tensor, noise_BHA: Tensor, k_B: Int[Tensor, " B"]) -> Tensor:
        """The next state without noise (DDIM with eta 0, Euler's step for flow) from the head's two estimates."""
        return _at(self.signal_K, k_B + 1) * action_BHA + _at(self.noise_K, k_B + 1) * noise_BHA

    @abstractmethod
    def transition(
        self,
        x_BHA: Float[Tensor, "B H A"],
        action_BHA: Float[Tensor, "B H A"],
        noise_BHA: Float[Tensor, "B H A"],
        k_B: Int[Tensor, " B"],
        condition_BOD: Float[Tensor, "B O D"],
    ) -> Transition:
        """The Gaussian of step k.

        Args:
            x_BHA: the chain's state.
            action_BHA: the head's estimate of the action.
            noise_BHA: the head's estimate of the noise.
            k_B: step of each row, 0 to K - 1.
            condition_BOD: what the policy sees.
        """


class MarginalKernel(Kernel):
    """mean = signal' action + sqrt(noise'^2 - std^2) epsilon: whatever the std, x_{k+1} keeps its noise level.

    This is DDIM, DDPM and coefficient-preserving flow noise in one; they differ in the table of stds, and DDPM takes epsilon from the
    state and the (clipped) action instead of from the net, which makes the mean that of the posterior (eq. 7 of arXiv
    2006.11239). A std above the level of the next state (the last step's) is added on top of a mean without noise.
    """

    std_K: Tensor

    def __init__(self, config: KernelConfig, grid: Grid, std_K: Tensor, posterior: bool = False) -> None:
        super().__init__(config, grid)
        self.posterior = posterior
        self.register_buffer("std_K", self.step_std(std_K), persistent=False)

    def transition(
        self, x_BHA: Tensor, action_BHA: Tensor, noise_BHA: Tensor, k_B: Tensor, condition_BOD: Tensor
    ) -> Transition:
        """See ``Kernel``."""
        std_B11 = _at(self.std_K, k_B)
        if self.posterior:
            noise_BHA = (x_BHA - _at(self.signal_K, k_B) * action_BHA) / _at(self.noise_K, k_B)
        rest_B11 = (_at(self.noise_K, k_B + 1).square() - std_B11.square()).clamp_min(0.0).sqrt()
        mean_BHA = _at(self.signal_K, k_B + 1) * action_BHA + rest_B11 * noise_BHA
        return Transition(mean_BHA, std_B11.expand_as(mean_BHA))


class SDEKernel(Kernel):
    """Euler-Maruyama step of the SDE with the flow's marginals: mean = Euler's - std^2 / (2 noise) epsilon, std = s sqrt(d tau).

    s = scale sqrt(noise / signal). Marginals are kept to first order in the step only, and the last step has noise but no correction.
    """

    std_K: Tensor

    def __init__(self, config: KernelConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        level_K = grid.noise[:-1].clamp_max(SDE_LARGEST_NOISE)
        strength_K = config.noise_scale * (level_K / (1 - level_K)).sqrt()
        self.register_buffer("std_K", self.step_std(strength_K * grid.signal.diff().sqrt()), persistent=False)

    def transition(
        self, x_BHA: Tensor, action_BHA: Tensor, noise_BHA: Tensor, k_B: Tensor, condition_BOD: Tensor
    ) -> Transition:
        """See ``Kernel``."""
        std_B11 = _at(self.std_K, k_B)
        mean_BHA = self.deterministic_step(action_BHA, noise_BHA, k_B)
        pull_B11 = std_B11.square() / (2 * _at(self.noise_K, k_B))
        last_B11 = (k_B == self.steps - 1).view(-1, 1, 1)
        mean_BHA = mean_BHA - torch.where(last_B11, 0.0, pull_B11) * noise_BHA
        return Transition(mean_BHA, std_B11.expand_as(mean_BHA))


class LearnedKernel(Kernel):
    """The deterministic step plus noise whose std a small net gives in [std_min, std_max] (ReinFlow); deployment leaves it out.

    ``last_std`` bounds the last step's from above, and the net starts in the middle of the range.
    """

    def __init__(self, config: KernelConfig, grid: Grid, condition_dim: int, action_shape: tuple[int, int]) -> None:
        super().__init__(config, grid)
        self.action_shape = action_shape
        entries = math.prod(action_shape)
        with initial_weights(0):  # the same net each time it is built, so that a resumed run begins as the first one
            self.net = nn.Sequential(
                nn.Linear(condition_dim + 1, NOISE_NET_WIDTH), nn.Tanh(), nn.Linear(NOISE_NET_WIDTH, entries)
            )
        nn.init.zeros_(self.net[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[2].bias)  # type: ignore[arg-type]
        high_K = torch.full((grid.steps,), config.std_max)
        high_K[-1] = min(config.last_std, config.std_max)
        self.register_buffer("high_K", high_K, persistent=False)
        self.register_buffer("low_K", torch.minimum(torch.full_like(high_K, config.std_min), high_K), persistent=False)
        self.high_K: Tensor
        self.low_K: Tensor

    def transition(
        self, x_BHA: Tensor, action_BHA: Tensor, noise_BHA: Tensor, k_B: Tensor, condition_BOD: Tensor
    ) -> Transition:
        """See ``Kernel``."""
        mean_BHA = self.deterministic_step(action_BHA, noise_BHA, k_B)
        asked = torch.cat([condition_BOD.flatten(1), self.tau_K[k_B][:, None]], dim=1)
        share_BHA = self.net(asked).tanh().view(-1, *self.action_shape) * 0.5 + 0.5
        low_B11, high_B11 = _at(self.low_K, k_B), _at(self.high_K, k_B)
        std_BHA = low_B11 + (high_B11 - low_B11) * share_BHA
        untrained_B11 = (k_B < self.trained[0]).view(-1, 1, 1)
        return Transition(mean_BHA, torch.where(untrained_B11, 0.0, std_BHA))


def ddim_std(grid: Grid, eta: float) -> Tensor:
    """Eq. 16 of arXiv 2010.02502 on a grid: (K,)."""
    ratio = (grid.noise[1:] / grid.noise[:-1]).square() * (1 - (grid.signal[:-1] / grid.signal[1:]).square())
    return eta * ratio.clamp_min(0.0).sqrt()


def cps_std(grid: Grid, scale: float) -> Tensor:
    """Noise' sin(scale pi / 2): (K,)."""
    return grid.noise[1:] * math.sin(scale * math.pi / 2)


def _at(table_K: Tensor, k_B: Tensor) -> Tensor:
    return table_K[k_B].view(-1, 1, 1)
