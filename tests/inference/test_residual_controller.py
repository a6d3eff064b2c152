"""Base and residual in an episode: what is asked when, what is stored, and that step 0 is the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import COUNTDOWN_ACTION, COUNTDOWN_LIMIT, COUNTDOWN_SPEC, countdown_env, tiny_flow, write_toy_set

from vla_rl.data.episode import Episode
from vla_rl.data.reader import load_dataset
from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import Source, StepContext, StepEpisode
from vla_rl.evaluate import Arena, evaluate
from vla_rl.inference.base_policy import BaseSpec, NoBase, OwnBase, PolicyOutputError
from vla_rl.inference.bases import BaseSource, own_base
from vla_rl.inference.checkpoint import load_agent, save_residual
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.residual_controller import (
    BaseOnly,
    CorrelatedNoise,
    Greedy,
    NoiseConfig,
    Noisy,
    ResidualAgent,
    ResidualController,
)
from vla_rl.inference.rollout import deal, rollout
from vla_rl.inference.steps import Order, collect_steps, label_demonstrations
from vla_rl.nets.step_critics import EnsembleCriticConfig
from vla_rl.policies.checkpoint import save_policy
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.runtime.errors import UserError
from vla_rl.types import Observation, SpecMismatchError

STEPS = 3  # of a chunk that run
SCENES = list(range(12))


class Counting:
    """A base whose actions say which episode, which chunk and which step of it they are; it remembers who asked."""

    def __init__(self, num_envs: int) -> None:
        self.spec = BaseSpec(COUNTDOWN_SPEC, observation_steps=2, execute_steps=STEPS)
        self.asked: list[list[int]] = []
        self.histories: list[Observation] = []
        self._chunks = [0] * num_envs

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        for env_id in env_ids:
            self._chunks[env_id] = 0

    def chunk(self, observation: Observation, env_ids: Sequence[int], leftovers: None = None) -> np.ndarray:
        self.asked.append(list(env_ids))
        self.histories.append(observation)
        rows = []
        for env_id in env_ids:
            number = self._chunks[env_id]
            self._chunks[env_id] += 1
            rows.append([[0.01 * number, 0.1 * h - 0.1] for h in range(STEPS + 1)])
        return np.asarray(rows, np.float32)


def residual(seed: int = 0, zero: bool = True, **options: object) -> ResidualPolicy:
    torch.manual_seed(seed)
    config = ResidualConfig(width=8, depth=1, critic=EnsembleCriticConfig(width=8, depth=1, members=2), **options)  # type: ignore[arg-type]
    made = ResidualPolicy(config, StepEncoder(COUNTDOWN_SPEC.observation_spec, COUNTDOWN_ACTION, STEPS))
    if not zero:
        torch.nn.init.normal_(made.actor.net[-1].weight)
    return made


def play(controller: ResidualController, slots: int, scenes: Sequence[int] = SCENES) -> dict[int, StepEpisode]:
    found: dict[int, StepEpisode] = {}

    def keep(scene: int, episode: Episode) -> None:
        found[scene] = controller.finish(scene, episode)

    rollout(countdown_env(slots), COUNTDOWN_ACTION, "toy", controller, deal(scenes, slots), keep)
    return found


def test_the_residual_that_was_drawn_is_kept_as_it_was_before_limits() -> None:
    """An on-policy learner scores the draw, not what limits or a gripper's switch made of it."""
    made = residual(zero=False, gate=False)
    noise = CorrelatedNoise(NoiseConfig(1.5, 0.0), COUNTDOWN_ACTION.dim, 1)
    steps = play(ResidualController(Counting(1), Noisy(made, noise), 1), 1, [4])[4]
    again = CorrelatedNoise(NoiseConfig(1.5, 0.0), COUNTDOWN_ACTION.dim, 1)
    again.reset(0, 4)
    drawn = np.stack([again.next([0])[0].numpy() for _ in range(steps.length)])
    features = {k: torch.from_numpy(v[:-1]) for k, v in steps.episode.observations.items()}
    seen = StepContext(features, torch.from_numpy(steps.base_TA[:-1]), torch.from_numpy(steps.phase_T[:-1]).long())
    with torch.no_grad():
        mean = made.mean(made.encoder(seen)).numpy()
    assert steps.residual_TA is not None
    assert np.abs(steps.residual_TA).max() > 1.0
    np.testing.assert_allclose(steps.residual_TA, mean + drawn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [True, False])
