"""Every stage from pictures, clouds and words: the encoder stays as it is, runs once per observation, and goes out with what is left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_residual import settings as residual_settings
from test_stages import offline, online
from test_student_stages import lessons, selection
from toys import PUSH_LIMIT, TINY_PUSH

from sim.collect import expert_episodes
from sim.experts.base import ExpertConfig
from sim.point_cloud import PointCloud
from sim.sensors import Sensors
from sim.task import TaskConfig, load_task
from vla_rl import distill_back as distill_back_module
from vla_rl.actors import own_team
from vla_rl.algos.bc import BCConfig
from vla_rl.cli.common import base_finder, open_arena
from vla_rl.data.reader import load_dataset
from vla_rl.data.writer import EpisodeWriter
from vla_rl.distill import distill
from vla_rl.distill_back import DistillBackBCConfig, DistillBackSettings, distill_back
from vla_rl.encoders.cnn import CNNConfig
from vla_rl.encoders.config import EncoderConfig
from vla_rl.encoders.observation import ObservationEncoder
from vla_rl.encoders.point_net import PointNetConfig
from vla_rl.encoders.resampler import ResamplerConfig
from vla_rl.evaluate import Arena, evaluate
from vla_rl.inference.checkpoint import load_agent
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.perception import encoded, latent_features
from vla_rl.nets.transformer import TransformerConfig
from vla_rl.offline import train_offline
from vla_rl.online import train_online
from vla_rl.policies.checkpoint import load_policy
from vla_rl.pretrain import PretrainSettings, pretrain
from vla_rl.residual import train_residual
from vla_rl.taco import fit_selector
from vla_rl.types import ENVIRONMENT_STATE, LATENT, Observation

SMALL_CNN = CNNConfig(channels=(8, 8), kernels=(4, 3), strides=(4, 2))
ENCODER = EncoderConfig(image=SMALL_CNN, features=8, points=PointNetConfig(widths=(8, 16)))
CLOUD = PointCloud(("top",), points=48, rays=64, grid=32, low_m=(-0.4, -0.4, -0.05), high_m=(0.4, 0.4, 0.1))
KINDS = {
    "pictures": (Sensors(("top",), 24, 24, environment_state=False), replace(TINY_PUSH, encoder=ENCODER)),
    "points": (Sensors(points=CLOUD, environment_state=False), replace(TINY_PUSH, encoder=ENCODER)),
    "words": (
        Sensors(("top",), 24, 24, environment_state=False),
        replace(
            TINY_PUSH,
            net=TransformerConfig(width=16, depth=1, heads=2),
            encoder=replace(ENCODER, pool="tokens", language=True, resampler=ResamplerConfig(queries=2, heads=2)),
        ),
    ),
}


@dataclass(frozen=True)
class World:
    task: TaskConfig
    demos: Path
    policy: Path

    def arena(self) -> Arena:
        return open_arena(self.task, 4)


@pytest.fixture(scope="module", params=list(KINDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    sensors, config = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    task = replace(load_task("push_t", max_episode_steps=125), sensors=sensors)
    env = task.make_env()
    writer = EpisodeWriter.open_or_create(
        root / "demos", action_spec=env.action_spec, observation_spec=env.observation_spec, task="push_t", recipe={}
    )
    for episode in expert_episodes(task, ExpertConfig(), range(12), 1):
        writer.add(episode)
    env.close()
    settings = PretrainSettings(
        policy=config, bc=BCConfig(steps=20, batch_size=16, warmup_steps=2), successes_only=False
    )
    pretrain([root / "demos"], root / "policy", settings)
    return World(replace(task, max_episode_steps=PUSH_LIMIT), root / "demos", root / "policy")


@pytest.fixture
def arena(world: World) -> Iterator[Arena]:
    made = world.arena()
    yield made
    made.env.close()


def encoder_weights(path: Path) -> dict[str, torch.Tensor]:
    encoder = load_policy(path).encoder
    assert encoder is not None
    return encoder.state_dict()


def assert_same_encoder(a: Path, b: Path) -> None:
    first, second = encoder_weights(a), encoder_weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def assert_acts(path: Path, arena: Arena) -> None:
    """What is left acts on raw observations."""
    agent = load_agent(path, base_finder(arena))
    result = evaluate(agent, arena, [1, 2, 3], seed=0, name="it", bar=False)
    assert result["episodes"] == 3


def test_a_policy_reads_nothing_else_and_acts(world: World, arena: Arena) -> None:
    policy = load_policy(world.policy)
    assert ENVIRONMENT_STATE not in policy.full_spec.observation_spec
    assert_acts(world.policy, arena)


def test_latents_say_what_the_observation_says(world: World) -> None:
    policy = load_policy(world.policy)
    raw = load_dataset(world.demos)
    seen, latent = raw.seen(policy.full_spec.observation_spec), encoded(raw, policy)
    rows = torch.arange(0, raw.num_frames, 37)
    words = raw.instructions(rows)
    observation = Observation.from_features({k: seen.rows(k, rows)[:, None] for k in seen.observation_spec}, words)
    behind = Observation.from_features({k: latent.rows(k, rows)[:, None] for k in latent.observation_spec})
    assert LATENT in latent.observation_spec
    for other in (behind, policy.read(observation)):
        torch.testing.assert_close(policy.condition(observation), policy.condition(other), rtol=1e-5, atol=1e-5)
    final = latent.episode(3).observations[LATENT][-1]
    shown = {k: raw.final(k, slice(3, 4)) for k in policy.full_spec.observation_spec}
    policy.instruct(raw.tasks[0])
    np.testing.assert_allclose(latent_features(policy, shown)[LATENT][0], final, rtol=1e-5, atol=1e-5)


def test_an_arena_behind_the_encoder_gives_the_same_episodes(world: World, arena: Arena) -> None:
    raw, behind = load_policy(world.policy), load_policy(world.policy)
    behind.see_latents()
    one = evaluate(PolicyAgent(raw), arena, list(range(6)), seed=0, name="raw", bar=False)
    other = evaluate(PolicyAgent(behind), arena.through(behind), list(range(6)), seed=0, name="latents", bar=False)
    assert [s["length"] for s in one["scenes"]] == [s["length"] for s in other["scenes"]]
    assert one["mean_max_coverage"] == pytest.approx(other["mean_max_coverage"], abs=1e-3)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few data rank at chance; the policy gradient is to run all the same."""
    for judged in ("states_at_chance", "actions_at_chance"):
        monkeypatch.setattr(f"vla_rl.algos.calibration.Calibration.{judged}", property(lambda self: False))


