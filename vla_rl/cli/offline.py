"""Improve a policy from its own roll-outs in rounds: merge, judge, imitate with weights, policy gradient behind the OPE gate.

Killed at any time, the same command goes on with the part of the round it was in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_rl.cli.common import CommandConfig, Simulation, open_arena, open_task
from vla_rl.evaluate import Arena
from vla_rl.offline import OfflineSettings, train_offline
from vla_rl.policies.base import discover_policies
from vla_rl.policies.checkpoint import load_policy
from vla_rl.statistics import Proportion

EXAMPLE = "vla-rl offline --data runs/push_t/demos --policy runs/push_t/pretrain --out runs/push_t/offline --rounds 2"
GROUPS = {"ppo": "ppo", "kernel": "kernel"}
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig, OfflineSettings):
    """Options of ``vla-rl offline``.

    data: folder of the demonstrations, or a list of several
    policy: folder of the policy to begin with
    out: run folder, in the end with the policy in it
    task: name of the task (none: the one the policy was trained on)
    num_envs: environments in parallel (0: 4 in threads for robosuite, 16 in turn for other tasks)
    max_episode_steps: overrides the task's own limit
    simulation: how the task is simulated
    """

    data: list[Path]
    policy: Path
    out: Path
    task: str | None = None
    num_envs: int = 0
    max_episode_steps: int | None = None
    simulation: Simulation = field(default_factory=Simulation)


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the policy."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Run the rounds; return what was done."""
    settings = OfflineSettings(**{name: getattr(config, name) for name in OfflineSettings.__dataclass_fields__})

    def arena() -> Arena:
        name = config.task or load_policy(config.policy).spec.task
        return open_arena(open_task(name, config.simulation, config.max_episode_steps), config.num_envs)

    results = train_offline(config.data, config.policy, config.out, settings, arena)
    for done in results["rounds"]:
        gate = f"{done['accepted']} of {done['candidates']} updates kept"
        print(f"round {done['round']}: {done['merged_episodes']} episodes, {gate}")
        for name, shown in done.get("selection", {}).items():
            numbers = {k: v for k, v in shown.items() if k != "mean_length"}
            print(
                f"  {name} on selection scenes: success {Proportion(**numbers)}, mean length {shown['mean_length']:.1f}"
            )
    return results
