"""On-policy experience against a replay by hand, and the online learner on it: exact resume, warm-up, a ratio of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor
from toys import COUNTDOWN_ACTION, COUNTDOWN_LIMIT, COUNTDOWN_SPEC, Countdown, countdown_env

from vla_rl.algos.ppo import PPOConfig, Samples, pair_log_ratio
from vla_rl.algos.ppo_online import OnlinePPO, OnlinePPOConfig
from vla_rl.algos.rewards import RewardConfig, roughness
from vla_rl.algos.value import ValueConfig
from vla_rl.inference.experience import Experience, Segment, collect
from vla_rl.kernels import Kernel, KernelConfig
from vla_rl.nets.mlp import MLPConfig
from vla_rl.online import shaped_rewards
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.flow import FlowConfig
from vla_rl.types import STATE, Observation

SLOTS, DECISIONS, HISTORY, CHUNK, STEPS = 4, 9, 2, 4, 3


def build(kernel: KernelConfig | None = None) -> tuple[ChunkPolicy, Kernel]:
    torch.manual_seed(0)
    config = FlowConfig(
        net=MLPConfig(width=16, depth=1, time_dim=4),
        observation_steps=HISTORY,
        chunk_steps=CHUNK,
        execute_steps=STEPS,
        sample_steps=3,
    )
    policy = config.build(COUNTDOWN_SPEC).eval()
    policy.action_normalizer.scale_SD.fill_(0.4)  # wide, so that some actions lie beyond the limits
    return policy, policy.make_kernel(kernel or KernelConfig())


def counter(start: int = 0) -> Callable[[], int]:
    return itertools.count(start).__next__


def run(
    parts: tuple[ChunkPolicy, Kernel] | None = None,
    env: SyncVectorEnv | None = None,
    seed: int = 0,
    scenes: Callable[[], int] | None = None,
    decisions: int = DECISIONS,
) -> Experience:
    policy, kernel = parts or build()
    generator = torch.Generator().manual_seed(seed)
    return collect(
        env or countdown_env(SLOTS),
        COUNTDOWN_ACTION,
        "count",
        policy,
        kernel,
        decisions,
        scenes or counter(),
        generator,
    )


@pytest.fixture(scope="module")
def experience() -> Experience:
    return run()


def seen_at(history: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    return np.stack([history[max(len(history) - 1 - back, 0)][key] for back in reversed(range(HISTORY))])


@dataclass
class Replayed:
    """What a decision must have been: one row of the arrays."""

    decision: int
    slot: int
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    rewards: list[float]
    terminated: bool
    ended: bool


def replay(found: Experience) -> Iterator[Replayed]:
    """Walk through single environments with the chunks that were drawn."""
    policy, _ = build()
    count, slots = found.ended_TN.shape
    scenes = counter()
    envs: list[Countdown | None] = [None] * slots
    histories: list[list[dict[str, np.ndarray]]] = [[] for _ in range(slots)]
    for t in range(count):
        for n in range(slots):
            if envs[n] is None:
                envs[n] = Countdown()
                histories[n] = [envs[n].reset(seed=scenes())[0]]  # type: ignore[union-attr]
        for n in range(slots):
            env, history = envs[n], histories[n]
            assert env is not None
            before = {k: seen_at(history, k) for k in history[0]}
            observation = Observation.from_features({k: torch.from_numpy(v)[None] for k, v in before.items()})
            chunk = found.chain.chunk[t * slots + n][None]
            intended_HA = policy.unnormalize_action(chunk, observation)[0].numpy()
            rewards, terminated, truncated = [], False, False
            for h in range(STEPS):
                features, reward, terminated, truncated, _ = env.step(np.clip(intended_HA[h], -0.5, 0.5))
                history.append(features)
                rewards.append(reward)
                if terminated or truncated:
                    envs[n] = None
                    break
            after = {k: seen_at(history, k) for k in history[0]}
            ended = terminated or truncated or t == count - 1
            yield Replayed(t, n, before, after, rewards, terminated, ended)


def test_experience_is_what_a_replay_by_hand_gives(experience: Experience) -> None:
    assert experience.reward_TNH.shape == (DECISIONS, SLOTS, STEPS)
    rows = list(replay(experience))
    assert len(rows) == DECISIONS * SLOTS
    for row in rows:
        at = row.decision, row.slot
        ran = len(row.rewards)
        assert experience.executed_TNH[at].tolist() == [h < ran for h in range(STEPS)]
        assert int(experience.steps[at]) == ran
        assert experience.reward_TNH[at].tolist() == pytest.approx(row.rewards + [0.0] * (STEPS - ran), rel=1e-6)
        assert bool(experience.terminated_TN[at]) == row.terminated
        assert bool(experience.ended_TN[at]) == row.ended
        for key in COUNTDOWN_SPEC.observation_spec:
            np.testing.assert_allclose(experience.observation[key][at], row.before[key], atol=1e-6)
            np.testing.assert_allclose(experience.next_observation[key][at], row.after[key], atol=1e-6)
    assert {len(r.rewards) for r in rows} == {1, 2, 3}  # ends in every place of a chunk, both kinds
    assert {r.terminated for r in rows if r.ended and r.decision < DECISIONS - 1} == {True, False}


def test_a_time_outs_next_observation_is_its_own_last_one(experience: Experience) -> None:
    """DPPO takes the next episode's first."""
    timeout_TN = experience.ended_TN & ~experience.terminated_TN
    timeout_TN[-1] = False
    assert timeout_TN.any()
    last = experience.next_observation[STATE][:-1, :, -1][timeout_TN[:-1]]
    following = experience.observation[STATE][1:, :, -1][timeout_TN[:-1]]
    assert last[:, 1].tolist() == [1.0] * len(last)  # COUNTDOWN_LIMIT steps of COUNTDOWN_LIMIT
    assert following[:, 1].tolist() == [0.0] * len(last)
    assert (last[:, 0] != following[:, 0]).all()  # another scene


