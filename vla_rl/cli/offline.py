"""Improve a policy from its own roll-outs in rounds: merge, judge, imitate with weights, policy gradient behind the OPE gate.

Killed at any time, the same command goes on with the part of the round it was in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.cli.common import TaskOptions, open_arena_of, settings_of
from vla_rl.evaluate import Arena
from vla_rl.offline import OfflineSettings, train_offline
from vla_rl.policies.base import discover_policies
from vla_rl.statistics import Proportion

EXAMPLE = "vla-rl offline --data runs/push_t/demos --policy runs/push_t/pretrain --out runs/push_t/offline --rounds 2"
GROUPS = {"ppo": "ppo", "kernel": "kernel"}
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, OfflineSettings):
    """Options of ``vla-rl offline``.

    data: folder of the demonstrations, or a list of several
    policy: folder of the policy to begin with
    out: run folder, in the end with the policy in it
    num_envs: environments in parallel (0: 4 in threads for robosuite, 16 in turn for other tasks)
    """

    data: list[Path]
    policy: Path
    out: Path
    num_envs: int = 0


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the policy."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Run the rounds; return what was done."""
    settings = settings_of(OfflineSettings, config)

    def arena() -> Arena:
        return open_arena_of(config, config.policy, config.num_envs)

    results = train_offline(config.data, config.policy, config.out, settings, arena)
    for done in results["rounds"]:
        gate = (
            f"{done['updates_kept']} of {done['candidates']} updates kept" if done["candidates"] else "imitation alone"
        )
        print(f"round {done['round']}: {done['merged_episodes']} episodes, {gate}")
        for name, shown in done.get("selection", {}).items():
            numbers = {k: v for k, v in shown.items() if k != "mean_length"}
            print(
                f"  {name} on selection scenes: success {Proportion(**numbers)}, mean length {shown['mean_length']:.1f}"
            )
    return results
