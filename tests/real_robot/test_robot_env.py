"""The robot as an environment: what a learner gets of it, and that the robot is safe whatever the learner does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from robot_toys import ToyDriver, toy_robot

from real_robot.loop import Judge
from real_robot.operators.base import Input, Operator, Situation
from real_robot.robot import Reading, RobotError
from real_robot.robot_env import Habits, RobotEnv, vector_of_one
from vla_rl.data.episode import Episode
from vla_rl.inference.rollout import rollout
from vla_rl.types import STATE

HZ = 50.0
SMALL_A = np.array([0.002, 0.0, 0.0, 0.0], np.float32)


class Script:
    """A person who does something in certain polls of the running episode."""

    def __init__(self, inputs: dict[int, Input]) -> None:
        self.inputs, self.step = inputs, -1

    def poll(self, situation: Situation) -> Input:
        if situation.phase != "running":
            return Input(ready=True)
        self.step += 1
        return self.inputs.get(self.step, Input())


def beyond(reading: Reading) -> tuple[float, bool]:
    """Success when the first axis has gone 2 cm."""
    done = bool(reading.features[STATE][0] >= 0.02)
    return float(done), done


@contextmanager
def environment(
    steps: int = 100, operator: Operator | None = None, judge: Judge | None = beyond
) -> Iterator[tuple[RobotEnv, ToyDriver]]:
    robot, driver = toy_robot(hz=HZ, heartbeat_s=0.5, inference_s=4.0)
    env = RobotEnv(robot, Habits(steps, "move", operator, judge))
    try:
        yield env, driver
    finally:
        env.close()


def towards(env: RobotEnv, k: int) -> np.ndarray:
    return SMALL_A * (k + 1)


def test_steps_run_at_the_robots_rate_until_it_succeeds() -> None:
    with environment() as (env, driver):
        seen, info = env.reset(seed=3)
        assert env.observation_space.contains(seen)
        assert info == {"success": False}
        begun_s, rewards, k = time.monotonic(), [], 0
        terminated = truncated = False
        while not (terminated or truncated):
            seen, reward, terminated, truncated, info = env.step(towards(env, k))
            rewards.append(reward)
            assert info["executed"] == pytest.approx(driver.written[-1][1], abs=1e-6) or terminated
            k += 1
        assert terminated
        assert not truncated
        assert info["success"]
        assert info["ended_by"] == "success"
        assert rewards == [0.0] * (k - 1) + [1.0]
        assert seen[STATE][0] >= 0.02
        assert time.monotonic() - begun_s >= 0.9 * k / HZ
        assert env.robot.state.at_rest
        with pytest.raises(RobotError, match="no episode is running"):
            env.step(SMALL_A)


def test_what_the_filter_leaves_is_what_was_executed() -> None:
    with environment(steps=5) as (env, _):
        env.reset(seed=0)
        _, _, _, _, info = env.step(np.array([2.0, 0, 0, 0]))
        assert 0 < info["executed"][0] < 0.02


def test_a_learner_that_is_away_leaves_the_robot_at_rest_and_may_go_on() -> None:
    with environment(steps=1000, judge=None) as (env, driver):
        env.reset(seed=0)
        for k in range(10):
            env.step(towards(env, k))
        moving_A = driver.written[-1][1]
        time.sleep(0.4)
        stood = len(driver.written)
        assert env.robot.state.at_rest
        assert abs(driver.written[-1][1] - moving_A).max() < 0.02, "it did not hold"
        assert stood > 10 + 10, "the loop did not go on"
        _, reward, terminated, truncated, info = env.step(driver.written[-1][1] + SMALL_A)
        assert (reward, terminated, truncated) == (0.0, False, False)
        assert info["executed"][0] > moving_A[0]
        assert env.robot.fault is None


def test_a_learner_that_is_away_for_long_finds_its_episode_ended() -> None:
    robot, _ = toy_robot(hz=HZ, heartbeat_s=0.5, inference_s=0.2)
    env = RobotEnv(robot, Habits(1000, "move"))
    env.reset(seed=0)
    env.step(SMALL_A)
    time.sleep(0.6)
    _, _, _, truncated, info = env.step(SMALL_A)
    assert truncated
    assert info["fault"].startswith("inference deadline")
    assert info["executed"][0] < SMALL_A[0]
    env.close()


def test_a_new_episode_ends_the_one_that_runs() -> None:
    with environment() as (env, _):
        env.reset(seed=0)
        env.step(SMALL_A)
        env.reset(seed=1)
        _, _, terminated, truncated, _ = env.step(SMALL_A)
        assert not terminated
        assert not truncated


def test_a_persons_action_is_what_was_executed() -> None:
    human_A = np.array([0.0, 0.001, 0.0, 0.0])
    with environment(operator=Script({k: Input(takeover_A=human_A) for k in range(2, 5)})) as (env, _):
        env.reset(seed=0)
        told = [env.step(SMALL_A)[4] for _ in range(8)]
    taken = [info["intervened"] for info in told]
    assert sum(taken) == 3
    for info in told:
        if info["intervened"]:
            assert info["executed"][1] > 0


@pytest.mark.parametrize(
    ("said", "key", "value"), [(Input(failure=True), "ended_by", "failure"), (Input(reset=True), "ended_by", "reset")]
)
def test_a_person_ends_an_episode(said: Input, key: str, value: str) -> None:
    with environment(operator=Script({4: said})) as (env, _):
        env.reset(seed=0)
        _, reward, terminated, truncated, info = last_of(env, lambda _: SMALL_A)
        assert info[key] == value
        assert reward == 0
        assert (terminated, truncated) == (said.failure, said.reset)


def last_of(env: RobotEnv, act: Callable[[int], np.ndarray]):
    for k in range(1000):
        result = env.step(act(k))
        if result[2] or result[3]:
            return result
    raise AssertionError("it never ended")


def test_an_episode_that_is_to_be_recorded_again_counts_for_nothing() -> None:
    with environment(operator=Script({3: Input(rerecord=True)})) as (env, _):
        env.reset(seed=0)
        seen, _, terminated, truncated, info = last_of(env, lambda _: SMALL_A)
        assert "diverged" in info
        assert truncated
        assert not terminated
        assert set(seen) == {STATE}


def test_a_person_who_stops_ends_the_stage() -> None:
    with environment(operator=Script({3: Input(stop=True)})) as (env, _):
        env.reset(seed=0)
        with pytest.raises(RobotError, match="a person stopped robot 'toy'"):
            last_of(env, lambda _: SMALL_A)


def test_a_fault_ends_the_episode_and_wants_a_person() -> None:
    with environment() as (env, driver):
        env.reset(seed=0)
        env.step(SMALL_A)
        driver.says = {"broken": ("link: cut",)}
        _, _, terminated, truncated, info = last_of(env, lambda _: SMALL_A)
        assert (terminated, truncated) == (False, True)
        assert info["fault"] == "link: cut"
        driver.says = {}
        with pytest.raises(RobotError, match="is held: link: cut; resume first"):
            env.reset(seed=1)


def test_rollouts_record_what_was_executed_and_by_whom() -> None:
    human_A = np.array([0.0, 0.001, 0.0, 0.0])
    robot, _ = toy_robot(hz=HZ, heartbeat_s=0.5)
    person = Script({k: Input(takeover_A=human_A) for k in range(3, 6)})
    env = vector_of_one(lambda: RobotEnv(robot, Habits(12, "move", person)))
    found: dict[int, Episode] = {}

    class Far:
        seconds, calls = 0.0, 0

        def act(self, features, active_N):
            return np.full((1, 4), 1.0, np.float32)

        def reset(self, slot: int, scene_seed: int) -> None:
            pass

        def plans(self, active_N) -> bool:
            return True

    rollout(env, robot.action_spec, "move", Far(), [[5, 6]], found.__setitem__)
    env.close()
    assert sorted(found) == [5, 6]
    first = found[5]
    assert first.length == 12
    assert first.truncated
    assert np.flatnonzero(first.intervened_T).tolist() == [3, 4, 5]
    assert abs(first.action_TA[:, 0]).max() < 0.5, "recorded is what was wanted, not what was executed"
    assert (first.intended_TA == 1.0).all()
    assert not replace(found[6]).intervened_T.any()
