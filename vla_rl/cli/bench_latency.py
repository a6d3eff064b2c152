"""Measure how long a policy takes per chunk: as it is, compiled or by onnxruntime; alone, or picking among N candidates by each selector.

Without a policy: fresh ones of every file in configs/policy, alone.
"""

from __future__ import annotations

import gc
import tempfile
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vla_rl.algos.iql import IQLConfig, blank_critic
from vla_rl.algos.progress_head import ProgressHead
from vla_rl.algos.pseudo_count.base import CountConfig, discover_counts
from vla_rl.algos.pseudo_count.leverage import LeverageConfig
from vla_rl.cli.common import CommandConfig
from vla_rl.inference.onnx_export import KIND, SOURCE, OnnxPolicy, export_onnx
from vla_rl.inference.rules import SelectorConfig
from vla_rl.inference.selector_checkpoint import Selector
from vla_rl.inference.selectors import FeatureKind, PlainSampler, Sampler
from vla_rl.policies.base import ChunkPolicy, PolicyConfig, discover_policies
from vla_rl.policies.checkpoint import load_policy, resolve_policy, save_policy
from vla_rl.policies.records import Generated, PolicySpec, Prefix
from vla_rl.policies.student import StudentConfig
from vla_rl.runtime.checkpoints import verify_folder
from vla_rl.runtime.config import decode, load_named, names_in
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import torch_generator
from vla_rl.types import ENVIRONMENT_STATE, STATE, ActionSpec, FeatureSpec, Observation

