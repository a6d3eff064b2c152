"""LeRobot's policies as bases: what they read and give, their noise by episode, and that they decide as LeRobot itself does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_rl.actors import own_team
from vla_rl.algos.residual_td3 import ResidualTD3Config
from vla_rl.cli.common import base_finder
from vla_rl.data.reader import load_dataset
from vla_rl.evaluate import Arena
from vla_rl.inference.base_policy import BasePolicy, ChunkQueue
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.checkpoint import load_agent
from vla_rl.inference.lerobot_base import lerobot_base, lerobot_folder
from vla_rl.inference.residual_controller import ResidualAgent
from vla_rl.nets.step_critics import EnsembleCriticConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.policies.residual import ResidualConfig
from vla_rl.residual import train_residual
from vla_rl.residual_settings import ResidualSettings
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec, FeatureSpec, Observation, SpecMismatchError

S, E, A = 5, 4, 3
SPEC = PolicySpec(
    {"observation.state": FeatureSpec((S,)), "observation.environment_state": FeatureSpec((E,))},
    ActionSpec(("x", "y", "z"), ("m",) * A, (-9.0,) * A, (9.0,) * A, "delta", 20.0),
    "toy",
)


def make_lerobot(
    kind: str, folder: Path, image: tuple[int, int, int] | None = None, dims: tuple[int, int, int] = (S, E, A)
) -> Path:
    """A LeRobot policy with random weights and processors that scale, saved as LeRobot saves them."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    state, environment, action = dims
    inputs = {
        "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (environment,)),
    }
    if image is not None:
        inputs["observation.images.top"] = PolicyFeature(FeatureType.VISUAL, image)
    small: dict[str, Any] = (
        {
            "chunk_size": 6,
            "n_action_steps": 4,
            "dim_model": 32,
            "n_heads": 2,
            "dim_feedforward": 32,
            "n_encoder_layers": 1,
        }
        | {"use_vae": False, "pretrained_backbone_weights": None}
        if kind == "act"
        else {"horizon": 8, "n_action_steps": 4, "down_dims": (8, 16), "num_train_timesteps": 5, "n_groups": 4}
        | {"diffusion_step_embed_dim": 8, "spatial_softmax_num_keypoints": 4, "crop_shape": None}
    )
    torch.manual_seed(3)
    config = make_policy_config(
        kind,
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        device="cpu",
        normalization_mapping={k: NormalizationMode.MEAN_STD for k in ("STATE", "ENV", "ACTION")},
        **small,
    )
    policy = get_policy_class(kind)(config)
    stats = {
        "observation.state": {"mean": torch.full((state,), 2.0), "std": torch.full((state,), 3.0)},
        "observation.environment_state": {"mean": torch.zeros(environment), "std": torch.ones(environment)},
        "action": {"mean": 0.1 * torch.arange(1.0, action + 1), "std": torch.full((action,), 0.5)},
    }
    before, after = make_pre_post_processors(config, dataset_stats=stats)
    policy.save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder)
    return folder


def open_base(folder: Path, spec: PolicySpec = SPEC) -> BaseSource:
    found = lerobot_folder(folder)
    assert found is not None
    return lerobot_base(found, spec, "push the block")


def history(batch: int, steps: int, seed: int = 0) -> Observation:
    g = torch.Generator().manual_seed(seed)
    return Observation(torch.randn(batch, steps, S, generator=g), torch.randn(batch, steps, E, generator=g))


@pytest.fixture(scope="module", params=["act", "diffusion"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lerobot(kind, tmp_path_factory.mktemp(kind) / "pretrained_model")


def test_it_is_found_and_says_what_it_is(folder: Path, kind: str) -> None:
    source = open_base(folder)
    assert lerobot_folder(folder.parent) == folder, "LeRobot's checkpoints keep it in pretrained_model"
    assert source.spec.execute_steps == 4
    assert source.spec.observation_steps == (1 if kind == "act" else 2)
    assert source.folder == folder
    assert isinstance(source.open(2, 0), BasePolicy)


def test_it_decides_as_lerobot_does(folder: Path, kind: str) -> None:
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    source = open_base(folder)
    policy = get_policy_class(kind).from_pretrained(str(folder)).eval()
    before, after = make_pre_post_processors(policy.config, str(folder))
    steps = source.spec.observation_steps
    seen = history(1, steps)
    base = source.open(1, seed=11)
    base.reset([0], [5])
    ours_HA = base.chunk(seen, [0])[0]

    generator = source.open(1, seed=11)
    generator.reset([0], [5])
    policy.reset()
    with torch.random.fork_rng(), torch.no_grad():
        for t in range(steps):
            row = {
                "observation.state": seen.state_BOS[0, t],
                "observation.environment_state": seen.environment_state_BOS[0, t],
            }  # type: ignore[index]
            batch = before(row)
            if t == steps - 1:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator._generator[0])))  # type: ignore[attr-defined]
                if kind == "diffusion":  # select_action has asked for a chunk at the first observation already
                    policy._queues["action"].clear()
            action = policy.select_action(batch)
        theirs_A = after(action)[0].numpy()
    np.testing.assert_allclose(ours_HA[0], theirs_A, atol=1e-5)


