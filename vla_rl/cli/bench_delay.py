"""Success against latency, per method of execution, on the same scenes: a table and a figure.

The latency is simulated: a chunk is computed from what was seen when it was begun and handed over so many control steps later. Killed
at any time, the same command goes on.
"""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vla_rl.cli.common import TaskOptions, base_finder, open_arena_of
from vla_rl.evaluate import evaluate
from vla_rl.inference.checkpoint import load_agent
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.delayed import DelayedAgent, LatencyConfig
from vla_rl.inference.timeline import ExecutionConfig, Method
from vla_rl.policies.base import discover_policies
from vla_rl.policies.checkpoint import resolve_policy
from vla_rl.policies.path import GuidanceConfig
from vla_rl.report.figures import success_against_delay
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_text
from vla_rl.runtime.seeding import TEST_SCENES
from vla_rl.statistics import Proportion, as_dict, paired_difference

EXAMPLE = "vla-rl bench delay runs/push_t/pretrain --out runs/delay --json results/delay.json"
POSITIONALS = ("policy",)
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions):
    """Options of ``vla-rl bench delay``.

    policy: folder of a chunk policy, or of a selector on one
    out: folder of journals and of the figure
    methods: of execution; one that is nothing for this policy at some latency is left out there, and said
    delays_s: simulated latencies
    jitter_s: mean of what comes on top of each
    execute_steps: of a chunk before the next is begun (0: the policy's own)
    guidance: of method rtc
    episodes: scenes of each method and delay
    seed: seed of the first scene, the others follow
    policy_seed: seed of the policy's noise
    num_envs: environments in parallel (0: as many as suit the task)
    """

    policy: Path
    out: Path
    methods: tuple[Method, ...] = ("synchronous", "asynchronous", "ensemble", "rtc", "rtc_prefix")
    delays_s: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    jitter_s: float = 0.0
    execute_steps: int = 0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    episodes: int = 250
    seed: int = TEST_SCENES
    policy_seed: int = 0
    num_envs: int = 0

    def __post_init__(self) -> None:
        if self.episodes < 1 or not self.delays_s or min(self.delays_s) < 0:
            raise ValueError(f"episodes wants at least 1, delays_s numbers >= 0, got {self.episodes}, {self.delays_s}")
        ExecutionConfig(execute_steps=self.execute_steps)  # what they refuse is refused before anything runs
        for delay_s in self.delays_s:
            LatencyConfig(delay_s, self.jitter_s)


def run(config: Config) -> dict[str, Any]:
    """Evaluate every method at every delay, print and draw."""
    arena = open_arena_of(config, config.policy, config.num_envs)
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    try:
        agent = load_agent(config.policy, base_finder(arena))
        if not isinstance(agent, PolicyAgent):
            raise UserError(f"methods of execution are for chunk policies; {config.policy} holds a residual on one")
        digest = folder_digest(resolve_policy(config.policy))
        scenes = list(range(config.seed, config.seed + config.episodes))
        for method in config.methods:
            execution = ExecutionConfig(method, config.execute_steps, guidance=config.guidance)
            for delay_s in config.delays_s:
                delayed = DelayedAgent(agent, execution, LatencyConfig(delay_s, config.jitter_s))
                why = _refusal(delayed)
                if why:
                    refused.append({"method": method, "delay_s": delay_s, "why": why})
                    continue
                identity = [digest, arena.identity(), encode(execution), delay_s, config.jitter_s]
                identity += [config.episodes, config.seed, config.policy_seed]
                header = json_module.dumps({"evaluation": sha256_text(json_module.dumps(identity))})
                result = evaluate(
                    delayed,
                    arena,
                    scenes,
                    seed=config.policy_seed,
                    name=f"{method} {1000 * delay_s:.0f} ms",
                    journal=config.out / f"{method}_{1000 * delay_s:.0f}ms.journal",
                    header=header,
                )
                successes = [bool(scene["success"]) for scene in result["scenes"]]
                rows.append({"method": method, "delay_s": delay_s, "success": result["success"], "scenes": successes})
    finally:
        arena.env.close()
    if not rows:
        raise UserError(refused[0]["why"])
    _compare(rows)
    _print(rows)
    for one in refused:
        print(f"not measured: {one['method']} at {1000 * one['delay_s']:.0f} ms: {one['why']}")
    success_against_delay(rows, config.out / "success_against_delay.png")
    return {"task": arena.task, "policy_digest": digest, "episodes": config.episodes, "rows": rows, "refused": refused}


def _refusal(delayed: DelayedAgent) -> str:
    """Why a method is nothing for this policy at this latency."""
    try:
        delayed.controller(1, 0)
    except UserError as error:
        return str(error)
    return ""


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add, to each row, its difference from the same method at the smallest delay."""
    for row in rows:
        first = min((r for r in rows if r["method"] == row["method"]), key=lambda r: float(r["delay_s"]))
        if first is not row:
            row["against_smallest_delay"] = as_dict(paired_difference(first["scenes"], row["scenes"]))


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "delay, ms", "success", "against the smallest delay, points")
    for row in rows:
        difference = row.get("against_smallest_delay")
        shown = (
            f"{100 * difference['difference']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
            if difference
            else ""
        )
        table.add_row(row["method"], f"{1000 * row['delay_s']:.0f}", str(Proportion(**row["success"])), shown)
    Console().print(table)