def test_inside_an_episode_the_next_observation_is_the_one_decided_on_next(experience: Experience) -> None:
    goes_on_TN = ~experience.ended_TN[:-1]
    assert goes_on_TN.any()
    for key in COUNTDOWN_SPEC.observation_spec:
        assert torch.equal(
            experience.next_observation[key][:-1][goes_on_TN], experience.observation[key][1:][goes_on_TN]
        )


def test_a_history_begins_with_its_episode(experience: Experience) -> None:
    begins_TN = torch.cat([torch.ones(1, SLOTS, dtype=torch.bool), experience.ended_TN[:-1]])
    state_TNOS = experience.observation[STATE]
    assert torch.equal(state_TNOS[begins_TN][:, 0], state_TNOS[begins_TN][:, 1])
    assert not (state_TNOS[~begins_TN][:, 0] == state_TNOS[~begins_TN][:, 1]).all(1).any()


def test_segments_are_the_executed_steps_in_their_order(experience: Experience) -> None:
    taken_TNH = torch.zeros_like(experience.executed_TNH, dtype=torch.int)
    for segment in experience.segments:
        rows = slice(segment.first_decision, segment.first_decision + segment.decisions)
        ran_DH = experience.executed_TNH[rows, segment.slot]
        taken_TNH[rows, segment.slot] += ran_DH.int()
        assert segment.episode.reward_T.tolist() == experience.reward_TNH[rows, segment.slot][ran_DH].tolist()
        first = experience.observation[STATE][segment.first_decision, segment.slot, -1]
        last = experience.next_observation[STATE][rows.stop - 1, segment.slot, -1]
        assert np.array_equal(segment.episode.observations[STATE][0], first.numpy())
        assert np.array_equal(segment.episode.observations[STATE][-1], last.numpy())
        assert experience.ended_TN[rows, segment.slot].tolist() == [False] * (segment.decisions - 1) + [True]
    assert torch.equal(taken_TNH, experience.executed_TNH.int())
    assert experience.env_steps == sum(s.episode.length for s in experience.segments)


