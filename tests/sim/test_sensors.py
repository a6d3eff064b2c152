"""Cameras and clouds as observations, and tasks told in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sim.collect import expert_episodes
from sim.experts.base import ExpertConfig
from sim.point_cloud import PointCloud
from sim.randomization import Randomization
from sim.sensors import Sensors
from sim.task import TaskConfig, load_task
from sim.tasks.robosuite_task import LIFTED_M
from sim.vector import make_vector_env
from vla_rl.runtime.errors import UserError
from vla_rl.types import ENVIRONMENT_STATE, IMAGE_PREFIX, POINTS, STATE

TOP = IMAGE_PREFIX + "top"
CLOUD = PointCloud(("top",), points=32, rays=48, grid=24, low_m=(-0.4, -0.4, -0.05), high_m=(0.4, 0.4, 0.1))


def seeing(**sensors: object) -> TaskConfig:
    return replace(load_task("push_t"), sensors=Sensors(**sensors))  # type: ignore[arg-type]


def test_what_is_seen_is_what_the_spec_says_and_what_the_renderer_draws() -> None:
    env = seeing(cameras=("top",), width=32, height=24, points=CLOUD).make_env()
    observation, _ = env.reset(seed=3)
    assert observation.keys() == env.observation_spec.keys() == {STATE, ENVIRONMENT_STATE, TOP, POINTS}
    for key, feature in env.observation_spec.items():
        assert observation[key].shape == feature.shape
        assert env.observation_space[key].contains(observation[key]), key
    assert env.observation_spec[STATE].names == ("x", "y")
    drawn = env.inner.image("top", 32, 24)  # type: ignore[attr-defined]
    assert np.array_equal(observation[TOP], drawn.transpose(2, 0, 1))
    moved, *_ = env.step(np.array([0.3, 0.3], np.float32))
    for _ in range(5):
        moved, *_ = env.step(np.array([0.3, 0.3], np.float32))
    assert not np.array_equal(moved[TOP], observation[TOP])
    env.close()


def test_a_scene_is_seen_the_same_whatever_ran_before() -> None:
    env = seeing(points=CLOUD).make_env()
    first, _ = env.reset(seed=5)
    after, *_ = env.step(np.zeros(2, np.float32))
    for seed in (9, 5):
        again, _ = env.reset(seed=seed)
    assert np.array_equal(again[POINTS], first[POINTS])
    assert np.array_equal(env.step(np.zeros(2, np.float32))[0][POINTS], after[POINTS])
    assert not np.array_equal(after[POINTS], first[POINTS]), "other rays in every step"
    env.close()


def test_poses_of_objects_can_be_left_out_and_come_late_with_the_pictures() -> None:
    task = seeing(cameras=("top",), width=16, height=16, environment_state=False)
    plain = task.make_env()
    late = replace(task, randomization=Randomization(observation_delay_steps=3)).make_env()
    seed = next(s for s in range(20) if late.reset(seed=s)[1]["randomization"]["observation_delay_steps"] == 2)
    seen = [plain.reset(seed=seed)[0]]
    got = [late.reset(seed=seed)[0]]
    for _ in range(4):
        action = np.array([0.2, -0.2], np.float32)
        seen.append(plain.step(action)[0])
        got.append(late.step(action)[0])
    assert ENVIRONMENT_STATE not in seen[0]
    for t in range(2, 5):
        assert np.array_equal(got[t][TOP], seen[t - 2][TOP])
    plain.close()
    late.close()


def test_a_batch_shows_what_single_environments_show() -> None:
    task = seeing(cameras=("top",), width=16, height=16)
    batch, alone = make_vector_env(task, 3), task.make_env()
    features, _ = batch.reset(seed=[1, 2, 3])
    assert features[TOP].dtype == np.uint8
    for slot, seed in enumerate((1, 2, 3)):
        assert np.array_equal(features[TOP][slot], alone.reset(seed=seed)[0][TOP])
    batch.close()
    alone.close()


def test_a_camera_that_there_is_none_of_is_named() -> None:
    with pytest.raises(UserError, match="task 'push_t' has no camera named 'side'; there are top"):
        seeing(cameras=("side",)).make_env()
    with pytest.raises(UserError, match="has no MuJoCo model"):
        replace(load_task("gym:Pendulum-v1"), sensors=Sensors(("top",))).make_env()
    with pytest.raises(ValueError, match="names that differ"):
        Sensors(("top", "top"))


def test_demonstrations_are_told_in_their_wordings_and_never_in_those_kept_for_tests() -> None:
    task = load_task("vla_push_t")
    assert len(task.unseen_wordings) >= 3
    told = {task.wording(scene) for scene in range(60)}
    assert told == {task.instruction, *task.wordings}
    assert not told & set(task.unseen_wordings)
    assert task.wording(7) == task.wording(7)
    with pytest.raises(ValueError, match="others than demonstrations are told in"):
        replace(task, unseen_wordings=(task.instruction,))
    short = replace(task, max_episode_steps=3, sensors=Sensors())
    episodes = list(expert_episodes(short, ExpertConfig(), range(4), 1))
    assert [e.instruction for e in episodes] == [task.wording(scene) for scene in range(4)]


@pytest.mark.parametrize(("colour", "other"), [("red", "green"), ("green", "red")])
def test_of_two_cubes_the_named_one_is_to_be_raised(colour: str, other: str) -> None:
    task = replace(load_task(f"vla_lift_{colour}"), sensors=Sensors())
    wrong = replace(load_task(f"vla_lift_{other}"), sensors=Sensors())
    (right,) = expert_episodes(task, ExpertConfig(), [11], 1)
    assert right.success
    env = wrong.make_env()
    env.reset(seed=11)
    successes = [env.step(action)[4]["success"] for action in right.action_TA]
    assert not any(successes), "raising the other cube is no success"
    body = env.model.body(wrong.lifts).id  # type: ignore[attr-defined]
    assert env.data.xpos[body, 2] < 0.85 + LIFTED_M  # type: ignore[attr-defined]
    env.close()
