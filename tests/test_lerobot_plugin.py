"""Our policies and tasks inside LeRobot's own programs: found without a list, trained, evaluated, exported and read back, off-line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from toys import TINY_PUSH

from sim.collect import expert_episodes
from sim.experts.base import ExpertConfig
from sim.task import load_task
from vla_rl.algos.bc import BCConfig
from vla_rl.cli.common import base_finder, open_arena
from vla_rl.cli.main import main
from vla_rl.data.writer import EpisodeWriter
from vla_rl.encoders.cnn import CNNConfig
from vla_rl.encoders.config import EncoderConfig
from vla_rl.evaluate import Arena
from vla_rl.inference.base_policy import ChunkQueue, OwnBase
from vla_rl.inference.selectors import PlainSampler
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.checkpoint import encode_policy, load_policy
from vla_rl.policies.flow import FlowConfig
from vla_rl.pretrain import PretrainSettings, pretrain
from vla_rl.runtime.config import write_yaml
from vla_rl.types import Observation

KIND = FlowConfig(
    net=MLPConfig(width=16, depth=1, time_dim=4),
    encoder=EncoderConfig(image=CNNConfig(channels=(8,), kernels=(8,), strides=(8,)), features=8),
    observation_steps=2,
    chunk_steps=8,
    execute_steps=4,
    sample_steps=2,
)


@pytest.fixture(scope="module", autouse=True)
def _found() -> None:
    register_third_party_plugins()
    assert "vla_rl" in PreTrainedConfig.get_known_choices()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few demonstrations of push_t from its camera."""
    task = load_task("push_t_rgb", max_episode_steps=125)
    env = task.make_env()
    root = tmp_path_factory.mktemp("pictures") / "set"
    writer = EpisodeWriter.open_or_create(
        root, action_spec=env.action_spec, observation_spec=env.observation_spec, task="push_t_rgb", recipe={}
    )
    env.close()
    for episode in expert_episodes(task, ExpertConfig(), range(2), 1):
        writer.add(episode)
    return root


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of ours that has seen them."""
    out = tmp_path_factory.mktemp("ours") / "run"
    settings = PretrainSettings(policy=KIND, bc=BCConfig(steps=3, batch_size=8), successes_only=False)
    pretrain([pictures], out, settings)
    return out


def lerobot(program: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Run one of LeRobot's programs in this process."""
    from lerobot.scripts import lerobot_eval, lerobot_train

    monkeypatch.setattr(sys, "argv", [program, *options])
    {"lerobot-train": lerobot_train.main, "lerobot-eval": lerobot_eval.main}[program]()


def test_lerobot_trains_it_and_evaluates_it_on_a_task_of_ours(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kind.yaml").write_text(write_yaml(encode_policy(KIND)))
    lerobot(
        "lerobot-train",
        monkeypatch,
        "--policy.type=vla_rl",
        f"--policy.kind={tmp_path / 'kind.yaml'}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=local/push_t",
        f"--dataset.root={pictures}",
        f"--output_dir={tmp_path / 'train'}",
        "--steps=2",
        "--batch_size=4",
        "--num_workers=0",
        "--save_freq=2",
        "--eval_freq=0",
        "--wandb.enable=false",
    )
    left = tmp_path / "train" / "checkpoints" / "000002" / "pretrained_model"
    assert {"config.json", "model.safetensors"} <= {p.name for p in left.iterdir()}
    lerobot(
        "lerobot-eval",
        monkeypatch,
        f"--policy.path={left}",
        "--policy.device=cpu",
        "--env.type=vla_rl",
        "--env.task=push_t_rgb",
        "--env.episode_length=9",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        f"--output_dir={tmp_path / 'eval'}",
    )
    told = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert told["overall"]["n_episodes"] == 2


def test_an_exported_policy_is_the_same_to_the_last_bit(trained: Path, tmp_path: Path) -> None:
    assert main(["distill", "export", str(trained), "--out", str(tmp_path / "out"), "--format", "lerobot"]) == 0
    ours = load_policy(trained)
    config = PreTrainedConfig.from_pretrained(str(tmp_path / "out"))
    theirs = get_policy_class("vla_rl").from_pretrained(str(tmp_path / "out"), config=config)
    before, after = make_pre_post_processors(config, str(tmp_path / "out"))
    rng = np.random.default_rng(0)
    picture = torch.from_numpy(rng.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8))
    state = torch.from_numpy(rng.uniform(-0.3, 0.3, (2, 2)).astype(np.float32))
    noise = torch.randn(ours.noise_count, 2, *ours.chunk_shape)
    moment = {"observation.state": state, "observation.images.top": picture.float() / 255, "task": ["a", "b"]}
    theirs.reset()
    given = after(theirs.predict_action_chunk(before(moment), noise=noise))
    history = Observation(torch.stack([state, state], 1), images={"top": torch.stack([picture, picture], 1)})
    wanted = ours.spec.action_spec.clip_tensor(ours.sample(history, noise).action_BHA)
    assert torch.equal(given, wanted)
    assert main(["distill", "export", str(trained), "--out", str(tmp_path / "out"), "--format", "lerobot"]) == 2


