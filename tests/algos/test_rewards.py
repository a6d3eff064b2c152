"""Process rewards, and the weights of imitation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import TOY_ACTION, reaching_episode, write_reaching_set, write_toy_set

from vla_rl.algos.progress import ProgressConfig, latent_loss, progress
from vla_rl.algos.rewards import RewardConfig, roughness, shape_rewards
from vla_rl.algos.weights import WeightingConfig, is_demonstration, window_weights
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import Windows
from vla_rl.runtime.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def episodes() -> list:
    rng = np.random.default_rng(0)
    return [reaching_episode(rng, {"scene_seed": scene}) for scene in range(60)]


def test_by_default_rewards_are_the_recorded_ones(episodes: list) -> None:
    assert RewardConfig().plain
    shaped = shape_rewards(episodes, TOY_ACTION, RewardConfig(), generator())
    for episode, reward_T in zip(episodes, shaped, strict=True):
        np.testing.assert_array_equal(reward_T, episode.reward_T)


def test_shaping_leaves_the_recorded_rewards_alone(episodes: list) -> None:
    before = [e.reward_T.copy() for e in episodes]
    config = RewardConfig(step_penalty=0.1, smoothness_penalty=0.1, progress=ProgressConfig(weight=0.5, steps=5))
    shape_rewards(episodes, TOY_ACTION, config, generator())
    for episode, reward_T in zip(episodes, before, strict=True):
        np.testing.assert_array_equal(episode.reward_T, reward_T)


def test_a_step_costs_its_penalty(episodes: list) -> None:
    shaped = shape_rewards(episodes, TOY_ACTION, RewardConfig(step_penalty=0.01), generator())
    for episode, reward_T in zip(episodes, shaped, strict=True):
        assert reward_T.sum() == pytest.approx(episode.reward_T.sum() - 0.01 * episode.length, abs=1e-5)


def test_roughness_is_zero_for_steady_actions_and_by_hand_for_others() -> None:
    assert roughness(np.ones((5, 2)), TOY_ACTION, 3).tolist() == [0.0] * 5
    action_TA = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])  # half the range is 2
    np.testing.assert_allclose(roughness(action_TA, TOY_ACTION, 4), [0.0, 0.5 * 1.0, 0.5 * 0.5**2])
    np.testing.assert_allclose(roughness(action_TA, TOY_ACTION, 1), [0.0, 0.5, 0.5])


def test_failures_that_came_near_are_worth_more_and_none_as_much_as_a_success(episodes: list) -> None:
    config = ProgressConfig(weight=0.5, steps=200, tail=1)
    found = progress(episodes, config, generator())
    success = np.array([e.success for e in episodes])
    assert bool((found[success] == 1).all())
    failed = found[~success]
    assert 0 < failed.min() < failed.max() < 1
    distance = [np.linalg.norm(e.observations["observation.state"][-1]) for e in episodes if not e.success]
    assert np.corrcoef(distance, failed)[0, 1] < -0.4
    shaped = shape_rewards(episodes, TOY_ACTION, RewardConfig(progress=config), generator())
    for episode, reward_T, share in zip(episodes, shaped, found, strict=True):
        extra = 0.0 if episode.success else 0.5 * share
        assert reward_T.sum() == pytest.approx(episode.reward_T.sum() + extra, abs=1e-5)


def test_progress_without_successes_is_nothing_and_a_cut_episode_earns_none(episodes: list) -> None:
    failures = [e for e in episodes if not e.success]
    assert progress(failures, ProgressConfig(weight=0.5, steps=2), generator()).tolist() == [0.0] * len(failures)
    cut = [replace(e, truncated=False, terminated=False) if not e.success else e for e in episodes]
    config = RewardConfig(progress=ProgressConfig(weight=0.5, steps=2))
    for episode, reward_T in zip(cut, shape_rewards(cut, TOY_ACTION, config, generator()), strict=True):
        np.testing.assert_array_equal(reward_T, episode.reward_T)


def test_a_collapsed_latent_is_dearer_than_a_spread_one() -> None:
    spread = torch.randn(200, 4, generator=generator())
    flat = torch.zeros(200, 4)
    assert float(latent_loss(flat, flat, flat)) > float(latent_loss(spread, spread, spread)) + 0.5


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    return Windows(load_dataset(write_reaching_set(tmp_path / "set", 40)), 1, 2)


def test_demonstrations_keep_their_share_however_many_rollouts_there_are(windows: Windows) -> None:
    """Defect 20: re-training on roll-outs that mostly fail forgets the demonstrations."""
    episode_W = windows.data.frame_episode()[windows.frames_W]
    demo_W = is_demonstration(windows.data)[episode_W]
    for kind in ("none", "success"):
        weight_W = window_weights(windows, WeightingConfig(kind=kind, demo_share=0.3))  # type: ignore[arg-type]
        assert float(weight_W.sum()) == pytest.approx(1.0)
        assert float(weight_W[demo_W].sum()) == pytest.approx(0.3, abs=1e-5)
    by_number = window_weights(windows, WeightingConfig(kind="none", demo_share=0.0))
    assert torch.allclose(by_number, by_number[0])


def test_filtered_imitation_draws_no_failure(windows: Windows) -> None:
    success_E = torch.tensor(windows.data.episodes["success"].to_numpy(bool))
    weight_W = window_weights(windows, WeightingConfig(kind="success"))
    failed_W = ~success_E[windows.data.frame_episode()[windows.frames_W]]
    assert float(weight_W[failed_W].sum()) == 0.0
    assert bool((weight_W[~failed_W] > 0).all())


def test_advantage_weights_are_those_of_awr(windows: Windows) -> None:
    advantage_N = torch.randn(windows.data.num_frames, generator=generator())
    config = WeightingConfig(kind="advantage", temperature=0.5, demo_share=0.0, largest=1e9)
    weight_W = window_weights(windows, config, advantage_N)
    wanted_W = torch.softmax(advantage_N[windows.frames_W] / advantage_N.std(correction=0) / 0.5, 0)
    torch.testing.assert_close(weight_W, wanted_W, rtol=1e-4, atol=1e-8)
    limited = window_weights(windows, replace(config, largest=3.0), advantage_N)
    assert float(limited.max() / limited.min()) < float(wanted_W.max() / wanted_W.min())
    assert bool(torch.isfinite(window_weights(windows, config, torch.zeros_like(advantage_N))).all())


def test_what_cannot_be_weighted_is_said(tmp_path: Path, windows: Windows) -> None:
    failures = Windows(load_dataset(write_toy_set(tmp_path / "toy", [5, 6], successes=[False, False])), 1, 2)
    with pytest.raises(UserError, match="none of the 2 episodes succeeded"):
        window_weights(failures, WeightingConfig(kind="success"))
    with pytest.raises(UserError, match="critic"):
        window_weights(windows, WeightingConfig(kind="advantage"))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (WeightingConfig, {"temperature": 0.0}),
        (WeightingConfig, {"demo_share": 1.5}),
        (RewardConfig, {"step_penalty": -1.0}),
        (ProgressConfig, {"weight": 1.0}),
    ],
)
def test_bad_options_are_refused(cls: type, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        cls(**options)
