"""Ways to draw a chunk: plain, noisy, best of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import reaching_policy

from vla_rl.inference.rules import highest
from vla_rl.inference.selectors import Candidates, NoisySampler, PlainSampler, Sampler, SelectingSampler, repeat
from vla_rl.kernels import KernelConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.errors import UserError
from vla_rl.types import Observation


@pytest.fixture
def policy() -> ChunkPolicy:
    return reaching_policy(4)


@pytest.fixture
def observation() -> Observation:
    return Observation(torch.randn(5, 1, 2, generator=torch.Generator().manual_seed(1)))


def noise(sampler: Sampler, seed: int = 2) -> Tensor:
    return torch.randn(sampler.noise_count, 5, 4, 2, generator=torch.Generator().manual_seed(seed))


def first_action(candidates: Candidates) -> Tensor:
    return candidates.executed()[:, 0, 0].view(candidates.shape)


def test_the_best_candidate_is_run(policy: ChunkPolicy, observation: Observation) -> None:
    sampler = SelectingSampler(policy, 8, highest(first_action))
    drawn = noise(sampler)
    best = sampler(observation, drawn).action_BHA
    each = torch.stack([policy.sample(observation, drawn[n : n + 1]).action_BHA for n in range(8)])
    wanted_B = each[:, :, 0, 0].max(0).values
    torch.testing.assert_close(best[:, 0, 0], wanted_B)
    assert each[:, :, 0, 0].std(0).min() > 1e-3


def test_a_choice_of_one_is_no_choice(policy: ChunkPolicy, observation: Observation) -> None:
    sampler = SelectingSampler(policy, 1, highest(first_action))
    drawn = noise(sampler)
    torch.testing.assert_close(
        sampler(observation, drawn).action_BHA, PlainSampler(policy)(observation, drawn).action_BHA
    )


def test_a_row_does_not_depend_on_its_neighbours(policy: ChunkPolicy, observation: Observation) -> None:
    sampler = SelectingSampler(policy, 4, highest(first_action))
    drawn = noise(sampler)
    whole = sampler(observation, drawn).action_BHA
    alone = sampler(Observation(observation.state_BOS[2:3]), drawn[:, 2:3]).action_BHA
    torch.testing.assert_close(whole[2:3], alone)


def test_the_noisy_sampler_explores_around_the_plain_one(policy: ChunkPolicy, observation: Observation) -> None:
    quiet = NoisySampler(
        policy, policy.make_kernel(KernelConfig(noise_scale=0.0, std_min=1e-6, std_max=1e-6, last_std=1e-6))
    )
    loud = NoisySampler(policy, policy.make_kernel(KernelConfig()))
    drawn = noise(quiet)
    plain = PlainSampler(policy)(observation, drawn[:1]).action_BHA
    torch.testing.assert_close(quiet(observation, drawn).action_BHA, plain, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(loud(observation, drawn).action_BHA, plain, atol=1e-2)


def test_repeated_rows_stand_together(observation: Observation) -> None:
    many = repeat(observation, 3).state_BOS
    assert torch.equal(many[0], many[2])
    assert torch.equal(many[3], observation.state_BOS[1])


def test_no_candidates_are_refused(policy: ChunkPolicy) -> None:
    with pytest.raises(UserError, match="candidates"):
        SelectingSampler(policy, 0, highest(first_action))