def test_episodes_say_how_they_ended_and_are_whole(experience: Experience) -> None:
    for segment in experience.segments:
        episode = segment.episode
        episode.validate()
        scene = int(episode.provenance["scene_seed"])
        assert episode.observations[STATE][0, 0] == np.float32(scene / 10)
        assert episode.terminated == episode.success
        if episode.terminated:
            assert (scene % 2, episode.length) == (0, 2 + scene // 2 % 5)
        elif episode.truncated:
            assert (scene % 2, episode.length) == (1, COUNTDOWN_LIMIT)
        else:
            assert segment.first_decision + segment.decisions == DECISIONS
    seeds = [s.episode.provenance["scene_seed"] for s in experience.segments]
    assert sorted(seeds) == list(range(len(seeds)))  # each scene that was handed out ran once


def test_what_is_recorded_was_executed(experience: Experience) -> None:
    intended = np.concatenate([s.episode.intended_TA for s in experience.segments])
    executed = np.concatenate([s.episode.action_TA for s in experience.segments])
    assert (np.abs(intended) > 0.5).any()
    assert np.array_equal(executed, np.clip(intended, -0.5, 0.5))


def cut_off(found: Experience) -> list[Segment]:
    return [s for s in found.segments if not (s.episode.terminated or s.episode.truncated)]


def test_what_still_runs_at_the_end_is_cut_and_not_terminated() -> None:
    found = run(scenes=itertools.repeat(1).__next__, decisions=2)  # scene 1 takes seven steps, two decisions six
    assert len(cut_off(found)) == SLOTS == len(found.segments)
    assert found.ended_TN.tolist() == [[False] * SLOTS, [True] * SLOTS]
    assert not found.terminated_TN.any()
    assert found.finished() == []
    assert (found.next_observation[STATE][-1, :, -1, 1] == np.float32(6 / COUNTDOWN_LIMIT)).all()
    longer = run(scenes=itertools.repeat(1).__next__, decisions=3)
    assert len(longer.finished()) == SLOTS
    assert cut_off(longer) == []


def test_the_share_of_successes_does_not_favour_the_short() -> None:
    """Even scenes succeed within six steps, odd ones time out after seven: of nine steps only a success leaves room for another episode."""
    scenes = iter([0, 1] * 100)
    found = run(scenes=scenes.__next__, decisions=3)
    ended = [e.success for e in found.finished()]
    assert found.success() == 0.5
    assert np.mean(ended) > 0.5


def test_the_same_generator_and_scenes_give_the_same_experience_to_the_bit() -> None:
    env = countdown_env(SLOTS)
    once = run(env=env)
    run(env=env, seed=5, scenes=counter(40), decisions=4)  # leaves the slots in the middle of something
    for other in (run(env=env), run()):
        for key in COUNTDOWN_SPEC.observation_spec:
            assert torch.equal(once.observation[key], other.observation[key])
            assert torch.equal(once.next_observation[key], other.next_observation[key])
        assert torch.equal(once.chain.x_BKHA, other.chain.x_BKHA)
        assert torch.equal(once.chain.log_prob_BKH, other.chain.log_prob_BKH)
        for name in ("reward_TNH", "executed_TNH", "terminated_TN", "ended_TN"):
            assert torch.equal(getattr(once, name), getattr(other, name)), name
    assert not torch.equal(once.chain.x_BKHA, run(seed=1).chain.x_BKHA)
    assert not torch.equal(once.observation[STATE], run(scenes=counter(1)).observation[STATE])


def test_idle_slots_do_not_move_what_others_see() -> None:
    """While others finish their chunk, a slot that is done is stepped on in a scene that counts for nobody."""
    found = run(scenes=itertools.cycle([0, 1, 3, 5]).__next__, decisions=2)  # scene 0 ends after two steps of three
    assert found.executed_TNH[0].tolist() == [[True, True, False]] + [[True] * 3] * 3
    assert found.reward_TNH[0, 0, 2] == 0.0
    assert found.next_observation[STATE][0, 0, -1, 1] == np.float32(2 / COUNTDOWN_LIMIT)
    assert next(s.episode.length for s in found.segments if s.slot == 0) == 2


def test_a_simulation_that_diverged_says_so() -> None:
    """So that the stage can count it, and no data set takes it in."""
    found = run(env=countdown_env(SLOTS, diverges=2), decisions=2)
    ended = {int(s.episode.provenance["scene_seed"]): s.episode for s in found.segments}
    assert ended[2].truncated
    assert ended[2].provenance.get("diverged") == "the point exploded"
    assert "diverged" not in ended[3].provenance


# --- rewards


def test_a_decisions_reward_is_discounted_inside_it(experience: Experience) -> None:
    found_TN = experience.decision_reward(0.9)
    for row in replay(experience):
        wanted = sum(0.9**h * r for h, r in enumerate(row.rewards))
        assert float(found_TN[row.decision, row.slot]) == pytest.approx(wanted, rel=1e-5)
    doubled = experience.decision_reward(0.9, 2 * experience.reward_TNH)
    torch.testing.assert_close(doubled, 2 * found_TN)


def shape(experience: Experience, config: RewardConfig) -> Tensor:
    return shaped_rewards(experience, COUNTDOWN_ACTION, config, torch.Generator().manual_seed(0))


def test_shaped_rewards_stand_where_the_recorded_ones_stood(experience: Experience) -> None:
    assert torch.equal(shape(experience, RewardConfig()), experience.reward_TNH)
    priced = shape(experience, RewardConfig(step_penalty=0.25))
    torch.testing.assert_close(priced, experience.reward_TNH - 0.25 * experience.executed_TNH)


def test_smoothness_is_that_of_each_episode_alone(experience: Experience) -> None:
    config = RewardConfig(smoothness_penalty=2.0, smoothness_window=3)
    taken_TNH = experience.reward_TNH - shape(experience, config)
    assert not taken_TNH[~experience.executed_TNH].any()
    for segment in experience.segments:
        rows = slice(segment.first_decision, segment.first_decision + segment.decisions)
        found = taken_TNH[rows, segment.slot][experience.executed_TNH[rows, segment.slot]]
        wanted = 2.0 * roughness(segment.episode.action_TA, COUNTDOWN_ACTION, 3)
        np.testing.assert_allclose(found, wanted, atol=2e-3)  # rewards of some thousand, in float32
    assert taken_TNH.max() > 0.01


# --- the online learner


def learner(kernel: KernelConfig | None = None, **options: object) -> OnlinePPO:
    config = OnlinePPOConfig(**{"discount": 0.9, "warmup_iterations": 0, **options})  # type: ignore[arg-type]
    policy, made = build(kernel)
    torch.manual_seed(1)
    ppo = PPOConfig(learning_rate=3e-4, epochs=2, minibatch=16, pairs=1, kl_stop=0.05)
    return OnlinePPO(policy, made, config, ppo, ValueConfig(width=16, epochs=2, minibatch=16))


def iterate(
    algorithm: OnlinePPO, change: Callable[[Experience], Experience] = lambda e: e, progress: float = 0.0
) -> dict[str, float]:
    """One iteration as the stage does it: all draws follow from its number."""
    number = algorithm.iteration
    generator = torch.Generator().manual_seed(number)
    parts = (algorithm.policy, algorithm.kernel)
    found = collect(countdown_env(SLOTS), COUNTDOWN_ACTION, "count", *parts, 5, counter(10 * number), generator)
    found = change(found)
    reward_TN = found.decision_reward(0.9, found.reward_TNH / 1000)
    return algorithm.update(found, reward_TN, generator, progress)


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("kind", ["cps", "learned"])
def test_two_updates_restored_and_two_more_are_four(kind: str, warmup: int) -> None:
    def fresh() -> OnlinePPO:
        # a target that is out of reach, so that the learning rate moves too
        return learner(KernelConfig(kind=kind), warmup_iterations=warmup, kl_target=1e3)  # type: ignore[arg-type]

    straight, first, second = fresh(), fresh(), fresh()
    wanted = [iterate(straight) for _ in range(4)]
    for _ in range(2):
        iterate(first)
    kept = first.state_dict()
    iterate(first)  # what was kept is a copy
    second.load_state_dict(kept)
    assert_same(second.state_dict(), kept)
    assert [iterate(second) for _ in range(2)] == wanted[2:]
    assert_same(straight.state_dict(), second.state_dict())
    assert straight.ppo.learning_rate > 3e-4 * 1.4


def test_the_learning_rate_falls_to_its_last_share() -> None:
    falling = learner(last_rate_share=0.25)
    for progress, share in ((0.0, 1.0), (0.5, 0.625), (1.0, 0.25), (1.1, 0.25)):
        metrics = iterate(falling, progress=progress)
        assert metrics["ppo/learning_rate"] == pytest.approx(3e-4 * share)
        assert falling.ppo.optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 * share)
    assert iterate(learner(), progress=1.0)["ppo/learning_rate"] == pytest.approx(3e-4)


