"""Critics: expectiles on a bandit with a known answer, chunk values against the truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor
from toys import write_reaching_set

from vla_rl.algos.critic import advantage
from vla_rl.algos.iql import IQL, IQLConfig, expectile_loss
from vla_rl.data.decisions import Decisions
from vla_rl.data.reader import load_dataset
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.types import Observation


def decisions(tmp: pytest.TempPathFactory | Callable, episodes: range, count: int = 200) -> Decisions:
    root = write_reaching_set(tmp.mktemp("data") / "reaching", episodes=count)  # type: ignore[union-attr]
    return Decisions(load_dataset(root), 1, 2, 0.95, episodes)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_the_expectile_of_a_bandit_is_the_one_of_its_rewards(expectile: float) -> None:
    """Its minimiser solves E |omega - 1(u < 0)| u = 0; for a fair coin of 0 and 1 that is omega itself."""
    rewards = torch.tensor([0.0, 1.0]).repeat(500)
    value = torch.tensor(0.2, requires_grad=True)
    optimizer = torch.optim.LBFGS([value], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expectile_loss(rewards - value, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert float(value.detach()) == pytest.approx(expectile, abs=1e-3)
    skewed = torch.rand(2000, generator=torch.Generator().manual_seed(0)) ** 3
    found = torch.tensor(stats.expectile(skewed.double().numpy(), alpha=expectile), requires_grad=True)
    expectile_loss(skewed.double() - found, expectile).backward()
    assert abs(float(found.grad)) < 1e-6  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[IQL, Decisions, Decisions]:
    known = decisions(tmp_path_factory, range(160))
    unseen = Decisions(known.data, 1, 2, 0.95, range(160, 200))
    config = IQLConfig(steps=600, width=64, learning_rate=2e-3, polyak=0.02, discount=0.95, return_share=0.3)
    critic = IQL(StateEncoder.fit(known), config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for _ in range(config.steps):
        critic.update(known.batch(torch.randint(0, len(known), (256,), generator=generator)))
    return critic, known, unseen


def test_values_rise_towards_the_goal(trained: tuple[IQL, Decisions, Decisions]) -> None:
    critic, _, _ = trained
    rows = torch.tensor([[0.2, 0.0], [0.9, 0.9]])[:, None]
    near, far = critic.value(Observation(rows)).tolist()
    assert near > far + 0.2


def test_a_good_action_has_the_larger_advantage(trained: tuple[IQL, Decisions, Decisions]) -> None:
    critic, known, _ = trained
    batch = known.batch(torch.arange(300))
    towards = -0.4 * batch.observation.state_BOS[:, -1:].expand(-1, 2, -1)
    good, bad = (advantage(critic, batch.observation, a) for a in (towards, -towards))
    assert float((good > bad).float().mean()) > 0.9


def test_the_target_of_q_counts_real_lengths_stops_at_the_end_and_not_at_a_time_out(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Defects 8 and 9: padding that repeats a reward, time-outs taken for ends."""
    known = decisions(tmp_path_factory, range(40), 40)
    critic = IQL(StateEncoder.fit(known), IQLConfig(width=8, return_share=0.0, discount=0.95), torch.Generator())
    with torch.no_grad():
        critic.v.layers[-1].weight.zero_()
        critic.v.layers[-1].bias.fill_(0.5)  # what follows is worth one half, wherever it is
        critic.q.layers[-1].weight.zero_()
        critic.q.layers[-1].bias.zero_()
    batch = known.batch(torch.arange(len(known)))
    last = known.data.episode_to_E[known.episode_W] - known.frames_W <= known.steps
    timed_out = last & ~batch.terminated_B
    assert bool(timed_out.any())
    assert bool(batch.terminated_B.any())
    goal = torch.where(batch.terminated_B, batch.reward_B, batch.reward_B + 0.5 * batch.discount_B)
    torch.testing.assert_close(goal[timed_out], 0.5 * batch.discount_B[timed_out])
    found = critic.update(batch)["critic/q_loss"]
    assert found == pytest.approx(float(goal.square().mean()), rel=1e-5)


def test_a_critic_travels_with_its_normalisers(trained: tuple[IQL, Decisions, Decisions]) -> None:
    """Defect 15: a normaliser that is fitted anew on merged data breaks stored critics."""
    critic, known, _ = trained
    data = known.data
    empty = StateEncoder(data.observation_spec, 1, data.action_spec.dim, 2)
    copy = IQL(empty, critic.config, torch.Generator())
    batch = known.batch(torch.arange(50))
    assert not torch.allclose(
        copy.q_values(batch.observation, batch.action_BHA), critic.q_values(batch.observation, batch.action_BHA)
    )
    copy.load_state_dict(critic.state_dict())
    assert torch.equal(
        copy.q_values(batch.observation, batch.action_BHA), critic.q_values(batch.observation, batch.action_BHA)
    )
    assert torch.equal(copy.value(batch.observation), critic.value(batch.observation))


@pytest.mark.parametrize(
    "options", [{"expectile": 0.3}, {"discount": 0.0}, {"polyak": 2.0}, {"return_share": 1.5}, {"learning_rate": 0.0}]
)
def test_bad_critics_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        IQLConfig(**options)
