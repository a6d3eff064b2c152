"""Does the gate help? Many candidate updates of one policy, each judged by every estimator and by the truth on the same scenes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from vla_rl.algos.bc import BCConfig
from vla_rl.algos.critic import calibrate
from vla_rl.algos.iql import IQL, IQLConfig
from vla_rl.algos.ope import Accepted, Estimate, GateConfig, gate
from vla_rl.algos.ppo_offline import OfflinePPO
from vla_rl.algos.weights import WeightingConfig, window_weights
from vla_rl.data.decisions import Decisions
from vla_rl.data.reader import EpisodeData
from vla_rl.data.windows import Windows
from vla_rl.evaluate import Arena, evaluate
from vla_rl.improve import Estimator, ImproveSettings, make_estimator, train_critic
from vla_rl.offline import split
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy
from vla_rl.pretrain import PretrainSettings, imitate
from vla_rl.runtime.files import append_line, read_lines
from vla_rl.runtime.seeding import SELECTION_SCENES, numpy_generator, torch_generator
from vla_rl.statistics import as_dict, paired_difference, proportion

ESTIMATES: tuple[Estimate, ...] = ("return", "am_q", "fqe")
JOURNAL = "candidates.jsonl"


@dataclass(frozen=True)
class GateBenchSettings(ImproveSettings):
    """What is tried on one policy.

    seed: of all draws
    scenes: on which the truth is measured
    held_out: share of the episodes that critic and model are judged on
    critic: Q and V
    learning_rates: of the policy-gradient candidates
    iterations: of the policy-gradient candidates
    repeats: candidates per learning rate and number of iterations
    imitations: candidates that are weighted imitation, going on from the policy
    imitation_steps: gradient steps of each of them
    """

    seed: int = 0
    scenes: int = 200
    held_out: float = 0.15
    critic: IQLConfig = field(default_factory=IQLConfig)
    learning_rates: tuple[float, ...] = (3e-6, 1e-5, 3e-5)
    iterations: tuple[int, ...] = (3, 10)
    repeats: int = 4
    imitations: int = 16
    imitation_steps: int = 1000

    def __post_init__(self) -> None:
        if self.scenes < 2 or self.repeats < 0 or self.imitations < 0 or self.imitation_steps < 1:
            raise ValueError("scenes wants at least 2, imitation_steps 1, repeats and imitations 0")


@dataclass(frozen=True)
class _Plan:
    """One candidate: how it is made."""

    name: str
    seed: int
    learning_rate: float
    steps: int
    weighting: str = ""


def plans(settings: GateBenchSettings) -> list[_Plan]:
    """All candidates, gentle and rough, by gradient and by imitation."""
    found = [
        _Plan(f"ppo-{rate:g}-{steps}-{seed}", seed, rate, steps)
        for rate, steps, seed in itertools.product(
            settings.learning_rates, settings.iterations, range(settings.repeats)
        )
    ]
    kinds = ("advantage", "success", "none")
    for number in range(settings.imitations):
        kind, rate = kinds[number % 3], (1e-4, 1e-3)[number // 3 % 2]
        steps = settings.imitation_steps
        found.append(_Plan(f"imitation-{kind}-{rate:g}-{number}", number, rate, steps, kind))
    return found


def bench_gate(
    data: EpisodeData, policy_path: Path, out: Path, settings: GateBenchSettings, arena: Arena
) -> dict[str, Any]:
    """Make the candidates, let the estimators judge them, measure the truth; resumes candidate by candidate.

    Args:
        data: demonstrations and roll-outs.
        policy_path: the policy that is updated.
        out: folder for what is trained and for the journal.
        settings: what is tried.
        arena: where the truth is measured.
    """
    base = load_policy(policy_path)
    training, held_out = split(data, settings.held_out, settings.seed)

    def decisions(episodes: list[int]) -> Decisions:
        config = base.config
        return Decisions(data, config.observation_steps, config.execute_steps, settings.critic.discount, episodes)

    known, unseen = decisions(training), decisions(held_out)
    critic = train_critic(known, settings.critic, out, settings.seed)
    judged = calibrate(critic, unseen, 8192, numpy_generator(settings.seed, "calibration"))
    tqdm.write(str(judged))
    estimators: dict[str, Estimator] = {}
    horizon = 0
    for estimate in ESTIMATES:
        using = replace(settings, gate=replace(settings.gate, estimate=estimate))
        estimators[estimate], found = make_estimator(critic, known, unseen, using, out, settings.seed)
        horizon = max(horizon, found)
    bases = {name: estimator(base) for name, estimator in estimators.items()}
    scenes = list(range(SELECTION_SCENES, SELECTION_SCENES + settings.scenes))

    def truth(policy: ChunkPolicy) -> list[bool]:
        return [
            bool(s["success"]) for s in evaluate(policy, arena, scenes, seed=0, name="candidate", bar=False)["scenes"]
        ]

    journal = out / JOURNAL
    done = {row["name"]: row for row in map(json.loads, read_lines(journal))}
    if "base" not in done:
        done["base"] = {
            "name": "base",
            "success": truth(base),
            "estimates": {n: float(b.mean()) for n, b in bases.items()},
        }
        append_line(journal, json.dumps(done["base"]))
    for plan in tqdm(plans(settings), "candidates"):
        if plan.name in done:
            continue
        policy = _candidate(plan, policy_path, data, known, critic, settings, out)
        row: dict[str, Any] = {"name": plan.name, "success": truth(policy), "estimates": {}, "accepted": {}}
        for name, estimator in estimators.items():
            value_EN = estimator(policy)
            decision = gate(value_EN, bases[name], settings.gate, numpy_generator(settings.seed, "gate", plan.name))
            row["estimates"][name] = float(value_EN.mean())
            row["accepted"][name] = isinstance(decision, Accepted)
            row.setdefault("decisions", {})[name] = asdict(decision)
        append_line(journal, json.dumps(row))
        done[plan.name] = row
    rows = [done[plan.name] for plan in plans(settings)]
    return {
        "calibration": asdict(judged),
        "horizon": horizon,
        "base_success": float(np.mean(done["base"]["success"])),
        **summarise(done["base"], rows, settings.gate),
        "candidates": [
            {
                "name": r["name"],
                "success": float(np.mean(r["success"])),
                "estimates": r["estimates"],
                "accepted": r["accepted"],
            }
            for r in rows
        ],
    }


def summarise(base: dict[str, Any], rows: Sequence[dict[str, Any]], config: GateConfig) -> dict[str, Any]:
    """Precision of accepts, share of harmful updates kept out, and rank correlation, for each estimator.

    An update is harmful when it succeeded on fewer of the scenes than the base, good when on more.
    """
    gains = np.array([paired_difference(base["success"], row["success"]).difference for row in rows])
    everything = [base, *rows]
    truths = [float(np.mean(row["success"])) for row in everything]
    summary: dict[str, Any] = {
        "updates": len(rows),
        "good": int((gains > 0).sum()),
        "harmful": int((gains < 0).sum()),
        "mean_gain_if_all_are_kept": float(gains.mean()),
    }
    for name in ESTIMATES:
        accepted = np.array([row["accepted"][name] for row in rows])
        right, kept, harmful = int((accepted & (gains > 0)).sum()), int(accepted.sum()), int((gains < 0).sum())
        out_of_it = int((~accepted & (gains < 0)).sum())
        estimates = [row["estimates"][name] for row in everything]
        summary[name] = {
            "accepted": kept,
            "precision": as_dict(proportion(right, kept)) if kept else None,
            "harmful_kept_out": as_dict(proportion(out_of_it, harmful)) if harmful else None,
            "mean_gain_of_accepted": float(gains[accepted].mean()) if kept else None,
            "rank_correlation": rank_correlation(estimates, truths),
        }
    return summary


def rank_correlation(estimates: Sequence[float], truths: Sequence[float]) -> dict[str, float]:
    """Spearman's over policies, with a 95 % bootstrap interval."""
    x, y = np.asarray(estimates), np.asarray(truths)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(x), len(x)) for _ in range(1000)]
    values = np.array([stats.spearmanr(x[d], y[d]).statistic for d in drawn])
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"policies": len(x), "rho": float(stats.spearmanr(x, y).statistic), "low": float(low), "high": float(high)}


