"""What a critic is to the stages, and whether it ranks better than chance on episodes it has not seen.

The calibration decides if a policy-gradient step is worth taking: reproductions of RL-100 found a Q whose ranking of returns was a coin
flip (peg insertion, 51 %) while its estimates of the policy rose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from vla_rl.data.decisions import DecisionBatch, Decisions
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.types import Observation

VALUE_BINS = 10  # states of like value, within which actions are compared
BOOTSTRAP_DRAWS = 500
QUANTILE = 0.05  # one-sided


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


@dataclass(frozen=True)
class Calibration:
    """How a critic ranks held-out decisions.

    decisions, episodes: what it was judged on
    return_rank_correlation: Spearman's, of Q against the discounted return that followed
    pair_accuracy: of pairs in states of like value and different episodes, the share whose order by advantage is that by return above
        value; 0.5 is chance
    low: one-sided 95 % bound of that share, by a bootstrap over episodes on both sides of a pair
    """

    decisions: int
    episodes: int
    return_rank_correlation: float
    pair_accuracy: float
    low: float

    @property
    def at_chance(self) -> bool:
        """Whether the ranking of actions may be a coin's."""
        return not self.low > 0.5

    def __str__(self) -> str:
        return (
            f"on {self.episodes} held-out episodes the critic's rank correlation with returns is {self.return_rank_correlation:.2f}, "
            f"and it orders {100 * self.pair_accuracy:.1f} % of pairs of actions as their returns do (95 % bound {100 * self.low:.1f} %)"
        )


@torch.no_grad()
def calibrate(critic: Critic, held_out: Decisions, samples: int, rng: np.random.Generator) -> Calibration:
    """Compare a critic with Monte-Carlo returns on decisions of episodes that it has not seen.

    An episode that was cut off by time has no return beyond its end; its tail counts as it stands, since a time-out is a failure.
    """
    index_B = torch.from_numpy(rng.permutation(len(held_out))[:samples])
    batch = held_out.batch(index_B)
    return_B = batch.return_B.numpy()
    q_B = critic.q_values(batch.observation, batch.action_BHA).min(0).values.numpy()
    value_B = critic.value(batch.observation).numpy()
    episode_B = held_out.episode_W[index_B].numpy()
    correlation = stats.spearmanr(q_B, return_B).statistic if np.ptp(return_B) > 0 and np.ptp(q_B) > 0 else 0.0
    right_EE, all_EE = _pair_counts(q_B - value_B, return_B, value_B, episode_B)
    accuracy = _accuracy(right_EE.sum(), all_EE.sum())
    count = len(all_EE)
    weight_ME = rng.multinomial(count, np.full(count, 1 / count), BOOTSTRAP_DRAWS)  # how often each episode is drawn
    resampled = [_accuracy(w @ right_EE @ w, w @ all_EE @ w) for w in weight_ME]
    return Calibration(len(index_B), count, float(correlation), accuracy, float(np.quantile(resampled, QUANTILE)))


def _pair_counts(
    advantage_B: np.ndarray, return_B: np.ndarray, value_B: np.ndarray, episode_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of episodes, how many pairs of their decisions of like value are ordered rightly, and how many there are: (E, E)."""
    episodes, number_B = np.unique(episode_B, return_inverse=True)
    right_EE, all_EE = np.zeros((2, len(episodes), len(episodes)))
    edges = np.quantile(value_B, np.linspace(0, 1, VALUE_BINS + 1)[1:-1])
    bin_B = np.digitize(value_B, edges)
    residual_B = return_B - value_B
    for number in range(VALUE_BINS):
        rows = np.flatnonzero(bin_B == number)
        wanted = residual_B[rows][:, None] - residual_B[rows]
        said = advantage_B[rows][:, None] - advantage_B[rows]
        mine, other = np.broadcast_arrays(number_B[rows][:, None], number_B[rows])
        counted = (mine != other) & (wanted != 0) & (said != 0)
        right = (np.sign(wanted) == np.sign(said)) & counted
        np.add.at(all_EE, (mine[counted], other[counted]), 1)
        np.add.at(right_EE, (mine[right], other[right]), 1)
    return right_EE, all_EE


def _accuracy(right: float, pairs: float) -> float:
    return float(right / pairs) if pairs else 0.5