@pytest.mark.usefixtures("trusting")
def test_an_offline_round_learns_on_latents_and_keeps_pictures(world: World, arena: Arena, tmp_path: Path) -> None:
    results = train_offline([world.demos], world.policy, tmp_path / "out", offline(rounds=1), lambda: world.arena())
    assert results["candidates"] >= 1
    kept = load_dataset(tmp_path / "out" / "round-1" / "rollouts")
    assert set(kept.observation_spec) == set(load_policy(world.policy).full_spec.observation_spec)
    assert_same_encoder(world.policy, tmp_path / "out")
    before, after = load_policy(world.policy).net.state_dict(), load_policy(tmp_path / "out").net.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert_acts(tmp_path / "out", arena)


def test_online_learning_moves_the_net_alone(world: World, arena: Arena, tmp_path: Path) -> None:
    train_online(world.policy, tmp_path / "out", online(), world.arena())
    assert_same_encoder(world.policy, tmp_path / "out" / "last")
    assert_acts(tmp_path / "out" / "last", arena)


def test_a_residual_learns_from_latents_acts_on_pictures_and_goes_back_into_the_policy(
    world: World, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = world.arena()
    base = base_finder(mine)(str(world.policy))
    settings = residual_settings(env_steps=200, select_every=200, selection_scenes=4)
    demos = load_dataset(world.demos)
    train_residual(demos, base, tmp_path / "out", settings, mine, lambda: own_team(mine, base, settings.residual))
    mine.env.close()
    assert_acts(tmp_path / "out" / "last", arena)
    agent = load_agent(tmp_path / "out" / "last", base_finder(arena))

    def successes_at_last(_: Any, __: str, out: Path, *___: Any) -> int:  # so little training brings none
        shutil.copytree(world.demos, out / "rollouts")
        return 1

    monkeypatch.setattr(distill_back_module, "_roll_out", successes_at_last)
    changes = DistillBackSettings(episodes=4, selection_scenes=4, bc=DistillBackBCConfig(steps=4, batch_size=8))
    back = distill_back(tmp_path / "out" / "last", agent, [world.demos], tmp_path / "back", changes, arena)
    assert back["composed"]["n"] == 4
    assert_same_encoder(world.policy, tmp_path / "back" / "imitation")


def test_a_student_shares_its_teachers_encoder(world: World, arena: Arena, tmp_path: Path) -> None:
    results = distill(world.policy, [world.demos], tmp_path / "out", lessons(), lambda: world.arena())
    assert results["student"]["n"] == 4
    assert_same_encoder(world.policy, tmp_path / "out" / "student")
    assert_acts(tmp_path / "out" / "student", arena)


def test_a_selector_counts_what_the_policy_makes_of_what_it_sees(world: World, arena: Arena, tmp_path: Path) -> None:
    fit_selector(world.policy, [world.demos], tmp_path / "out", selection(), lambda: world.arena())
    assert_acts(tmp_path / "out" / "selector", arena)


def test_the_encoder_runs_once_for_all_candidates(
    world: World, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_selector(world.policy, [world.demos], tmp_path / "out", selection(selection_scenes=0), lambda: world.arena())
    agent = load_agent(tmp_path / "out" / "selector", base_finder(arena))
    rows: list[int] = []
    forward = ObservationEncoder.forward

    def counting(self: ObservationEncoder, observation: Observation, *rest: Any) -> Any:
        rows.append(observation.batch_size)
        return forward(self, observation, *rest)

    monkeypatch.setattr(ObservationEncoder, "forward", counting)
    agent.instruct(arena.instruction)
    controller = agent.controller(4, 0)
    features, _ = arena.env.reset(seed=[0, 1, 2, 3])
    for slot in range(4):
        controller.reset(slot, slot)
    controller.act(features, np.ones(4, bool))
    assert rows == [4]


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of the task push_t_rgb itself, hardly trained, that reads words."""
    root = tmp_path_factory.mktemp("pictured")
    task = load_task("push_t_rgb", max_episode_steps=60)
    env = task.make_env()
    writer = EpisodeWriter.open_or_create(
        root / "demos", action_spec=env.action_spec, observation_spec=env.observation_spec, task="push_t_rgb", recipe={}
    )
    env.close()
    for episode in expert_episodes(task, ExpertConfig(), range(2), 1):
        writer.add(episode)
    config = replace(TINY_PUSH, encoder=replace(ENCODER, language=True))
    pretrain(
        [root / "demos"], root / "policy", PretrainSettings(policy=config, bc=BCConfig(steps=2), successes_only=False)
    )
    return root / "policy"


def test_scenes_hear_the_wordings_in_turn(
    pictured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vla_rl.cli.main import main
    from vla_rl.policies.base import ChunkPolicy

    said: list[str] = []
    instruct = ChunkPolicy.instruct
    monkeypatch.setattr(ChunkPolicy, "instruct", lambda self, words: (said.append(words), instruct(self, words))[1])
    options = ["eval", str(pictured), "--episodes", "3", "--max-episode-steps", "10", "--num-envs", "2"]
    assert main([*options, "--instruction", "go", "--json", str(tmp_path / "one.json")]) == 0
    assert set(said) == {"go"}
    assert main([*options, "--json", str(tmp_path / "own.json")]) == 0
    assert set(said) == {"go", "push the T onto its target"}
    capsys.readouterr()
    assert main([*options, "--wordings", "unseen"]) == 2
    assert "has no unseen_wordings" in capsys.readouterr().err
    assert main([*options, "--instruction", " "]) == 2
    assert "instruction wants words" in capsys.readouterr().err


def test_a_task_without_the_camera_is_refused_by_name(pictured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vla_rl.cli.main import main

    assert main(["eval", str(pictured), "--task", "push_t", "--episodes", "1"]) == 2
    said = capsys.readouterr().err
    assert "wants the observation 'observation.images.top', which task 'push_t' lacks" in said
    assert main(["eval", str(pictured), "--task", "vla_push_t", "--episodes", "1"]) == 2
    assert "'observation.images.top' has shape (3, 96, 96)" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "words"), [(0, "of one colour"), (None, "is frozen")])
def test_a_camera_that_shows_nothing_is_refused_in_training(
    tmp_path: Path, value: int | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vla_rl.cli.main import main
    from vla_rl.types import IMAGE_PREFIX

    task = load_task("push_t_rgb", max_episode_steps=30)
    env = task.make_env()
    writer = EpisodeWriter.open_or_create(
        tmp_path / "set",
        action_spec=env.action_spec,
        observation_spec=env.observation_spec,
        task="push_t_rgb",
        recipe={},
    )
    env.close()
    key = IMAGE_PREFIX + "top"
    for episode in expert_episodes(task, ExpertConfig(), range(2), 1):
        shown = episode.observations[key]
        blind = np.full_like(shown, value) if value is not None else np.repeat(shown[:1], len(shown), 0)
        writer.add(replace(episode, observations={**episode.observations, key: blind}))
    options = ["--policy", "flow_rgb", "--bc.steps", "1", "--successes-only", "false"]
    assert main(["pretrain", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert key in said
    assert not (tmp_path / "out" / "policy").exists()