def test_a_restored_state_undoes_what_came_after_it() -> None:
    """A roll-back: also to a state before the first step of the policy."""
    algorithm = learner(warmup_iterations=1)
    iterate(algorithm)
    kept = algorithm.state_dict()
    iterate(algorithm)
    iterate(algorithm)
    algorithm.load_state_dict(kept)
    assert_same(algorithm.state_dict(), kept)
    assert algorithm.iteration == 1


def test_while_the_value_function_warms_up_the_policy_stays() -> None:
    algorithm = learner(KernelConfig(kind="learned"), warmup_iterations=2)

    def parts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        state = algorithm.state_dict()
        acting = {k: v for k, v in state.items() if k.startswith(("policy.", "kernel."))}
        return acting, {k: v for k, v in state.items() if k.startswith("value.")}

    acting, value = parts()
    for _ in range(2):
        metrics = iterate(algorithm)
        assert not any(name.startswith("ppo/gradient") for name in metrics)
        now, learnt = parts()
        assert_same(acting, now)
        assert any(not torch.equal(value[k], learnt[k]) for k in value)
        value = learnt
    assert iterate(algorithm)["ppo/gradient_steps"] > 0
    moved = {k.split(".")[0] for k, v in parts()[0].items() if not torch.equal(v, acting[k])}
    assert moved == {"policy", "kernel"}