def _candidate(
    plan: _Plan,
    policy_path: Path,
    data: EpisodeData,
    known: Decisions,
    critic: IQL,
    settings: GateBenchSettings,
    out: Path,
) -> ChunkPolicy:
    if not plan.weighting:
        policy = load_policy(policy_path)
        kernel = policy.make_kernel(settings.kernel)
        ppo = replace(settings.ppo, learning_rate=plan.learning_rate)
        algorithm = OfflinePPO(policy, kernel, critic, settings.offline, ppo)
        generator = torch_generator(settings.seed, "candidate", plan.name)
        for _ in range(plan.steps):
            algorithm.update(known, generator)
        return policy.eval()
    weighting = WeightingConfig(kind=plan.weighting, demo_share=0.0)  # type: ignore[arg-type]
    advantage_N = known.frame_advantage(critic.value, weighting.gae_lambda) if plan.weighting == "advantage" else None

    def weigh(windows: Windows) -> torch.Tensor:
        return window_weights(windows, weighting, advantage_N)

    base = load_policy(policy_path)
    bc = BCConfig(steps=plan.steps, learning_rate=plan.learning_rate, warmup_steps=50)
    trained = PretrainSettings(policy=base.config, bc=bc, seed=plan.seed, successes_only=False, validation_share=0.02)
    folder = out / "imitations" / plan.name
    imitate(data, folder, trained, weigh=weigh, initial=policy_path)
    return load_policy(folder)
