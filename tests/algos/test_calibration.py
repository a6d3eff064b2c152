"""Calibration: it sees what a critic knows of states and of actions, and is not taken in by a Q that knows states alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import REACHING_OBSERVATION, TOY_ACTION, reaching_policy, tiny_flow, write_reaching_set

from vla_rl.algos.calibration import Calibration, _pair_counts, calibrate, own_episodes
from vla_rl.algos.iql import IQL, IQLConfig
from vla_rl.data.decisions import DecisionBatch, Decisions
from vla_rl.data.episode import Provenance
from vla_rl.data.reader import load_dataset
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.records import PolicySpec
from vla_rl.types import STATE, ActionChunk, Observation

HASH = "the policy's"


def wandering_policy() -> ChunkPolicy:
    """Stands still on average, wherever it is."""
    policy = reaching_policy(2)

    def sample(observation: Observation, noise_KBHA: Tensor, prefix: Tensor | None = None) -> ActionChunk:
        return ActionChunk(0.2 * noise_KBHA[0], 2, TOY_ACTION)

    policy.sample = sample  # type: ignore[method-assign]
    return policy


def whose(scene: int) -> Provenance:
    """One in five explores, one in ten is another policy's."""
    return {
        "source": "policy",
        "round": 1,
        "strategy": "exploratory" if scene % 5 == 0 else "deployed",
        "policy_hash": "another" if scene % 10 == 1 else HASH,
    }


@pytest.fixture(scope="module")
def wandered(tmp_path_factory: pytest.TempPathFactory) -> Decisions:
    root = tmp_path_factory.mktemp("data") / "set"
    write_reaching_set(root, 250, provenance=whose, gains=(0.0, 0.0), noise=0.2, near=0.3)
    return Decisions(load_dataset(root), 1, 2, 0.95)


def own(known: Decisions) -> Tensor:
    return own_episodes(known.data, HASH)


