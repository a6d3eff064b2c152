"""Measure reinforcement learning: PPO updates/s, roll-out steps/s, and the share of time that each part of the online stage takes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sim.task import TaskConfig
from vla_rl.algos.ppo import PPOConfig
from vla_rl.algos.ppo_online import OnlinePPO, OnlinePPOConfig
from vla_rl.algos.value import ValueConfig
from vla_rl.bench_residual import ResidualBenchSettings, bench_residual
from vla_rl.cli.common import TaskOptions, base_finder, open_arena_of
from vla_rl.evaluate import evaluate
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.experience import collect
from vla_rl.kernels import KernelConfig
from vla_rl.policies.base import discover_policies
from vla_rl.policies.checkpoint import load_policy
from vla_rl.runtime.config import decode
from vla_rl.runtime.seeding import SELECTION_SCENES, numpy_generator, torch_generator

EXAMPLE = "vla-rl bench train --policy runs/push_t/pretrain --json results/bench_train_push_t.json"
GROUPS = {"ppo": "ppo", "kernel": "kernel"}
prepare = discover_policies
SCENES = 50


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions):
    """Options of ``vla-rl bench train``.

    policy: folder of the policy that is trained
    num_envs: environments in parallel
    decisions: per environment and iteration
    iterations: measured, after one that is not
    seed: of all draws
    kernel: the chain's noise
    ppo: the surrogate
    residual_bench: what is measured of the residual stage
    """

    policy: Path
    num_envs: int = 64
    decisions: int = 50
    iterations: int = 5
    seed: int = 0
    kernel: KernelConfig = field(default_factory=KernelConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    residual_bench: ResidualBenchSettings = field(default_factory=ResidualBenchSettings)

    def __post_init__(self) -> None:
        if min(self.num_envs, self.decisions, self.iterations) < 1:
            raise ValueError("num_envs, decisions and iterations want at least 1")
        if self.ppo.imitation_weight:
            raise ValueError("ppo.imitation_weight is the offline stage's: there are no demonstrations online")


def run(config: Config) -> dict[str, Any]:
    """Time the parts of a few iterations; nothing is kept of the policy."""
    policy = load_policy(config.policy)
    arena = open_arena_of(config, config.policy, config.num_envs)
    try:
        results = _run(config, policy, arena)
    finally:
        arena.env.close()
    arena = open_arena_of(config, config.policy, decode(TaskConfig, arena.recipe).batch)
    try:
        residual = bench_residual(base_finder(arena)(str(config.policy)), arena, config.residual_bench)
    finally:
        arena.env.close()
    shares = ", ".join(f"{k} {100 * v:.0f} %" for k, v in residual["share_at_one_update_per_step"].items())
    hours = [residual[f"steps_per_hour_in_{n}"] for n in ("one_process", "two_processes")]
    print(
        f"{arena.task}: residual, {sum(residual['ms_per_update'].values()):.1f} ms an update; at one update per step {shares}, "
        f"{hours[0]:.0f} steps an hour in one process, {hours[1]:.0f} in two; two are in balance at "
        f"{residual['updates_per_step_where_two_processes_are_in_balance']:.2f} updates per step"
    )
    return {**results, "residual": residual}


def _run(config: Config, policy: Any, arena: Any) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    kernel = policy.make_kernel(config.kernel)
    algorithm = OnlinePPO(policy, kernel, OnlinePPOConfig(warmup_iterations=0), config.ppo, ValueConfig())
    spent: dict[str, float] = defaultdict(float)
    steps = gradient_steps = pairs = decisions = 0

    arena.env.step = _timing_steps(arena.env.step, spent)
    for number in range(config.iterations + 1):
        if number == 1:  # the first one warms up
            spent.clear()
            steps = gradient_steps = pairs = decisions = 0
        generator = torch_generator(config.seed, "bench", number)
        rng = numpy_generator(config.seed, "bench scenes", number)
        with _timed(spent, "roll out"):
            experience = collect(
                arena.env,
                arena.action_spec,
                arena.instruction,
                policy,
                kernel,
                config.decisions,
                functools.partial(_scene, rng),
                generator,
            )
        with _timed(spent, "update"):
            reward_TN = experience.decision_reward(algorithm.config.discount)
            metrics = algorithm.update(experience, reward_TN, generator)
        steps += experience.env_steps
        decisions += int(experience.executed_TNH.any(-1).sum())
        gradient_steps += int(metrics.get("ppo/gradient_steps", 0))
        of_sample = min(config.ppo.pairs or len(kernel.trained), len(kernel.trained))
        pairs += int(metrics.get("ppo/epochs", 0)) * len(experience.chain.chunk) * of_sample
    del arena.env.step
    scenes = list(range(SELECTION_SCENES, SELECTION_SCENES + SCENES))
    with _timed(spent, "select"):
        selected = evaluate(PolicyAgent(policy), arena, scenes, seed=0, name="the policy", bar=False)
    inside = spent.pop("simulation")
    parts = {
        "simulation": inside,
        "policy and recording": spent["roll out"] - inside,
        "update": spent["update"],
    }
    whole = sum(parts.values())
    results = {
        "task": arena.task,
        "num_envs": config.num_envs,
        "denoising_steps": kernel.steps,
        "rollout_env_steps_per_s": steps / spent["roll out"],
        "training_env_steps_per_s": steps / whole,
        "decisions_per_s": decisions / spent["roll out"],
        "ppo_gradient_steps_per_s": gradient_steps / spent["update"],
        "ppo_pairs_per_s": pairs / spent["update"],
        "selection_env_steps_per_s": selected["env_steps"] / spent["select"],
        "share": {name: seconds / whole for name, seconds in parts.items()},
    }
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in results["share"].items())
    print(
        f"{arena.task}: roll-outs {results['rollout_env_steps_per_s']:.0f} steps/s, PPO {results['ppo_gradient_steps_per_s']:.1f} "
        f"gradient steps/s, {results['ppo_pairs_per_s']:.0f} pairs/s; an iteration is {shares}"
    )
    return results


def _scene(rng: np.random.Generator) -> int:
    return int(rng.integers(0, SELECTION_SCENES))


@contextlib.contextmanager
def _timed(spent: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[part] += time.perf_counter() - started


def _timing_steps(step: Callable[[np.ndarray], Any], spent: dict[str, float]) -> Callable[[np.ndarray], Any]:
    def timed(actions: np.ndarray) -> Any:
        started = time.perf_counter()
        outcome = step(actions)
        spent["simulation"] += time.perf_counter() - started
        return outcome

    return timed
