"""Distil a diffusion or flow policy into a student that needs one net call per chunk; it is kept if it bounds what it loses.

Killed at any time, the same command goes on. The teacher's files are only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.cli.common import TaskOptions, open_arena_of, settings_of
from vla_rl.distill import DistillSettings, distill
from vla_rl.policies.base import discover_policies

EXAMPLE = "vla-rl distill --teacher runs/can/pretrain --data runs/can/demos --out runs/can/student"
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, DistillSettings):
    """Options of ``vla-rl distill``.

    teacher: folder of the policy that teaches
    data: folder of the demonstrations, or a list of several
    out: run folder, in the end with student and policy in it
    num_envs: environments in parallel (0: 4 in threads for robosuite, 16 in turn for other tasks)
    """

    teacher: Path
    data: list[Path]
    out: Path
    num_envs: int = 0


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the student."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Train and compare; return what was done."""
    settings = settings_of(DistillSettings, config)
    results = distill(
        config.teacher,
        config.data,
        config.out,
        settings,
        lambda: open_arena_of(config, config.teacher, config.num_envs),
    )
    if "paired" in results:
        paired = results["paired"]
        verdict = "kept" if results["kept"] else "not kept: policy is the teacher"
        print(
            f"{config.out}: teacher {results['teacher']['rate']:.3f}, student {results['student']['rate']:.3f} of "
            f"{paired['n']} selection scenes, difference {100 * paired['difference']:+.1f} points (95 % "
            f"{100 * paired['low']:+.1f} to {100 * paired['high']:+.1f}): {verdict}"
        )
    return results
