"""Residual PPO: the same residual, learned on-policy; what off-policy correction is measured against (ResiP, arXiv 2407.16677).

A Gaussian of fixed width around the actor's residual, GAE per control step, a state value beside it. What is scored is the residual that
was drawn, before limits and switches turn it into the executed action: they belong to the environment.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.algos.guard import GuardedOptimizer, load_optimizer_tensors, optimizer_tensors
from vla_rl.algos.returns import generalized_advantage
from vla_rl.algos.value import ValueConfig, ValueFunction
from vla_rl.data.steps import StepContext, StepEpisode
from vla_rl.policies.residual import ResidualPolicy
from vla_rl.runtime.checkpoints import part


@dataclass(frozen=True)
class ResidualPPOConfig:
    """Surrogate and returns.

    learning_rate: of the actor
    clip: how far the ratio may leave one
    epochs: passes over an order's steps
    minibatch: steps per gradient step
    discount: gamma per control step
    gae_lambda: lambda per control step
    kl_limit: divergence at which the passes over an order end
    std: of the Gaussian, as a share of the residual's reach
    value: the state value
    """

    learning_rate: float = 3e-4
    clip: float = 0.2
    epochs: int = 5
    minibatch: int = 512
    discount: float = 0.99
    gae_lambda: float = 0.95
    kl_limit: float = 0.1
    std: float = 0.2
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        if min(self.learning_rate, self.clip, self.std, self.kl_limit) <= 0 or min(self.epochs, self.minibatch) < 1:
            raise ValueError(
                "learning_rate, clip, std and kl_limit want positive numbers, epochs and minibatch at least 1"
            )
        if not (0 < self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(
                f"discount wants a number in (0, 1], gae_lambda one in [0, 1], got {self.discount}, {self.gae_lambda}"
            )


def log_prob(residual_BA: Float[Tensor, "B A"], mean_BA: Float[Tensor, "B A"], std: float) -> Float[Tensor, " B"]:
    """Of a Gaussian of one width in all dimensions."""
    return (-0.5 * ((residual_BA - mean_BA) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(1)


def surrogate_loss(ratio_B: Float[Tensor, " B"], advantage_B: Float[Tensor, " B"], clip: float) -> Float[Tensor, ""]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised."""
    return -torch.minimum(ratio_B * advantage_B, ratio_B.clamp(1 - clip, 1 + clip) * advantage_B).mean()


class ResidualPPO:
    """Learns ``policy``'s actor from orders of its own episodes."""

    def __init__(self, policy: ResidualPolicy, config: ResidualPPOConfig) -> None:
        self.policy, self.config = policy, config
        self.value = ValueFunction(policy.encoder.context_dim, config.value)
        adam = torch.optim.AdamW(policy.actor.parameters(), config.learning_rate, weight_decay=0.0)
        self.optimizer = GuardedOptimizer(adam, clip_norm=1.0, name="residual PPO")

    def update(self, episodes: Sequence[StepEpisode], generator: torch.Generator) -> dict[str, float]:
        """Learn from episodes of the policy as it is, with noise of ``config.std``."""
        policy, config = self.policy, self.config
        contexts, residuals, advantages, targets = zip(*(self._judge(steps) for steps in episodes), strict=True)
        context_BD, residual_BA = torch.cat(contexts), torch.cat(residuals)
        advantage_B, target_B = torch.cat(advantages), torch.cat(targets)
        metrics = self.value.update(context_BD[:, None], target_B, generator)
        advantage_B = (advantage_B - advantage_B.mean()) / advantage_B.std().clamp_min(1e-6)
        before = copy.deepcopy(policy)
        with torch.no_grad():
            old_B = log_prob(residual_BA, before.mean(context_BD), config.std)
        passes = kl = 0.0
        for _ in range(config.epochs):
            for rows in torch.randperm(len(old_B), generator=generator).split(config.minibatch):
                new_B = log_prob(residual_BA[rows], policy.mean(context_BD[rows]), config.std)
                loss = surrogate_loss((new_B - old_B[rows]).exp(), advantage_B[rows], config.clip)
                self.optimizer.step(loss)
            passes += 1
            with torch.no_grad():  # of two Gaussians of one width
                moved_BA = policy.mean(context_BD) - before.mean(context_BD)
                kl = float((moved_BA / config.std).square().sum(1).mean() / 2)
            if kl > config.kl_limit:
                break
        return metrics | {"ppo/kl": kl, "ppo/epochs": passes}

    @torch.no_grad()
    def _judge(self, steps: StepEpisode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Contexts, drawn residuals, advantages and value targets of an episode's steps."""
        episode, config, policy = steps.episode, self.config, self.policy
        assert steps.residual_TA is not None, "residual PPO learns from its own episodes"
        features = {k: torch.from_numpy(v) for k, v in episode.observations.items()}
        seen = StepContext(features, torch.from_numpy(steps.base_TA), torch.from_numpy(steps.phase_T).long())
        context_TD = policy.encoder(seen)
        residual_TA = torch.from_numpy(steps.residual_TA)
        value_T1 = self.value.value(context_TD[:, None])[:, None]
        last_T1 = (torch.arange(steps.length) == steps.length - 1)[:, None]
        advantage_T1 = generalized_advantage(
            torch.from_numpy(episode.reward_T)[:, None],
            torch.ones(steps.length, 1, dtype=torch.long),
            last_T1 & episode.terminated,
            last_T1,
            value_T1[:-1],
            value_T1[1:],
            config.discount,
            config.gae_lambda,
        )
        return context_TD[:-1], residual_TA, advantage_T1[:, 0], (advantage_T1 + value_T1[:-1])[:, 0]

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors."""
        state = {f"policy.{k}": v.clone() for k, v in self.policy.state_dict().items()}
        state |= {f"value.{k}": v.clone() for k, v in self.value.net.state_dict().items()}
        for optimizer, name in self._optimizers():
            state |= {k: v.clone() for k, v in optimizer_tensors(optimizer, name).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``."""
        self.policy.load_state_dict(part(state, "policy."))
        self.value.net.load_state_dict(part(state, "value."))
        for optimizer, name in self._optimizers():
            load_optimizer_tensors(optimizer, state, name)

    def _optimizers(self) -> list[tuple[torch.optim.Optimizer, str]]:
        return [(self.optimizer.optimizer, "optimizer."), (self.value.optimizer.optimizer, "value_optimizer.")]
