"""The offline stage's learned parts and its policy gradient behind the gate: critic, models, candidate updates, decisions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from vla_rl.algos.bc import masked_mean
from vla_rl.algos.critic import Critic
from vla_rl.algos.dynamics import DynamicsConfig, DynamicsEnsemble, bootstrap_rows, error_curve, trusted_horizon
from vla_rl.algos.fqe import FQEConfig, fitted_q_evaluation
from vla_rl.algos.guard import NonFiniteLossError
from vla_rl.algos.iql import IQL, IQLConfig
from vla_rl.algos.joint_distill import JointDistillConfig, joint_student
from vla_rl.algos.likelihood import HeldOutLikelihood
from vla_rl.algos.ope import Accepted, GateConfig, ModelEvaluator, Rejected, as_record, gate
from vla_rl.algos.ppo_offline import OfflinePPO, OfflinePPOConfig, OfflineSurrogateConfig
from vla_rl.algos.weights import is_demonstration
from vla_rl.data.decisions import Decisions
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.data.windows import Windows
from vla_rl.kernels import KernelConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import save_policy
from vla_rl.runtime.checkpoints import load_tensors, save_folder, verify_folder
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import append_line, write_text
from vla_rl.runtime.metrics import MetricsLog
from vla_rl.runtime.seeding import numpy_generator, torch_generator

GATE_LOG = "gate.jsonl"
LOG_EVERY = 100
ERROR_CURVE_SAMPLES = 256
ANCHOR_BATCH = 128

NO_ANCHOR = "ppo.imitation_weight wants demonstrations that succeeded; the data have none"

Estimator = Callable[[ChunkPolicy], Tensor]


@dataclass(frozen=True)
class EstimatorSettings:
    """What judges a candidate.

    dynamics: the models
    gate: the test
    fqe: fitted Q evaluation, the gate's second estimator
    """

    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    fqe: FQEConfig = field(default_factory=FQEConfig)


@dataclass(frozen=True)
class ImproveSettings(EstimatorSettings):
    """The policy gradient and its gate.

    improve: ppo behind the gate, ppo_ungated, or none (imitation alone)
    kernel: the chain's noise
    offline: how much is tried
    ppo: the surrogate
    student: a one-step student that learns beside the policy
    """

    improve: Literal["ppo", "ppo_ungated", "none"] = "ppo"
    kernel: KernelConfig = field(default_factory=KernelConfig)
    offline: OfflinePPOConfig = field(default_factory=OfflinePPOConfig)
    ppo: OfflineSurrogateConfig = field(default_factory=OfflineSurrogateConfig)
    student: JointDistillConfig = field(default_factory=JointDistillConfig)


def train_critic(known: Decisions, config: IQLConfig, folder: Path, seed: int) -> IQL:
    """Train the critic, or load it where ``folder/critic`` is there."""
    critic = IQL(StateEncoder.fit(known), config, torch_generator(seed, "critic weights"))
    path = folder / "critic"
    if path.exists():
        critic.load_state_dict(_load(path, "critic"))
        return critic
    generator = torch_generator(seed, "critic")
    log = MetricsLog(folder / "critic_log", 0)
    for step in tqdm(range(1, config.steps + 1), "critic", mininterval=1 if sys.stderr.isatty() else 30):
        index_B = torch.randint(0, len(known), (config.batch_size,), generator=generator)
        metrics = critic.update(known.batch(index_B))
        if step % LOG_EVERY == 0:
            log.write(step, metrics)
    log.close()
    _save(path, "critic", critic.state_dict(), {"data": known.data.digest, **encode(config)})
    return critic


def train_dynamics(
    known: Decisions, unseen: Decisions, encoder: StateEncoder, config: DynamicsConfig, folder: Path, seed: int
) -> tuple[DynamicsEnsemble, int]:
    """Train the models, or load them where ``folder/dynamics`` is there; return them and how many decisions they may be trusted for."""
    model = DynamicsEnsemble(encoder, config, torch_generator(seed, "dynamics weights"))
    path = folder / "dynamics"
    if path.exists():
        model.load_state_dict(_load(path, "dynamics"))
        return model, int(verify_folder(path)["horizon"])
    model.fit_rewards(known)
    generator = torch_generator(seed, "dynamics")
    rows_EN = bootstrap_rows(len(known), config.members, generator)
    log = MetricsLog(folder / "dynamics_log", 0)
    for step in tqdm(range(1, config.steps + 1), "dynamics", mininterval=1 if sys.stderr.isatty() else 30):
        drawn_EB = torch.randint(0, len(known), (config.members, config.batch_size), generator=generator)
        metrics = model.update(known, rows_EN.gather(1, drawn_EB))
        if step % LOG_EVERY == 0:
            log.write(step, metrics)
    log.close()
    curve = error_curve(model, unseen, config.largest_horizon, ERROR_CURVE_SAMPLES, generator)
    horizon = trusted_horizon(curve, config.largest_error)
    meta = {"data": known.data.digest, "horizon": horizon, "error_curve": curve.tolist(), **encode(config)}
    _save(path, "dynamics", model.state_dict(), meta)
    return model, horizon


def asks_about_actions(settings: ImproveSettings) -> bool:
    """Whether updates hang on what the critic's Q says of actions, and not only on its V of states."""
    return settings.offline.decisions == 1 or settings.gate.estimate == "am_q"


