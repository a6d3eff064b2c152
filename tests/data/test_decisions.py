"""Decisions against a walk through the episodes that were written: real lengths, true final observations, nothing across an end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import TOY_ACTION, TOY_OBSERVATION, toy_episode

from vla_rl.data import schema
from vla_rl.data.decisions import DecisionBatch, Decisions, discounted_return
from vla_rl.data.episode import Episode
from vla_rl.data.reader import EpisodeData, load_dataset
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.errors import UserError
from vla_rl.types import ACTION, ENVIRONMENT_STATE, STATE, FeatureSpec, Observation

LENGTHS = [7, 3, 12, 1, 5]
SUCCESSES = [True, False, False, True, True]
CUT = 2  # the episode that neither ended nor ran out of time
HISTORY, STEPS, DISCOUNT = 3, 4, 0.9


def draw_episodes() -> list[Episode]:
    """Episodes with a reward at every step, and intended actions of their own."""
    rng = np.random.default_rng(0)
    found = []
    for i, (length, success) in enumerate(zip(LENGTHS, SUCCESSES, strict=True)):
        episode = toy_episode(rng, length, success=success, scene=i)
        reward_T = rng.normal(size=length).astype(np.float32)
        episode = replace(episode, truncated=not success and i != CUT)
        found.append(
            replace(episode, reward_T=reward_T, intended_TA=episode.action_TA + 1, instruction=f"task {i % 2}")
        )
    return found


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return draw_episodes()


@pytest.fixture(scope="module")
def data(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    root = tmp_path_factory.mktemp("decisions") / "set"
    writer = EpisodeWriter.open_or_create(
        root, action_spec=TOY_ACTION, observation_spec=TOY_OBSERVATION, task="toy", recipe={}
    )
    for episode in episodes:
        writer.add(episode)
    return load_dataset(root)


def decide(data: EpisodeData, steps: int = STEPS, **options: object) -> Decisions:
    return Decisions(data, HISTORY, steps, DISCOUNT, **options)  # type: ignore[arg-type]


def everything(decisions: Decisions) -> DecisionBatch:
    return decisions.batch(torch.arange(len(decisions)))


def history(episode: Episode, key: str, t: int) -> np.ndarray:
    """The last O observations at step t, where the first stands for those before it."""
    return np.stack([episode.observations[key][max(t - back, 0)] for back in reversed(range(HISTORY))])


def parts(batch: DecisionBatch) -> dict[str, torch.Tensor]:
    """All of a batch's tensors."""
    found = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    for name in ("observation", "next_observation"):
        seen: Observation = getattr(batch, name)
        assert seen.environment_state_BOS is not None
        found |= {f"{name}.state": seen.state_BOS, f"{name}.environment": seen.environment_state_BOS}
    return found


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_every_decision_is_what_its_episode_says(data: EpisodeData, episodes: list[Episode], steps: int) -> None:
    decisions = decide(data, steps)
    assert len(decisions) == sum(LENGTHS)  # every frame begins one
    found = parts(everything(decisions))
    row = 0
    for episode in episodes:
        for t in range(episode.length):
            ran = min(steps, episode.length - t)
            rewards = episode.reward_T[t:]
            assert found["is_pad_BH"][row].tolist() == [h >= ran for h in range(steps)]
            for h in range(steps):
                assert found["action_BHA"][row, h].tolist() == episode.action_TA[t + min(h, ran - 1)].tolist()
            discounted = [DISCOUNT**h * float(r) for h, r in enumerate(rewards)]
            assert float(found["reward_B"][row]) == pytest.approx(sum(discounted[:ran]), abs=1e-5)
            assert float(found["return_B"][row]) == pytest.approx(sum(discounted), abs=1e-5)
            assert float(found["discount_B"][row]) == pytest.approx(DISCOUNT**ran)
            assert bool(found["terminated_B"][row]) == (t + ran == episode.length and episode.terminated)
            for name, key in (("state", STATE), ("environment", ENVIRONMENT_STATE)):
                now, after = found[f"observation.{name}"][row], found[f"next_observation.{name}"][row]
                assert np.array_equal(now.numpy(), history(episode, key, t))
                assert np.array_equal(after.numpy(), history(episode, key, t + ran))
            row += 1


