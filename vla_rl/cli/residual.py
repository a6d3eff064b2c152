"""Learn a residual on a frozen base, off-policy from sparse success, and keep the best on selection scenes.

Killed at any time, the same command goes on from its newest checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.actors import own_team
from vla_rl.cli.common import TaskOptions, base_finder, open_arena, open_task, settings_of
from vla_rl.data.reader import load_datasets
from vla_rl.inference.checkpoint import spec_of
from vla_rl.policies.base import discover_policies
from vla_rl.residual import ResidualSettings, train_residual

EXAMPLE = "vla-rl residual --policy runs/can/pretrain --data runs/can/demos --out runs/can/residual --env-steps 60000"
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, ResidualSettings):
    """Options of ``vla-rl residual``.

    policy: the base: a policy folder
    data: demonstrations that half of each batch comes from (none: learn from roll-outs alone)
    out: run folder, in the end with the best residual and the last one
    num_envs: environments in parallel
    """

    policy: str
    data: tuple[Path, ...] = ()
    out: Path
    num_envs: int = 8


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the residual."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Train; return what was done."""
    settings = settings_of(ResidualSettings, config)
    data = load_datasets(list(config.data)) if config.data else None
    task = config.task or (data.task if data is not None else spec_of(Path(config.policy)).task)
    arena = open_arena(open_task(task, config.simulation, config.max_episode_steps), config.num_envs)
    try:
        base = base_finder(arena)(config.policy)
        results = train_residual(
            data, base, config.out, settings, arena, lambda: own_team(arena, base, settings.residual)
        )
    finally:
        arena.env.close()
    print(
        f"{config.out}: success {results['base_selection_success']:.3f} -> {results['selection_success']:.3f} on "
        f"{results['selection_scenes']} selection scenes after {results['env_steps']} steps; evaluate on others with 'vla-rl eval'"
    )
    return results
