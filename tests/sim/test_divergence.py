"""Bad actions and simulations that break down: named, contained, and kept out of data sets and statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sim.collect import run_expert
from sim.experts.base import ExpertConfig, HumanLike, load_expert
from sim.task import InvalidActionError, ModelMismatchError, SimulationDivergedError, load_task
from sim.tasks import robosuite_task
from sim.vector import TaskVectorEnv, make_vector_env
from vla_rl.cli import collect
from vla_rl.data.episode import Episode
from vla_rl.data.reader import load_dataset
from vla_rl.inference.rollout import rollout
from vla_rl.runtime.errors import UserError

TASKS = ["push_t", "lift"]


def break_down(env: object) -> None:
    """What a solver does that has gone wrong."""
    env.data.qvel[0] = np.nan  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TASKS)
def test_a_simulation_that_diverges_raises_an_error_that_names_task_and_step(name: str) -> None:
    env = load_task(name).make_env()
    env.reset(seed=0)
    action_A = np.zeros(env.action_spec.dim, np.float32)
    env.step(action_A)
    break_down(env)
    with pytest.raises(
        SimulationDivergedError, match=rf"task '{name}', step 2: the simulation diverged \(mjWARN_BADQVEL\)"
    ):
        env.step(action_A)
    env.reset(seed=0)
    env.step(action_A)


def test_positions_that_are_not_finite_are_found_without_a_warning_of_mujocos() -> None:
    env = load_task("push_t").make_env()
    env.reset(seed=0)
    env.data.qpos[0] = np.inf  # type: ignore[attr-defined]
    with pytest.raises(SimulationDivergedError, match="positions that are not finite"):
        env.require_healthy()  # type: ignore[attr-defined]


@pytest.mark.parametrize("placement", ["inline", "threads"])
@pytest.mark.parametrize("name", TASKS)
def test_one_slot_diverges_and_the_others_go_on_as_if_alone(name: str, placement: str) -> None:
    env = make_vector_env(load_task(name), 3, placement=placement)  # type: ignore[arg-type]
    env.reset(seed=[1, 2, 3])
    action_NA = np.zeros((3, env.action_spec.dim), np.float32)
    before, *_ = env.step(action_NA)
    break_down(env.env.envs[1])
    after, reward_N, terminated_N, truncated_N, info = env.step(action_NA)
    assert truncated_N.tolist() == [False, True, False]
    assert not terminated_N.any()
    assert info["_diverged"].tolist() == [False, True, False]
    assert "step 2" in info["diverged"][1]
    assert not info["success"][1]
    assert reward_N[1] == 0.0
    for key, value in after.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value[1], before[key][1])
    alone = load_task(name).make_env()
    alone.reset(seed=3)
    for _ in range(2):
        expected, *_ = alone.step(action_NA[2])
    assert all(np.array_equal(after[key][2], expected[key]) for key in expected)
    env.reset(seed=[None, 2, None], options={"reset_mask": np.array([False, True, False])})
    again, _, _, truncated_N, info = env.step(action_NA)
    assert not truncated_N.any()
    assert "diverged" not in info
    assert all(np.array_equal(again[key][1], before[key][1]) for key in again)
    env.close()


def test_a_bad_action_is_refused_before_any_slot_has_moved_and_names_slot_and_step() -> None:
    env = make_vector_env(load_task("push_t"), 3)
    env.reset(seed=[1, 2, 3])
    good_NA = np.zeros((3, 2), np.float32)
    env.step(good_NA)
    states = [e.data.qpos.copy() for e in env.env.envs]
    bad_NA = good_NA.copy()
    bad_NA[2, 1] = np.inf
    with pytest.raises(InvalidActionError, match=r"task 'push_t', environment 2, step 2: .* got \[0.0, inf\]"):
        env.step(bad_NA)
    with pytest.raises(InvalidActionError, match=r"3 environments have shape \(3, 2\), got \(2, 2\)"):
        env.step(good_NA[:2])
    for state, slot in zip(states, env.env.envs, strict=True):
        np.testing.assert_array_equal(slot.data.qpos, state)
    env.step(good_NA)
    env.close()


class Holding:
    """A controller that breaks one slot's simulation after some steps."""

    calls = 0
    seconds = 0.0

    def __init__(self, env: TaskVectorEnv, slot: int, step: int) -> None:
        self.env, self.slot, self.left = env, slot, step

    def reset(self, slot: int, scene_seed: int) -> None:
        """Nothing to forget."""

    def plans(self, active_N: np.ndarray) -> bool:
        """It decides anew at every step."""
        return True

    def act(self, features: dict[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """Hold still."""
        self.left -= 1
        if self.left == 0:
            break_down(self.env.env.envs[self.slot])
        return np.zeros((len(active_N), 2), np.float32)


def test_a_rollout_flags_the_episode_and_goes_on() -> None:
    env = make_vector_env(load_task("push_t", max_episode_steps=6), 2)
    episodes: dict[int, Episode] = {}
    controller = Holding(env, slot=1, step=3)
    rollout(env, env.action_spec, "", controller, [[1, 2], [3, 4]], episodes.__setitem__)  # type: ignore[arg-type]
    assert set(episodes) == {1, 2, 3, 4}
    flagged = [seed for seed, episode in episodes.items() if "diverged" in episode.provenance]
    assert flagged == [3]
    assert episodes[3].length == 3
    assert episodes[3].truncated
    with pytest.raises(UserError, match="diverged enters no data set"):
        episodes[3].validate()
    env.close()


def test_collection_leaves_the_scene_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_task("push_t", max_episode_steps=5)
    env, demonstrator = task.make_env(), HumanLike(load_expert(task), ExpertConfig())
    act = HumanLike.act

    def act_badly(self: HumanLike, env: object) -> tuple[np.ndarray, np.ndarray]:
        if env.scene == 1 and env.steps == 2:  # type: ignore[attr-defined]
            break_down(env)
        return act(self, env)  # type: ignore[arg-type]

    reset = type(env).reset

    def remember(self: object, *, seed: int | None = None, options: object = None) -> object:
        self.scene = seed  # type: ignore[attr-defined]
        return reset(self, seed=seed)  # type: ignore[arg-type]

    monkeypatch.setattr(HumanLike, "act", act_badly)
    monkeypatch.setattr(type(env), "reset", remember)
    assert "diverged" in run_expert(env, demonstrator, 1).provenance
    config = collect.Config(task="push_t", out=tmp_path / "set", episodes=3, workers=1, max_episode_steps=5)
    collect.run(config)
    assert "scene 1 is left out" in capsys.readouterr().err
    data = load_dataset(tmp_path / "set")
    assert len(data.episodes) == 3
    more = collect.Config(task="push_t", out=tmp_path / "set", episodes=3, workers=1, max_episode_steps=5)
    collect.run(more)  # resumed: nothing is missing, and the scenes go on behind the last one
    assert len(load_dataset(tmp_path / "set").episodes) == 3


def test_a_model_without_the_objects_of_the_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(robosuite_task.WATCHED, "Lift", robosuite_task.Watched(("sphere_main",)))
    with pytest.raises(ModelMismatchError, match=r"task 'lift': the model of Lift lacks .*sphere_main"):
        load_task("lift").make_env()
