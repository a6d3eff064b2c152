"""Shared fixtures; array shapes of all annotated signatures are checked while tests run."""

from __future__ import annotations

from jaxtyping import install_import_hook

install_import_hook("vla_rl", "beartype.beartype")

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from toys import PUSH_LIMIT, TINY_PUSH, write_toy_set  # noqa: E402

import sim  # noqa: E402, F401  (before any test imports MuJoCo, which reads MUJOCO_GL then)
from sim.collect import expert_episodes  # noqa: E402
from sim.experts.base import ExpertConfig  # noqa: E402
from sim.task import load_task  # noqa: E402
from vla_rl.algos.bc import BCConfig  # noqa: E402
from vla_rl.cli.common import Simulation, open_arena, open_task  # noqa: E402
from vla_rl.data.reader import load_dataset  # noqa: E402
from vla_rl.data.writer import EpisodeWriter  # noqa: E402
from vla_rl.evaluate import Arena  # noqa: E402
from vla_rl.policies.base import discover_policies  # noqa: E402
from vla_rl.pretrain import PretrainSettings, pretrain  # noqa: E402
from vla_rl.runtime.platform import set_offline, set_single_thread  # noqa: E402

set_single_thread()
set_offline()
discover_policies()
torch.set_num_threads(1)


@pytest.fixture
def toy_set(tmp_path: Path) -> Path:
    """A data set of five short episodes."""
    return write_toy_set(tmp_path / "toy", [7, 3, 12, 5, 9])


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """Write further data sets by name."""
    return lambda name, lengths, **options: write_toy_set(tmp_path / name, lengths, **options)


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of push_t that are cut short, so that some fail."""
    task = load_task("push_t", max_episode_steps=125)
    env = task.make_env()
    root = tmp_path_factory.mktemp("demos") / "set"
    writer = EpisodeWriter.open_or_create(
        root, action_spec=env.action_spec, observation_spec=env.observation_spec, task="push_t", recipe={}
    )
    for episode in expert_episodes(task, ExpertConfig(), range(12), 1):
        writer.add(episode)
    successes = load_dataset(root).episodes["success"]
    assert successes.any()
    assert not successes.all()
    return root


@pytest.fixture(scope="session")
def policy(demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imitation of them that has hardly been trained."""
    out = tmp_path_factory.mktemp("policy") / "run"
    settings = PretrainSettings(
        policy=TINY_PUSH, bc=BCConfig(steps=30, batch_size=16, warmup_steps=2), successes_only=False
    )
    pretrain([demos], out, settings)
    return out


@pytest.fixture(scope="session")
def arena() -> Iterator[Arena]:
    """Four environments of push_t with little time."""
    made = open_arena(open_task("push_t", Simulation(), PUSH_LIMIT), 4)
    yield made
    made.env.close()