def blindness(horizon: int, known: Decisions, decisions: int, config: GateConfig) -> str | None:
    """Why models trusted for ``horizon`` decisions cannot tell whether a policy will succeed: almost any success takes longer.

    What is left is the critic's opinion of states that the models made up, and policies are soon found that it is wrong about.
    """
    if config.estimate in ("fqe", "likelihood") and decisions == 1:
        return None  # no model is asked
    data = known.data
    mine = known.episode_W.unique()
    success_E = torch.tensor(data.episodes["success"].to_numpy(bool))[mine]
    length_E = (data.episode_to_E - data.episode_from_E)[mine][success_E]
    reach = horizon * known.steps
    covered = float((length_E <= reach).float().mean()) if len(length_E) else 0.0
    if covered >= config.smallest_coverage:
        return None
    return f"the models may be trusted for {reach} control steps, and {100 * covered:.0f} % of the successes are that short"


def make_estimator(
    chunk_steps: int,
    critic: Critic,
    model: DynamicsEnsemble,
    horizon: int,
    known: Decisions,
    unseen: Decisions,
    settings: EstimatorSettings,
    seed: int,
) -> Estimator:
    """What the gate compares: an estimate for each model (Q function, draw) and start (episode)."""
    if settings.gate.estimate == "likelihood":
        return HeldOutLikelihood(unseen, critic.value, chunk_steps, seed).evaluate
    first = known.first()
    chosen = first[numpy_generator(seed, "starts").permutation(len(first))[: settings.gate.starts]]
    starts = known.observe(known.frames_W[chosen], known.episode_W[chosen])
    if settings.gate.estimate == "fqe":
        return lambda policy: fitted_q_evaluation(policy, known, critic.encoder, starts, settings.fqe, seed)
    discount, bounds = known.discount**known.steps, known.reward_bounds
    return ModelEvaluator(model, critic, starts, horizon, discount, bounds, settings.gate, seed).evaluate