class Smooth:
    """A smooth random function."""

    def __init__(self, dim: int, scale: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.frequency_DF = 2 * torch.randn(dim, 64, generator=draw)
        self.phase_F = 6.3 * torch.rand(64, generator=draw)
        self.weight_F = scale * torch.randn(64, generator=draw) / 32**0.5

    def __call__(self, x_BD: Tensor) -> Tensor:
        return torch.sin(x_BD @ self.frequency_DF + self.phase_F) @ self.weight_F


class StatesAlone:
    """V and Q err about states, each in its own way; what Q says of actions is made up."""

    def __init__(self, known: Decisions, error: float, seed: int) -> None:
        self.encoder = StateEncoder.fit(known)
        self.v_error, self.q_error, self.made_up = (
            Smooth(2, error, seed),
            Smooth(2, error, seed + 1),
            Smooth(6, 0.02, seed + 2),
        )

    def update(self, batch: DecisionBatch) -> dict[str, float]:
        return {}

    def value(self, observation: Observation) -> Tensor:
        state_BD = observation.state_BOS[:, -1]
        return -state_BD.norm(dim=1) + self.v_error(state_BD)

    def q_values(self, observation: Observation, action_BHA: Tensor) -> Tensor:
        state_BD = observation.state_BOS[:, -1]
        both = torch.cat([state_BD, action_BHA.flatten(1)], dim=1)
        return (-state_BD.norm(dim=1) + self.q_error(state_BD) + self.made_up(both))[None]


def test_a_q_that_knows_states_alone_is_at_chance_about_actions(wandered: Decisions) -> None:
    """Defect 13. Q - V against the return above V would take it for a judge of actions: the error of V is on both sides."""
    data = wandered.data
    at_once = -data.columns[STATE].float().norm(dim=1)  # what is earned hangs on where one is, and on nothing one does
    null = Decisions(data, 1, 2, 1e-6, None, at_once)
    batch, episode_W = null.batch(torch.arange(0, len(null), 3)), null.episode_W[::3].numpy()
    judged, fooled = [], []
    for seed in range(0, 60, 3):
        critic = StatesAlone(null, 0.1, seed)
        judged.append(calibrate(critic, wandering_policy(), null, own(null), 1000, seed))
        value_B = critic.value(batch.observation).numpy()
        shared_B = critic.q_values(batch.observation, batch.action_BHA)[0].numpy() - value_B
        right_EE, all_EE = _pair_counts(shared_B, batch.return_B.numpy(), value_B, episode_W)
        fooled.append(right_EE.sum() / all_EE.sum())
    assert np.mean(fooled) > 0.6
    assert np.mean([j.pair_accuracy for j in judged]) == pytest.approx(0.5, abs=0.01)
    assert np.mean([j.actions_at_chance for j in judged]) > 0.85
    assert not any(j.states_at_chance for j in judged)


def test_a_q_that_knows_actions_is_told_from_a_coin(wandered: Decisions) -> None:
    class Nearer(StatesAlone):
        sign = 1.0

        def q_values(self, observation: Observation, action_BHA: Tensor) -> Tensor:
            value_B = -self.sign * (observation.state_BOS[:, -1] + action_BHA.sum(1)).norm(dim=1)
            hopeful_B = 10 + super().q_values(observation, action_BHA)[0]  # knows nothing; the lower one counts
            return torch.stack([value_B, hopeful_B])

    critic = Nearer(wandered, 0.1, 0)
    judged = calibrate(critic, wandering_policy(), wandered, own(wandered), 10_000, 0)
    assert not judged.actions_at_chance
    assert "held-out" in str(judged)
    critic.sign = -1.0
    misled = calibrate(critic, wandering_policy(), wandered, own(wandered), 10_000, 0)
    assert misled.pair_accuracy == pytest.approx(1 - judged.pair_accuracy, abs=1e-6)
    assert misled.actions_at_chance


def test_a_v_that_knows_nothing_is_at_chance_about_states(wandered: Decisions) -> None:
    class Blind(StatesAlone):
        def value(self, observation: Observation) -> Tensor:
            return self.made_up(observation.state_BOS[:, -1].repeat(1, 3) % 0.013 * 1e3)

    chance = [
        calibrate(Blind(wandered, 0.1, seed), wandering_policy(), wandered, own(wandered), 1000, seed).states_at_chance
        for seed in range(10)
    ]
    assert np.mean(chance) > 0.6


def test_errors_that_are_shared_within_an_episode_do_not_count_as_many(wandered: Decisions) -> None:
    """A bootstrap of one side of the pairs, or of decisions, would be too sure, and follow a coin one time in five."""
    batch = wandered.batch(torch.arange(len(wandered)))
    keys = [tuple(row) for row in batch.observation.state_BOS[:, -1].tolist()]
    episode_of = dict(zip(keys, wandered.episode_W.tolist(), strict=True))

    class Shared(StatesAlone):
        def __init__(self, seed: int) -> None:
            super().__init__(wandered, 0.0, seed)
            self.draw = torch.Generator().manual_seed(seed)

        def q_values(self, observation: Observation, action_BHA: Tensor) -> Tensor:
            episode_B = torch.tensor([episode_of[tuple(row)] for row in observation.state_BOS[:, -1].tolist()])
            noise = torch.randn(wandered.data.num_episodes, generator=self.draw)[episode_B]
            return (noise + 0.1 * torch.randn(len(episode_B), generator=self.draw))[None]

    chance = [
        calibrate(Shared(seed), wandering_policy(), wandered, own(wandered), 1000, seed).actions_at_chance
        for seed in range(20)
    ]
    assert np.mean(chance) > 0.85


def test_only_whole_decisions_that_the_policy_took_are_compared(wandered: Decisions) -> None:
    mine = own(wandered)
    assert mine.float().mean() == pytest.approx(0.7)
    judged = calibrate(StatesAlone(wandered, 0.1, 0), wandering_policy(), wandered, mine, 10**6, 0)
    lengths = (wandered.data.episode_to_E - wandered.data.episode_from_E)[mine]
    assert judged.action_decisions == int((lengths // 2).sum())
    assert judged.decisions == len(wandered)
    nobody = torch.zeros_like(mine)
    all_lengths = wandered.data.episode_to_E - wandered.data.episode_from_E
    anyone = calibrate(StatesAlone(wandered, 0.1, 0), wandering_policy(), wandered, nobody, 10**6, 0)
    assert anyone.action_decisions == int((all_lengths - 1).sum())


def test_a_bound_at_chance_is_chance() -> None:
    assert Calibration(10, 5, 0.9, 0.1, 10, 0.6, 0.5).actions_at_chance
    assert not Calibration(10, 5, 0.9, 0.1, 10, 0.6, 0.51).actions_at_chance
    assert Calibration(10, 5, 0.9, 0.0, 10, 0.6, 0.51).states_at_chance
    assert not Calibration(10, 5, 0.9, 0.1, 10, 0.6, 0.51).states_at_chance


def test_data_without_any_outcome_or_whole_decision_give_numbers(tmp_path: Path) -> None:
    data = load_dataset(write_reaching_set(tmp_path / "reaching", episodes=20))
    flat = Decisions(data, 1, 2, 0.95, None, torch.zeros(data.num_frames))
    critic = IQL(StateEncoder.fit(flat), IQLConfig(width=8), torch.Generator())
    judged = calibrate(critic, reaching_policy(2), flat, own_episodes(data, HASH), 1000, 0)
    assert (judged.value_correlation, judged.states_at_chance) == (0.0, True)
    assert 0 <= judged.pair_low <= judged.pair_accuracy <= 1
    long = Decisions(data, 1, 100, 0.95)
    patient = IQL(StateEncoder.fit(long), IQLConfig(width=8), torch.Generator())
    policy = tiny_flow(100, 100, 1).build(PolicySpec(REACHING_OBSERVATION, TOY_ACTION, "reach")).eval()
    nothing = calibrate(patient, policy, long, own_episodes(data, HASH), 1000, 0)
    assert (nothing.action_decisions, nothing.pair_accuracy, nothing.actions_at_chance) == (0, 0.5, True)
