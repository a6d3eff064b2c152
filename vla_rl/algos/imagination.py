"""Samples for the offline surrogate: the policy's own chains at recorded states, judged by what follows in the models.

One decision alone is judged by the critic's Q, as in RL-100 (arXiv 2510.14830). Over several the noisy policy is rolled out in the
ensemble of models, each row in one of them, and generalised advantages are taken (the code's "chunk_vdelta_gae", which repeats the
same chunk, done with the policy's own decisions); the critic's value stands for what lies beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vla_rl.algos.critic import Critic, advantage
from vla_rl.algos.dynamics import DynamicsEnsemble
from vla_rl.algos.ppo import Samples
from vla_rl.algos.returns import generalized_advantage
from vla_rl.data.decisions import Decisions
from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import Chain, sample_chain
from vla_rl.types import Observation


def _decide(
    policy: ChunkPolicy, kernel: Kernel, observation: Observation, generator: torch.Generator
) -> tuple[Tensor, Chain, Tensor]:
    """Condition, chain, and the actions that are executed of it."""
    condition_BOD = policy.condition(observation)
    noise_KBHA = torch.randn(kernel.steps + 1, observation.batch_size, *policy.chunk_shape, generator=generator)
    chain = sample_chain(policy, kernel, condition_BOD, noise_KBHA)
    action_BHA = policy.unnormalize_action(chain.chunk, observation)[:, : policy.config.execute_steps]
    return condition_BOD, chain, policy.spec.action_spec.clip_tensor(action_BHA)


@torch.no_grad()
def one_decision(
    policy: ChunkPolicy, kernel: Kernel, critic: Critic, start: Observation, generator: torch.Generator
) -> Samples:
    """Chains at recorded states, judged by the critic's advantage."""
    condition_BOD, chain, action_BHA = _decide(policy, kernel, start, generator)
    executed_BH = torch.ones(action_BHA.shape[:2], dtype=torch.bool)
    return Samples(condition_BOD, chain, advantage(critic, start, action_BHA), executed_BH)


@torch.no_grad()
def imagine(
    policy: ChunkPolicy,
    kernel: Kernel,
    critic: Critic,
    model: DynamicsEnsemble,
    start: Observation,
    decisions: int,
    known: Decisions,
    gae_lambda: float,
    generator: torch.Generator,
) -> Samples:
    """Chains along roll-outs in the models, judged by generalised advantages.

    Args:
        policy: decides, with the kernel's noise.
        kernel: its chain.
        critic: gives the value of states, also after the last decision.
        model: the ensemble.
        start: recorded states, one row per roll-out.
        decisions: T, at most as many as the models may be trusted for.
        known: the data, for the discount and the range of rewards.
        gae_lambda: lambda per decision.
        generator: of all noise.
    """
    rows = start.batch_size
    state_BD, row_B = model.encoder.encode(start), torch.arange(rows)
    member_B = torch.randint(0, model.config.members, (rows,), generator=generator)
    low, high = known.reward_bounds
    alive_B = torch.ones(rows, dtype=torch.bool)
    conditions, chains, rewards, values, ends, ran = [], [], [], [], [], []
    for _ in range(decisions):
        observation = model.encoder.decode(state_BD)
        condition_BOD, chain, action_BHA = _decide(policy, kernel, observation, generator)
        found = model.predict(state_BD, model.encoder.encode_action(action_BHA))
        end_B = torch.rand(rows, generator=generator) < torch.sigmoid(found.end_logit_EB[member_B, row_B])
        conditions.append(condition_BOD)
        chains.append(chain)
        values.append(critic.value(observation))
        rewards.append(found.reward_EB[member_B, row_B].clamp(low, high))
        ends.append(end_B)
        ran.append(alive_B)
        mean_BD, std_BD = found.mean_EBD[member_B, row_B], found.std_EBD[member_B, row_B]
        state_BD = mean_BD + std_BD * torch.randn(mean_BD.shape, generator=generator)
        alive_B = alive_B & ~end_B
    value_TN, end_TN, ran_TN = torch.stack(values), torch.stack(ends), torch.stack(ran)
    last_N = critic.value(model.encoder.decode(state_BD))
    cut_TN = end_TN.clone()
    cut_TN[-1] = True
    steps_TN = torch.full(end_TN.shape, known.steps)
    advantage_TN = generalized_advantage(
        torch.stack(rewards),
        steps_TN,
        end_TN,
        cut_TN,
        value_TN,
        torch.cat([value_TN[1:], last_N[None]]),
        known.discount,
        gae_lambda,
    )
    kept = ran_TN.flatten()
    whole = Chain(torch.cat([c.x_BKHA for c in chains]), torch.cat([c.log_prob_BKH for c in chains])).rows(kept)
    executed_BH = torch.ones(len(whole.chunk), policy.config.execute_steps, dtype=torch.bool)
    return Samples(torch.cat(conditions)[kept], whole, advantage_TN.flatten()[kept], executed_BH)