def improve(
    policy: ChunkPolicy,
    critic: Critic,
    model: DynamicsEnsemble,
    horizon: int,
    known: Decisions,
    unseen: Decisions,
    settings: ImproveSettings,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Policy gradient behind the gate; the policy ends as the last candidate that was accepted, every decision in ``gate.jsonl``.

    A candidate is always judged against the last accepted one. Where it is undecided, the next update goes on from it, so that gains too
    small to be seen alone can add up; any other rejection, and the end, roll back to the last accepted one. How far it leaves the data is
    a matter of each update.

    Args:
        policy: changed in place.
        critic: judges.
        model: in which candidates are followed and judged.
        horizon: decisions that it may be trusted for.
        known: decisions to learn from.
        unseen: held-out decisions, for the gate that asks for their likelihood.
        settings: how.
        folder: of the round.
        seed: of all draws.
    """
    steps = policy.config.chunk_steps
    estimate = make_estimator(steps, critic, model, horizon, known, unseen, settings, seed)
    likelihood = HeldOutLikelihood(unseen, critic.value, steps, seed)
    log = folder / GATE_LOG
    write_text(log, "")
    kernel = policy.make_kernel(settings.kernel)
    student = joint_student(policy, settings.student, seed)
    algorithm = OfflinePPO(policy, kernel, critic, settings.offline, settings.ppo, model, horizon, student)
    anchor = demonstration_loss(policy, known) if settings.ppo.imitation_weight else None
    good, base_EN, good_error = algorithm.state_dict(), estimate(policy), likelihood.error(policy)
    accepted, kept_updates, growing, candidate, last_error = 0, 0, 0, 0, good_error
    rng = numpy_generator(seed, "gate")
    metrics_log = MetricsLog(folder / "ppo_log", 0)
    for candidate in range(1, settings.offline.candidates + 1):
        generator = torch_generator(seed, "candidate", candidate)
        try:
            for iteration in range(settings.offline.iterations):
                metrics = algorithm.update(known, generator, anchor)
                metrics_log.write((candidate - 1) * settings.offline.iterations + iteration + 1, metrics)
            candidate_EN, candidate_error = estimate(policy), likelihood.error(policy)
        except NonFiniteLossError as error:
            append_line(
                log, json.dumps({"candidate": candidate, "accepted": False, "kept": False, "reason": str(error)})
            )
            tqdm.write(f"candidate {candidate}: {error}", sys.stderr)
            break
        departure = candidate_error / last_error - 1
        decision = gate(candidate_EN, base_EN, settings.gate, rng, departure)
        kept = isinstance(decision, Accepted) or settings.improve == "ppo_ungated"
        judged = {"estimator": settings.gate.estimate, "horizon": horizon, "departure": departure}
        append_line(log, json.dumps(as_record(decision, candidate=candidate, kept=kept, **judged)))
        growing += 1
        last_error = candidate_error
        if kept:
            good, base_EN, good_error = algorithm.state_dict(), candidate_EN, candidate_error
            accepted, kept_updates, growing = accepted + 1, kept_updates + growing, 0
        elif not (isinstance(decision, Rejected) and decision.undecided):
            algorithm.load_state_dict(good)
            last_error, growing = good_error, 0
    algorithm.load_state_dict(good)
    metrics_log.close()
    if student is not None and not (folder / "student").exists():
        save_policy(student.deployed, folder / "student", {"data": known.data.digest})
    return {"accepted": accepted, "updates_kept": kept_updates, "candidates": candidate, "horizon": horizon}


def demonstration_loss(policy: ChunkPolicy, known: Decisions) -> Callable[[torch.Generator], Tensor]:
    """Imitation loss on demonstrations that succeeded, as an anchor of the policy gradient."""
    data = known.data
    good_E = is_demonstration(data) & torch.tensor(data.episodes["success"].to_numpy(bool))
    good_E[~torch.isin(torch.arange(data.num_episodes), known.episode_W)] = False
    config = policy.config
    windows = Windows(data, config.observation_steps, config.chunk_steps, torch.nonzero(good_E)[:, 0].tolist())
    if not len(windows):
        raise UserError(NO_ANCHOR)

    def loss(generator: torch.Generator) -> Tensor:
        batch = windows.batch(torch.randint(0, len(windows), (ANCHOR_BATCH,), generator=generator))
        draw = policy.draw(ANCHOR_BATCH, generator)
        keep_BH = ~batch.is_pad_BH & ~draw.prefix_BH
        return masked_mean(policy.error(batch, draw), keep_BH, int(keep_BH.sum()))

    return loss


def _save(path: Path, kind: str, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
    save_folder(path, tensors={kind: state}, texts={}, meta={"kind": kind, **meta})


def _load(path: Path, kind: str) -> dict[str, Tensor]:
    if verify_folder(path).get("kind") != kind:
        raise UserError(f"{path} holds no {kind}")
    return load_tensors(path, kind)