def test_the_successor_of_an_episodes_last_decision_is_its_true_final_observation(
    data: EpisodeData, episodes: list[Episode]
) -> None:
    batch = everything(decide(data))
    last_E = data.episode_to_E - 1
    for row, episode in zip(last_E.tolist(), episodes, strict=True):
        assert np.array_equal(batch.next_observation.state_BOS[row, -1].numpy(), episode.observations[STATE][-1])
    assert batch.terminated_B[last_E].tolist() == SUCCESSES  # a time-out's goes on, with gamma to the power of what ran
    torch.testing.assert_close(batch.discount_B[last_E], torch.full((len(LENGTHS),), DISCOUNT))


def test_decisions_of_chosen_episodes(data: EpisodeData) -> None:
    chosen = decide(data, episodes=[3, 1])
    assert set(chosen.episode_W.tolist()) == {1, 3}
    assert len(chosen) == 3 + 1
    whole = parts(everything(decide(data)))
    for name, value in parts(everything(chosen)).items():
        assert torch.equal(value, whole[name][chosen.frames_W]), name
    assert chosen.first().tolist() == [0, 3]
    assert decide(data).first().tolist() == data.episode_from_E.tolist()


def test_a_batch_is_its_decisions_one_by_one(data: EpisodeData) -> None:
    decisions = decide(data)
    order = torch.randperm(len(decisions), generator=torch.Generator().manual_seed(0))
    whole = parts(everything(decisions))
    for name, value in parts(decisions.batch(order)).items():
        assert torch.equal(value, whole[name][order]), name


def test_nothing_of_another_episode_moves_a_decision(data: EpisodeData) -> None:
    """Padding repeats a place in the data, and histories begin before the first frame: neither may be read from a neighbour."""
    mine_N = data.frame_episode() == 2
    columns = {
        k: torch.where(mine_N.view(-1, *[1] * (v.ndim - 1)), v, v + 100) if v.is_floating_point() else v
        for k, v in data.columns.items()
    }
    before, after = (parts(everything(decide(d, episodes=[2]))) for d in (data, replace(data, columns=columns)))
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    other = parts(everything(decide(replace(data, columns=columns), episodes=[1])))
    assert not torch.equal(other["reward_B"], parts(everything(decide(data, episodes=[1])))["reward_B"])


def test_padding_earns_nothing(data: EpisodeData) -> None:
    """Defect 8 of RL-100's code: a padded last step brings its +1 again."""
    reward_N = torch.zeros(data.num_frames)
    reward_N[data.episode_to_E - 1] = 1.0
    batch = everything(decide(data, 20, reward_N=reward_N))
    left_N = (data.episode_to_E[data.frame_episode()] - 1 - torch.arange(data.num_frames)).float()
    torch.testing.assert_close(batch.reward_B, DISCOUNT**left_N)
    torch.testing.assert_close(batch.reward_B, batch.return_B)


def test_given_rewards_stand_for_the_recorded_ones(data: EpisodeData) -> None:
    reward_N = torch.randn(data.num_frames, generator=torch.Generator().manual_seed(0))
    recorded, given = everything(decide(data)), everything(decide(data, reward_N=reward_N))
    assert not torch.allclose(recorded.reward_B, given.reward_B)
    columns = {k: v for k, v in data.columns.items() if k != schema.REWARD}
    alone = everything(decide(replace(data, columns=columns), reward_N=reward_N))
    assert torch.equal(alone.reward_B, given.reward_B)
    assert torch.equal(alone.return_B, given.return_B)
    assert torch.equal(alone.terminated_B, recorded.terminated_B)


def test_returns_are_sums_to_the_end_of_their_own_episode() -> None:
    reward_N = torch.randn(20, generator=torch.Generator().manual_seed(0))
    start_E, stop_E = torch.tensor([0, 7, 8]), torch.tensor([7, 8, 20])
    found_N = discounted_return(reward_N, start_E, stop_E, DISCOUNT)
    for start, stop in zip(start_E.tolist(), stop_E.tolist(), strict=True):
        for t in range(start, stop):
            wanted = sum(DISCOUNT ** (u - t) * float(reward_N[u]) for u in range(t, stop))
            assert float(found_N[t]) == pytest.approx(wanted, abs=1e-5)


