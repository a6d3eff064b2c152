"""Offline PPO in the denoising chain: the policy's own chains at recorded states, judged by the critic.

Stage 2 of RL-100 (arXiv 2510.14830). The data's actions enter through the critic, and through an imitation anchor where one is
wanted. Differs from RL-100's code: see ``vla_rl/algos/ppo.py``; several chains per state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_rl.algos.critic import Critic, advantage
from vla_rl.algos.guard import load_optimizer_tensors, optimizer_tensors
from vla_rl.algos.ppo import ChainPPO, PPOConfig, Samples
from vla_rl.data.decisions import Decisions
from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import sample_chain
from vla_rl.runtime.checkpoints import part


@dataclass(frozen=True)
class OfflineSurrogateConfig(PPOConfig):
    """The surrogate with gentler defaults: a critic that errs off the data is not to be followed far."""

    learning_rate: float = 1e-5
    epochs: int = 3
    kl_stop: float = 0.02


@dataclass(frozen=True)
class OfflinePPOConfig:
    """How much is tried.

    candidates: updates that are put before the gate
    iterations: batches of chains that a candidate learns from
    states: recorded states per batch
    chains_per_state: chains drawn at each
    """

    candidates: int = 10
    iterations: int = 5
    states: int = 512
    chains_per_state: int = 4

    def __post_init__(self) -> None:
        if self.candidates < 0 or min(self.iterations, self.states, self.chains_per_state) < 1:
            raise ValueError("candidates wants at least 0; iterations, states and chains_per_state at least 1")


class OfflinePPO:
    """One ``update`` per batch of recorded states; ``state_dict`` is what a rollback restores."""

    def __init__(
        self, policy: ChunkPolicy, kernel: Kernel, critic: Critic, config: OfflinePPOConfig, ppo: PPOConfig
    ) -> None:
        self.policy = policy
        self.kernel = kernel
        self.critic = critic
        self.config = config
        self.ppo = ChainPPO(policy, kernel, ppo)

    def update(
        self,
        decisions: Decisions,
        generator: torch.Generator,
        imitation_loss: Callable[[torch.Generator], Tensor] | None = None,
    ) -> dict[str, float]:
        """Draw states, let the policy as it is draw chains there, judge them and learn.

        Raises:
            NonFiniteLossError: several losses in a row were not finite.
        """
        config, policy = self.config, self.policy
        index_B = torch.randint(0, len(decisions), (config.states,), generator=generator)
        frame_B = decisions.frames_W[index_B].repeat_interleave(config.chains_per_state)
        observation = decisions.observe(
            frame_B, decisions.episode_W[index_B].repeat_interleave(config.chains_per_state)
        )
        with torch.no_grad():
            condition_BOD = policy.condition(observation)
            noise_KBHA = torch.randn(self.kernel.steps + 1, len(frame_B), *policy.chunk_shape, generator=generator)
            chain = sample_chain(policy, self.kernel, condition_BOD, noise_KBHA)
            action_BHA = policy.unnormalize_action(chain.chunk, observation)[:, : policy.config.execute_steps]
            advantage_B = advantage(self.critic, observation, policy.spec.action_spec.clip_tensor(action_BHA))
        executed_BH = torch.ones(len(frame_B), policy.config.execute_steps, dtype=torch.bool)
        metrics = self.ppo.update(Samples(condition_BOD, chain, advantage_B, executed_BH), generator, imitation_loss)
        return metrics | {"offline/advantage": float(advantage_B.mean())}

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of policy and kernel, and the optimiser's moments, copied."""
        state = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        state |= {f"kernel.{k}": v for k, v in self.kernel.state_dict().items()}
        state |= optimizer_tensors(self.ppo.optimizer.optimizer, "optimizer.")
        return {k: v.clone() for k, v in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``: weights and moments are as they were."""
        self.policy.load_state_dict(part(state, "policy."))
        self.kernel.load_state_dict(part(state, "kernel."))
        load_optimizer_tensors(self.ppo.optimizer.optimizer, state, "optimizer.")
