"""Fit what picks among a policy's candidates at test time (TACO pseudo-counts, Q, or both), and see on selection scenes whether it helps.

The policy is not changed. Killed at any time, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.algos.pseudo_count.base import discover_counts
from vla_rl.cli.common import TaskOptions, open_arena_of, settings_of
from vla_rl.policies.base import discover_policies
from vla_rl.taco import TacoSettings, fit_selector

EXAMPLE = "vla-rl taco --policy runs/can/pretrain --data runs/can/demos --out runs/can/taco --select.candidates 32"


def prepare() -> None:
    """Register what options can choose."""
    discover_policies()
    discover_counts()


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, TacoSettings):
    """Options of ``vla-rl taco``.

    policy: folder of a chunk policy
    data: folder of what it was trained on, or a list of several
    critic: folder of a critic that the offline stage trained, for rules that ask for Q
    out: run folder, in the end with selector and policy in it
    num_envs: environments in parallel (0: 4 in threads for robosuite, 16 in turn for other tasks)
    """

    policy: Path
    data: list[Path]
    critic: Path | None = None
    out: Path
    num_envs: int = 0


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the selector."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Fit and compare; return what was done."""
    results = fit_selector(
        config.policy,
        config.data,
        config.out,
        settings_of(TacoSettings, config),
        lambda: open_arena_of(config, config.policy, config.num_envs),
        config.critic,
    )
    if "paired" in results:
        paired = results["paired"]
        print(
            f"{config.out}: first sample {results['first']['rate']:.3f}, selected {results['selected']['rate']:.3f} of "
            f"{paired['n']} selection scenes, difference {100 * paired['difference']:+.1f} points (95 % "
            f"{100 * paired['low']:+.1f} to {100 * paired['high']:+.1f}): "
            f"{'kept' if results['kept'] else 'not kept: policy is the policy alone'}"
        )
    return results