def test_an_episode_does_not_depend_on_the_other_slots(base: BaseSource, gate: bool) -> None:
    """To the bit, so that an evaluation that was cut, or other hands that collect, give the same."""
    torch.manual_seed(3)
    config = ResidualConfig(
        width=128, gate=gate, pessimism=0.0, critic=EnsembleCriticConfig(width=128, depth=2, members=3)
    )
    made = ResidualPolicy(config, StepEncoder(COUNTDOWN_SPEC.observation_spec, COUNTDOWN_ACTION, STEPS))
    torch.nn.init.normal_(made.actor.net[-1].weight)

    def run(scenes: Sequence[int]) -> dict[int, StepEpisode]:
        noise = CorrelatedNoise(NoiseConfig(0.3, 0.5), COUNTDOWN_ACTION.dim, 1)
        return play(ResidualController(base.open(8, 5), Noisy(made, noise), 8), 8, scenes)

    together = run(list(range(16)))
    for scenes in ([3], [9, 3, 14], [14]):
        for scene, steps in run(scenes).items():
            np.testing.assert_array_equal(steps.episode.action_TA, together[scene].episode.action_TA)
            np.testing.assert_array_equal(steps.base_TA, together[scene].base_TA)
            np.testing.assert_array_equal(steps.residual_TA, together[scene].residual_TA)


def policy() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_flow(STEPS + 1, STEPS, 2).build(COUNTDOWN_SPEC).eval()


@pytest.fixture
def base(tmp_path: Path) -> BaseSource:
    save_policy(policy(), tmp_path / "base", {})  # type: ignore[arg-type]
    return own_base(tmp_path / "base")