def level(observation: Observation) -> torch.Tensor:
    """A value that looks at all of the history."""
    weight_O = torch.arange(1.0, HISTORY + 1)
    assert observation.environment_state_BOS is not None
    return observation.state_BOS.sum(-1) @ weight_O + observation.environment_state_BOS[:, -1, 0]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_frame_advantages_are_sums_of_errors_to_the_end_of_their_own_episode(
    data: EpisodeData, episodes: list[Episode], gae_lambda: float
) -> None:
    found_N = decide(data).frame_advantage(level, gae_lambda)
    row = 0
    for episode in episodes:
        seen = {k: np.stack([history(episode, k, t) for t in range(episode.length + 1)]) for k in episode.observations}
        value_T = level(Observation.from_features({k: torch.from_numpy(v) for k, v in seen.items()})).numpy().copy()
        value_T[-1] *= not episode.terminated
        for t in range(episode.length):
            wanted = sum(
                (DISCOUNT * gae_lambda) ** (u - t) * (episode.reward_T[u] + DISCOUNT * value_T[u + 1] - value_T[u])
                for u in range(t, episode.length)
            )
            assert float(found_N[row]) == pytest.approx(wanted, abs=1e-4)
            row += 1
    assert row == len(found_N)


def test_data_without_rewards_or_endings_are_refused(data: EpisodeData) -> None:
    columns = {k: v for k, v in data.columns.items() if k != schema.REWARD}
    with pytest.raises(UserError, match=schema.REWARD):
        decide(replace(data, columns=columns))
    final = schema.FINAL_PREFIX + STATE
    for column in ("terminated", final):
        with pytest.raises(UserError, match=column):
            decide(replace(data, episodes=data.episodes.drop(columns=column)))
    partly = data.episodes.assign(**{final: [*data.episodes[final][:-1], None]})  # as where two sets are joined
    with pytest.raises(UserError, match=final):
        decide(replace(data, episodes=partly))


# --- episodes from data


def test_an_episode_comes_back_as_it_was_written(data: EpisodeData, episodes: list[Episode]) -> None:
    for index, written in enumerate(episodes):
        read = data.episode(index)
        read.validate()
        assert read.observations.keys() == written.observations.keys()
        for key, value in written.observations.items():
            assert np.array_equal(read.observations[key], value)
        for name in ("action_TA", "intended_TA", "reward_T", "success_T"):
            one, two = getattr(read, name), getattr(written, name)
            assert one.dtype == two.dtype, name
            assert np.array_equal(one, two), name
        assert (read.terminated, read.truncated) == (written.terminated, written.truncated)
        assert (read.instruction, read.length, read.success) == (written.instruction, written.length, written.success)


@pytest.mark.parametrize("column", [schema.REWARD, schema.SUCCESS])
def test_an_episode_whose_columns_are_missing_is_refused(data: EpisodeData, column: str) -> None:
    columns = {k: v for k, v in data.columns.items() if k != column}
    with pytest.raises(UserError, match=column):
        replace(data, columns=columns).episode(0)


@pytest.mark.parametrize("column", ["terminated", "truncated", schema.FINAL_PREFIX + STATE])
def test_an_episode_whose_ending_is_unknown_is_refused(data: EpisodeData, column: str) -> None:
    with pytest.raises(UserError, match=column):
        replace(data, episodes=data.episodes.drop(columns=column)).episode(0)
    partly = data.episodes.assign(**{column: [*data.episodes[column][:-1].astype(object), None]})
    joined = replace(data, episodes=partly)  # of two sets, one of which says nothing of it
    assert joined.episode(0).length == LENGTHS[0]
    with pytest.raises(UserError, match=column):
        joined.episode(len(LENGTHS) - 1)


# --- the encoder of critics and models


