"""The replay: returns over several steps, ends of episodes, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import TOY_ACTION, TOY_OBSERVATION, toy_episode

from vla_rl.data.replay import JOURNAL, Replay
from vla_rl.data.steps import StepEpisode
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE, FeatureSpec

LENGTHS = [7, 3, 12, 1]
SUCCESSES = [True, False, True, False]  # the second and the last run out of time
DISCOUNT = 0.9
SPEC = dict(TOY_OBSERVATION)


def step_episode(length: int, *, success: bool, seed: int = 0) -> StepEpisode:
    rng = np.random.default_rng(seed + length)
    episode = toy_episode(rng, length, success=success, scene=seed)
    episode.reward_T[:] = rng.normal(size=length)
    base_TA = rng.normal(size=(length + 1, 2)).astype(np.float32)
    return StepEpisode(episode, base_TA, np.arange(length + 1) % 4)


def filled(folder: Path | None, spec: dict = SPEC, capacity: int = 64) -> tuple[Replay, list[StepEpisode]]:
    replay = Replay.open(folder, spec, TOY_ACTION.dim, capacity)
    episodes = [step_episode(n, success=s, seed=10 * n) for n, s in zip(LENGTHS, SUCCESSES, strict=True)]
    for steps in episodes:
        replay.add(steps, "policy")
    return replay, episodes


@pytest.mark.parametrize("n_steps", [1, 3, 20])
def test_returns_are_those_that_a_loop_over_each_episode_finds(n_steps: int) -> None:
    replay, episodes = filled(None)
    batch = replay.gather(torch.arange(replay.transitions), n_steps, DISCOUNT)
    at = 0
    for steps in episodes:
        episode = steps.episode
        for t in range(steps.length):
            ran = min(n_steps, steps.length - t)
            reward = sum(DISCOUNT**i * episode.reward_T[t + i] for i in range(ran))
            ends = episode.terminated and t + ran == steps.length
            assert batch.reward_B[at] == pytest.approx(reward, abs=1e-5)
            assert batch.discount_B[at] == pytest.approx(0.0 if ends else DISCOUNT**ran)
            for context, row in ((batch.now, t), (batch.following, t + ran)):
                np.testing.assert_array_equal(context.features[STATE][at], episode.observations[STATE][row])
                np.testing.assert_array_equal(context.base_BA[at], steps.base_TA[row])
                assert context.phase_B[at] == steps.phase_T[row]
            np.testing.assert_array_equal(batch.action_BA[at], episode.action_TA[t])
            at += 1
    assert at == replay.transitions == sum(LENGTHS)


def test_a_time_out_bootstraps_from_its_true_final_observation_with_the_bases_action_there() -> None:
    replay, episodes = filled(None)
    last = LENGTHS[0] + LENGTHS[1] - 1
    batch = replay.gather(torch.tensor([last]), 5, DISCOUNT)
    assert batch.discount_B[0] == pytest.approx(DISCOUNT)
    np.testing.assert_array_equal(batch.following.features[STATE][0], episodes[1].episode.observations[STATE][-1])
    np.testing.assert_array_equal(batch.following.base_BA[0], episodes[1].base_TA[-1])


def test_realised_returns() -> None:
    replay, episodes = filled(None)
    wanted = []
    for steps in episodes:
        reward_T = steps.episode.reward_T
        wanted += [sum(DISCOUNT ** (k - t) * reward_T[k] for k in range(t, steps.length)) for t in range(steps.length)]
    np.testing.assert_allclose(replay.returns(DISCOUNT), wanted, atol=1e-5)


def test_it_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    replay, _ = filled(tmp_path / "replay")
    again = Replay.open(tmp_path / "replay", SPEC, TOY_ACTION.dim, 64)
    index = torch.arange(replay.transitions)
    a, b = replay.gather(index, 3, DISCOUNT), again.gather(index, 3, DISCOUNT)
    assert torch.equal(a.reward_B, b.reward_B)
    assert torch.equal(a.following.features[STATE], b.following.features[STATE])
    assert again.episodes == replay.episodes


def test_an_episode_that_a_kill_cut_short_is_as_if_it_had_not_begun(tmp_path: Path) -> None:
    replay, _ = filled(tmp_path / "replay")
    journal = tmp_path / "replay" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:9])
    again = Replay.open(tmp_path / "replay", SPEC, TOY_ACTION.dim, 64)
    assert again.transitions == sum(LENGTHS[:-1])
    again.add(step_episode(4, success=True), "policy")
    assert Replay.open(tmp_path / "replay", SPEC, TOY_ACTION.dim, 64).transitions == sum(LENGTHS[:-1]) + 4
    assert replay.transitions == sum(LENGTHS)


def test_what_came_after_a_checkpoint_is_forgotten(tmp_path: Path) -> None:
    replay, _ = filled(tmp_path / "replay")
    replay.keep(2)
    assert replay.transitions == LENGTHS[0] + LENGTHS[1]
    assert len(json.loads(f"[{','.join((tmp_path / 'replay' / JOURNAL).read_text().splitlines())}]")) == 3
    replay.add(step_episode(5, success=True), "noise")
    again = Replay.open(tmp_path / "replay", SPEC, TOY_ACTION.dim, 64)
    assert again.transitions == LENGTHS[0] + LENGTHS[1] + 5
    assert [e["source"] for e in again.episodes] == ["policy", "policy", "noise"]
    with pytest.raises(UserError, match="holds 3 episodes where its run has seen 9"):
        again.keep(9)


def test_pictures_are_kept_as_bytes(tmp_path: Path) -> None:
    spec = {STATE: FeatureSpec((3,)), "observation.images.front": FeatureSpec((6, 5, 3))}
    replay = Replay.open(tmp_path / "replay", spec, TOY_ACTION.dim, 32)
    steps = step_episode(4, success=True)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (5, 6, 5, 3)).astype(np.uint8)
    seen = {STATE: steps.episode.observations[STATE], "observation.images.front": picture}
    replay.add(StepEpisode(replaced(steps, seen), steps.base_TA, steps.phase_T), "policy")
    batch = replay.gather(torch.arange(4), 1, DISCOUNT)
    assert batch.following.features["observation.images.front"].dtype == torch.uint8
    np.testing.assert_array_equal(batch.following.features["observation.images.front"], picture[1:])
    assert (tmp_path / "replay" / "observation.images.front.bin").stat().st_size == 32 * 6 * 5 * 3


def replaced(steps: StepEpisode, observations: dict) -> object:
    from dataclasses import replace

    return replace(steps.episode, observations=observations)


def test_bad_input_leaves_the_replay_as_it_was(tmp_path: Path) -> None:
    replay, _ = filled(tmp_path / "replay", capacity=30)
    with pytest.raises(UserError, match="a replay of 30 rows is full; 10 more do not fit"):
        replay.add(step_episode(9, success=True), "policy")
    broken = step_episode(2, success=True)
    broken.episode.action_TA[1, 0] = np.nan
    with pytest.raises(UserError, match="'action' is not finite at step 1"):
        replay.add(broken, "policy")
    assert replay.transitions == sum(LENGTHS)
    with pytest.raises(UserError, match="other columns or another capacity"):
        Replay.open(tmp_path / "replay", {STATE: FeatureSpec((3,))}, TOY_ACTION.dim, 30)


def test_the_bases_actions_are_checked_too() -> None:
    replay, _ = filled(None)
    good = step_episode(4, success=True)
    broken = good.base_TA.copy()
    broken[2, 0] = np.nan
    with pytest.raises(UserError, match="base that are not finite"):
        replay.add(StepEpisode(good.episode, broken, good.phase_T), "policy")
    with pytest.raises(UserError, match=r"wants 5 actions of the base and their places, got \(4, 2\)"):
        replay.add(StepEpisode(good.episode, good.base_TA[:-1], good.phase_T), "policy")
    assert len(replay.episodes) == len(LENGTHS)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that a sparse file has no block for kills the process by SIGBUS instead."""
    replay, _ = filled(tmp_path / "replay")
    before = {p.name: p.read_bytes() for p in (tmp_path / "replay").iterdir()}

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no space left"):
        replay.add(step_episode(4, success=True), "policy")
    monkeypatch.undo()
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "replay").iterdir()}
    replay.add(step_episode(4, success=True), "policy")
    assert len(replay.episodes) == len(LENGTHS) + 1


@pytest.mark.parametrize("lost", [True, False])
def test_a_column_that_is_lost_or_cut_is_not_taken_for_zeros(tmp_path: Path, lost: bool) -> None:
    folder = tmp_path / "replay"
    filled(folder)
    if lost:
        (folder / "reward.bin").unlink()
    else:
        os.truncate(folder / "reward.bin", 8)
    with pytest.raises(UserError, match=r"reward.bin is lost or cut, and its replay holds 4 episodes"):
        Replay.open(folder, SPEC, TOY_ACTION.dim, 64)


def test_drawing_reaches_every_transition() -> None:
    replay, _ = filled(None)
    assert set(replay.draw(2000, torch.Generator().manual_seed(0)).tolist()) == set(range(sum(LENGTHS)))
