"""Run a control loop at a fixed rate with the policy in a thread beside it, and count the deadlines it misses.

The robot is simulated by its last observation; what is measured is whether inference ever holds the loop up.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from vla_rl.cli.common import CommandConfig, RobotExecutionConfig
from vla_rl.inference.base_policy import BasePolicy, BaseSpec, OwnBase
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.checkpoint import load_agent
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.delayed import execution_sampler
from vla_rl.inference.worker import RealTimeController
from vla_rl.policies.base import discover_policies
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import SPIN_S, Pace, fixed_priority, without_pauses

EXAMPLE = "vla-rl bench loop runs/can/student --hz 100 --seconds 600 --json results/loop.json"
POSITIONALS = ("policy",)
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench loop``.

    policy: folder of a chunk policy, or of a selector or graph of one
    hz: control steps per second, whatever rate the policy was trained for
    seconds: how long
    late_s: lateness from which a deadline counts as missed
    spin_s: look at the clock instead of sleeping for so long before a deadline
    priority: 2 to 99: the loop's thread runs before all that has no such priority (Linux, SCHED_FIFO; 0: as any other)
    execution: how chunks become actions
    """

    policy: Path
    hz: float = 100.0
    seconds: float = 600.0
    late_s: float = 0.002
    spin_s: float = SPIN_S
    priority: int = 0
    execution: RobotExecutionConfig = field(default_factory=RobotExecutionConfig)

    def __post_init__(self) -> None:
        if not all(0 < x < math.inf for x in (self.hz, self.seconds, self.late_s)):
            raise ValueError(
                f"hz, seconds and late_s want positive numbers, got {self.hz}, {self.seconds}, {self.late_s}"
            )
        Pace(self.hz, self.spin_s)
        if self.priority and not 2 <= self.priority <= 99:  # the thread that computes has one less
            raise ValueError(f"priority wants 2 to 99, or 0 for none, got {self.priority}")


class _AtRate:
    """A base whose control rate is another one than it was trained for."""

    def __init__(self, base: BasePolicy, hz: float) -> None:
        policy = base.spec.policy
        self.spec: BaseSpec = replace(
            base.spec, policy=replace(policy, action_spec=replace(policy.action_spec, control_hz=hz))
        )
        self.reset, self.chunk = base.reset, base.chunk


def run(config: Config) -> dict[str, Any]:
    """Run the loop; return lateness and what the robot did."""
    agent = load_agent(config.policy, no_base_finder)
    if not isinstance(agent, PolicyAgent):
        raise UserError(f"the loop runs chunk policies and selectors on them; {config.policy} holds a residual on one")
    sampler = execution_sampler(agent.policy, config.execution, agent.sampler)
    base = _AtRate(OwnBase(agent.policy, 1, 0, sampler), config.hz)
    rng = np.random.default_rng(0)
    features = {k: rng.normal(size=f.shape).astype(np.float32) for k, f in base.spec.policy.observation_spec.items()}
    steps = round(config.hz * config.seconds)
    late_N, took_N = np.zeros(steps), np.zeros(steps)
    print(f"the loop runs for {config.seconds:g} s; leave the machine alone meanwhile", flush=True)
    stolen = stolen_s()
    pace = Pace(config.hz, config.spin_s)
    with (
        fixed_priority(config.priority),  # first: where it is refused, no thread has begun
        RealTimeController(base, config.execution, priority=config.priority and config.priority - 1) as controller,
    ):
        controller.warm_up(features)
        controller.reset(0)
        with without_pauses():
            for step in range(steps):  # without a bar: a terminal that blocks would hold the loop up
                late_N[step] = pace.wait()
                woke = time.monotonic()
                controller.act(features)
                took_N[step] = time.monotonic() - woke
        tally, latency_ms = controller.tally, 1e3 * np.asarray(controller.latencies_s)
    results = {
        "hz": config.hz,
        "steps": steps,
        "missed_deadlines": int((late_N > config.late_s).sum()) + pace.skipped,
        "late_s": config.late_s,
        "spin_s": config.spin_s,
        "priority": config.priority,
        **_percentiles("lateness", 1e3 * late_N),
        **_percentiles("act", 1e3 * took_N),
        **_percentiles("answer", 1e3 * (late_N + took_N)),
        **_percentiles("inference", latency_ms),
        "chunks": tally.chunks,
        "held": tally.held,
        "late_actions": tally.late,
        "wasted_chunks": tally.wasted,
        "failures": controller.failures,
        "stolen_s": round(stolen_s() - stolen, 2),
    }
    table = Table("", "p50, ms", "p99, ms", "max, ms")
    for name in ("lateness", "act", "answer", "inference"):
        shown = [results[f"{name}_{p}_ms"] for p in ("p50", "p99", "max")]
        table.add_row(name, *("none" if x is None else f"{x:.3f}" for x in shown))
    Console().print(table)
    print(
        f"{results['missed_deadlines']} of {steps} deadlines missed by more than {1e3 * config.late_s:g} ms; {tally.chunks} chunks, "
        f"{tally.held} steps without an action, {tally.late} actions dropped, {tally.wasted} chunks late as a whole"
    )
    if results["stolen_s"]:
        print(f"meanwhile this machine, a virtual one, did not run for {results['stolen_s']:g} s of processor time")
    return results


def stolen_s() -> float:
    """Processor time that other virtual machines had while this one wanted it, where the system knows (Linux)."""
    return getattr(psutil.cpu_times(), "steal", 0.0)


def no_base_finder(reference: str) -> BaseSource:
    """For commands that take no residual."""
    raise UserError(f"a residual on {reference} acts step by step; this command is for policies that act in chunks")


def _percentiles(name: str, values_N: np.ndarray) -> dict[str, float | None]:
    if not len(values_N):
        return {f"{name}_{p}_ms": None for p in ("p50", "p99", "max")}
    p50, p99 = np.percentile(values_N, [50, 99])
    return {f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99), f"{name}_max_ms": float(values_N.max())}
