"""How much of a policy's success hangs on its noise, and how much of that a selector gets: noise seeds, oracle and regret.

The same scenes are run with several seeds of the noise. The oracle picks the best seed of each scene after the fact. Killed at any
time, the same command goes on.
"""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vla_rl.cli.common import TaskOptions, open_arena_of
from vla_rl.evaluate import Arena, evaluate
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.selector_checkpoint import KIND, load_selector
from vla_rl.policies.base import discover_policies
from vla_rl.policies.checkpoint import resolve_policy
from vla_rl.runtime.checkpoints import folder_digest, verify_folder
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_text
from vla_rl.runtime.seeding import TEST_SCENES
from vla_rl.statistics import as_dict, paired_difference, proportion

EXAMPLE = (
    "vla-rl bench selection runs/can/taco/selector --noise-seeds 8 --out runs/selection --json results/selection.json"
)
POSITIONALS = ("selector",)
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions):
    """Options of ``vla-rl bench selection``.

    selector: folder of a selector
    out: folder of journals
    noise_seeds: of the policy alone, each on all scenes
    selected_seeds: of the selector
    episodes: scenes
    seed: seed of the first scene, the others follow
    num_envs: environments in parallel (0: as many as suit the task)
    """

    selector: Path
    out: Path
    noise_seeds: int = 8
    selected_seeds: int = 1
    episodes: int = 250
    seed: int = TEST_SCENES
    num_envs: int = 0

    def __post_init__(self) -> None:
        if self.noise_seeds < 2 or min(self.selected_seeds, self.episodes) < 1:
            raise ValueError(
                "noise_seeds wants at least 2, selected_seeds and episodes at least 1, got "
                f"{self.noise_seeds}, {self.selected_seeds}, {self.episodes}"
            )


def run(config: Config) -> dict[str, Any]:
    """Run all seeds, print and return what the noise decides and what the selector gets."""
    folder = resolve_policy(config.selector)
    if verify_folder(folder).get("kind") != KIND:
        raise UserError(f"{config.selector} holds no selector; 'vla-rl taco' fits one")
    policy, selector = load_selector(folder)
    arena = open_arena_of(config, config.selector, config.num_envs)
    agents = [(f"first_{n}", PolicyAgent(policy), n) for n in range(config.noise_seeds)]
    selecting = PolicyAgent(policy, selector.sampler(policy))
    agents += [(f"selected_{n}", selecting, n) for n in range(config.selected_seeds)]
    try:
        found = {name: _successes(config, arena, agent, name, seed) for name, agent, seed in agents}
    finally:
        arena.env.close()
    first_KN = np.array([found[f"first_{n}"] for n in range(config.noise_seeds)])
    selected_KN = np.array([found[f"selected_{n}"] for n in range(config.selected_seeds)])
    results = {"task": arena.task, "episodes": config.episodes, **decompose(first_KN, selected_KN)}
    _print(results)
    return results


def _successes(config: Config, arena: Arena, agent: PolicyAgent, name: str, seed: int) -> list[bool]:
    scenes = list(range(config.seed, config.seed + config.episodes))
    identity = [folder_digest(resolve_policy(config.selector)), arena.identity(), name, config.episodes, config.seed]
    header = json_module.dumps({"evaluation": sha256_text(json_module.dumps(identity))})
    journal = config.out / f"{name}.journal"
    result = evaluate(agent, arena, scenes, seed=seed, name=name, journal=journal, header=header)
    return [bool(scene["success"]) for scene in result["scenes"]]


def decompose(first_KN: np.ndarray, selected_KN: np.ndarray) -> dict[str, Any]:
    """What the noise decides, and what is got of it.

    Args:
        first_KN: successes of the policy alone, by noise seed and scene.
        selected_KN: of the selector; its first seed is compared with the first one's.

    Returns:
        Rates by seed; the variance of a single outcome split into that within scenes (noise) and between them; the share of scenes that
        the noise decides; the oracle's success, and by how much each falls short of it (regret).
    """
    by_scene_N = first_KN.mean(0)
    seeds = len(first_KN)
    within = float((by_scene_N * (1 - by_scene_N)).mean()) * seeds / (seeds - 1)
    between = max(float(by_scene_N.var()) - within / seeds, 0.0)  # unbiased, as in an analysis of variance
    oracle_N = first_KN.any(0)
    return {
        "first_by_seed": first_KN.mean(1).tolist(),
        "selected_by_seed": selected_KN.mean(1).tolist(),
        "first": as_dict(proportion(int(first_KN[0].sum()), first_KN.shape[1])),
        "selected": as_dict(proportion(int(selected_KN[0].sum()), selected_KN.shape[1])),
        "paired": as_dict(paired_difference(first_KN[0].tolist(), selected_KN[0].tolist())),
        "noise_variance": within,
        "scene_variance": between,
        "decided_by_noise": float(((by_scene_N > 0) & (by_scene_N < 1)).mean()),
        "oracle": as_dict(proportion(int(oracle_N.sum()), first_KN.shape[1])),
        "oracle_of": first_KN.shape[0],
        "regret_of_first": float(oracle_N.mean() - first_KN.mean()),
        "regret_of_selected": float(oracle_N.mean() - selected_KN.mean()),
    }


def _print(results: dict[str, Any]) -> None:
    table = Table("", "success, %")
    rates = results["first_by_seed"]
    table.add_row(f"policy alone, {len(rates)} noise seeds", ", ".join(f"{100 * r:.1f}" for r in rates))
    table.add_row("selected", ", ".join(f"{100 * r:.1f}" for r in results["selected_by_seed"]))
    table.add_row(
        f"oracle, best of {results['oracle_of']} seeds in each scene", f"{100 * results['oracle']['rate']:.1f}"
    )
    table.add_row(
        "regret of the policy alone, of the selector",
        f"{100 * results['regret_of_first']:.1f}, {100 * results['regret_of_selected']:.1f}",
    )
    share = results["noise_variance"] / max(results["noise_variance"] + results["scene_variance"], 1e-12)
    table.add_row("scenes that the noise decides", f"{100 * results['decided_by_noise']:.1f}")
    table.add_row("share of the outcome's variance that is the noise's", f"{100 * share:.1f}")
    Console().print(table)
