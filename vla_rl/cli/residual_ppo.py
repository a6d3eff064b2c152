"""Learn a residual on a frozen base on-policy, by PPO: a baseline of the residual stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.actors import own_team
from vla_rl.cli.common import TaskOptions, base_finder, open_arena_of, settings_of
from vla_rl.policies.base import discover_policies
from vla_rl.residual_ppo import ResidualPPOSettings, train_residual_ppo

EXAMPLE = "vla-rl residual ppo --policy runs/lift/pretrain --out runs/lift/residual_ppo --env-steps 100000"
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, ResidualPPOSettings):
    """Options of ``vla-rl residual ppo``.

    policy: folder of the base
    out: run folder, in the end with the best residual
    num_envs: environments in parallel
    """

    policy: Path
    out: Path
    num_envs: int = 16


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the residual."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Train; return what was done."""
    settings = settings_of(ResidualPPOSettings, config)
    arena = open_arena_of(config, config.policy, config.num_envs)
    try:
        base = base_finder(arena)(str(config.policy))
        team = own_team(arena, base, settings.ungated)
        results = train_residual_ppo(base, config.out, settings, arena, lambda: team)
    finally:
        arena.env.close()
    print(
        f"{config.out}: success {results['base_selection_success']:.3f} -> {results['selection_success']:.3f} on "
        f"{results['selection_scenes']} selection scenes after {results['env_steps']} steps"
    )
    return results