def test_encoding_is_undone_by_decoding(data: EpisodeData) -> None:
    decisions = decide(data)
    encoder = StateEncoder.fit(decisions)
    seen = everything(decisions).observation
    flat_BD = encoder.encode(seen)
    assert flat_BD.shape == (len(decisions), encoder.state_dim) == (len(decisions), HISTORY * 7)
    back = encoder.decode(flat_BD)
    assert seen.environment_state_BOS is not None
    assert back.environment_state_BOS is not None
    torch.testing.assert_close(back.state_BOS, seen.state_BOS, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back.environment_state_BOS, seen.environment_state_BOS, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(back), flat_BD, atol=1e-5, rtol=1e-5)


def test_codes_have_zero_mean_and_unit_spread_over_the_frames(data: EpisodeData) -> None:
    encoder = StateEncoder.fit(Decisions(data, 1, 1, DISCOUNT))
    batch = everything(Decisions(data, 1, 1, DISCOUNT))
    for code in (encoder.encode(batch.observation), encoder.encode_action(batch.action_BHA)):
        torch.testing.assert_close(code.mean(0), torch.zeros(code.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(code.std(0, correction=0), torch.ones(code.shape[1]), atol=1e-4, rtol=0)


def test_the_newest_observation_is_the_last_part_of_a_code_and_an_action_step_one_part_of_a_chunks(
    data: EpisodeData,
) -> None:
    decisions = decide(data)
    encoder, batch = StateEncoder.fit(decisions), everything(decisions)
    assert batch.observation.environment_state_BOS is not None
    changed = replace(batch.observation, state_BOS=batch.observation.state_BOS.clone())
    changed.state_BOS[:, -1] += 1
    moved_BD = (encoder.encode(changed) - encoder.encode(batch.observation)) != 0
    assert moved_BD.any(0).nonzero().squeeze(1).tolist() == [14, 15, 16]
    chunk_BHA = batch.action_BHA.clone()
    chunk_BHA[:, 2] += 1
    moved_BD = (encoder.encode_action(chunk_BHA) - encoder.encode_action(batch.action_BHA)) != 0
    assert moved_BD.any(0).nonzero().squeeze(1).tolist() == [4, 5]
    assert moved_BD.shape[1] == encoder.action_dim == STEPS * 2


def test_statistics_travel_with_the_state(data: EpisodeData, make_set) -> None:
    mine = decide(data)
    grown = decide(load_dataset(make_set("grown", [6, 9], seed=5)))
    encoder, other = StateEncoder.fit(mine), StateEncoder.fit(grown)
    batch = everything(mine)
    wanted = encoder.encode(batch.observation), encoder.encode_action(batch.action_BHA)
    assert not torch.allclose(other.encode(batch.observation), wanted[0])
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.encode(batch.observation), wanted[0])
    assert torch.equal(other.encode_action(batch.action_BHA), wanted[1])


def test_a_channel_that_does_not_vary_and_data_of_states_alone(tmp_path: Path, episodes: list[Episode]) -> None:
    writer = EpisodeWriter.open_or_create(
        tmp_path / "still", action_spec=TOY_ACTION, observation_spec={STATE: FeatureSpec((3,))}, task="toy", recipe={}
    )
    for episode in episodes:
        state = episode.observations[STATE].copy()
        state[:, 1] = 0.25
        writer.add(replace(episode, observations={STATE: state}))
    decisions = decide(load_dataset(tmp_path / "still"))
    encoder, seen = StateEncoder.fit(decisions), everything(decisions).observation
    code_BD = encoder.encode(seen)
    assert encoder.state_dim == code_BD.shape[1] == HISTORY * 3
    assert code_BD[:, 1::3].abs().max() < 1e-6
    back = encoder.decode(code_BD)
    assert back.environment_state_BOS is None
    torch.testing.assert_close(back.state_BOS, seen.state_BOS, atol=1e-5, rtol=1e-5)


def test_the_data_keep_their_numbers(data: EpisodeData) -> None:
    """Batches and episodes are new data."""
    before = {k: v.clone() for k, v in data.columns.items()}
    batch = everything(decide(data))
    batch.action_BHA.zero_()
    batch.observation.state_BOS.zero_()
    batch.reward_B.zero_()
    for key, value in data.columns.items():
        assert torch.equal(value, before[key]), key
    assert (data.columns[ACTION] != 0).any()
