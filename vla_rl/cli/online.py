"""Fine-tune a policy online by PPO in its denoising chain, and keep the best on selection scenes.

Killed at any time, the same command goes on from its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.cli.common import TaskOptions, open_arena_of, settings_of
from vla_rl.cli.on_robot import RobotOptions, robot_arena
from vla_rl.evaluate import Arena
from vla_rl.inference.checkpoint import spec_of
from vla_rl.online import OnlineSettings, train_online
from vla_rl.policies.base import discover_policies

EXAMPLE = (
    "vla-rl online --policy runs/push_t/offline --out runs/push_t/online --env-steps 3000000 --ppo.learning-rate 5e-5"
)
GROUPS = {"ppo": "ppo", "kernel": "kernel"}
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, RobotOptions, OnlineSettings):
    """Options of ``vla-rl online``.

    policy: folder of the policy to begin with
    out: run folder, in the end with the best policy and the last one
    num_envs: environments in parallel (a robot is one)
    """

    policy: Path
    out: Path
    num_envs: int = 64

    def __post_init__(self) -> None:
        RobotOptions.__post_init__(self)
        OnlineSettings.__post_init__(self)


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the policy."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


@contextmanager
def _arena(config: Config) -> Iterator[Arena]:
    if config.robot is None:
        arena = open_arena_of(config, config.policy, config.num_envs)
        with closing(arena.env):
            yield arena
    else:
        with robot_arena(config, config.task or spec_of(config.policy).task, config.max_episode_steps) as arena:
            yield arena


def run(config: Config) -> dict[str, Any]:
    """Train; return what was done."""
    settings = settings_of(OnlineSettings, config)
    with _arena(config) as arena:
        results = train_online(config.policy, config.out, settings, arena)
    print(
        f"{config.out}: success {results['selection_success']:.3f} on {results['selection_scenes']} selection scenes after "
        f"{results['env_steps']} steps; evaluate on others with 'vla-rl eval'"
    )
    return results