def test_its_queue_runs_the_chunk_and_reads_the_history(trained: Path, tmp_path: Path) -> None:
    """As our own controller does, observation by observation."""
    assert main(["distill", "export", str(trained), "--out", str(tmp_path / "out"), "--format", "lerobot"]) == 0
    ours = load_policy(trained)
    theirs: Any = get_policy_class("vla_rl").from_pretrained(str(tmp_path / "out"))
    noises = [torch.randn(ours.noise_count, 1, *ours.chunk_shape) for _ in range(3)]
    queue, base = [], OwnBase(ours, 1, 0)
    waiting = iter(noises)

    class Given(PlainSampler):
        """Draws with the noises of the test."""

        def __call__(self, observation: Observation, noise_KBHA: torch.Tensor, prefix: Any = None) -> Any:
            return ours.sample(observation, next(waiting), prefix)

    base._sampler = Given(ours)
    chunks = ChunkQueue(base, 1)
    chunks.reset(0, 0)
    theirs.reset()
    rng = np.random.default_rng(1)
    drawn = iter(noises)
    for step in range(9):
        picture = rng.integers(0, 256, (1, 3, 96, 96), dtype=np.uint8)
        state = rng.uniform(-0.3, 0.3, (1, 2)).astype(np.float32)
        chunks.see({"observation.state": state, "observation.images.top": picture}, [0])
        wanted = ours.spec.action_spec.clip(chunks.take([0])[0])
        noise = next(drawn) if step % 4 == 0 else None
        moment = {
            "observation.state": torch.from_numpy(state),
            "observation.images.top": torch.from_numpy(picture) / 255,
        }
        queue.append(theirs.select_action(moment, noise=noise).numpy())
        np.testing.assert_array_equal(queue[-1], wanted)


def test_what_is_exported_is_a_base_like_any_other_of_lerobots(trained: Path, tmp_path: Path) -> None:
    assert main(["distill", "export", str(trained), "--out", str(tmp_path / "out"), "--format", "lerobot"]) == 0
    arena: Arena = open_arena(replace(load_task("push_t_rgb"), max_episode_steps=12), 2)
    source = base_finder(arena)(str(tmp_path / "out"))
    base = source.open(2, 0)
    base.reset([0, 1], [0, 1])
    features, _ = arena.env.reset(seed=[0, 1])
    arena.env.close()
    seen = {k: torch.from_numpy(np.stack([v, v], 1)) for k, v in features.items()}
    assert base.chunk(Observation.from_features(seen), [0, 1]).shape == (2, 4, 2)


def test_weights_that_are_missing_are_an_error(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert main(["distill", "export", str(trained), "--out", str(tmp_path / "out"), "--format", "lerobot"]) == 0
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        get_policy_class("vla_rl").from_pretrained(str(tmp_path / "out"))


def test_steps_that_contradict_the_policy_are_refused() -> None:
    kind = json.dumps(encode_policy(TINY_PUSH))
    made = PreTrainedConfig.get_choice_class("vla_rl")(kind=kind, device="cpu")
    assert (made.n_obs_steps, made.chunk_size, made.n_action_steps) == (1, 8, 8)
    with pytest.raises(ValueError, match=r"chunk_size of the policy .* is 8, got 16"):
        PreTrainedConfig.get_choice_class("vla_rl")(kind=kind, chunk_size=16, device="cpu")
