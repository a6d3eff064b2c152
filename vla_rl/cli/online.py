"""Fine-tune a policy online by PPO in its denoising chain, and keep the best on selection scenes.

Killed at any time, the same command goes on from its newest checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_rl.cli.common import CommandConfig, Simulation, open_arena, open_task
from vla_rl.online import OnlineSettings, train_online
from vla_rl.policies.base import discover_policies
from vla_rl.policies.checkpoint import load_policy

EXAMPLE = (
    "vla-rl online --policy runs/push_t/offline --out runs/push_t/online --env-steps 3000000 --ppo.learning-rate 5e-5"
)
GROUPS = {"ppo": "ppo", "kernel": "kernel"}
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig, OnlineSettings):
    """Options of ``vla-rl online``.

    policy: folder of the policy to begin with
    out: run folder, in the end with the best policy and the last one
    task: name of the task (none: the one the policy was trained on)
    num_envs: environments in parallel
    max_episode_steps: overrides the task's own limit
    simulation: how the task is simulated
    """

    policy: Path
    out: Path
    task: str | None = None
    num_envs: int = 64
    max_episode_steps: int | None = None
    simulation: Simulation = field(default_factory=Simulation)


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the policy."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Train; return what was done."""
    settings = OnlineSettings(**{name: getattr(config, name) for name in OnlineSettings.__dataclass_fields__})
    task = open_task(config.task or load_policy(config.policy).spec.task, config.simulation, config.max_episode_steps)
    arena = open_arena(task, config.num_envs)
    try:
        results = train_online(config.policy, config.out, settings, arena)
    finally:
        arena.env.close()
    print(
        f"{config.out}: success {results['selection_success']:.3f} on {results['selection_scenes']} selection scenes after "
        f"{results['env_steps']} steps; evaluate on others with 'vla-rl eval'"
    )
    return results
