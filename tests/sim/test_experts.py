"""Experts succeed when clean, fail when told to, recover from mistakes; the knobs do what they say."""

from __future__ import annotations

import numpy as np
import pytest

from sim.collect import expert_episodes, run_expert
from sim.experts.base import ExpertConfig, HumanLike, load_expert
from sim.task import load_task
from vla_rl.data.episode import Episode
from vla_rl.runtime.errors import UserError

SCENES = range(50_000, 50_003)


def episodes(name: str, config: ExpertConfig, scenes: range) -> list[Episode]:
    return list(expert_episodes(load_task(name), config, scenes, workers=1))


@pytest.mark.parametrize("name", ["lift", "can", "stack", "door", "push_t", "square"])
def test_the_clean_expert_succeeds(name: str) -> None:
    found = episodes(name, ExpertConfig(), SCENES)
    assert sum(e.success for e in found) >= 2  # the rates over 100 scenes are in docs/results.md
    for episode in found:
        episode.validate()
        assert np.array_equal(episode.action_TA, episode.intended_TA)


def test_an_expert_that_misjudges_fails() -> None:
    for name in ("lift", "push_t"):
        found = episodes(name, ExpertConfig(failure_share=1.0), SCENES)
        assert not any(e.success for e in found)
        assert all(e.truncated and not e.terminated for e in found)
        assert all(e.provenance["meant_to_fail"] for e in found)


def test_human_like_flaws_change_the_actions_and_are_recovered_from() -> None:
    config = ExpertConfig(action_noise=0.1, pause_probability=0.02, mistake_probability=0.02)
    found = episodes("push_t", config, range(50_000, 50_010))
    assert sum(e.success for e in found) >= 6
    assert all(not np.array_equal(e.action_TA, e.intended_TA) for e in found)


def test_strategies_are_mixed_and_recorded() -> None:
    found = episodes("push_t", ExpertConfig(strategies=0), range(50_000, 50_020))
    assert len({e.provenance["strategy"] for e in found}) >= 3
    assert {e.provenance["strategy"] for e in episodes("push_t", ExpertConfig(), SCENES)} == {
        load_expert(load_task("push_t")).strategies[0]
    }


def test_episodes_are_the_same_for_any_number_of_workers() -> None:
    task, config = load_task("push_t"), ExpertConfig(strategies=0, action_noise=0.1)
    one, two = (list(expert_episodes(task, config, SCENES, workers)) for workers in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.action_TA, b.action_TA)
        assert a.provenance == b.provenance


class Still:
    """An expert that keeps still."""

    strategies = ("only",)

    def reset(self, *_: object) -> None: ...

    def act(self, env: object) -> np.ndarray:
        return np.zeros(1)


def test_mistakes_on_absolute_targets_move_them_by_a_tenth_of_the_range_a_step() -> None:
    env = load_task("gym:Pendulum-v1").make_env()
    person = HumanLike(Still(), ExpertConfig(mistake_probability=1.0))  # type: ignore[arg-type]
    person.reset(env, np.random.default_rng(0))
    target = np.array([person.act(env)[0][0] for _ in range(500)]) / env.action_space.high[0]
    steps = np.abs(np.diff(target))
    assert 0.08 < steps.max() <= 0.1 + 1e-6


def test_noise_has_the_standard_deviation_and_correlation_asked_for() -> None:
    env = load_task("gym:Pendulum-v1").make_env()

    person = HumanLike(Still(), ExpertConfig(action_noise=0.1, noise_correlation=0.8))  # type: ignore[arg-type]
    person.reset(env, np.random.default_rng(0))
    noise = (
        np.array([person.act(env)[0][0] for _ in range(20_000)]) / env.action_space.high[0] / 0.1
    )  # absolute targets: a tenth
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    assert np.corrcoef(noise[:-1], noise[1:])[0, 1] == pytest.approx(0.8, abs=0.03)


def test_the_planner_of_gym_tasks_swings_the_pendulum_up() -> None:
    task = load_task("gym:Pendulum-v1", max_episode_steps=100)
    env = task.make_env()
    planned = run_expert(env, HumanLike(load_expert(task), ExpertConfig()), 50_000)
    rng = np.random.default_rng(0)
    env.reset(seed=50_000)
    idle = sum(env.step(rng.uniform(-2, 2, 1))[1] for _ in range(100))
    assert planned.reward_T.sum() > 0.6 * idle  # both negative
    assert planned.reward_T[-20:].mean() > -1.0


def test_a_task_without_expert_is_named() -> None:
    class Other:
        name = "other"
        expert = ""

    with pytest.raises(UserError, match=r"no expert for task 'other'.*lift"):
        load_expert(Other())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"failure_share": 1.5}, {"noise_correlation": 1.0}, {"action_noise": -1.0}, {"strategies": -1}]
)
def test_knobs_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ExpertConfig(**options)
