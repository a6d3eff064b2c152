"""The state value of online PPO: regression on the returns of the policy's own decisions, with a clip on how far it moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.algos.guard import GuardedOptimizer
from vla_rl.nets.ensemble import EnsembleMLP


@dataclass(frozen=True)
class ValueConfig:
    """Value net and its regression.

    width: hidden units of each of the two layers
    members: nets whose mean is the value
    learning_rate: of Adam
    epochs: passes over a batch of decisions
    minibatch: decisions per gradient step
    clip: how far a value may move from the one the advantages were made with before its error stops counting (0: no limit)
    """

    width: int = 256
    members: int = 2
    learning_rate: float = 1e-3
    epochs: int = 5
    minibatch: int = 1024
    clip: float = 0.0

    def __post_init__(self) -> None:
        if min(self.width, self.members, self.epochs, self.minibatch) < 1:
            raise ValueError("width, members, epochs and minibatch of a value function want at least 1")
        if self.learning_rate <= 0 or self.clip < 0:
            raise ValueError(
                f"learning_rate wants a positive number, clip one >= 0, got {self.learning_rate}, {self.clip}"
            )


def value_loss(
    value_EB: Float[Tensor, "E B"], target_B: Float[Tensor, " B"], old_B: Float[Tensor, " B"], clip: float
) -> Float[Tensor, ""]:
    """Squared error; with a clip, the larger of it and that of the value held within ``clip`` of the old one (PPO2's)."""
    error_EB = (value_EB - target_B).square()
    if clip > 0:
        held_EB = old_B + (value_EB - old_B).clamp(-clip, clip)
        error_EB = torch.maximum(error_EB, (held_EB - target_B).square())
    return 0.5 * error_EB.mean()


class ValueFunction:
    """V(condition); the mean over its nets."""

    def __init__(self, condition_dim: int, config: ValueConfig) -> None:
        self.config = config
        self.net = EnsembleMLP(config.members, condition_dim, (config.width, config.width), 1)
        adam = torch.optim.AdamW(self.net.parameters(), lr=config.learning_rate, weight_decay=0.0)
        self.optimizer = GuardedOptimizer(adam, clip_norm=1.0, name="value")

    @torch.no_grad()
    def value(self, condition_BOD: Float[Tensor, "B O D"]) -> Float[Tensor, " B"]:
        """Value of each row."""
        return self.net(condition_BOD.flatten(1)).mean(0).squeeze(-1)

    def update(
        self, condition_BOD: Float[Tensor, "B O D"], target_B: Float[Tensor, " B"], generator: torch.Generator
    ) -> dict[str, float]:
        """Regress on the targets; return the last pass's loss and the explained variance before it."""
        old_B = self.value(condition_BOD)
        flat_BD = condition_BOD.flatten(1)
        losses: list[float] = []
        for _ in range(self.config.epochs):
            losses = []
            for rows in torch.randperm(len(flat_BD), generator=generator).split(self.config.minibatch):
                value_EM = self.net(flat_BD[rows]).squeeze(-1)
                loss = value_loss(value_EM, target_B[rows], old_B[rows], self.config.clip)
                self.optimizer.step(loss)
                losses.append(loss.item())
        unexplained = (target_B - old_B).var(correction=0) / target_B.var(correction=0).clamp_min(1e-12)
        return {"value/loss": sum(losses) / len(losses), "value/explained_variance": float(1 - unexplained)}
