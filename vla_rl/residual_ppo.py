"""Residual PPO as a stage: orders of noisy episodes, an update after each, the best on selection scenes kept. A baseline.

The same base, residual, actors and scenes as the residual stage; what differs is the algorithm, and that episodes are never used twice.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vla_rl.actors import Team
from vla_rl.algos.residual_ppo import ResidualPPO, ResidualPPOConfig
from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import Source, StepContext, StepEpisode
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.checkpoint import save_residual
from vla_rl.inference.residual_controller import NoiseConfig, ResidualAgent
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.residual_checks import judge, keep_base
from vla_rl.residual_runs import Progress, load_training, make_order, save_training
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.files import exclusive, write_json
from vla_rl.runtime.metrics import MetricsLog
from vla_rl.runtime.seeding import derive_seed, initial_weights, torch_generator
from vla_rl.statistics import as_dict, paired_difference


@dataclass(frozen=True)
class ResidualPPOSettings:
    """Everything that determines the weights, beside base and task.

    env_steps: budget of control steps
    seed: of all draws
    order_episodes: episodes between two updates
    selection_scenes: on which the best is chosen
    select_every: environment steps between evaluations
    residual: nets and limits; PPO has no critic of actions, so that the gate is off whatever it says
    ppo: updates
    """

    env_steps: int = 100_000
    seed: int = 0
    order_episodes: int = 16
    selection_scenes: int = 100
    select_every: int = 10_000
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    ppo: ResidualPPOConfig = field(default_factory=ResidualPPOConfig)

    def __post_init__(self) -> None:
        if min(self.env_steps, self.order_episodes, self.selection_scenes, self.select_every) < 1:
            raise ValueError("env_steps, order_episodes, selection_scenes and select_every want at least 1")

    @property
    def ungated(self) -> ResidualConfig:
        """Nets and limits as they are used."""
        return replace(self.residual, gate=False)


def train_residual_ppo(
    base: BaseSource, out: Path, settings: ResidualPPOSettings, arena: Arena, make_team: Callable[[], Team]
) -> dict[str, Any]:
    """Run the stage: leave the best residual in ``out/policy``; return what was done. Raises as ``train_residual``."""
    arena = arena.through(base.policy)
    arena.require_fit(base.spec.policy, base.reference)
    with exclusive(out):
        claim_folder(out, {**encode(settings), "policy": base.digest, **arena.identity()})
        beside, team = keep_base(base, out), make_team()
        try:
            return _run(base, beside, out, settings, arena, team)
        finally:
            team.close()


def _run(
    base: BaseSource, beside: BaseSource, out: Path, settings: ResidualPPOSettings, arena: Arena, team: Team
) -> dict[str, Any]:
    spec, progress = base.spec.policy, Progress()
    with initial_weights(derive_seed(settings.seed, "residual weights")):
        encoder = StepEncoder(spec.observation_spec, spec.action_spec, base.spec.execute_steps)
        algorithm = ResidualPPO(ResidualPolicy(settings.ungated, encoder), settings.ppo)
    best = algorithm.state_dict()
    found = load_training(out)
    if found is not None:
        now, best, progress = found
        algorithm.load_state_dict(now)
    log = MetricsLog(out, progress.env_steps)
    bar = tqdm(
        total=settings.env_steps,
        initial=progress.env_steps,
        desc=f"residual PPO {arena.task}",
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 30,
    )

    def collect(source: Source) -> list[StepEpisode]:
        noise = NoiseConfig(std=settings.ppo.std, correlation=0.0)
        order = make_order(progress.orders, source, settings.order_episodes, settings.seed, noise)
        team.submit(order, algorithm.policy)
        episodes = team.result()
        progress.orders += 1
        progress.episodes += len(episodes)
        progress.env_steps += sum(steps.length for steps in episodes)
        bar.update(sum(steps.length for steps in episodes))
        return episodes

    def select() -> tuple[bool, ...]:
        agent = ResidualAgent(base, copy.deepcopy(algorithm.policy))
        judged = judge(agent, arena, settings.selection_scenes, settings.seed, team.collect)
        progress.selected_at = progress.env_steps
        progress.selection_env_steps += judged.env_steps
        return judged.successes

    def checkpoint() -> None:
        save_training(out, algorithm.state_dict(), best, progress)

    if not progress.base_successes:
        seen = collect("base")
        action_BA = torch.from_numpy(np.concatenate([steps.episode.action_TA for steps in seen]))
        algorithm.policy.encoder.fit(StepContext.cat([_context(steps) for steps in seen]), action_BA)
        progress.base_successes = progress.best_successes = select()
        best = algorithm.state_dict()
        log.write(
            progress.env_steps, {"selection/success": progress.best_success, "selection/best": progress.best_success}
        )
        checkpoint()
    while progress.env_steps < settings.env_steps and progress.best_success < 1:
        episodes = collect("policy")
        metrics = algorithm.update(episodes, torch_generator(settings.seed, "learn", progress.orders))
        if (
            progress.env_steps - progress.selected_at < settings.select_every
            and progress.env_steps < settings.env_steps
        ):
            continue
        successes = select()
        if sum(successes) >= sum(progress.best_successes):
            best = algorithm.state_dict()
            progress.best_successes, progress.best_at = successes, progress.env_steps
        metrics |= {"selection/success": sum(successes) / len(successes), "selection/best": progress.best_success}
        metrics["rollout/success"] = sum(steps.episode.success for steps in episodes) / len(episodes)
        log.write(progress.env_steps, metrics)
        checkpoint()
    bar.close()
    log.close()
    shutil.rmtree(out / "policy", ignore_errors=True)
    algorithm.load_state_dict(best)
    save_residual(algorithm.policy, beside, out / "policy", {"env_steps": progress.best_at, "seed": settings.seed})
    results = {
        "env_steps": progress.env_steps,
        "episodes": progress.episodes,
        "selection_env_steps": progress.selection_env_steps,
        "selection_success": progress.best_success,
        "selection_scenes": settings.selection_scenes,
        "base_selection_success": sum(progress.base_successes) / len(progress.base_successes),
        "against_base": as_dict(paired_difference(progress.base_successes, progress.best_successes)),
        "best_env_steps": progress.best_at,
    }
    write_json(out / "results.json", results)
    return results


def _context(steps: StepEpisode) -> StepContext:
    """What was seen when something was executed."""
    features = {k: torch.from_numpy(v[:-1]) for k, v in steps.episode.observations.items()}
    return StepContext(features, torch.from_numpy(steps.base_TA[:-1]), torch.from_numpy(steps.phase_T[:-1]).long())
