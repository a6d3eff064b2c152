"""What a critic is to the stages, and what it is asked about."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from vla_rl.data.decisions import DecisionBatch
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.policies.base import ChunkPolicy
from vla_rl.types import Observation


@runtime_checkable
class Critic(Protocol):
    """Judges chunks. What regularises the policy by advantages (A2PR, say) needs no more than this."""

    encoder: StateEncoder

    def update(self, batch: DecisionBatch) -> dict[str, float]:
        """Take a gradient step; return its metrics."""

    def value(self, observation: Observation) -> Float[Tensor, " B"]:
        """V of each state."""

    def q_values(self, observation: Observation, action_BHA: Float[Tensor, "B H A"]) -> Float[Tensor, "E B"]:
        """Q of each chunk by each member: executed steps, units of the action spec; what an episode's end cut off repeats its last."""


def advantage(critic: Critic, observation: Observation, action_BHA: Float[Tensor, "B H A"]) -> Float[Tensor, " B"]:
    """Min Q - V: the pessimistic member's (RL-100)."""
    return critic.q_values(observation, action_BHA).min(0).values - critic.value(observation)


def executed_actions(
    policy: ChunkPolicy, observation: Observation, noise_KBHA: Float[Tensor, "K B H A"]
) -> Float[Tensor, "B He A"]:
    """What of a policy's chunk is executed: its first steps, within the action's limits."""
    action_BHA = policy.sample(observation, noise_KBHA).action_BHA[:, : policy.config.execute_steps]
    return policy.spec.action_spec.clip_tensor(action_BHA)
