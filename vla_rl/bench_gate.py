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
from vla_rl.algos.calibration import calibrate, own_episodes
from vla_rl.algos.critic import Critic
from vla_rl.algos.dynamics import DynamicsEnsemble
from vla_rl.algos.iql import IQLConfig
from vla_rl.algos.ope import Accepted, Estimate, gate
from vla_rl.algos.ppo_offline import OfflinePPO, OfflinePPOConfig, OfflineSurrogateConfig
from vla_rl.algos.weights import WeightingConfig, window_weights
from vla_rl.data.decisions import Decisions, split_episodes
from vla_rl.data.reader import EpisodeData
from vla_rl.data.windows import Windows
from vla_rl.evaluate import Arena, evaluate
from vla_rl.improve import Estimator, EstimatorSettings, blindness, make_estimator, train_critic, train_dynamics
from vla_rl.inference.controller import PolicyAgent
from vla_rl.kernels import KernelConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy
from vla_rl.preconditions import require_usable
from vla_rl.pretrain import PretrainSettings, imitate
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.files import append_line, read_lines
from vla_rl.runtime.seeding import SELECTION_SCENES, numpy_generator, torch_generator
from vla_rl.statistics import as_dict, paired_difference, proportion

ESTIMATES: tuple[Estimate, ...] = ("return", "am_q", "fqe", "likelihood")
GATE = "gate"  # the test of the return, and no departure from the data: what the offline stage asks of an update
JOURNAL = "candidates.jsonl"