@pytest.mark.parametrize("slots", [1, 3])
def test_a_chunk_never_leaks_into_the_next_episode(slots: int) -> None:
    """Defects 3 and 4: whether an episode was terminated or ran out of time, the next begins with a fresh chunk at its first place."""
    base = Counting(slots)
    found = play(ResidualController(base, Greedy(residual()), slots), slots)
    assert sorted(found) == SCENES
    assert {s.episode.truncated for s in found.values()} == {True, False}
    for steps in found.values():
        t = np.arange(steps.length)
        np.testing.assert_array_equal(steps.phase_T[:-1], t % STEPS)
        np.testing.assert_allclose(
            steps.base_TA[:-1], np.stack([0.01 * (t // STEPS), 0.1 * (t % STEPS) - 0.1], 1), atol=1e-6
        )


def test_the_base_runs_once_for_each_chunk_that_is_executed() -> None:
    base = Counting(1)
    found = play(ResidualController(base, Greedy(residual()), 1), 1)
    wanted = 0
    for steps in found.values():
        asked_after_the_end = steps.episode.truncated and steps.length % STEPS == 0
        wanted += -(-steps.length // STEPS) + asked_after_the_end
    assert len(base.asked) == wanted


def test_a_time_out_has_what_the_base_would_have_done_next() -> None:
    """Defect 8: at the true final observation, the next action of the queue, or of a fresh chunk where it is empty."""
    found = play(ResidualController(Counting(2), Greedy(residual()), 2), 2)
    timed_out = [s for s in found.values() if s.episode.truncated]
    assert all(s.length == COUNTDOWN_LIMIT for s in timed_out)
    for steps in timed_out:
        assert steps.phase_T[-1] == COUNTDOWN_LIMIT % STEPS
        expected = [0.01 * (COUNTDOWN_LIMIT // STEPS), 0.1 * (COUNTDOWN_LIMIT % STEPS) - 0.1]
        np.testing.assert_allclose(steps.base_TA[-1], expected, atol=1e-6)


def test_the_base_sees_histories_of_the_true_observations() -> None:
    base = Counting(1)
    found = play(ResidualController(base, Greedy(residual()), 1), 1, [1])
    seen = found[1].episode.observations["observation.state"]
    for call, history in enumerate(base.histories):
        t = call * STEPS
        np.testing.assert_array_equal(history.state_BOS[0, 1], seen[t])
        np.testing.assert_array_equal(history.state_BOS[0, 0], seen[max(t - 1, 0)])


def test_what_is_stored_was_executed() -> None:
    made = residual(zero=False, scale=2.0, gate=False)
    found = play(ResidualController(Counting(2), Greedy(made), 2), 2)
    for steps in found.values():
        place = steps.episode.observations["observation.state"][:, 2:]
        np.testing.assert_allclose(np.diff(place, axis=0), steps.episode.action_TA, atol=1e-5)
    assert any((np.abs(s.episode.action_TA) == 0.5).any() for s in found.values())


def test_at_step_zero_an_evaluation_is_the_bases_to_the_bit(base: BaseSource) -> None:
    env = countdown_env(4)
    arena = Arena(env, COUNTDOWN_ACTION, COUNTDOWN_SPEC.observation_spec, "toy", "toy")
    assert base.policy is not None
    composed = ResidualAgent(base, residual())
    results = [
        evaluate(agent, arena, SCENES, seed=3, name="it", bar=False) for agent in (PolicyAgent(base.policy), composed)
    ]
    assert results[0]["scenes"] == results[1]["scenes"]
    assert len({s["episode_return"] for s in results[0]["scenes"]}) == len(SCENES)
    moved = evaluate(ResidualAgent(base, residual(zero=False, gate=False)), arena, SCENES, seed=3, name="it", bar=False)
    assert moved["scenes"] != results[0]["scenes"]


@pytest.mark.parametrize("source", ["base", "noise", "policy"])
def test_an_order_is_carried_out_the_same_again_whatever_ran_before(base: BaseSource, source: Source) -> None:
    made = residual(zero=False)

    def carry_out(order: Order) -> list[StepEpisode]:
        return collect_steps(order, countdown_env(3), COUNTDOWN_ACTION, "toy", base, made)

    order = Order(4, source, tuple(SCENES), 7, NoiseConfig())
    first, again = carry_out(order), carry_out(order)
    assert len(first) == len(SCENES)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.episode.action_TA, b.episode.action_TA)
    assert [s.episode.provenance["scene_seed"] for s in first] == SCENES
    if source == "base":
        for steps in first:
            np.testing.assert_array_equal(steps.episode.action_TA, steps.base_TA[:-1])


def test_noise_is_in_proportion_to_the_reach_and_correlated() -> None:
    noise = CorrelatedNoise(NoiseConfig(std=0.3, correlation=0.8), 2, seed=0)
    noise.reset(0, scene_seed=5)
    drawn = torch.cat([noise.next([0]) for _ in range(20_000)])
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.05)
    centred = drawn - drawn.mean(0)
    correlation = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert float(correlation) == pytest.approx(0.8, abs=0.03)
    for scale in (0.1, 0.4):
        made = residual(scale=scale)
        controller = ResidualController(Counting(2), BaseOnly(made, CorrelatedNoise(NoiseConfig(0.3, 0.5), 2, 1)), 2)
        found = play(controller, 2)
        moved = np.concatenate([s.episode.action_TA - s.base_TA[:-1] for s in found.values()])
        assert np.abs(moved).max() <= scale * 0.5 + 1e-6
        assert moved.std() == pytest.approx(0.3 * scale * 0.5, rel=0.35)


def test_noise_is_around_the_base_where_the_residual_is_an_action_of_its_own() -> None:
    """IBRL's warm-up shows what the base does, not the middle of the range."""
    noise = CorrelatedNoise(NoiseConfig(0.02, 0.0), 2, 1)
    found = play(ResidualController(Counting(2), BaseOnly(residual(kind="full"), noise), 2), 2)
    moved = np.concatenate([s.episode.action_TA - s.base_TA[:-1] for s in found.values()])
    assert np.abs(moved).max() < 0.1
    assert moved.std() == pytest.approx(0.02 * 0.5, rel=0.35)  # of half the range


def test_demonstrations_are_labelled_anew_from_the_start_of_each(tmp_path: Path) -> None:
    """Defect 4: no queue lives on from one demonstration to the next; copies begin in other places of the chunk."""
    from toys import TOY_ACTION, TOY_OBSERVATION

    from vla_rl.policies.records import PolicySpec

    spec = BaseSpec(PolicySpec(TOY_OBSERVATION, TOY_ACTION, "toy"), observation_steps=1, execute_steps=STEPS)

    class Toy(Counting):
        def __init__(self, num_envs: int) -> None:
            super().__init__(num_envs)
            self.spec = spec

    source = BaseSource("toy", "digest", spec, lambda count, _: Toy(count))
    data = load_dataset(write_toy_set(tmp_path / "set", [7, 4, 9], successes=[True, False, True]))
    labelled = label_demonstrations(data, source, copies=3, seed=0)
    assert [s.length for s in labelled] == [7, 4, 9] * 3
    offsets = set()
    places: dict[int, set[int]] = {7: set(), 4: set(), 9: set()}  # of a demonstration, by its length
    for steps in labelled:
        starts = np.flatnonzero(steps.phase_T == 0)
        assert starts[0] == 0
        offsets.add(int(starts[1]))
        places[steps.length].add(int(starts[1]))
        np.testing.assert_array_equal(np.diff(starts[1:]), STEPS)
        chunk = np.cumsum(steps.phase_T == 0) - 1
        np.testing.assert_allclose(steps.base_TA[:, 0], 0.01 * chunk, atol=1e-6)
        np.testing.assert_allclose(steps.base_TA[:, 1], 0.1 * steps.phase_T - 0.1, atol=1e-6)
    assert offsets == {1, 2, 3}
    assert all(found == {1, 2, 3} for found in places.values()), "as many copies as places: each once"
    np.testing.assert_array_equal(labelled[1].episode.action_TA, data.episode(1).action_TA)


def test_no_base_is_the_middle_of_the_range() -> None:
    nothing = NoBase(COUNTDOWN_SPEC)
    found = play(ResidualController(nothing, Greedy(residual_for(1)), 2), 2)
    assert all((s.episode.action_TA == 0).all() for s in found.values())


def residual_for(execute_steps: int) -> ResidualPolicy:
    return ResidualPolicy(
        ResidualConfig(width=8, depth=1), StepEncoder(COUNTDOWN_SPEC.observation_spec, COUNTDOWN_ACTION, execute_steps)
    )


def test_a_checkpoint_acts_as_what_was_saved(base: BaseSource, tmp_path: Path) -> None:
    made = residual(zero=False)
    save_residual(made, base, tmp_path / "run" / "policy", {})
    agent = load_agent(tmp_path / "run", own_base_of)
    a = play(agent.controller(2, 5), 2)  # type: ignore[arg-type]
    b = play(ResidualController(base.open(2, 5), Greedy(made), 2), 2)
    for scene in SCENES:
        np.testing.assert_array_equal(a[scene].episode.action_TA, b[scene].episode.action_TA)


def own_base_of(reference: str) -> BaseSource:
    return own_base(Path(reference))


def test_a_residual_refuses_a_base_with_other_weights(base: BaseSource, tmp_path: Path) -> None:
    save_residual(residual(), base, tmp_path / "run" / "policy", {})
    torch.manual_seed(1)
    (tmp_path / "base").rename(tmp_path / "old")
    save_policy(tiny_flow(STEPS + 1, STEPS, 2).build(COUNTDOWN_SPEC), tmp_path / "base", {})
    with pytest.raises(UserError, match="trained on a base with the hash") as caught:
        load_agent(tmp_path / "run", own_base_of)
    assert "\n" not in str(caught.value)


def test_a_residual_refuses_a_base_that_runs_another_share_of_its_chunks(base: BaseSource) -> None:
    with pytest.raises(SpecMismatchError, match="runs 2 actions of a chunk, this one runs 3"):
        ResidualAgent(base, residual_for(2))


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (np.full((1, STEPS, 2), np.nan, np.float32), "not finite in scene 4"),
        (np.zeros((1, STEPS - 1, 2), np.float32), "have shape"),
        (np.zeros((1, STEPS, 3), np.float32), "have shape"),
    ],
)
def test_a_base_that_is_broken_is_an_error_that_says_so(chunk: np.ndarray, words: str) -> None:
    class Broken(Counting):
        def chunk(self, observation: Observation, env_ids: Sequence[int], leftovers: None = None) -> np.ndarray:
            return chunk

    with pytest.raises(PolicyOutputError, match=words):
        play(ResidualController(Broken(1), Greedy(residual()), 1), 1, [4])


def test_own_bases_are_three_calls(base: BaseSource) -> None:
    from vla_rl.inference.base_policy import BasePolicy

    assert isinstance(base.open(2, 0), BasePolicy)
    assert isinstance(base.open(2, 0), OwnBase)
    assert isinstance(NoBase(COUNTDOWN_SPEC), BasePolicy)
