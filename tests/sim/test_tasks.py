"""Every task: the same seed is the same scene, whatever ran before; the vector API; actions checked at the border."""

from __future__ import annotations

import re
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from sim.task import InvalidActionError, Placement, TaskEnv, load_task
from sim.vector import make_vector_env
from vla_rl.runtime.config import names_in
from vla_rl.runtime.errors import UserError

CHEAP = ["push_t", "gym:Pendulum-v1", "gym:InvertedPendulum-v5"]
ROBOSUITE = ["lift", "can", "square", "stack", "door"]


@pytest.fixture(scope="module", params=[*CHEAP, *ROBOSUITE])
def env(request: pytest.FixtureRequest) -> Iterator[TaskEnv]:
    built = load_task(request.param).make_env()
    yield built
    built.close()


def play(env: TaskEnv, seed: int, steps: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    assert info["success"] is False
    seen = [np.concatenate([v for _, v in sorted(observation.items())])]
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high)
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(
            np.concatenate(
                [*(v for _, v in sorted(observation.items())), [reward, terminated, truncated, info["success"]]]
            )
        )
    return seen


def test_a_seed_determines_the_scene_and_the_episode(env: TaskEnv) -> None:
    first, other, again = play(env, 7), play(env, 8), play(env, 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_a_reset_ignores_and_leaves_alone_numpys_global_state(env: TaskEnv) -> None:
    np.random.seed(1)  # noqa: NPY002
    first, _ = env.reset(seed=3)
    drawn = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert np.random.random() == drawn  # noqa: NPY002
    second, _ = env.reset(seed=3)
    assert all(np.array_equal(first[k], second[k]) for k in first)


def test_observations_are_in_their_space_and_match_the_spec(env: TaskEnv) -> None:
    observation, _ = env.reset(seed=0)
    assert set(observation) == set(env.observation_spec)
    for key, value in observation.items():
        assert value.dtype == np.float32
        assert value.shape == env.observation_spec[key].shape
        assert np.isfinite(value).all()


def test_bad_actions_are_refused(env: TaskEnv) -> None:
    env.reset(seed=0)
    env.step(env.action_spec.clip(np.zeros(env.action_spec.dim)))
    where = re.escape(f"task {env.config.name!r}, step 2: ")
    with pytest.raises(InvalidActionError, match=where + r".* has shape"):
        env.step(np.zeros(env.action_spec.dim + 1))
    with pytest.raises(InvalidActionError, match=where + r".* must be finite"):
        env.step(np.full(env.action_spec.dim, np.nan))


def test_actions_beyond_the_limits_act_as_the_limits(env: TaskEnv) -> None:
    env.reset(seed=5)
    a = env.step(env.action_space.high * 10)[0]
    env.reset(seed=5)
    b = env.step(env.action_space.high)[0]
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_running_out_of_steps_truncates_and_does_not_terminate() -> None:
    env = load_task("push_t", max_episode_steps=3).make_env()
    env.reset(seed=0)
    ends = [env.step(env.pusher_m)[2:4] for _ in range(3)]  # type: ignore[attr-defined]
    assert ends == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize("placement", ["inline", "threads", "processes"])
def test_vector_environment_is_batch_first_and_equals_single_environments(placement: Placement) -> None:
    task = load_task("push_t", max_episode_steps=5)
    vector = make_vector_env(task, 3, placement=placement)
    single = task.make_env()
    observation, _ = vector.reset(seed=[4, 5, 6])
    action = np.array([[0.1, 0.0], [0.0, 0.1], [-0.1, 0.0]], np.float32)
    for _ in range(4):
        observation, reward, terminated, truncated, info = vector.step(action)
    assert reward.shape == terminated.shape == truncated.shape == info["success"].shape == (3,)
    single.reset(seed=5)
    for _ in range(4):
        expected, *_ = single.step(action[1])
    assert all(np.array_equal(observation[k][1], expected[k]) for k in expected)
    # the step that ends the episode returns its true final observation, and only the masked slot is reset
    final, _, _, truncated, _ = vector.step(action)
    expected, _, _, ended, _ = single.step(action[1])
    assert truncated.all()
    assert ended
    assert all(np.array_equal(final[k][1], expected[k]) for k in expected)
    kept = {k: v.copy() for k, v in final.items()}
    after, _ = vector.reset(seed=[None, 9, None], options={"reset_mask": np.array([False, True, False])})
    fresh, _ = single.reset(seed=9)
    for key in fresh:
        assert np.array_equal(after[key][1], fresh[key])
        assert np.array_equal(after[key][0], kept[key][0])
    assert isinstance(vector, gym.vector.VectorEnv)
    assert vector.action_spec == single.action_spec
    assert vector.observation_spec == single.observation_spec
    vector.close()


def test_same_step_autoreset_hands_out_the_true_final_observation() -> None:
    task = load_task("push_t", max_episode_steps=2)
    vector = make_vector_env(task, 2, autoreset_mode=AutoresetMode.SAME_STEP)
    single = task.make_env()
    vector.reset(seed=[1, 2])
    single.reset(seed=2)
    action = np.zeros((2, 2), np.float32)
    vector.step(action)
    single.step(action[0])
    observation, _, _, truncated, info = vector.step(action)
    final, *_ = single.step(action[0])
    assert truncated.all()
    assert np.array_equal(info["final_obs"][1]["observation.state"], final["observation.state"])
    assert not np.array_equal(observation["observation.state"][1], final["observation.state"])
    vector.close()


@pytest.mark.parametrize("name", ["lift"])
def test_robosuite_in_processes_gives_the_scenes_of_one_process(name: str) -> None:
    task = load_task(name)
    vector, single = make_vector_env(task, 2), task.make_env()
    batch, _ = vector.reset(seed=[11, 12])
    for slot, seed in enumerate((11, 12)):
        alone, _ = single.reset(seed=seed)
        assert all(np.array_equal(batch[k][slot], alone[k]) for k in alone)
    vector.close()


def test_a_soft_reset_gives_the_scene_of_a_fresh_environment() -> None:
    used, fresh = load_task("can").make_env(), load_task("can").make_env()
    play(used, 3)
    a, _ = used.reset(seed=21)
    b, _ = fresh.reset(seed=21)
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_unknown_tasks_are_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no task named 'lfit'.*lift"):
        load_task("lfit")
    with pytest.raises(UserError, match="NoSuch-v0"):
        load_task("gym:NoSuch-v0").make_env()
    with pytest.raises(UserError, match="continuous"):
        load_task("gym:CartPole-v1").make_env()
    with pytest.raises(UserError, match="max_episode_steps"):
        load_task("lift", max_episode_steps=0)
    assert set(names_in("task")) >= {"push_t", *ROBOSUITE}


@pytest.mark.parametrize("name", ["push_t", "lift"])
def test_rendering_gives_frames_that_move(name: str) -> None:
    env = load_task(name).make_env()
    env.reset(seed=0)
    before = env.render_rgb(64, 48)
    for _ in range(10):
        env.step(env.action_space.high)
    after = env.render_rgb(64, 48)
    env.close()
    assert before.shape == (48, 64, 3)
    assert before.dtype == np.uint8
    assert before.std() > 10
    assert (before != after).any()