def test_rows_do_not_depend_on_each_other_and_follow_from_their_scene(folder: Path) -> None:
    source = open_base(folder)
    seen = history(3, source.spec.observation_steps)
    first = source.open(3, seed=1)
    first.reset([0, 1, 2], [7, 8, 9])
    together = first.chunk(seen, [0, 1, 2])
    second = source.open(3, seed=1)
    second.reset([0, 1, 2], [7, 8, 9])
    alone = [second.chunk(seen, [row])[0] for row in (2, 0, 1)]
    np.testing.assert_array_equal(together[[2, 0, 1]], np.stack(alone))


def test_its_noise_leaves_the_program_s_own_generator_alone(folder: Path) -> None:
    source = open_base(folder)
    base = source.open(1, 0)
    base.reset([0], [0])
    state = torch.get_rng_state()
    base.chunk(history(1, source.spec.observation_steps), [0])
    assert torch.equal(state, torch.get_rng_state())


def test_history_counts_where_a_policy_reads_it(folder: Path, kind: str) -> None:
    source = open_base(folder)
    queue = ChunkQueue(source.open(1, 0), 1)
    rows = history(1, 2, seed=4)
    actions = []
    for first in (0, 1):
        queue.reset(0, 3)
        for t in (first, 1):
            features = {"observation.state": rows.state_BOS[:, t].numpy()}
            features["observation.environment_state"] = rows.environment_state_BOS[:, t].numpy()  # type: ignore[index]
            queue.see(features, [0])
        actions.append(queue.take([0])[0])
    assert np.allclose(actions[0], actions[1]) == (kind == "act")


def test_images_are_read(kind: str, tmp_path: Path) -> None:
    folder = make_lerobot(kind, tmp_path / "policy", image=(3, 64, 64))
    spec = PolicySpec(
        {**SPEC.observation_spec, "observation.images.top": FeatureSpec((3, 64, 64))}, SPEC.action_spec, "toy"
    )
    source = open_base(folder, spec)
    steps = source.spec.observation_steps
    chunks = []
    for level in (0, 255):
        base = source.open(2, 0)
        base.reset([0, 1], [0, 1])
        states = history(2, steps)
        image = torch.full((2, steps, 3, 64, 64), level, dtype=torch.uint8)
        chunks.append(base.chunk(Observation(states.state_BOS, states.environment_state_BOS, {"top": image}), [0, 1]))
    assert chunks[0].shape == (2, 4, A)
    assert not np.allclose(chunks[0], chunks[1]), "it sees"


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    other = PolicySpec({"observation.state": FeatureSpec((S + 1,))}, SPEC.action_spec, "toy")
    with pytest.raises(
        SpecMismatchError, match=r"reads observation.state of shape \(5,\), which task 'toy' has in shape \(6,\)"
    ):
        open_base(folder, other)
    lacking = PolicySpec({"observation.state": FeatureSpec((S,))}, SPEC.action_spec, "toy")
    with pytest.raises(SpecMismatchError, match=r"observation.environment_state of shape .* lacks"):
        open_base(folder, lacking)
    two = ActionSpec(("x", "y"), ("m",) * 2, (-1.0,) * 2, (1.0,) * 2, "delta", 20.0)
    with pytest.raises(SpecMismatchError, match="gives 3 action dimensions, task 'toy' wants 2"):
        open_base(folder, PolicySpec(SPEC.observation_spec, two, "toy"))
    assert lerobot_folder(tmp_path) is None
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(
        UserError, match=r"lacks model.safetensors, policy_preprocessor.json, policy_postprocessor.json"
    ):
        open_base(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"not what it says")
    with pytest.raises(UserError, match="LeRobot cannot load the policy"):
        open_base(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "unheard of", "output_features": {}}')
    with pytest.raises(UserError, match="LeRobot cannot load the policy"):
        open_base(tmp_path)
    hostile = {
        "name": "x",
        "steps": [{"class": "subprocess.Popen", "config": {"args": ["touch", str(tmp_path / "ran")]}}],
    }
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(hostile))
    with pytest.raises(UserError, match=r"names subprocess.Popen to run"):
        open_base(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_residual_is_learned_on_it_and_keeps_it(arena: Arena, demos: Path, tmp_path: Path) -> None:
    """From LeRobot's folder to a residual that is loaded again with the copy of the base beside it, and nothing else."""
    folder = make_lerobot("act", tmp_path / "act", dims=(2, 22, 2))
    base = base_finder(arena)(str(folder))
    critic = EnsembleCriticConfig(width=8, depth=1, members=2)
    settings = ResidualSettings(
        env_steps=900, base_episodes=1, noise_episodes=1, order_episodes=1, anchor_updates=2, warmup_updates=2,
        imitation_updates=2, updates_per_step=0.02, label_copies=1, selection_scenes=2, select_every=200,
        residual=ResidualConfig(width=8, depth=1, critic=critic), td3=ResidualTD3Config(batch_size=8),
    )  # fmt: skip
    out = tmp_path / "residual"
    results = train_residual(
        load_dataset(demos), base, out, settings, arena, lambda: own_team(arena, base, settings.residual)
    )
    assert results["env_steps"] >= 900
    assert results["gradient_steps"] > 4
    shutil.rmtree(folder)
    agent = load_agent(out / "policy", base_finder(arena))
    assert isinstance(agent, ResidualAgent)
    assert agent.base.digest == base.digest
    (out / "base" / "model.safetensors").write_bytes((out / "base" / "model.safetensors").read_bytes()[:-1] + b"?")
    with pytest.raises(UserError):
        load_agent(out / "policy", base_finder(arena))