@pytest.mark.parametrize("kernel", [KernelConfig(), KernelConfig(kind="learned"), KernelConfig(trained_steps=2)])
def test_chains_have_ratio_one_before_the_update(kernel: KernelConfig) -> None:
    """Those of a policy that has learnt, in other batches than they were drawn in."""
    algorithm = learner(kernel)
    iterate(algorithm)
    found = run((algorithm.policy, algorithm.kernel))
    flat = {k: v.flatten(0, 1) for k, v in found.observation.items()}
    condition = algorithm.policy.condition(Observation.from_features(flat))
    count = len(condition)
    samples = Samples(condition, found.chain, torch.zeros(count), found.executed_TNH.flatten(0, 1))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:25]
    for index in range(len(algorithm.kernel.trained)):
        step = torch.full((25,), index)
        for reduction in ("joint", "action_step", "mean"):
            log_ratio = pair_log_ratio(algorithm.policy, algorithm.kernel, samples, order, step, reduction)
            assert (log_ratio.detach().exp() - 1).abs().max() < 1e-5


def test_targets_are_the_returns_of_the_steps_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """With lambda one: rewards to the end of the episode, by control step, and the value of what a time-out or a cut left."""
    algorithm = learner(gae_lambda=1.0)
    found = run((algorithm.policy, algorithm.kernel))
    given: dict[str, Tensor] = {}

    def learn(condition_BOD: Tensor, target_B: Tensor, _: torch.Generator) -> dict[str, float]:
        given["target"] = target_B
        return {}

    def improve(samples: Samples, _: torch.Generator) -> dict[str, float]:
        given["advantage"], given["executed"] = samples.advantage_B, samples.executed_BH
        return {}

    monkeypatch.setattr(algorithm.value, "update", learn)
    monkeypatch.setattr(algorithm.ppo, "update", improve)
    reward_TNH = found.reward_TNH / 1000
    algorithm.update(found, found.decision_reward(0.9, reward_TNH), torch.Generator())

    def value(features: Mapping[str, Tensor], t: int, n: int) -> float:
        one = Observation.from_features({k: v[t, n][None] for k, v in features.items()})
        return float(algorithm.value.value(algorithm.policy.condition(one)))

    for segment in found.segments:
        n, last = segment.slot, segment.first_decision + segment.decisions - 1
        for t in range(segment.first_decision, last + 1):
            ran = found.executed_TNH[t : last + 1, n]
            rewards = reward_TNH[t : last + 1, n][ran].tolist()
            wanted = sum(0.9**i * r for i, r in enumerate(rewards))
            if not segment.episode.terminated:
                wanted += 0.9 ** len(rewards) * value(found.next_observation, last, n)
            at = t * SLOTS + n
            assert float(given["target"][at]) == pytest.approx(wanted, abs=1e-4)
            assert float(given["advantage"][at]) == pytest.approx(wanted - value(found.observation, t, n), abs=1e-4)
    assert torch.equal(given["executed"], found.executed_TNH.flatten(0, 1))


