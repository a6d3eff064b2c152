"""Offline PPO in the denoising chain: the policy's own chains at recorded states, judged by the critic.

Stage 2 of RL-100 (arXiv 2510.14830). The data's actions enter through critic and models, and through an imitation anchor where one is
wanted. Differs from RL-100's code: see ``vla_rl/algos/ppo.py`` and ``vla_rl/algos/imagination.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_rl.algos.critic import Critic
from vla_rl.algos.dynamics import DynamicsEnsemble
from vla_rl.algos.guard import load_optimizer_tensors, optimizer_tensors
from vla_rl.algos.imagination import imagine, one_decision
from vla_rl.algos.joint_distill import JointStudent
from vla_rl.algos.ppo import ChainPPO, PPOConfig
from vla_rl.data.decisions import Decisions
from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.checkpoints import part


@dataclass(frozen=True)
class OfflineSurrogateConfig(PPOConfig):
    """The surrogate with gentler defaults: a critic or model that errs off the data is not to be followed far at once."""

    learning_rate: float = 3e-5
    epochs: int = 3
    kl_stop: float = 0.02


@dataclass(frozen=True)
class OfflinePPOConfig:
    """How much is tried, and how chains are judged.

    candidates: updates that are put before the gate
    iterations: batches of chains that a candidate learns from
    states: recorded states per batch
    chains_per_state: chains begun at each
    decisions: that are followed in the models, as far as they may be trusted (1: the critic's Q judges the first one alone, as RL-100)
    gae_lambda: lambda per decision
    """

    candidates: int = 8
    iterations: int = 10
    states: int = 256
    chains_per_state: int = 1
    decisions: int = 15
    gae_lambda: float = 0.9

    def __post_init__(self) -> None:
        if self.candidates < 0 or min(self.iterations, self.states, self.chains_per_state, self.decisions) < 1:
            raise ValueError(
                "candidates wants at least 0; iterations, states, chains_per_state and decisions at least 1"
            )
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda wants a number in [0, 1], got {self.gae_lambda}")


class OfflinePPO:
    """One ``update`` per batch of recorded states; ``state_dict`` is what a rollback restores."""

    def __init__(
        self,
        policy: ChunkPolicy,
        kernel: Kernel,
        critic: Critic,
        config: OfflinePPOConfig,
        ppo: PPOConfig,
        model: DynamicsEnsemble,
        trusted: int,
        student: JointStudent | None = None,
    ) -> None:
        """Set up.

        Args:
            policy: changed in place.
            kernel: of the policy.
            critic: judges.
            config: how much is tried, and how chains are judged.
            ppo: the surrogate.
            model: follows the chains.
            trusted: decisions that the model may be trusted for.
            student: learns beside the policy, and is rolled back with it.
        """
        self.policy = policy
        self.kernel = kernel
        self.critic = critic
        self.config = config
        self.model = model
        self.decisions = min(config.decisions, trusted)
        self.ppo = ChainPPO(policy, kernel, ppo)
        self.student = student

    def update(
        self,
        known: Decisions,
        generator: torch.Generator,
        imitation_loss: Callable[[torch.Generator], Tensor] | None = None,
    ) -> dict[str, float]:
        """Draw states, let the policy as it is draw chains from there, judge them and learn.

        Raises:
            NonFiniteLossError: several losses in a row were not finite.
        """
        index_B = torch.randint(0, len(known), (self.config.states,), generator=generator)
        index_B = index_B.repeat_interleave(self.config.chains_per_state)
        start = known.observe(known.frames_W[index_B], known.episode_W[index_B])
        if self.decisions == 1:
            samples = one_decision(self.policy, self.kernel, self.critic, start, generator)
        else:
            samples = imagine(
                self.policy,
                self.kernel,
                self.critic,
                self.model,
                start,
                self.decisions,
                known,
                self.config.gae_lambda,
                generator,
            )
        metrics = self.ppo.update(samples, generator, imitation_loss)
        if self.student is not None:
            metrics |= self.student.update(samples)
        return metrics | {"offline/advantage": float(samples.advantage_B.mean())}

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of policy and kernel, and the optimiser's moments, copied."""
        state = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        state |= {f"kernel.{k}": v for k, v in self.kernel.state_dict().items()}
        state |= optimizer_tensors(self.ppo.optimizer.optimizer, "optimizer.")
        if self.student is not None:
            state |= {f"student.{k}": v for k, v in self.student.state_dict().items()}
        return {k: v.clone() for k, v in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``: weights and moments are as they were."""
        self.policy.load_state_dict(part(state, "policy."))
        self.kernel.load_state_dict(part(state, "kernel."))
        load_optimizer_tensors(self.ppo.optimizer.optimizer, state, "optimizer.")
        if self.student is not None:
            self.student.load_state_dict(part(state, "student."))
