"""Measure how long a policy takes per chunk: every head and net, or one trained policy, at batch 1 and more."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vla_rl.cli.common import CommandConfig
from vla_rl.policies.base import ChunkPolicy, PolicyConfig, PolicySpec, discover_policies
from vla_rl.policies.checkpoint import load_policy
from vla_rl.runtime.config import decode, load_named, names_in
from vla_rl.types import ENVIRONMENT_STATE, STATE, ActionSpec, FeatureSpec, Observation

EXAMPLE = "vla-rl bench policy --batch-sizes [1,16]"
POSITIONALS = ("policy",)
WARM_UP_CALLS = 10


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench policy``.

    policy: a policy folder (none: fresh ones of every file in configs/policy)
    batch_sizes: observations at once
    calls: measured calls of each
    """

    policy: Path | None = None
    batch_sizes: tuple[int, ...] = (1, 16)
    calls: int = 200


def _fresh(name: str) -> ChunkPolicy:
    action = ActionSpec(tuple("abcdefg"), ("1",) * 7, (-1.0,) * 7, (1.0,) * 7, "delta", 20.0)
    spec = PolicySpec({STATE: FeatureSpec((11,)), ENVIRONMENT_STATE: FeatureSpec((12,))}, action, "bench")
    return decode(PolicyConfig, load_named("policy", name)).build(spec).eval()


def _measure(policy: ChunkPolicy, batch: int, calls: int) -> dict[str, float]:
    config = policy.config
    observation = Observation.from_features(
        {k: torch.zeros(batch, config.observation_steps, *v.shape) for k, v in policy.spec.observation_spec.items()}
    )
    noise_KBHA = torch.randn(policy.noise_count, batch, config.chunk_steps, policy.spec.action_spec.dim)
    for _ in range(WARM_UP_CALLS):
        policy.sample(observation, noise_KBHA)
    times_ms = []
    for _ in range(calls):
        started = time.perf_counter()
        policy.sample(observation, noise_KBHA)
        times_ms.append(1e3 * (time.perf_counter() - started))
    return {"p50_ms": float(np.percentile(times_ms, 50)), "p99_ms": float(np.percentile(times_ms, 99))}


def run(config: Config) -> dict[str, Any]:
    """Measure, print and return latencies."""
    discover_policies()
    policies = (
        {str(config.policy): load_policy(config.policy)}
        if config.policy
        else {n: _fresh(n) for n in names_in("policy")}
    )
    table = Table("policy", "parameters", "batch", "p50, ms", "p99, ms")
    results: dict[str, Any] = {}
    for name, policy in policies.items():
        count = sum(p.numel() for p in policy.parameters())
        for batch in config.batch_sizes:
            measured = _measure(policy, batch, config.calls)
            results.setdefault(name, {"parameters": count})[f"batch_{batch}"] = measured
            table.add_row(name, f"{count:,}", str(batch), f"{measured['p50_ms']:.2f}", f"{measured['p99_ms']:.2f}")
    Console().print(table)
    return results
