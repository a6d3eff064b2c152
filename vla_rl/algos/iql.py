"""Implicit Q-learning over chunks (arXiv 2110.06169): twin Q, a state value by expectile regression, no action outside the data.

Stage 2 of RL-100 (arXiv 2510.14830). Differs from its code: decisions start at every frame instead of every H-th; rewards and
discounts count the steps a decision really ran, padding excluded; a time-out bootstraps from the true final observation; the target
mixes in the episode's own return (``return_share``), which on a few hundred episodes ranks better than bootstrapping alone
(docs/rl.md) and takes a time-out for the failure that it is; the critic has normalisers of its own, so that a policy re-trained on
grown data sees the same critic.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.algos.guard import GuardedOptimizer
from vla_rl.data.decisions import DecisionBatch
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.nets.ensemble import EnsembleMLP
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.checkpoints import load_tensors, verify_folder
from vla_rl.runtime.config import decode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import initial_weights, torch_generator
from vla_rl.types import Observation


@dataclass(frozen=True)
class IQLConfig:
    """Nets and optimisation.

    steps: gradient steps
    batch_size: decisions per step
    learning_rate: of Adam
    width: hidden units of each layer
    depth: hidden layers
    members: Q functions
    expectile: omega; 0.5 is the mean, towards 1 the best action in the data
    discount: gamma per control step
    polyak: share of the new weights that the target takes per step
    return_share: share of the episode's own return in the target of Q, zero after a time-out; the rest is bootstrapped (0: the paper's)
    """

    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 1e-3
    width: int = 64
    depth: int = 2
    members: int = 2
    expectile: float = 0.7
    discount: float = 0.99
    polyak: float = 0.01
    return_share: float = 0.5

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.width, self.depth, self.members) < 1:
            raise ValueError("steps, batch_size, width, depth and members of a critic want at least 1")
        if not (0.5 <= self.expectile < 1 and 0 < self.discount <= 1 and 0 < self.polyak <= 1):
            raise ValueError(
                "expectile wants a number in [0.5, 1), discount and polyak in (0, 1], got "
                f"{self.expectile}, {self.discount}, {self.polyak}"
            )
        if not 0 <= self.return_share <= 1:
            raise ValueError(f"return_share wants a number in [0, 1], got {self.return_share}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate wants a positive number, got {self.learning_rate}")


def expectile_loss(difference: Tensor, expectile: float) -> Float[Tensor, ""]:
    """|omega - 1(u < 0)| u^2 (eq. 5), averaged."""
    weight = torch.where(difference < 0, 1 - expectile, expectile)
    return (weight * difference.square()).mean()


class IQL(nn.Module):
    """A ``Critic``; one gradient step of Q and V per ``update``. ``state_dict`` is what judging takes, normalisers and all."""

    def __init__(self, encoder: StateEncoder, config: IQLConfig, generator: torch.Generator) -> None:
        """Set up with fresh nets.

        Args:
            encoder: normalisers fitted on the data.
            config: nets and optimisation.
            generator: of the initial weights.
        """
        super().__init__()
        self.config = config
        self.encoder = encoder
        widths = (config.width,) * config.depth
        with initial_weights(generator):
            self.q = EnsembleMLP(config.members, encoder.state_dim + encoder.action_dim, widths, 1)
            self.v = EnsembleMLP(1, encoder.state_dim, widths, 1)
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        adam = torch.optim.AdamW([*self.q.parameters(), *self.v.parameters()], config.learning_rate, weight_decay=1e-4)
        self.optimizer = GuardedOptimizer(adam, clip_norm=10.0, name="critic")

    def update(self, batch: DecisionBatch) -> dict[str, float]:
        """Eq. 5 for V and eq. 6 for Q on one batch."""
        state_BD = self.encoder.encode(batch.observation)
        both_BD = torch.cat([state_BD, self.encoder.encode_action(batch.action_BHA)], dim=1)
        with torch.no_grad():
            lowest_B = self.target(both_BD).squeeze(-1).min(0).values
            next_B = self.v(self.encoder.encode(batch.next_observation))[0].squeeze(-1)
            goal_B = batch.reward_B + batch.discount_B * ~batch.terminated_B * next_B
            goal_B = torch.lerp(goal_B, batch.return_B, self.config.return_share)
        value_loss = expectile_loss(lowest_B - self.v(state_BD)[0].squeeze(-1), self.config.expectile)
        q_loss = (self.q(both_BD).squeeze(-1) - goal_B).square().mean()
        norm = self.optimizer.step(value_loss + q_loss)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.q.parameters()), self.config.polyak)
        return {"critic/q_loss": q_loss.item(), "critic/value_loss": value_loss.item(), "critic/gradient_norm": norm}

    @torch.no_grad()
    def value(self, observation: Observation) -> Float[Tensor, " B"]:
        """See ``Critic``."""
        return self.v(self.encoder.encode(observation))[0].squeeze(-1)

    @torch.no_grad()
    def q_values(self, observation: Observation, action_BHA: Tensor) -> Float[Tensor, "E B"]:
        """See ``Critic``."""
        both_BD = torch.cat([self.encoder.encode(observation), self.encoder.encode_action(action_BHA)], dim=1)
        return self.target(both_BD).squeeze(-1)


def load_critic(path: Path, policy: ChunkPolicy) -> IQL:
    """Load the critic that a round of the offline stage left, to judge chunks of a policy.

    Raises:
        UserError: there is none, it is damaged, or it judges other states or chunks than the policy's.
    """
    meta = verify_folder(path)
    if meta.get("kind") != "critic":
        raise UserError(f"{path} holds no critic")
    config = decode(IQLConfig, {k: v for k, v in meta.items() if k in IQLConfig.__dataclass_fields__})
    critic = blank_critic(config, policy)
    try:
        critic.load_state_dict(load_tensors(path, "critic"))
    except RuntimeError as error:
        raise UserError(
            f"the critic in {path} judges other states or chunks than this policy's: {' '.join(str(error).split())[:160]}"
        ) from error
    return critic


def blank_critic(config: IQLConfig, policy: ChunkPolicy) -> IQL:
    """A critic of a policy's chunks whose weights are to be overwritten."""
    spec, steps = policy.latent_spec, policy.config
    encoder = StateEncoder(spec.observation_spec, steps.observation_steps, spec.action_spec.dim, steps.execute_steps)
    return IQL(encoder, config, torch_generator(0, "overwritten"))
