"""Progress of failed episodes, measured against the run's own successes in a learned latent space (SRPO, arXiv 2511.15605).

SRPO embeds videos with a pre-trained world model, clusters the successful ones and pays a failure the less the further it ends from
the nearest centre. Here states are embedded by a small world model trained on the run's own episodes (its latent predicts the next one;
variance and covariance are regularised as in VICReg, 2105.04906, so that it cannot collapse), an episode is the mean latent of its
last steps, and the distance is the mean over the nearest few successes, so that no number of clusters has to be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.algos.guard import GuardedOptimizer
from vla_rl.data.episode import Episode
from vla_rl.runtime.seeding import initial_weights

NEIGHBOURS = 5
SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class ProgressConfig:
    """The world model, and what progress is worth.

    weight: reward at the end of a failed episode that came as near as any success; 0 turns progress off
    latent_dim: size of the latent
    width: hidden units
    steps: gradient steps per fit
    batch_size: steps of episodes per gradient step
    learning_rate: of Adam
    tail: last steps of an episode that stand for it
    """

    weight: float = 0.0
    latent_dim: int = 16
    width: int = 128
    steps: int = 300
    batch_size: int = 256
    learning_rate: float = 1e-3
    tail: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.weight < 1:
            raise ValueError(f"weight of progress wants a number in [0, 1), below a success's 1, got {self.weight}")
        if min(self.latent_dim, self.width, self.steps, self.batch_size, self.tail) < 1 or self.learning_rate <= 0:
            raise ValueError("latent_dim, width, steps, batch_size and tail want at least 1, learning_rate more than 0")


def latent_loss(
    latent_BD: Float[Tensor, "B D"], predicted_BD: Float[Tensor, "B D"], next_BD: Float[Tensor, "B D"]
) -> Float[Tensor, ""]:
    """Prediction error, a hinge that keeps each latent dimension's deviation at 1, and decorrelation of dimensions."""
    centred_BD = latent_BD - latent_BD.mean(0)
    covariance = centred_BD.T @ centred_BD / max(len(latent_BD) - 1, 1)
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    spread = (1 - deviation).clamp_min(0).mean() + off_diagonal.square().sum() / latent_BD.shape[1]
    return (predicted_BD - next_BD).square().mean() + spread


def progress(
    episodes: Sequence[Episode], config: ProgressConfig, generator: torch.Generator
) -> Float[np.ndarray, " E"]:
    """Progress of each episode: 1 for a success; for a failure sigmoid of its standardised nearness to the successes, in (0, 1).

    Where nothing has succeeded there is nothing to be near to: all are 0.
    """
    success_E = np.array([e.success for e in episodes])
    if not success_E.any():
        return np.zeros(len(episodes))
    if success_E.all():
        return np.ones(len(episodes))
    states = [np.concatenate([e.observations[k] for k in sorted(e.observations)], axis=1) for e in episodes]
    encoder = _fit(states, [e.action_TA for e in episodes], config, generator)
    with torch.no_grad():
        latent_ED = torch.stack([encoder(torch.from_numpy(s[-config.tail :])).mean(0) for s in states])
    distance_EE = torch.cdist(latent_ED, latent_ED[success_E])
    nearest_E = distance_EE.topk(min(NEIGHBOURS, int(success_E.sum())), largest=False).values.mean(1).numpy()
    failed = nearest_E[~success_E]
    spread = max(float(failed.std()), SMALLEST_SPREAD)
    found_E = np.ones(len(episodes))
    found_E[~success_E] = 1 / (1 + np.exp((failed - failed.mean()) / spread))
    return found_E


def _fit(
    states: Sequence[np.ndarray], actions: Sequence[np.ndarray], config: ProgressConfig, generator: torch.Generator
) -> nn.Sequential:
    """Train encoder and predictor; return the encoder of raw states."""
    now = torch.from_numpy(np.concatenate([s[:-1] for s in states]))
    after = torch.from_numpy(np.concatenate([s[1:] for s in states]))
    action = torch.from_numpy(np.concatenate(actions))
    with initial_weights(generator):
        encoder = nn.Sequential(
            _Standardize(now),
            nn.Linear(now.shape[1], config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.latent_dim),
        )
        predictor = nn.Sequential(
            nn.Linear(config.latent_dim + action.shape[1], config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.latent_dim),
        )
    scale = _Standardize(action)
    adam = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], config.learning_rate)
    optimizer = GuardedOptimizer(adam, clip_norm=10.0, name="progress")
    for _ in range(config.steps):
        rows = torch.randint(0, len(now), (config.batch_size,), generator=generator)
        latent, target = encoder(now[rows]), encoder(after[rows])
        predicted = latent + predictor(torch.cat([latent, scale(action[rows])], dim=1))
        optimizer.step(latent_loss(latent, predicted, target))
    return encoder


class _Standardize(nn.Module):
    """Zero mean and unit deviation of the rows it was made from."""

    mean: Tensor
    scale: Tensor

    def __init__(self, rows_BD: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows_BD.mean(0))
        self.register_buffer("scale", rows_BD.std(0, correction=0).clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale
