"""Fitted Q evaluation (arXiv 1911.06854): the Q function of a given policy from recorded decisions; the gate's second estimator.

It needs no model of the world: Q(s, a) is regressed on R + gamma^n Q(s', pi(s')).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.algos.critic import executed_actions
from vla_rl.algos.guard import GuardedOptimizer
from vla_rl.data.decisions import Decisions
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.nets.ensemble import EnsembleMLP
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.seeding import derive_seed, initial_weights, torch_generator
from vla_rl.types import Observation


@dataclass(frozen=True)
class FQEConfig:
    """Nets and optimisation.

    steps: gradient steps per policy
    batch_size: decisions per step
    learning_rate: of Adam
    width: hidden units of each of the three layers
    members: Q functions, each on a bootstrap sample of the episodes, whose spread the gate takes for uncertainty
    polyak: share of the new weights that the target takes per step
    """

    steps: int = 500
    batch_size: int = 256
    learning_rate: float = 5e-4
    width: int = 256
    members: int = 4
    polyak: float = 0.01

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.width) < 1 or self.members < 2:
            raise ValueError("steps, batch_size and width want at least 1, members at least 2")
        if not (self.learning_rate > 0 and 0 < self.polyak <= 1):
            raise ValueError(
                f"learning_rate wants a positive number, polyak one in (0, 1], got {self.learning_rate}, {self.polyak}"
            )


def fitted_q_evaluation(
    policy: ChunkPolicy, decisions: Decisions, encoder: StateEncoder, starts: Observation, config: FQEConfig, seed: int
) -> Float[Tensor, "E N"]:
    """Value of a policy from each start by each Q function; the same seed gives two policies the same nets, batches and noise.

    Args:
        policy: to be evaluated, without exploration noise.
        decisions: recorded ones.
        encoder: fitted on them.
        starts: N start states.
        config: nets and optimisation.
        seed: of everything drawn.
    """
    generator = torch_generator(seed, "fqe")
    with initial_weights(derive_seed(seed, "fqe weights")):
        net = EnsembleMLP(config.members, encoder.state_dim + encoder.action_dim, (config.width,) * 3, 1)
    target = copy.deepcopy(net).requires_grad_(False)
    adam = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=1e-4)
    optimizer = GuardedOptimizer(adam, clip_norm=10.0, name="fitted Q evaluation")

    def q_values(net: EnsembleMLP, observation: Observation, action_BHA: Tensor) -> Tensor:
        both_BD = torch.cat([encoder.encode(observation), encoder.encode_action(action_BHA)], dim=1)
        return net(both_BD).squeeze(-1)

    def act(observation: Observation) -> Tensor:
        noise = torch.randn(policy.noise_count, observation.batch_size, *policy.chunk_shape, generator=generator)
        return executed_actions(policy, observation, noise)

    episode_W, count = decisions.episode_W, int(decisions.episode_W.max()) + 1
    drawn_EE = torch.randint(0, count, (config.members, count), generator=generator)
    weight_EE = torch.stack([torch.bincount(drawn_E, minlength=count) for drawn_E in drawn_EE]).float()
    for _ in range(config.steps):
        index_B = torch.randint(0, len(decisions), (config.batch_size,), generator=generator)
        batch = decisions.batch(index_B)
        with torch.no_grad():
            next_EB = q_values(target, batch.next_observation, act(batch.next_observation))
            goal_EB = batch.reward_B + batch.discount_B * ~batch.terminated_B * next_EB
        error_EB = (q_values(net, batch.observation, batch.action_BHA) - goal_EB).square()
        optimizer.step((weight_EE[:, episode_W[index_B]] * error_EB).mean())
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), config.polyak)
    with torch.no_grad():
        return q_values(target, starts, act(starts))