@dataclass(frozen=True)
class GateBenchSettings(EstimatorSettings):
    """What is tried on one policy; all estimators judge, whatever ``gate.estimate`` says.

    seed: of all draws
    scenes: on which the truth is measured
    held_out: share of the episodes that critic and model are judged on
    critic: Q and V
    kernel: the chain's noise
    states: recorded states per batch of a policy-gradient candidate
    chains_per_state: chains begun at each
    decisions: that policy-gradient candidates are followed for in the models
    learning_rates: of the policy-gradient candidates
    iterations: of the policy-gradient candidates
    repeats: candidates per learning rate, number of iterations and of decisions
    imitations: candidates that are weighted imitation, going on from the policy
    imitation_steps: gradient steps of each of them
    """

    seed: int = 0
    scenes: int = 200
    held_out: float = 0.15
    critic: IQLConfig = field(default_factory=IQLConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    states: int = 256
    chains_per_state: int = 4
    decisions: tuple[int, ...] = (1, 15)
    learning_rates: tuple[float, ...] = (1e-5, 3e-5)
    iterations: tuple[int, ...] = (5, 20)
    repeats: int = 3
    imitations: int = 16
    imitation_steps: int = 1000

    def __post_init__(self) -> None:
        if self.scenes < 2 or self.repeats < 0 or self.imitations < 0 or self.imitation_steps < 1:
            raise ValueError("scenes wants at least 2, imitation_steps 1, repeats and imitations 0")
        if not self.repeats + self.imitations:
            raise ValueError("repeats or imitations has to be more than 0; there is nothing to judge")
        counts = self.states, self.chains_per_state, *self.iterations, *self.decisions
        if min(counts) < 1 or min(self.learning_rates) <= 0:
            raise ValueError(
                "states, chains_per_state, iterations and decisions want at least 1, learning_rates more than 0"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out wants a share in (0, 1), got {self.held_out}")


@dataclass(frozen=True)
class _Plan:
    """One candidate: how it is made."""

    name: str
    seed: int
    learning_rate: float
    steps: int
    decisions: int = 1
    weighting: str = ""


def plans(settings: GateBenchSettings) -> list[_Plan]:
    """All candidates, gentle and rough, by gradient and by imitation."""
    found = [
        _Plan(f"ppo-{followed}-{rate:g}-{steps}-{seed}", seed, rate, steps, followed)
        for followed, rate, steps, seed in itertools.product(
            settings.decisions, settings.learning_rates, settings.iterations, range(settings.repeats)
        )
    ]
    kinds = ("advantage", "success", "none")
    for number in range(settings.imitations):
        kind, rate = kinds[number % 3], (1e-4, 1e-3)[number // 3 % 2]
        steps = settings.imitation_steps
        found.append(_Plan(f"imitation-{kind}-{rate:g}-{number}", number, rate, steps, weighting=kind))
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
    require_usable(data, base)
    training, held_out = split_episodes(data, settings.held_out, settings.seed)

    def decisions(episodes: list[int]) -> Decisions:
        config = base.config
        return Decisions(data, config.observation_steps, config.execute_steps, settings.critic.discount, episodes)

    known, unseen = decisions(training), decisions(held_out)
    critic = train_critic(known, settings.critic, out, settings.seed)
    own_E = own_episodes(data, folder_digest(resolve_policy(policy_path)))
    judged = calibrate(critic, base, unseen, own_E, 8192, settings.seed)
    tqdm.write(str(judged))
    model, horizon = train_dynamics(known, unseen, critic.encoder, settings.dynamics, out, settings.seed)
    estimators: dict[str, Estimator] = {}
    for estimate in ESTIMATES:
        using = replace(settings, gate=replace(settings.gate, estimate=estimate))
        steps = base.config.chunk_steps
        estimators[estimate] = make_estimator(steps, critic, model, horizon, known, unseen, using, settings.seed)
    bases = {name: estimator(base) for name, estimator in estimators.items()}
    scenes = list(range(SELECTION_SCENES, SELECTION_SCENES + settings.scenes))

    def truth(policy: ChunkPolicy) -> dict[str, Any]:
        found = evaluate(PolicyAgent(policy), arena, scenes, seed=0, name="candidate", bar=False)["scenes"]
        gamma = settings.critic.discount
        returns = [gamma ** (s["length"] - 1) * s["episode_return"] for s in found]  # sparse: paid in the last step
        return {"success": [bool(s["success"]) for s in found], "return": float(np.mean(returns))}

    journal = out / JOURNAL
    done = {row["name"]: row for row in map(json.loads, read_lines(journal))}
    if "base" not in done:
        estimated = {n: float(b.mean()) for n, b in bases.items()}
        done["base"] = {"name": "base", **truth(base), "estimates": estimated}
        append_line(journal, json.dumps(done["base"]))
    for plan in tqdm(plans(settings), "candidates"):
        if plan.name in done:
            continue
        policy = _candidate(plan, policy_path, known, critic, model, horizon, settings, out, held_out)
        row: dict[str, Any] = {"name": plan.name, **truth(policy), "estimates": {}, "accepted": {}, "decisions": {}}
        for name, estimator in estimators.items():
            value_EN = estimator(policy)
            decision = gate(value_EN, bases[name], settings.gate, numpy_generator(settings.seed, "gate", plan.name))
            row["estimates"][name] = float(value_EN.mean())
            row["accepted"][name] = isinstance(decision, Accepted)
            row["decisions"][name] = asdict(decision)
        append_line(journal, json.dumps(row))
        done[plan.name] = row
    rows = [done[plan.name] for plan in plans(settings)]
    return {
        "calibration": asdict(judged),
        "horizon": horizon,
        "stage_would_leave_it_out": blindness(horizon, known, max(settings.decisions), settings.gate),
        "base_success": float(np.mean(done["base"]["success"])),
        **summarise(done["base"], rows, settings.gate.largest_departure),
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


def summarise(base: dict[str, Any], rows: Sequence[dict[str, Any]], largest_departure: float) -> dict[str, Any]:
    """Precision of accepts and share of harmful updates kept out, for each estimator's test and for the gate; rank correlations.

    The gate's correlations are over the policies that have not left the data. An update is good when it succeeded on more of the scenes
    than the base, harmful when on fewer; surely so where the 95 % interval of the paired difference excludes zero.
    """
    differences = [paired_difference(base["success"], row["success"]) for row in rows]
    gains = np.array([d.difference for d in differences])
    surely_harmful = np.array([d.high < 0 for d in differences])
    surely_good = np.array([d.low > 0 for d in differences])
    everything = [base, *rows]
    summary: dict[str, Any] = {
        "updates": len(rows),
        "good": int((gains > 0).sum()),
        "harmful": int((gains < 0).sum()),
        "surely_good": int(surely_good.sum()),
        "surely_harmful": int(surely_harmful.sum()),
        "mean_gain_if_all_are_kept": float(gains.mean()),
    }
    departure = np.array([r["estimates"]["likelihood"] for r in rows]) / base["estimates"]["likelihood"] - 1
    summary["departure"] = departure.tolist()
    for name in (*ESTIMATES, GATE):
        estimate = "return" if name == GATE else name
        accepted = np.array([row["accepted"][estimate] for row in rows])
        judged = everything
        if name == GATE:
            accepted &= departure <= largest_departure
            judged = [base, *(row for row, far in zip(rows, departure, strict=True) if far <= largest_departure)]
        estimates = [row["estimates"][estimate] for row in judged]
        summary[name] = {
            "accepted": int(accepted.sum()),
            "precision": _share(gains > 0, accepted),
            "harmful_kept_out": _share(~accepted, gains < 0),
            "surely_harmful_kept_out": _share(~accepted, surely_harmful),
            "surely_good_let_in": _share(accepted, surely_good),
            "mean_gain_of_accepted": float(gains[accepted].mean()) if accepted.any() else None,
            "rank_correlation_with_return": rank_correlation(estimates, [row["return"] for row in judged]),
            "rank_correlation_with_success": rank_correlation(estimates, [np.mean(row["success"]) for row in judged]),
        }
    return summary


def _share(which: np.ndarray, of: np.ndarray) -> dict[str, Any] | None:
    return as_dict(proportion(int((which & of).sum()), int(of.sum()))) if of.any() else None


def rank_correlation(estimates: Sequence[float], truths: Sequence[float]) -> dict[str, Any] | None:
    """Spearman's over policies, with a 95 % bootstrap interval; None where all of either are the same."""
    x, y = np.asarray(estimates), np.asarray(truths)
    if not np.ptp(x) or not np.ptp(y):
        return None
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(x), len(x)) for _ in range(1000)]
    drawn = [d for d in drawn if np.ptp(x[d]) and np.ptp(y[d])]
    values = np.array([stats.spearmanr(x[d], y[d]).statistic for d in drawn])
    low, high = np.quantile(values, [0.025, 0.975])
    return {"policies": len(x), "rho": float(stats.spearmanr(x, y).statistic), "low": float(low), "high": float(high)}


def _candidate(
    plan: _Plan,
    policy_path: Path,
    known: Decisions,
    critic: Critic,
    model: DynamicsEnsemble,
    horizon: int,
    settings: GateBenchSettings,
    out: Path,
    held_out: list[int],
) -> ChunkPolicy:
    if not plan.weighting:
        policy = load_policy(policy_path)
        kernel = policy.make_kernel(settings.kernel)
        batches = OfflinePPOConfig(
            states=settings.states,
            chains_per_state=settings.chains_per_state if plan.decisions == 1 else 1,
            decisions=plan.decisions,
        )
        surrogate = OfflineSurrogateConfig(learning_rate=plan.learning_rate)
        algorithm = OfflinePPO(policy, kernel, critic, batches, surrogate, model, horizon)
        generator = torch_generator(settings.seed, "candidate", plan.name)
        for _ in range(plan.steps):
            algorithm.update(known, generator)
        return policy.eval()
    weighting = WeightingConfig(kind=plan.weighting, demo_share=0.0)  # type: ignore[arg-type]
    advantage_N = known.frame_advantage(critic.value, weighting.gae_lambda) if plan.weighting == "advantage" else None

    def weigh(windows: Windows) -> torch.Tensor:
        return window_weights(windows, weighting, advantage_N, held_out)

    base = load_policy(policy_path)
    bc = BCConfig(steps=plan.steps, learning_rate=plan.learning_rate, warmup_steps=50)
    trained = PretrainSettings(policy=base.config, bc=bc, seed=plan.seed, successes_only=False, validation_share=0.02)
    folder = out / "imitations" / plan.name
    imitate(known.data, folder, trained, weigh=weigh, initial=policy_path)
    return load_policy(folder)
