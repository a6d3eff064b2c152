"""Samples from the models: what happens in a world whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import reaching_policy, write_reaching_set

from vla_rl.algos.dynamics import DynamicsConfig, DynamicsEnsemble, Prediction
from vla_rl.algos.imagination import imagine, one_decision
from vla_rl.data.decisions import Decisions
from vla_rl.data.reader import load_dataset
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.kernels import KernelConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import log_ratio, step_log_prob
from vla_rl.types import Observation

DISCOUNT = 0.95


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Decisions:
    root = write_reaching_set(tmp_path_factory.mktemp("data") / "set", 20)
    return Decisions(load_dataset(root), 1, 2, DISCOUNT)


@pytest.fixture
def policy() -> ChunkPolicy:
    return reaching_policy(2)


class Pays(DynamicsEnsemble):
    """Pays 0.5 for every decision, and ends each with a given certainty."""

    logit = -50.0

    def predict(self, state: Tensor, action: Tensor) -> Prediction:
        found = super().predict(state, action)
        half, end = torch.full_like(found.reward_EB, 0.5), torch.full_like(found.end_logit_EB, self.logit)
        return replace(found, reward_EB=half, end_logit_EB=end)


class Flat:
    """Every state is worth 2, every action 3 or 4."""

    def __init__(self, encoder: StateEncoder) -> None:
        self.encoder = encoder

    def update(self, batch: object) -> dict[str, float]:
        return {}

    def value(self, observation: Observation) -> Tensor:
        return torch.full((observation.batch_size,), 2.0)

    def q_values(self, observation: Observation, action_BHA: Tensor) -> Tensor:
        return torch.stack([torch.full((observation.batch_size,), q) for q in (3.0, 4.0)])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def starts(known: Decisions, rows: int = 6) -> Observation:
    return known.observe(known.frames_W[:rows], known.episode_W[:rows])


def model(known: Decisions) -> Pays:
    return Pays(StateEncoder.fit(known), DynamicsConfig(width=8, depth=1, members=2), generator())


def test_one_decision_is_judged_by_the_pessimists_advantage(known: Decisions, policy: ChunkPolicy) -> None:
    samples = one_decision(
        policy, policy.make_kernel(KernelConfig()), Flat(StateEncoder.fit(known)), starts(known), generator()
    )
    assert samples.advantage_B.tolist() == [1.0] * 6


def test_advantages_are_those_of_the_imagined_rewards(known: Decisions, policy: ChunkPolicy) -> None:
    world = model(known)
    kernel, decisions = policy.make_kernel(KernelConfig()), 3
    samples = imagine(policy, kernel, Flat(world.encoder), world, starts(known), decisions, known, 1.0, generator())
    gamma = DISCOUNT**2
    assert len(samples.advantage_B) == 18
    for t in range(decisions):
        left = decisions - t
        wanted = sum(gamma**i * 0.5 for i in range(left)) + gamma**left * 2.0 - 2.0
        torch.testing.assert_close(samples.advantage_B[6 * t : 6 * (t + 1)], torch.full((6,), wanted))


def test_nothing_is_learned_from_what_comes_after_the_end(known: Decisions, policy: ChunkPolicy) -> None:
    world = model(known)
    world.logit = 50.0
    samples = imagine(
        policy,
        policy.make_kernel(KernelConfig()),
        Flat(world.encoder),
        world,
        starts(known),
        5,
        known,
        0.9,
        generator(),
    )
    assert samples.advantage_B.tolist() == [0.5 - 2.0] * 6


def test_imagined_chains_have_ratio_one(known: Decisions, policy: ChunkPolicy) -> None:
    world, kernel = model(known), policy.make_kernel(KernelConfig())
    samples = imagine(policy, kernel, Flat(world.encoder), world, starts(known), 4, known, 0.9, generator())
    rows = len(samples.advantage_B)
    for index, k in enumerate(kernel.trained):
        x = samples.chain.x_BKHA
        new = step_log_prob(policy, kernel, samples.condition_BOD, x[:, k], x[:, k + 1], torch.full((rows,), k))
        ratio = log_ratio(new, samples.chain.log_prob_BKH[:, index], samples.executed_BH, "joint", 2).exp()
        assert float((ratio.detach() - 1).abs().max()) < 1e-5


def test_the_same_generator_imagines_the_same(known: Decisions, policy: ChunkPolicy) -> None:
    world, kernel = model(known), policy.make_kernel(KernelConfig())
    one, two = (
        imagine(policy, kernel, Flat(world.encoder), world, starts(known), 3, known, 0.9, generator()) for _ in range(2)
    )
    assert torch.equal(one.chain.x_BKHA, two.chain.x_BKHA)
