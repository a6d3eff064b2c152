"""The online stage: PPO in the denoising chain on vectorised roll-outs, never worse than the best policy so far.

Stage 3 of RL-100 (arXiv 2510.14830). Every iteration starts from fresh scenes and draws from (seed, iteration), so
that a run that was cut goes on as if it had not been. Every few iterations the policy is evaluated as it will be deployed on
selection scenes, the same ones each time: one that is as good or better becomes the best, a significantly worse one is rolled back to
it, weights and optimisers and all. The best is what the stage leaves.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vla_rl.algos.guard import NonFiniteLossError
from vla_rl.algos.joint_distill import JointDistillConfig, joint_student
from vla_rl.algos.ppo import PPOConfig
from vla_rl.algos.ppo_online import OnlinePPO, OnlinePPOConfig
from vla_rl.algos.rewards import RewardConfig, shape_rewards
from vla_rl.algos.value import ValueConfig
from vla_rl.distill import RetentionConfig
from vla_rl.evaluate import Arena, compare, evaluate
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.experience import Experience, collect
from vla_rl.kernels import Kernel, KernelConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy, save_policy
from vla_rl.policies.student import StudentPolicy
from vla_rl.runtime.checkpoints import (
    folder_digest,
    keep_newest,
    load_tensors,
    newest,
    part,
    save_folder,
    verify_folder,
)
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.files import exclusive, write_json
from vla_rl.runtime.metrics import MetricsLog
from vla_rl.runtime.seeding import SELECTION_SCENES, derive_seed, initial_weights, numpy_generator, torch_generator
from vla_rl.statistics import paired_difference
from vla_rl.types import ActionSpec

RATE_AFTER_ROLLBACK = 0.5  # of the learning rate: the step that was too far is not taken again


@dataclass(frozen=True)
class OnlineSettings:
    """Everything that determines the weights, beside policy and task.

    env_steps: budget of control steps for learning (evaluations on selection scenes are counted apart)
    decisions: per environment and iteration
    seed: of all draws
    selection_scenes: on which the best policy is chosen
    select_every: iterations between evaluations
    stop_at: success on the selection scenes that ends the stage early
    kernel: the chain's noise
    online: returns and when the policy moves
    ppo: the surrogate
    value: the value function
    reward: what learning sees
    student: a one-step student that learns beside the policy
    """

    env_steps: int = 1_000_000
    decisions: int = 100
    seed: int = 0
    selection_scenes: int = 100
    select_every: int = 10
    stop_at: float = 1.0
    kernel: KernelConfig = field(default_factory=KernelConfig)
    online: OnlinePPOConfig = field(default_factory=OnlinePPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    student: JointDistillConfig = field(default_factory=JointDistillConfig)

    def __post_init__(self) -> None:
        if min(self.env_steps, self.decisions, self.selection_scenes, self.select_every) < 1:
            raise ValueError("env_steps, decisions, selection_scenes and select_every want at least 1")
        if self.ppo.imitation_weight:
            raise ValueError("ppo.imitation_weight is the offline stage's: there are no demonstrations online")
        if not 0 < self.stop_at <= 1:
            raise ValueError(f"stop_at wants a success rate in (0, 1], got {self.stop_at}")


@dataclass
class _Progress:
    """Where a run is: what a checkpoint keeps beside weights."""

    env_steps: int = 0
    episodes: int = 0
    selection_env_steps: int = 0
    rollbacks: int = 0
    best_iteration: int = 0
    best_successes: tuple[bool, ...] = ()
    diverged: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"roll_out": 0.0, "update": 0.0, "select": 0.0})

    @property
    def best_success(self) -> float:
        return sum(self.best_successes) / len(self.best_successes) if self.best_successes else 0.0


def train_online(policy_path: Path, out: Path, settings: OnlineSettings, arena: Arena) -> dict[str, Any]:
    """Run the stage and leave the best policy in ``out/policy`` and the last in ``out/last``; return what was done.

    Args:
        policy_path: policy to begin with.
        out: run folder.
        settings: everything else.
        arena: where it acts; its number of environments is part of what determines the weights.

    Raises:
        UserError: ``out`` holds a run of other settings.
        NonFiniteLossError: several losses in a row were not finite; the best policy and the last good weights are left all the same.
    """
    policy = load_policy(policy_path)
    arena.require_fit(policy.full_spec, str(policy_path))
    policy.see_latents()
    arena = arena.through(policy)
    kernel = policy.make_kernel(settings.kernel)  # what it refuses is refused before anything is begun
    with exclusive(out):
        digest = folder_digest(resolve_policy(policy_path))
        claim_folder(out, {**encode(settings), "policy": digest, **arena.identity()})
        return _Run(policy, kernel, out, settings, arena).run()


class _Run:
    def __init__(self, policy: ChunkPolicy, kernel: Kernel, out: Path, settings: OnlineSettings, arena: Arena) -> None:
        self.policy, self.out, self.settings, self.arena = policy, out, settings, arena
        with initial_weights(derive_seed(settings.seed, "online weights")):
            student = joint_student(policy, settings.student, settings.seed)
            self.algorithm = OnlinePPO(policy, kernel, settings.online, settings.ppo, settings.value, student)
        self.progress = _Progress()
        self.best = self.algorithm.state_dict()
        self._resume()

    def run(self) -> dict[str, Any]:
        """Iterate until the budget is spent or the goal reached."""
        settings, algorithm, progress = self.settings, self.algorithm, self.progress
        log = MetricsLog(self.out, algorithm.iteration)
        bar = tqdm(
            total=settings.env_steps,
            initial=progress.env_steps,
            desc=f"online {self.arena.task}",
            unit="step",
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        if not progress.best_successes:
            self._select()
        while progress.env_steps < settings.env_steps and progress.best_success < settings.stop_at:
            number = algorithm.iteration
            generator = torch_generator(settings.seed, "online", number)
            started = time.monotonic()
            experience = self._collect(number, generator)
            progress.seconds["roll_out"] += time.monotonic() - started
            started = time.monotonic()
            reward_TN = self._reward(experience, number)
            try:
                metrics = algorithm.update(experience, reward_TN, generator, progress.env_steps / settings.env_steps)
            except NonFiniteLossError:
                self._finish()
                raise
            progress.seconds["update"] += time.monotonic() - started
            finished = experience.finished()
            progress.env_steps += experience.env_steps
            progress.episodes += len(finished)
            progress.diverged += sum("diverged" in e.provenance for e in finished)
            metrics["rollout/success"] = experience.success()
            metrics["rollout/env_steps"] = float(progress.env_steps)
            selects = algorithm.iteration % settings.select_every == 0 or progress.env_steps >= settings.env_steps
            if selects:
                metrics["selection/success"] = self._select()
                metrics["selection/best"] = progress.best_success
            log.write(algorithm.iteration, metrics)
            if selects:
                self._checkpoint()
            bar.update(experience.env_steps)
            bar.set_postfix(
                success=f"{metrics['rollout/success']:.2f}", best=f"{progress.best_success:.2f}", refresh=False
            )
        bar.close()
        log.close()
        return self._finish()

    def _collect(self, number: int, generator: torch.Generator) -> Experience:
        rng = numpy_generator(self.settings.seed, "online scenes", number)
        arena = self.arena
        return collect(
            arena.env,
            arena.action_spec,
            arena.instruction,
            self.policy,
            self.algorithm.kernel,
            self.settings.decisions,
            lambda: int(rng.integers(0, SELECTION_SCENES)),
            generator,
        )

    def _reward(self, experience: Experience, number: int) -> Tensor:
        settings = self.settings
        if settings.reward.plain:
            return experience.decision_reward(settings.online.discount)
        generator = torch_generator(settings.seed, "online reward", number)
        shaped_TNH = shaped_rewards(experience, self.arena.action_spec, settings.reward, generator)
        return experience.decision_reward(settings.online.discount, shaped_TNH)

    def _select(self) -> float:
        """Evaluate as deployed; keep the best, roll back what is significantly worse. Return the success."""
        started = time.monotonic()
        scenes = list(range(SELECTION_SCENES, SELECTION_SCENES + self.settings.selection_scenes))
        name = "the policy in training"
        result = evaluate(PolicyAgent(self.policy), self.arena, scenes, seed=self.settings.seed, name=name, bar=False)
        progress = self.progress
        progress.selection_env_steps += result["env_steps"]
        successes = tuple(bool(s["success"]) for s in result["scenes"])
        if sum(successes) >= sum(progress.best_successes):  # of equals the later one has learned from more
            self.best = self.algorithm.state_dict()
            progress.best_successes, progress.best_iteration = successes, self.algorithm.iteration
        elif paired_difference(progress.best_successes, successes).high < 0:
            iteration, rate = self.algorithm.iteration, self.algorithm.ppo.learning_rate
            self.algorithm.load_state_dict(self.best)
            self.algorithm.iteration, self.algorithm.ppo.learning_rate = iteration, rate * RATE_AFTER_ROLLBACK
            progress.rollbacks += 1
        progress.seconds["select"] += time.monotonic() - started
        return sum(successes) / len(successes)

    def _retained(self, student: StudentPolicy) -> dict[str, Any]:
        """What the best policy's student has of its success on the selection scenes."""
        agents = {"teacher": PolicyAgent(self.policy), "student": PolicyAgent(student)}
        settings = self.settings
        paired, found = compare(
            agents, self.arena, settings.selection_scenes, settings.seed, first="teacher", second="student"
        )
        kept = paired.low > -RetentionConfig().largest_loss
        return {"student": {"kept": kept, "paired": found["paired"], "student": found["student"]}}

    def _checkpoint(self) -> None:
        progress = self.progress
        state = {f"now.{k}": v for k, v in self.algorithm.state_dict().items()}
        state |= {f"best.{k}": v for k, v in self.best.items()}
        root = self.out / "checkpoints"
        path = root / f"step-{self.algorithm.iteration:08d}"
        if not path.exists():
            meta = {
                "kind": "training",
                "progress": {**progress.__dict__, "best_successes": list(progress.best_successes)},
            }
            save_folder(path, tensors={"training": state}, texts={}, meta=meta)
        keep_newest(root, 2)

    def _resume(self) -> None:
        path = newest(self.out / "checkpoints")
        if path is None:
            return
        kept = verify_folder(path)["progress"]
        self.progress = _Progress(**{**kept, "best_successes": tuple(kept["best_successes"])})
        state = load_tensors(path, "training")
        self.best = part(state, "best.")
        self.algorithm.load_state_dict(part(state, "now."))

    def _finish(self) -> dict[str, Any]:
        """Leave the best policy and the last one, and say what it cost."""
        progress = self.progress
        meta = {"env_steps": progress.env_steps, "seed": self.settings.seed}
        last, retained = self.algorithm.state_dict(), {}
        for name, state, iteration in (
            ("last", last, self.algorithm.iteration),
            ("policy", self.best, progress.best_iteration),
        ):
            shutil.rmtree(self.out / name, ignore_errors=True)  # what a run that stopped early left
            self.algorithm.load_state_dict(state)
            save_policy(self.policy, self.out / name, {**meta, "iteration": iteration})
            if name == "policy" and self.algorithm.student is not None:
                shutil.rmtree(self.out / "student", ignore_errors=True)
                save_policy(self.algorithm.student.deployed, self.out / "student", {**meta, "iteration": iteration})
                retained = self._retained(self.algorithm.student.deployed)
        self.algorithm.load_state_dict(last)
        results = {
            "iterations": self.algorithm.iteration,
            "env_steps": progress.env_steps,
            "episodes": progress.episodes,
            "selection_env_steps": progress.selection_env_steps,
            "selection_success": progress.best_success,
            "selection_scenes": len(progress.best_successes),
            "best_iteration": progress.best_iteration,
            "rollbacks": progress.rollbacks,
            "diverged": progress.diverged,
            **retained,
            "timing": {
                "seconds": sum(progress.seconds.values()),
                **{f"{k}_seconds": v for k, v in progress.seconds.items()},
            },
        }
        write_json(self.out / "results.json", results)
        return results


def shaped_rewards(
    experience: Experience, spec: ActionSpec, config: RewardConfig, generator: torch.Generator
) -> Tensor:
    """Shaped rewards in the places of the recorded ones: (T, N, He)."""
    shaped = shape_rewards([s.episode for s in experience.segments], spec, config, generator)
    reward_TNH = torch.zeros_like(experience.reward_TNH)
    for segment, reward_T in zip(experience.segments, shaped, strict=True):
        rows = slice(segment.first_decision, segment.first_decision + segment.decisions)
        ran = experience.executed_TNH[rows, segment.slot]
        reward_TNH[rows, segment.slot] = reward_TNH[rows, segment.slot].masked_scatter(ran, torch.from_numpy(reward_T))
    return reward_TNH
