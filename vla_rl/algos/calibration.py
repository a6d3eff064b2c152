"""Whether a critic ranks better than chance on episodes that it has not seen: states by V, actions by Q.

It decides if a policy-gradient step is worth taking: reproductions of RL-100 (arXiv 2510.14830) found a Q whose ranking was a coin flip
(peg insertion, 51 %) while its estimates of the policy rose.

Actions are harder to judge than they look. Q - V and what was earned above V share the error of V, so that a Q which knows nothing but
the state orders more than half of the pairs rightly. Here the taken action is compared with another one that the same policy drew in the
same state: where actions do not matter, either could have been taken, and any Q is right half of the time, whatever it errs about states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from vla_rl.algos.critic import Critic, executed_actions
from vla_rl.data.decisions import Decisions
from vla_rl.data.reader import PROVENANCE_PREFIX, EpisodeData
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.seeding import numpy_generator, torch_generator

VALUE_BINS = 10  # states of like value, within which actions are compared
BOOTSTRAP_DRAWS = 500
QUANTILE = 0.05  # one-sided


@dataclass(frozen=True)
class Calibration:
    """How a critic ranks held-out decisions; bounds are one-sided, 95 %, by a bootstrap over episodes.

    decisions, episodes: what it was judged on
    value_correlation: Spearman's, of V against the discounted return that followed; 0 is chance
    value_low: its bound
    action_decisions: decisions of the policy itself, for the pairs
    pair_accuracy: of pairs of these in states of like value and different episodes, the share whose order by Q above that of another
        action of the policy's is that by return above value; 0.5 is chance
    pair_low: its bound
    """

    decisions: int
    episodes: int
    value_correlation: float
    value_low: float
    action_decisions: int
    pair_accuracy: float
    pair_low: float

    @property
    def states_at_chance(self) -> bool:
        """Whether the ranking of states may be a coin's."""
        return not self.value_low > 0

    @property
    def actions_at_chance(self) -> bool:
        """Whether the ranking of actions may be a coin's."""
        return not self.pair_low > 0.5

    def __str__(self) -> str:
        return (
            f"on {self.episodes} held-out episodes the critic's V has a rank correlation with returns of {self.value_correlation:.2f} "
            f"(95 % bound {self.value_low:.2f}), and its Q orders {100 * self.pair_accuracy:.1f} % of pairs of actions as their returns do "
            f"(95 % bound {100 * self.pair_low:.1f} %)"
        )


@torch.no_grad()
def calibrate(
    critic: Critic, policy: ChunkPolicy, held_out: Decisions, own_E: Bool[Tensor, " E"], samples: int, seed: int
) -> Calibration:
    """Compare a critic with Monte-Carlo returns on decisions of episodes that it has not seen.

    An episode that was cut off by time has no return beyond its end; its tail counts as it stands, since a time-out is a failure.

    Args:
        critic: is judged.
        policy: of whose actions Q is asked.
        held_out: decisions to judge on.
        own_E: episodes of the data that this policy rolled out, where the comparison is exact; without any, all are taken.
        samples: decisions, at most, of either kind.
        seed: of which ones, and of the policy's noise.
    """
    rng = numpy_generator(seed, "calibration")
    index_B = torch.from_numpy(rng.permutation(len(held_out))[:samples])
    found = _rank_states(critic, held_out, index_B, rng)
    taken_B = _own_decisions(held_out, own_E)
    taken_B = taken_B[torch.from_numpy(rng.permutation(len(taken_B))[:samples])]
    return Calibration(*found, *_rank_actions(critic, policy, held_out, taken_B, seed, rng))


def _rank_states(
    critic: Critic, held_out: Decisions, index_B: Tensor, rng: np.random.Generator
) -> tuple[int, int, float, float]:
    batch = held_out.batch(index_B)
    value_B, return_B = critic.value(batch.observation).numpy(), batch.return_B.numpy()
    episodes, number_B = np.unique(held_out.episode_W[index_B].numpy(), return_inverse=True)
    rows_E = [np.flatnonzero(number_B == e) for e in range(len(episodes))]

    def correlation(weight_E: np.ndarray) -> float:
        rows_B = np.concatenate([np.tile(r, w) for r, w in zip(rows_E, weight_E, strict=True)])
        varied = np.ptp(value_B[rows_B]) > 0 and np.ptp(return_B[rows_B]) > 0
        return float(stats.spearmanr(value_B[rows_B], return_B[rows_B]).statistic) if varied else 0.0

    whole = correlation(np.ones(len(episodes), int))
    return len(index_B), len(episodes), whole, _low(correlation, len(episodes), rng)


def _rank_actions(
    critic: Critic, policy: ChunkPolicy, held_out: Decisions, index_B: Tensor, seed: int, rng: np.random.Generator
) -> tuple[int, float, float]:
    if not len(index_B):  # all episodes are shorter than a decision
        return 0, 0.5, 0.5
    batch = held_out.batch(index_B)
    generator = torch_generator(seed, "other actions")
    noise_KBHA = torch.randn(policy.noise_count, len(index_B), *policy.chunk_shape, generator=generator)
    other_BHA = executed_actions(policy, batch.observation, noise_KBHA)
    taken_B, other_B = (critic.q_values(batch.observation, a).min(0).values for a in (batch.action_BHA, other_BHA))
    right_EE, all_EE = _pair_counts(
        (taken_B - other_B).numpy(),
        batch.return_B.numpy(),
        critic.value(batch.observation).numpy(),
        held_out.episode_W[index_B].numpy(),
    )

    def accuracy(weight_E: np.ndarray) -> float:
        pairs = weight_E @ all_EE @ weight_E
        return float(weight_E @ right_EE @ weight_E / pairs) if pairs else 0.5

    return len(index_B), accuracy(np.ones(len(all_EE))), _low(accuracy, len(all_EE), rng)


def own_episodes(data: EpisodeData, policy_hash: str) -> Bool[Tensor, " E"]:
    """Which episodes the policy of that hash rolled out as it is deployed, without noise for exploration."""
    if PROVENANCE_PREFIX + "policy_hash" not in data.episodes:
        return torch.zeros(data.num_episodes, dtype=torch.bool)
    own = data.episodes[PROVENANCE_PREFIX + "policy_hash"] == policy_hash
    return torch.tensor((own & (data.episodes[PROVENANCE_PREFIX + "strategy"] != "exploratory")).to_numpy(bool))


def _own_decisions(held_out: Decisions, own_E: Bool[Tensor, " E"]) -> Tensor:
    """Decisions that were really taken as such, whole ones: chunks begin every H steps from an episode's first."""
    left_W = held_out.data.episode_to_E[held_out.episode_W] - held_out.frames_W
    at_W = held_out.frames_W - held_out.data.episode_from_E[held_out.episode_W]
    whole_W = left_W >= held_out.steps
    taken_W = whole_W & own_E[held_out.episode_W] & (at_W % held_out.steps == 0)
    return torch.nonzero(taken_W if taken_W.any() else whole_W).squeeze(1)


def _low(statistic: Callable[[np.ndarray], float], count: int, rng: np.random.Generator) -> float:
    """One-sided bound by drawing each of ``count`` episodes as often as chance will have it."""
    weight_ME = rng.multinomial(count, np.full(count, 1 / count), BOOTSTRAP_DRAWS)
    return float(np.quantile([statistic(weight_E) for weight_E in weight_ME], QUANTILE))


def _pair_counts(
    advantage_B: Float[np.ndarray, " B"],
    return_B: Float[np.ndarray, " B"],
    value_B: Float[np.ndarray, " B"],
    episode_B: np.ndarray,
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
