"""Train the generative policy on the successes of its residual, so that it goes on alone; kept only if a paired test says so.

Killed at any time, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.cli.common import TaskOptions, base_finder, open_arena_of, settings_of
from vla_rl.distill_back import DistillBackSettings, distill_back
from vla_rl.inference.checkpoint import load_agent
from vla_rl.policies.base import discover_policies

EXAMPLE = "vla-rl distill back --residual runs/can/residual --data runs/can/demos --out runs/can/distilled"
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, DistillBackSettings):
    """Options of ``vla-rl distill back``.

    residual: folder of the residual
    data: data sets that are merged with the roll-outs (none: roll-outs alone)
    out: run folder, in the end with the better of base and new policy
    num_envs: environments in parallel
    """

    residual: Path
    data: tuple[Path, ...] = ()
    out: Path
    num_envs: int = 16


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the policy."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Roll out, imitate, test; return what was done."""
    settings = settings_of(DistillBackSettings, config)
    arena = open_arena_of(config, config.residual, config.num_envs)
    try:
        agent = load_agent(config.residual, base_finder(arena))
        results = distill_back(config.residual, agent, list(config.data), config.out, settings, arena)
    finally:
        arena.env.close()
    verdict = "takes the base's place" if results["kept"] else "is not surely better, so that the base stays"
    print(
        f"{config.out}: base {results['base']['rate']:.3f}, composed {results['composed']['rate']:.3f}, distilled "
        f"{results['new']['rate']:.3f} of {results['new']['n']} selection scenes: it {verdict}"
    )
    return results