def updated(change: Callable[[Experience], Experience]) -> dict[str, Tensor]:
    algorithm = learner()
    iterate(algorithm, change)
    return algorithm.state_dict()


def plus_next(found: Experience, where_TN: Tensor) -> Experience:
    features = {k: v + 5.0 * where_TN[..., None, None] for k, v in found.next_observation.items()}
    return replace(found, next_observation=features)


def test_only_a_termination_makes_what_follows_worthless() -> None:
    plain = updated(lambda e: e)
    assert_same(plain, updated(lambda e: plus_next(e, e.terminated_TN)))
    for timed_out in (
        updated(lambda e: plus_next(e, e.ended_TN & ~e.terminated_TN)),
        updated(lambda e: plus_next(e, ~e.ended_TN)),
    ):
        assert any(not torch.equal(plain[k], timed_out[k]) for k in plain if k.startswith("value."))


def test_actions_that_did_not_run_move_no_weight() -> None:
    def change(found: Experience) -> Experience:
        idle = ~found.executed_TNH.flatten(0, 1)
        assert idle.any()
        return replace(found, chain=replace(found.chain, log_prob_BKH=found.chain.log_prob_BKH + 3.0 * idle[:, None]))

    assert_same(updated(lambda e: e), updated(change))


def test_it_learns_to_go_where_the_reward_is() -> None:
    algorithm = learner(KernelConfig(noise_scale=0.9))
    algorithm.ppo.learning_rate = 1e-3
    env = countdown_env(16)
    means = []
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        found = collect(
            env, COUNTDOWN_ACTION, "count", algorithm.policy, algorithm.kernel, 6, counter(100 * number), generator
        )
        right_TNH = torch.zeros_like(found.reward_TNH)
        for segment in found.segments:  # what each step moved to the right
            rows = slice(segment.first_decision, segment.first_decision + segment.decisions)
            ran = found.executed_TNH[rows, segment.slot]
            moved = torch.from_numpy(segment.episode.action_TA[:, 0].copy())
            right_TNH[rows, segment.slot] = right_TNH[rows, segment.slot].masked_scatter(ran, moved)
        means.append(float(right_TNH.sum() / found.executed_TNH.sum()))
        algorithm.update(found, found.decision_reward(0.9, right_TNH), generator)
    assert np.mean(means[-2:]) > np.mean(means[:2]) + 0.05
