"""Values of a single step's action: an ensemble of scalars, or of normal distributions of the return."""

from __future__ import annotations

from dataclasses import dataclass

import draccus
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.nets.ensemble import EnsembleMLP

SMALLEST_STD = 0.01  # of a return's distribution


@dataclass(frozen=True)
class StepCriticConfig(draccus.ChoiceRegistry):
    """What all critics share.

    width: hidden units of each layer
    depth: hidden layers
    members: nets
    subset: members, drawn anew for each batch, that the target and the actor ask
    """

    width: int = 256
    depth: int = 2
    members: int = 5
    subset: int = 2

    def __post_init__(self) -> None:
        if min(self.width, self.depth) < 1 or self.members < 2:
            raise ValueError(
                f"width and depth of a critic want at least 1, members at least 2, got {self.width}, {self.depth}, {self.members}"
            )
        if not 1 <= self.subset <= self.members:
            raise ValueError(f"subset wants 1 to members = {self.members}, got {self.subset}")

    def build(self, inputs: int) -> StepCritic:
        """Build the nets."""
        raise TypeError(f"{type(self).__name__} builds no critic")


class StepCritic(nn.Module):
    """Maps inputs to what each member says of the return; its expected value comes first."""

    net: EnsembleMLP

    def outputs(self, x_BD: Float[Tensor, "B D"], chosen: Int[Tensor, " C"] | None = None) -> Float[Tensor, "E B F"]:
        """Return all that each member says, or each of some that are chosen."""
        return self.net(x_BD, chosen)

    def forward(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "E B"]:
        """Return the expected return by each member."""
        return self.outputs(x_BD)[..., 0]


@StepCriticConfig.register_subclass("ensemble")
@dataclass(frozen=True)
class EnsembleCriticConfig(StepCriticConfig):
    """Scalar values, min of a random few in the target (REDQ, arXiv 2101.05982)."""

    def build(self, inputs: int) -> EnsembleCritic:
        """Build the nets."""
        return EnsembleCritic(self, inputs)


class EnsembleCritic(StepCritic):
    """E scalars; LayerNorm in every layer keeps what is not in the data from being overrated (RLPD, arXiv 2302.02948)."""

    def __init__(self, config: EnsembleCriticConfig, inputs: int) -> None:
        super().__init__()
        self.config = config
        self.net = EnsembleMLP(config.members, inputs, (config.width,) * config.depth, 1, torch.relu)


@StepCriticConfig.register_subclass("dsac_t")
@dataclass(frozen=True)
class DistributionalCriticConfig(StepCriticConfig):
    """Normal distributions of the return (DSAC-T, arXiv 2310.05858).

    clip: standard deviations beyond which a sampled return is clipped (xi)
    polyak: share of the newest batch in the running means of deviation and variance (tau_b)
    """

    members: int = 2
    clip: float = 3.0
    polyak: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip > 0 or not 0 < self.polyak <= 1:
            raise ValueError(f"clip wants a positive number, polyak one in (0, 1], got {self.clip} and {self.polyak}")

    def build(self, inputs: int) -> DistributionalCritic:
        """Build the nets."""
        return DistributionalCritic(self, inputs)


class DistributionalCritic(StepCritic):
    """E normal distributions; running means of their deviation and variance make the loss indifferent to the scale of rewards."""

    mean_std_E: Tensor
    mean_variance_E: Tensor

    def __init__(self, config: DistributionalCriticConfig, inputs: int) -> None:
        super().__init__()
        self.config = config
        self.net = EnsembleMLP(config.members, inputs, (config.width,) * config.depth, 2, torch.relu)
        self.register_buffer("mean_std_E", torch.full((config.members,), -1.0))  # -1: nothing seen yet
        self.register_buffer("mean_variance_E", torch.full((config.members,), -1.0))

    @staticmethod
    def distribution(outputs_EBF: Float[Tensor, "E B 2"]) -> tuple[Float[Tensor, "E B"], Float[Tensor, "E B"]]:
        """Mean and standard deviation of the return by each member."""
        mean_EB, raw_EB = outputs_EBF.unbind(-1)
        return mean_EB, functional.softplus(raw_EB) + SMALLEST_STD
