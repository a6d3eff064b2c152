"""Online PPO in the denoising chain: GAE over policy decisions, a state value, one surrogate (stage 3 of RL-100, arXiv 2510.14830).

A decision is a chunk that runs up to H control steps; its reward is discounted inside it and its successor counts gamma^n. Differs from
RL-100 and DPPO: at a time-out the target takes the value of the true final observation; the value function is warmed up before the
policy moves; the learning rate follows a target divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_rl.algos.guard import load_optimizer_tensors, optimizer_tensors
from vla_rl.algos.joint_distill import JointStudent
from vla_rl.algos.ppo import ChainPPO, PPOConfig, Samples
from vla_rl.algos.returns import generalized_advantage
from vla_rl.algos.value import ValueConfig, ValueFunction
from vla_rl.inference.experience import Experience
from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.checkpoints import part
from vla_rl.types import Observation


@dataclass(frozen=True)
class OnlinePPOConfig:
    """Returns, and when the policy moves.

    discount: gamma per control step
    gae_lambda: lambda per decision
    warmup_iterations: iterations in which only the value function learns
    kl_target: divergence per iteration that the learning rate is steered to (0: the rate stays)
    largest_rate_factor: how far the steered rate may leave its start, both ways
    last_rate_share: share of the learning rate that is left at the end of the budget, to which it falls linearly
    """

    discount: float = 0.998
    gae_lambda: float = 0.95
    warmup_iterations: int = 2
    kl_target: float = 0.0
    largest_rate_factor: float = 10.0
    last_rate_share: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(
                f"discount wants a number in (0, 1], gae_lambda one in [0, 1], got {self.discount}, {self.gae_lambda}"
            )
        if not 0 < self.last_rate_share <= 1:
            raise ValueError(f"last_rate_share wants a share in (0, 1], got {self.last_rate_share}")
        if self.warmup_iterations < 0 or self.kl_target < 0 or self.largest_rate_factor < 1:
            raise ValueError(
                "warmup_iterations and kl_target want numbers >= 0, largest_rate_factor at least 1, got "
                f"{self.warmup_iterations}, {self.kl_target}, {self.largest_rate_factor}"
            )


class OnlinePPO:
    """One ``update`` per batch of experience; everything it needs to go on is in ``state_dict``."""

    def __init__(
        self,
        policy: ChunkPolicy,
        kernel: Kernel,
        config: OnlinePPOConfig,
        ppo: PPOConfig,
        value: ValueConfig,
        student: JointStudent | None = None,
    ) -> None:
        self.policy = policy
        self.kernel = kernel
        self.config = config
        self.ppo = ChainPPO(policy, kernel, ppo)
        self.value = ValueFunction(policy.condition_dim, value)
        self.student = student
        self.iteration = 0

    def update(
        self, experience: Experience, reward_TN: Tensor, generator: torch.Generator, progress: float = 0.0
    ) -> dict[str, float]:
        """Learn from a batch of the policy's own decisions.

        Args:
            experience: of the policy as it is.
            reward_TN: of each decision, discounted inside it.
            generator: of the minibatches.
            progress: share of the budget that is spent.

        Raises:
            NonFiniteLossError: several losses in a row were not finite.
        """
        shape = reward_TN.shape
        with torch.no_grad():
            condition_BOD = self._condition(experience.observation)
            value_TN = self.value.value(condition_BOD).view(shape)
            next_TN = self.value.value(self._condition(experience.next_observation)).view(shape)
            advantage_TN = generalized_advantage(
                reward_TN,
                experience.steps,
                experience.terminated_TN,
                experience.ended_TN,
                value_TN,
                next_TN,
                self.config.discount,
                self.config.gae_lambda,
            )
        metrics = self.value.update(condition_BOD, (advantage_TN + value_TN).flatten(), generator)
        executed_BH = experience.executed_TNH.flatten(0, 1)
        samples = Samples(condition_BOD, experience.chain, advantage_TN.flatten(), executed_BH)
        if self.iteration >= self.config.warmup_iterations:
            self.ppo.rate_share = 1 + (self.config.last_rate_share - 1) * min(progress, 1.0)
            metrics |= self.ppo.update(samples, generator)
            if self.config.kl_target and "ppo/kl" in metrics:
                self.ppo.adapt(metrics["ppo/kl"], self.config.kl_target, self.config.largest_rate_factor)
        if self.student is not None:
            metrics |= self.student.update(samples)
        self.iteration += 1
        return metrics | {"ppo/learning_rate": self.ppo.learning_rate * self.ppo.rate_share}

    def _condition(self, features: Mapping[str, Tensor]) -> Tensor:
        flat = {k: v.flatten(0, 1) for k, v in features.items()}
        return self.policy.condition(Observation.from_features(flat))

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors."""
        state = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        state |= {f"kernel.{k}": v for k, v in self.kernel.state_dict().items()}
        state |= {f"value.{k}": v for k, v in self.value.net.state_dict().items()}
        state |= optimizer_tensors(self.ppo.optimizer.optimizer, "ppo_optimizer.")
        state |= optimizer_tensors(self.value.optimizer.optimizer, "value_optimizer.")
        if self.student is not None:
            state |= {f"student.{k}": v for k, v in self.student.state_dict().items()}
        rate = torch.tensor(self.ppo.learning_rate, dtype=torch.float64)
        return {k: v.clone() for k, v in state.items()} | {
            "learning_rate": rate,
            "iteration": torch.tensor(self.iteration),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``."""
        self.policy.load_state_dict(part(state, "policy."))
        self.kernel.load_state_dict(part(state, "kernel."))
        self.value.net.load_state_dict(part(state, "value."))
        load_optimizer_tensors(self.ppo.optimizer.optimizer, state, "ppo_optimizer.")
        load_optimizer_tensors(self.value.optimizer.optimizer, state, "value_optimizer.")
        if self.student is not None:
            self.student.load_state_dict(part(state, "student."))
        self.ppo.learning_rate = float(state["learning_rate"])
        self.iteration = int(state["iteration"])