EXAMPLE = "vla-rl bench latency runs/can/pretrain runs/can/student/student --json latency.json"
POSITIONALS = ("policies*",)
WARM_UP_CALLS = 20
FITTED_ROWS = 4096  # features that the pseudo-counts are fitted on; how long they take hangs on their number only
Backend = Literal["eager", "compiled", "onnx"]
_OF_POLICIES = ("candidates", "backends", "selectors", "features")  # options that fresh ones have no use for
Choice = Literal["first", "q", "leverage", "coin_flipping", "nearest", "constrained", "consensus"]


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench latency``.

    policies: policy folders, say a teacher and its student (none: fresh ones of every file in configs/policy)
    candidates: N, how many each selector picks from
    backends: eager, compiled (torch.compile; takes a compiler, and a minute per row), onnx
    selectors: first (no choice), q (an IQL critic), leverage, coin_flipping, nearest (TACO), constrained (leverage, progress), consensus
    features: that pseudo-counts are asked about: clean (one more pass) or last
    device: cpu or cuda; onnx runs on the CPU where its build has nothing else
    calls: measured calls of each row
    """

    policies: tuple[Path, ...] = ()
    candidates: tuple[int, ...] = (1, 8, 32, 64)
    backends: tuple[Backend, ...] = ("eager", "onnx")
    selectors: tuple[Choice, ...] = typing.get_args(Choice)
    features: FeatureKind = "clean"
    device: Literal["cpu", "cuda"] = "cpu"
    calls: int = 500

    def __post_init__(self) -> None:
        if not self.candidates or min(self.candidates) < 1 or self.calls < 1:
            raise ValueError(f"candidates and calls want at least 1, got {self.candidates} and {self.calls}")
        given = [f.name for f in fields(self) if f.name in _OF_POLICIES and getattr(self, f.name) != f.default]
        if given and not self.policies:
            raise ValueError(f"{', '.join(given)}: for policies that are named; fresh ones draw one sample each, eager")


def run(config: Config) -> dict[str, Any]:
    """Measure, print and return latencies."""
    discover_policies()
    discover_counts()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda wants a GPU, and torch finds none here")
    table = Table("policy", "parameters", "backend", "selector", "N", "p50, ms", "p99, ms", "max, ms")
    rows: list[dict[str, Any]] = []
    policies = [(str(p), _load(p)) for p in config.policies] or [(n, _fresh(n)) for n in names_in("policy")]
    refused: list[dict[str, str]] = []
    for name, policy in policies:
        policy.to(torch.device(config.device))
        selectors = config.selectors if config.policies else ("first",)
        for backend in config.backends if config.policies else ("eager",):
            try:
                samplers = _samplers(policy, backend, selectors, config)
            except UserError as why:  # torch cannot write every policy as a graph
                refused.append({"policy": name, "backend": backend, "why": str(why)})
                continue
            for label, count, sampler in samplers:
                row = {"policy": name, "backend": backend, "selector": label, "candidates": count}
                row["parameters"] = sum(p.numel() for p in policy.parameters())
                row |= {"device": config.device, **_measure(policy, sampler, config.calls)}
                rows.append(row)
                shown = [f"{row[k]:.3f}" for k in ("p50_ms", "p99_ms", "max_ms")]
                table.add_row(name, f"{row['parameters']:,}", backend, label, str(count), *shown)
    if not rows:
        raise UserError(refused[0]["why"])
    Console().print(table)
    for one in refused:
        print(f"not measured: {one['policy']}, {one['backend']}: {one['why']}")
    return {"rows": rows, "refused": refused, "calls": config.calls, "threads": torch.get_num_threads()}


def _load(path: Path) -> ChunkPolicy:
    """A policy folder, or the policy in a folder of an ONNX graph (whose graph is made anew)."""
    folder = resolve_policy(path)
    return load_policy(folder / SOURCE if verify_folder(folder).get("kind") == KIND else folder)


def _fresh(name: str) -> ChunkPolicy:
    action = ActionSpec(tuple("abcdefg"), ("1",) * 7, (-1.0,) * 7, (1.0,) * 7, "delta", 20.0)
    spec = PolicySpec({STATE: FeatureSpec((11,)), ENVIRONMENT_STATE: FeatureSpec((12,))}, action, "bench")
    return decode(PolicyConfig, load_named("policy", name)).build(spec).eval()


def _samplers(
    policy: ChunkPolicy, backend: str, selectors: tuple[str, ...], config: Config
) -> list[tuple[str, int, Sampler]]:
    """Every row to measure: what draws, and how many it picks from."""
    found: list[tuple[str, int, Sampler]] = []
    variants = [("", policy)]
    if isinstance(policy.config, StudentConfig) and policy.config.told_jumps:
        most = min(3, len(policy.config.levels) - 1)
        variants = [(f", {steps} steps", _with_steps(policy, steps)) for steps in range(1, most + 1)]
    for suffix, variant in variants:
        plain = _Backed(variant, backend)
        for label in selectors:
            if label == "first":
                found.append((f"first{suffix}", 1, plain))
                continue
            for count in config.candidates:
                sampler = _selector(label, count, variant, config.features).sampler(variant)
                sampler.generate = plain.generate
                found.append((label + suffix, count, sampler))
    return found


def _with_steps(policy: ChunkPolicy, steps: int) -> ChunkPolicy:
    other = replace(policy.config, sample_steps=steps).build(policy.spec)  # type: ignore[call-arg]
    other.load_state_dict(policy.state_dict())
    return other.eval().to(next(policy.parameters()).device)


class _Backed(PlainSampler):
    """A policy whose chunks are generated by a backend."""

    def __init__(self, policy: ChunkPolicy, backend: str) -> None:
        super().__init__(policy)
        self.generate: Callable[[Tensor, Tensor, Prefix | None], Generated] = policy.generate
        if backend == "compiled":
            self.generate = torch.compile(policy.generate)
        elif backend == "onnx":
            with tempfile.TemporaryDirectory() as folder:
                save_policy(policy, Path(folder) / "saved", {})
                export_onnx(Path(folder) / "saved", Path(folder) / "graph")
                self.generate = OnnxPolicy(Path(folder) / "graph").generate

    def __call__(self, observation: Observation, noise_KBHA: Tensor, prefix: Prefix | None = None) -> Any:
        policy = self.policy
        with torch.no_grad():
            made = self.generate(policy.condition(observation), noise_KBHA, None)
            return policy.unnormalize_action(made.action_BHA, observation)


def _selector(label: str, count: int, policy: ChunkPolicy, features: FeatureKind) -> Selector:
    """A selector fitted on random features: as fast as any."""
    width = policy.net.feature_dim
    features_NF = torch.randn(FITTED_ROWS, width, generator=torch_generator(0, "bench features"))
    if label == "consensus":
        return Selector(SelectorConfig("consensus", "last", count))
    if label == "q":
        return Selector(SelectorConfig("q", "last", count), critic=blank_critic(IQLConfig(), policy))
    kind = "leverage" if label == "constrained" else label
    options = {"epochs": 1} if kind == "coin_flipping" else {}
    estimator = CountConfig.get_choice_class(kind)(**options).build(width)
    estimator.fit(features_NF)
    if label != "constrained":
        return Selector(SelectorConfig("taco", features, count), estimator)
    progress = ProgressHead(width, LeverageConfig())
    progress.fit(features_NF, torch.rand(FITTED_ROWS, generator=torch_generator(0, "bench progress")))
    return Selector(SelectorConfig("constrained", features, count), estimator, (0.0,) * 101, progress)


def _measure(policy: ChunkPolicy, sampler: Sampler, calls: int) -> dict[str, float]:
    """Latency of one observation's chunk; the garbage collector rests meanwhile, as it does in the control loop."""
    device = next(policy.parameters()).device
    features = policy.spec.observation_spec.items()
    observation = Observation.from_features(
        {k: torch.zeros(1, policy.config.observation_steps, *v.shape, device=device) for k, v in features}
    )
    noise_KBHA = torch.randn(sampler.noise_count, 1, *policy.chunk_shape, device=device)

    def call() -> None:
        sampler(observation, noise_KBHA)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP_CALLS):
        call()
    times_ms = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(calls):
            started = time.perf_counter()
            call()
            times_ms.append(1e3 * (time.perf_counter() - started))
    finally:
        gc.enable()
    p50, p99 = np.percentile(times_ms, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": max(times_ms)}
