"""The rollout loop: slots are independent, the queue follows the chunk, what is recorded is what was executed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import COUNTDOWN_ACTION, COUNTDOWN_SPEC, countdown_env, tiny_flow

from sim.task import load_task
from sim.vector import TaskVectorEnv, make_vector_env
from vla_rl.data.episode import Episode
from vla_rl.inference.base_policy import PolicyOutputError
from vla_rl.inference.controller import ChunkController, PolicyAgent
from vla_rl.inference.rollout import deal, rollout
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import PolicySpec

LIMIT = 20


@pytest.fixture(scope="module")
def vector() -> TaskVectorEnv:
    return make_vector_env(load_task("push_t", max_episode_steps=LIMIT), 3)


@pytest.fixture(scope="module")
def policy(vector: TaskVectorEnv) -> ChunkPolicy:
    torch.manual_seed(0)
    config = FlowConfig(net=MLPConfig(width=32, depth=1, time_dim=8), chunk_steps=6, execute_steps=4, sample_steps=2)
    built = config.build(PolicySpec(vector.observation_spec, vector.action_spec, "push_t")).eval()
    built.action_normalizer.scale_SD.fill_(0.4)  # wide, so that some actions lie beyond the limits
    return built


def run(vector: TaskVectorEnv, policy: ChunkPolicy, scenes: list[list[int]]) -> dict[int, Episode]:
    found: dict[int, Episode] = {}
    controller = PolicyAgent(policy).controller(vector.num_envs, 0)
    rollout(vector, vector.action_spec, "push", controller, scenes, lambda seed, episode: found.update({seed: episode}))
    return found


def test_every_scene_runs_once_and_is_whole(vector: TaskVectorEnv, policy: ChunkPolicy) -> None:
    found = run(vector, policy, deal(range(7), 3))
    assert sorted(found) == list(range(7))
    for seed, episode in found.items():
        episode.validate()
        assert episode.length <= LIMIT
        assert episode.truncated == (episode.length == LIMIT and not episode.success)
        assert episode.provenance["scene_seed"] == seed


def test_an_episode_does_not_depend_on_the_other_slots_or_on_what_ran_before(
    vector: TaskVectorEnv, policy: ChunkPolicy
) -> None:
    together = run(vector, policy, [[0, 3], [1, 4], [2, 5]])
    alone = run(vector, policy, [[], [4], []])
    assert np.array_equal(together[4].action_TA, alone[4].action_TA)
    assert np.array_equal(together[4].observations["observation.state"], alone[4].observations["observation.state"])


def test_what_is_recorded_was_executed_and_replays(vector: TaskVectorEnv, policy: ChunkPolicy) -> None:
    episode = run(vector, policy, [[9], [], []])[9]
    spec = vector.action_spec
    assert (episode.intended_TA < spec.low_array()).any() or (episode.intended_TA > spec.high_array()).any()
    assert (episode.action_TA >= spec.low_array()).all()
    assert (episode.action_TA <= spec.high_array()).all()
    single = load_task("push_t", max_episode_steps=LIMIT).make_env()
    observation, _ = single.reset(seed=9)
    for t in range(episode.length):
        assert np.array_equal(observation["observation.state"], episode.observations["observation.state"][t])
        observation, *_ = single.step(episode.action_TA[t])
    assert np.array_equal(
        observation["observation.state"], episode.observations["observation.state"][-1]
    )  # the true final one


def test_the_policy_is_called_once_per_executed_chunk(vector: TaskVectorEnv, policy: ChunkPolicy) -> None:
    controller = PolicyAgent(policy).controller(3, 0)
    rollout(vector, vector.action_spec, "push", controller, [[0], [1], [2]], lambda *_: None)
    assert controller.calls == LIMIT // 4


def test_slots_keep_in_step_so_that_the_policy_is_asked_for_all_at_once() -> None:
    """Episodes of 2 to 7 steps in chunks of 3: one that ended waits for the others' next chunk, and is what it is alone."""
    env = countdown_env(4)
    torch.manual_seed(0)
    policy = tiny_flow(4, 3, 2).build(COUNTDOWN_SPEC).eval()
    found: dict[int, Episode] = {}

    def play(scenes: list[list[int]]) -> tuple[ChunkController, int]:
        controller, ticks = PolicyAgent(policy).controller(4, 0), [0]

        def count(*_: object) -> None:
            ticks[0] += 1

        rollout(env, COUNTDOWN_ACTION, "count", controller, scenes, found.__setitem__, on_step=count)
        return controller, ticks[0]

    controller, ticks = play(deal(range(40), 4))
    assert len(found) == 40
    assert len({e.length for e in found.values()}) > 2
    # A call every third tick, and once more where all had ended; it was two of three where each slot began when it could.
    assert controller.calls < 0.5 * ticks
    together = dict(found)
    play([[], [], [7], []])
    assert np.array_equal(found[7].action_TA, together[7].action_TA)
    env.close()


def test_the_first_observation_stands_for_the_history_before_it(vector: TaskVectorEnv, policy: ChunkPolicy) -> None:
    seen = []
    original = policy.condition

    def watch(observation):
        seen.append(observation.state_BOS.clone())
        return original(observation)

    policy.condition = watch  # type: ignore[method-assign]
    try:
        run(vector, policy, [[0], [1], [2]])
    finally:
        del policy.condition
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])
    assert not torch.equal(seen[1][:, 0], seen[1][:, 1])


def test_a_policy_that_emits_nan_is_stopped_and_the_scene_named(vector: TaskVectorEnv, policy: ChunkPolicy) -> None:
    import copy

    broken = copy.deepcopy(policy)
    broken.action_normalizer.scale_SD.fill_(float("nan"))
    with pytest.raises(PolicyOutputError, match="scene 5"):
        run(vector, broken, [[], [5], []])


def test_wrong_number_of_slots_is_refused(vector: TaskVectorEnv, policy: ChunkPolicy) -> None:
    with pytest.raises(ValueError, match="3 lists"):
        run(vector, policy, [[0]])
