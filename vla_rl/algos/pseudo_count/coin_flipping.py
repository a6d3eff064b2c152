"""Coin-flipping network: regress random signs, and the more samples share an input the less is left of them (eq. 1).

Lobel et al. 2023 (arXiv 2306.03186) as TACO has it (2512.02834). Sample i has coins c_i in {-1, 1}^d; the net's best answer to m samples
with the same input is the mean of their coins, so E|f|^2 / d = 1 / m. To the trained net a frozen one is added, each of its outputs with
mean square 1 on the data: where nothing was seen the sum reads about 1. Differs from TACO's code: 128 coins instead of 20 (the relative
spread of the read-out is sqrt(2 / d)); a prior of its own instead of a copy of the trained net; no dropout; its statistics are taken
once, over all data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.algos.pseudo_count.base import CountConfig, PseudoCount
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import initial_weights, torch_generator

SMALLEST_SPREAD = 1e-6


@CountConfig.register_subclass("coin_flipping")
@dataclass(frozen=True)
class CoinFlippingConfig(CountConfig):
    """Net and optimisation.

    coins: d
    width: of the hidden layers
    blocks: residual blocks of the trained net (0: a linear map of the features)
    scale: features are multiplied by it first (TACO: 10)
    prior: add the frozen net
    epochs: passes over the data
    update_epochs: passes over all that was seen, after an update
    batch_size: samples per gradient step
    learning_rate: largest of the one-cycle schedule
    """

    coins: int = 128
    width: int = 256
    blocks: int = 2
    scale: float = 1.0
    prior: bool = True
    epochs: int = 20
    update_epochs: int = 4
    batch_size: int = 512
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.coins, self.width, self.epochs, self.update_epochs, self.batch_size) < 1 or self.blocks < 0:
            raise ValueError("coins, width, epochs, update_epochs and batch_size want at least 1, blocks 0")
        if not (self.scale > 0 and self.learning_rate > 0):
            raise ValueError(f"scale and learning_rate want positive numbers, got {self.scale}, {self.learning_rate}")

    def build(self, feature_dim: int) -> CoinFlipping:
        """Build the estimator."""
        return CoinFlipping(feature_dim, self)


class _Block(nn.Module):
    """LayerNorm(x + MLP(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.norm(x_ND + self.net(x_ND))


class CoinFlipping(PseudoCount):
    """A trained net and a frozen one."""

    config: CoinFlippingConfig
    prior_mean_C: Tensor
    prior_spread_C: Tensor
    seen_NF: Tensor
    coins_NC: Tensor

    def __init__(self, feature_dim: int, config: CoinFlippingConfig) -> None:
        super().__init__(feature_dim, config)
        with initial_weights(torch_generator(config.seed, "coin-flipping net")):
            self.net = self._make_net(feature_dim)
            self.prior = self._make_net(feature_dim).requires_grad_(False)
        self.register_buffer("prior_mean_C", torch.zeros(config.coins))
        self.register_buffer("prior_spread_C", torch.ones(config.coins))
        self.register_buffer("seen_NF", torch.zeros(0, feature_dim))
        self.register_buffer("coins_NC", torch.zeros(0, config.coins, dtype=torch.int8))

    def _make_net(self, feature_dim: int) -> nn.Sequential:
        config = self.config
        if not config.blocks:
            return nn.Sequential(nn.Linear(feature_dim, config.coins, bias=False))
        return nn.Sequential(
            nn.Linear(feature_dim, config.width),
            nn.GELU(),
            nn.LayerNorm(config.width),
            *(_Block(config.width) for _ in range(config.blocks)),
            nn.Linear(config.width, config.coins),
        )

    def forward(self, features_NF: Float[Tensor, "N F"]) -> Float[Tensor, "N C"]:
        """Trained net plus normalised prior."""
        scaled_NF = self.config.scale * features_NF
        said_NC = self.net(scaled_NF)
        if not self.config.prior:
            return said_NC
        return said_NC + (self.prior(scaled_NF) - self.prior_mean_C) / self.prior_spread_C

    def _fit(self, features_NF: Tensor) -> None:
        with initial_weights(torch_generator(self.config.seed, "coin-flipping net")):
            self.net.load_state_dict(self._make_net(features_NF.shape[1]).state_dict())
        with torch.no_grad():
            said_NC = self.prior(self.config.scale * features_NF)
            self.prior_mean_C.copy_(said_NC.mean(0))
            self.prior_spread_C.copy_(said_NC.std(0, correction=0).clamp_min(SMALLEST_SPREAD))
        self.seen_NF, self.coins_NC = self.seen_NF[:0], self.coins_NC[:0]
        self._train(features_NF, self.config.epochs)

    def _update(self, features_NF: Tensor) -> None:
        self._train(features_NF, self.config.update_epochs)

    def _train(self, features_NF: Tensor, epochs: int) -> None:
        """Flip coins for new samples, and regress those of all: what was seen before keeps its own, or it would be forgotten."""
        config = self.config
        generator = torch_generator(config.seed, "coins", len(self.seen_NF))
        flipped_NC = torch.randint(0, 2, (len(features_NF), config.coins), generator=generator) * 2 - 1
        self.seen_NF = torch.cat([self.seen_NF, features_NF])
        self.coins_NC = torch.cat([self.coins_NC, flipped_NC.to(self.coins_NC)])
        count = len(self.seen_NF)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=config.learning_rate)
        steps = epochs * -(-count // config.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, div_factor=10)
        for _ in range(epochs):
            for rows in torch.randperm(count, generator=generator).split(config.batch_size):
                loss = (self(self.seen_NF[rows]) - self.coins_NC[rows]).square().mean()
                if not torch.isfinite(loss):
                    raise UserError("the coin-flipping network's loss is not finite; lower its learning_rate or scale")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def _score(self, features_MF: Tensor) -> Tensor:
        bonus_M = self(features_MF).square().mean(1)
        return 1 / bonus_M.clamp_min(torch.finfo(bonus_M.dtype).tiny)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        for name in ("seen_NF", "coins_NC"):  # as many rows as were seen
            if prefix + name in state_dict:
                setattr(self, name, torch.zeros_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
