"""Execution under latency: the schedule step by step, the simulated delay, and a thread that never holds the loop up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from toys import COUNTDOWN_SPEC, TOY_ACTION, countdown_env, tiny_flow

from vla_rl.inference.base_policy import BaseSpec, Leftover, OwnBase, PolicyOutputError
from vla_rl.inference.controller import ChunkController, PolicyAgent
from vla_rl.inference.delayed import DelayedAgent, DelayedController, LatencyConfig, execution_sampler
from vla_rl.inference.rollout import rollout
from vla_rl.inference.selectors import PlainSampler
from vla_rl.inference.timeline import DelayEstimate, ExecutionConfig, Method, Timeline, steps_of
from vla_rl.inference.worker import RealTimeController
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.student import StudentConfig
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec, Observation

METHODS: list[Method] = ["synchronous", "asynchronous", "ensemble", "rtc", "rtc_prefix"]
ABSOLUTE = TOY_ACTION
DELTA = COUNTDOWN_SPEC.action_spec


def timeline(method: Method, execute: int = 4, spec: ActionSpec = ABSOLUTE, **options: float) -> Timeline:
    return Timeline(spec, execute, ExecutionConfig(method, **options))  # type: ignore[arg-type]


def chunk(first: float, steps: int = 8) -> np.ndarray:
    """Actions first, first + 0.01, ...: which chunk and which step of it can be read from each."""
    return np.stack([np.arange(steps) * 0.01 + first, np.zeros(steps)], 1).astype(np.float32)


def play(schedule: Timeline, delay: int, steps: int) -> list[float]:
    """Run a schedule whose n-th chunk (n = 0, 1, ...) takes ``delay`` steps (the first none) and begins at value n / 10."""
    done: list[float] = []
    coming: list[tuple[int, np.ndarray]] = []
    count = 0
    for step in range(steps):
        while coming and coming[0][0] == step:
            schedule.deliver(coming.pop(0)[1])
        if schedule.wants(delay):
            schedule.begin(delay)
            made = chunk(count / 10)
            if count == 0 or delay == 0:
                schedule.deliver(made)
            else:
                coming.append((step + delay, made))
            count += 1
        done.append(round(float(schedule.next()[0]), 2))
    return done


def test_without_delay_every_method_but_the_ensemble_is_receding_horizon() -> None:
    for method in METHODS:
        if method != "ensemble":
            wanted = [0.0, 0.01, 0.02, 0.03, 0.1, 0.11, 0.12, 0.13, 0.2, 0.21]
            assert play(timeline(method), 0, 10) == wanted, method


def test_synchronous_stands_still_while_the_policy_works_and_runs_the_whole_chunk_then() -> None:
    schedule = timeline("synchronous")
    assert play(schedule, 2, 12) == [0.0, 0.01, 0.02, 0.03, 0.03, 0.03, 0.1, 0.11, 0.12, 0.13, 0.13, 0.13]
    assert schedule.tally.held == 4
    assert schedule.tally.late == 0
    moving = timeline("synchronous", spec=DELTA)
    assert play(moving, 2, 6) == [0.0, 0.01, 0.02, 0.03, 0.0, 0.0]  # a movement of zero, not the last one again


@pytest.mark.parametrize("method", ["asynchronous", "rtc", "rtc_prefix"])
def test_going_on_drops_what_is_late_and_never_waits(method: Method) -> None:
    schedule = timeline(method)
    # the second chunk is begun at step 4 and there at step 6: its actions for steps 4 and 5 never run
    assert play(schedule, 2, 12) == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.12, 0.13, 0.14, 0.15, 0.22, 0.23]
    assert schedule.tally.late == 4
    assert schedule.tally.held == 0


def test_a_chunk_is_begun_early_enough_that_the_last_one_lasts() -> None:
    schedule = timeline("asynchronous", execute=8)
    assert play(schedule, 3, 14) == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.13, 0.14, 0.15, 0.16, 0.17, 0.23]
    assert schedule.tally.held == 0


def test_an_empty_queue_stands_still() -> None:
    schedule = timeline("asynchronous")
    assert play(schedule, 6, 10)[6:] == [0.06, 0.07, 0.16, 0.17]  # begun at 2, there at 8: nothing is missing
    assert schedule.tally.held == 0
    late = timeline("asynchronous")
    late.begin(0)
    late.deliver(chunk(0.0))
    for _ in range(8):
        late.next()
    late.begin(2)
    assert [round(float(late.next()[0]), 2) for _ in range(3)] == [0.07] * 3
    assert late.tally.held == 3
    late.give_up()
    assert late.wants(0)


def test_before_the_first_chunk_no_place_is_made_up() -> None:
    """Zero is standing still for movements; for places it is a place, which the robot would go to."""
    assert timeline("asynchronous", spec=ABSOLUTE).next() is None
    assert np.array_equal(timeline("asynchronous", spec=DELTA).next(), [0.0, 0.0])  # type: ignore[arg-type]


def test_a_chunk_of_an_ensemble_that_has_run_out_is_no_first_one() -> None:
    schedule = timeline("ensemble")
    assert schedule.empty
    schedule.begin(0)
    schedule.deliver(chunk(0.0))
    for _ in range(10):
        schedule.next()
    assert not schedule.empty
    schedule.reset()
    assert schedule.empty


def test_the_ensemble_averages_what_covers_a_step_and_weighs_the_oldest_most() -> None:
    schedule = timeline("ensemble", ensemble_decay=0.5)
    schedule.begin(0)
    schedule.deliver(chunk(0.0))
    schedule.next()
    schedule.begin(0)
    schedule.deliver(chunk(1.0))
    weights = np.exp([0.0, -0.5])
    assert schedule.next()[0] == pytest.approx((weights @ [0.01, 1.0]) / weights.sum(), abs=1e-6)
    flat = timeline("ensemble", ensemble_decay=0.0)
    assert play(flat, 0, 3)[2] == pytest.approx(np.mean([0.02, 0.11, 0.2]), abs=0.006)


def test_what_is_left_is_handed_to_the_next_chunk_from_this_step_on() -> None:
    schedule = timeline("rtc")
    assert schedule.begin(3) is None  # nothing has run yet
    schedule.deliver(chunk(0.0))
    for _ in range(4):
        schedule.next()
    left = schedule.begin(3)
    assert left is not None
    assert left.fixed == 3
    np.testing.assert_allclose(left.action_LA[:, 0], [0.04, 0.05, 0.06, 0.07], atol=1e-6)
    assert timeline("asynchronous").begin(3) is None


def test_the_delay_estimate_is_the_longest_of_the_last_calls_without_the_cold_start() -> None:
    estimate = DelayEstimate(20.0, window=3, warm_up=1)
    assert estimate.steps() == 0
    estimate.add(9.0)
    assert estimate.steps() == 0
    for latency in (0.11, 0.02, 0.02):
        estimate.add(latency)
    assert estimate.steps() == 3
    estimate.add(0.02)
    assert estimate.steps() == 1  # the long one has left the window
    assert [steps_of(x, 20.0) for x in (0.0, 0.05, 0.0501, 0.2)] == [0, 1, 2, 4]


# --- simulated latency ------------------------------------------------------------------------------------------------------------


class Scripted:
    """A base that answers each environment with the number of its call, and notes what it was asked."""

    def __init__(self, num_envs: int, prefix_steps: int = 4) -> None:
        self.spec = BaseSpec(COUNTDOWN_SPEC, 1, 4, 8, prefix_steps=prefix_steps)
        self.calls = [0] * num_envs
        self.asked: list[dict[int, Leftover]] = []
        self.seen: list[float] = []

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        for env_id in env_ids:
            self.calls[env_id] = 0

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        self.asked.append(dict(leftovers or {}))
        self.seen.append(float(observation.state_BOS[env_ids[0], -1, 0]))
        made = np.stack([chunk(self.calls[env_id] / 10) for env_id in env_ids])
        for env_id in env_ids:
            self.calls[env_id] += 1
        return made


def features(value: float = 0.0, slots: int = 1) -> dict[str, np.ndarray]:
    return {
        "observation.state": np.full((slots, 4), value, np.float32),
        "observation.environment_state": np.zeros((slots, 1), np.float32),
    }


def act(controller: DelayedController, steps: int, begin: int = 0) -> list[float]:
    active = np.array([True])
    return [round(float(controller.act(features(begin + t), active)[0, 0]), 2) for t in range(steps)]


def test_a_chunk_comes_later_and_is_of_what_was_seen_when_it_was_begun() -> None:
    base = Scripted(1)
    controller = DelayedController(base, 1, ExecutionConfig("rtc_prefix"), LatencyConfig(0.1), 0)
    controller.reset(0, 5)
    assert act(controller, 8) == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.12, 0.13]
    assert base.seen == [0, 4]
    assert base.asked[1][0].fixed == 2
    assert controller.calls == 2
    controller.reset(0, 6)  # what was on its way is of the last episode
    assert act(controller, 2) == [0.0, 0.01]


def test_latency_is_of_the_episode_and_the_estimate_follows_it() -> None:
    def run(neighbours: int, scene: int = 7) -> list[float]:
        base = Scripted(1 + neighbours)
        controller = DelayedController(
            base, 1 + neighbours, ExecutionConfig("asynchronous"), LatencyConfig(0.05, 0.1), 0
        )
        for slot in range(1 + neighbours):
            controller.reset(slot, scene + slot)
        active = np.array([True] + [True] * neighbours)
        return [round(float(controller.act(features(t, 1 + neighbours), active)[0, 0]), 2) for t in range(40)]

    assert len(set(run(0))) > 10  # chunks come, and move on
    assert run(0) == run(0)
    assert run(0) == run(2)
    assert run(0) != run(0, scene=8)


def countdown_policy(**options: object) -> ChunkPolicy:
    torch.manual_seed(0)
    from dataclasses import replace

    return replace(tiny_flow(8, 4, 3), **options).build(COUNTDOWN_SPEC).eval()  # type: ignore[arg-type]


def episodes(agent_controller: Callable[[int], object], scenes: list[list[int]]) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    rollout(
        countdown_env(len(scenes)),
        COUNTDOWN_SPEC.action_spec,
        "count down",
        agent_controller(len(scenes)),  # type: ignore[arg-type]
        scenes,
        lambda scene, episode: found.__setitem__(scene, episode.action_TA),
    )
    return found


def test_without_latency_it_is_the_controller_of_evaluation() -> None:
    policy = countdown_policy()
    scenes = [[1, 3], [5, 7]]
    plain = episodes(lambda n: ChunkController(OwnBase(policy, n, 0), n), scenes)
    for method in ("synchronous", "asynchronous"):
        agent = DelayedAgent(PolicyAgent(policy), ExecutionConfig(method), LatencyConfig())  # type: ignore[arg-type]
        delayed = episodes(lambda n, agent=agent: agent.controller(n, 0), scenes)  # type: ignore[misc]
        assert all(np.array_equal(plain[scene], delayed[scene]) for scene in plain)


@pytest.mark.parametrize("method", ["rtc", "rtc_prefix"])
def test_a_chunk_in_real_time_begins_with_what_is_decided(method: Method) -> None:
    """The seam: actions that have run by the time the new chunk is there are those of the last one."""
    policy = countdown_policy(max_prefix_steps=4)
    sampler = execution_sampler(policy, ExecutionConfig(method), None) or PlainSampler(policy)
    base = OwnBase(policy, 2, 0, sampler)
    base.reset([0, 1], [3, 5])
    observation = Observation(torch.randn(2, 1, 4), torch.randn(2, 1, 1))
    first = base.chunk(observation, [0, 1])
    assert first.shape == (2, 8, 2)
    second = base.chunk(observation, [0, 1], {0: Leftover(first[0, 4:], 3)})
    np.testing.assert_allclose(second[0, :3], first[0, 4:7], atol=1e-5)
    assert not np.allclose(second[0, 3:], first[0, 3:], atol=1e-3)
    free = base.chunk(observation, [1])
    assert free.shape == (1, 8, 2)


def test_methods_that_a_policy_or_base_cannot_do_are_refused() -> None:
    policy = countdown_policy()
    with pytest.raises(UserError, match="rtc_prefix"):
        execution_sampler(policy, ExecutionConfig("rtc"), PlainSampler(policy))
    student = StudentConfig(net=policy.config.net, chunk_steps=4, execute_steps=2).build(COUNTDOWN_SPEC)
    with pytest.raises(UserError, match="no denoising chain"):
        execution_sampler(student, ExecutionConfig("rtc"), None)
    bases = {"prefixes": Scripted(1), "none": Scripted(1, prefix_steps=0), "plain": OwnBase(policy, 1, 0)}
    for name, method, words in (
        ("prefixes", "rtc", "wants a policy whose chunks are guided"),
        ("plain", "rtc", "wants a policy whose chunks are guided"),
        ("none", "rtc_prefix", "max-prefix-steps"),
        ("plain", "rtc_prefix", "max-prefix-steps"),
    ):
        for build in (
            lambda base, config: DelayedController(base, 1, config, LatencyConfig(), 0),
            lambda base, config: RealTimeController(base, config),
        ):
            with pytest.raises(UserError, match=words):
                build(bases[name], ExecutionConfig(method))  # type: ignore[arg-type]

    class Whole(PlainSampler):
        takes_prefix = False  # as a graph

    whole = OwnBase(countdown_policy(max_prefix_steps=2), 1, 0, Whole(policy))
    with pytest.raises(UserError, match="max-prefix-steps"):
        RealTimeController(whole, ExecutionConfig("rtc_prefix"))
    for method, delay_s, words in (
        ("asynchronous", 0.4, "8 steps: chunks of 8 would always be late"),
        ("rtc_prefix", 0.25, "prefixes of at most 4"),
    ):
        with pytest.raises(UserError, match=words):
            DelayedController(Scripted(1), 1, ExecutionConfig(method), LatencyConfig(delay_s), 0)  # type: ignore[arg-type]
    single = replace_spec(Scripted(1), chunk_steps=1)
    with pytest.raises(UserError, match="chunks of 1 would always be late"):
        RealTimeController(single, ExecutionConfig("asynchronous"))
    RealTimeController(single, ExecutionConfig("synchronous"))


def replace_spec(base: Scripted, **changes: object) -> Scripted:
    from dataclasses import replace

    base.spec = replace(base.spec, **changes)  # type: ignore[arg-type]
    return base


def test_a_chunk_that_is_late_as_a_whole_is_counted() -> None:
    timeline = Timeline(COUNTDOWN_SPEC.action_spec, 4, ExecutionConfig("asynchronous"))
    timeline.begin(0)
    timeline.deliver(chunk(0.0))
    for _ in range(4):
        timeline.next()
    timeline.begin(0)
    for _ in range(8):
        timeline.next()
    timeline.deliver(chunk(0.1))
    assert (timeline.tally.wasted, timeline.tally.late) == (1, 8)


@pytest.mark.parametrize("method", ["rtc", "rtc_prefix"])
def test_a_chunk_does_not_hang_on_whether_neighbours_go_on_from_one(method: Method) -> None:
    """Else a run that was killed, whose slots begin together again, would end with other numbers."""
    policy = countdown_policy(max_prefix_steps=4)
    sampler = execution_sampler(policy, ExecutionConfig(method), None)
    observation = Observation(torch.randn(2, 1, 4), torch.randn(2, 1, 1))
    made = []
    for leftovers in (None, {0: Leftover(chunk(0.0), 3)}):
        base = OwnBase(policy, 2, 0, sampler)
        base.reset([0, 1], [3, 5])
        made.append(base.chunk(observation, [0, 1], leftovers))
    assert np.array_equal(made[0][1], made[1][1])
    assert not np.array_equal(made[0][0], made[1][0])


def test_a_longer_prefix_than_the_policy_knows_is_cut() -> None:
    policy = countdown_policy(max_prefix_steps=2)
    base = OwnBase(policy, 1, 0)
    base.reset([0], [3])
    prefix = base._prefix({0: Leftover(chunk(0.0), 5)})
    assert prefix.fixed_B.tolist() == [2]
    assert prefix.known_B.tolist() == [8]


# --- the thread -------------------------------------------------------------------------------------------------------------------


class Slow(Scripted):
    """A base that waits for a gate before it answers, and may fail."""

    def __init__(self) -> None:
        super().__init__(1)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self.bad = False

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        self.entered.set()
        assert self.gate.wait(20.0)
        if self.error is not None:
            raise self.error
        made = super().chunk(observation, env_ids, leftovers)
        return made * np.nan if self.bad else made


def one(value: float = 0.0) -> dict[str, np.ndarray]:
    return {k: v[0] for k, v in features(value).items()}


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_loop_is_never_held_up_and_stands_still_until_a_chunk_is_there() -> None:
    base = Slow()
    with RealTimeController(base, ExecutionConfig("asynchronous")) as controller:
        controller.warm_up(one())
        controller.reset(1)
        base.gate.clear()
        started = time.monotonic()
        assert [float(controller.act(one())[0]) for _ in range(50)] == [0.0] * 50
        assert time.monotonic() - started < 1.0
        assert controller.tally.held == 50
        base.gate.set()
        until(lambda: controller.tally.chunks == 1 or controller.act(one())[0] is None)
        assert controller.tally.late > 0


@pytest.mark.parametrize("method", ["asynchronous", "rtc_prefix"])
def test_the_estimate_of_the_delay_leaves_the_cold_start_out(method: Method) -> None:
    class Cold(Slow):
        """Its first call is slow, and so is the first that goes on from another."""

        def chunk(
            self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
        ) -> np.ndarray:
            if not self.asked or (leftovers and not any(self.asked)):
                time.sleep(0.3)
            return super().chunk(observation, env_ids, leftovers)

    for warm in (True, False):
        base = Cold()
        with RealTimeController(base, ExecutionConfig(method)) as controller:
            if warm:
                controller.warm_up(one())
                assert controller.estimate.steps() <= 1
                assert any(base.asked) == (method == "rtc_prefix")  # warmed up as it will be used
            controller.reset(1)
            until(lambda: controller.act(one()) is None or controller.tally.chunks > 1)
            assert controller.estimate.steps() <= 1


def test_a_failing_policy_costs_motion_not_the_loop_and_what_it_does_after_that_is_run() -> None:
    base = Slow()
    with RealTimeController(base, ExecutionConfig("asynchronous")) as controller:
        controller.reset(1)
        for bad in ("error", "not finite"):
            base.error = ConnectionError("the server is gone") if bad == "error" else None
            base.bad = bad == "not finite"
            failures = controller.failures
            until(lambda: controller.act(one()) is None or controller.failures > failures)  # noqa: B023
            assert isinstance(controller.failure, ConnectionError if bad == "error" else PolicyOutputError)
            held = controller.tally.held
            controller.act(one())
            assert controller.tally.held == held + 1
        base.error, base.bad = None, False
        until(lambda: controller.act(one()) is None or controller.tally.chunks > 0)
        assert controller.failure is None


@pytest.mark.parametrize("error", [KeyError("of a plug-in"), ZeroDivisionError(), NotImplementedError()])
def test_whatever_a_policy_raises_is_known_and_tried_again(error: Exception) -> None:
    base = Slow()
    base.error = error
    with RealTimeController(base, ExecutionConfig("asynchronous")) as controller:
        controller.reset(1)
        until(lambda: controller.act(one()) is None or controller.failures > 0)
        assert controller.failure is error
        base.error = None
        until(lambda: controller.act(one()) is None or controller.tally.chunks > 0)


@pytest.mark.parametrize("method", ["asynchronous", "ensemble", "synchronous"])
def test_what_a_robot_is_sent_is_within_its_limits(method: Method) -> None:
    class Wild(Slow):
        def chunk(
            self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
        ) -> np.ndarray:
            return 1e3 * (super().chunk(observation, env_ids, leftovers) + 1.0)

    spec = COUNTDOWN_SPEC.action_spec
    with RealTimeController(Wild(), ExecutionConfig(method)) as controller:
        controller.reset(1)
        sent: list[np.ndarray] = []
        until(lambda: sent.append(controller.act(one())) or controller.tally.chunks > 0)  # type: ignore[func-returns-value, arg-type]
        sent.append(controller.act(one()))  # type: ignore[arg-type]
        assert np.array_equal(sent[-1], spec.high_array())


def test_a_priority_that_is_refused_is_said_before_the_thread_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    before = threading.active_count()
    controller = RealTimeController(Slow(), ExecutionConfig("asynchronous"), priority=5)
    with pytest.raises(UserError, match="priority 5"), controller:
        pass
    assert threading.active_count() == before


def test_a_chunk_of_the_last_episode_is_dropped() -> None:
    base = Slow()
    with RealTimeController(base, ExecutionConfig("asynchronous")) as controller:
        controller.reset(1)
        base.gate.clear()
        controller.act(one())
        assert base.entered.wait(10.0)
        controller.reset(2)
        base.gate.set()
        until(lambda: len(controller.latencies_s) > 0)
        time.sleep(0.05)
        controller.act(one())
        assert controller.tally.chunks == 0


def test_the_thread_ends_with_the_controller() -> None:
    before = threading.active_count()
    with RealTimeController(Slow(), ExecutionConfig("asynchronous")):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
