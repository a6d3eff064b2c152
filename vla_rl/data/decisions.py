"""Recorded episodes as decisions: every frame begins one, which ran up to H control steps, with its real length and what came after.

A chunk critic learns from all start offsets (RL-100's code uses every H-th only); a decision near the end of an episode is as
long as what is left, and its successor is the true final observation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import signal
from torch import Tensor

from vla_rl.data import schema
from vla_rl.data.reader import EpisodeData
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import numpy_generator
from vla_rl.types import ACTION, Observation

PART = 16_384  # rows whose histories are held at once


def discounted_return(
    reward_N: Float[Tensor, " N"], episode_from_E: Int[Tensor, " E"], episode_to_E: Int[Tensor, " E"], discount: float
) -> Float[Tensor, " N"]:
    """Sum of the discounted rewards from each frame to the end of its episode."""
    return_N = np.zeros(len(reward_N))
    for first, last in zip(episode_from_E.tolist(), episode_to_E.tolist(), strict=True):
        reversed_T = reward_N[first:last].flip(0).double().numpy()
        return_N[first:last] = signal.lfilter([1.0], [1.0, -discount], reversed_T)[::-1]  # G_t = r_t + gamma G_{t+1}
    return torch.from_numpy(return_N).float()


def split_episodes(data: EpisodeData, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Episodes to learn from and to be judged on; where it can be, both have successes and failures."""
    rng = numpy_generator(seed, "held out")
    success_E = data.episodes["success"].to_numpy(bool)
    held: list[int] = []
    for group in (np.flatnonzero(success_E), np.flatnonzero(~success_E)):
        count = min(max(round(share * len(group)), 1), len(group) - 1)  # none of a group of one
        held += rng.permutation(group)[: max(count, 0)].tolist()
    if not held:  # one success, one failure
        held = [int(rng.integers(data.num_episodes))]
    return sorted(set(range(data.num_episodes)) - set(held)), sorted(held)


@dataclass(frozen=True)
class DecisionBatch:
    """B decisions; actions past the end of the episode repeat the last one and are marked.

    ``return_B`` is what followed to the end of the episode, discounted; an episode cut off by time earned nothing after it.
    """

    observation: Observation
    action_BHA: Float[Tensor, "B H A"]
    is_pad_BH: Bool[Tensor, "B H"]
    reward_B: Float[Tensor, " B"]
    return_B: Float[Tensor, " B"]
    discount_B: Float[Tensor, " B"]
    next_observation: Observation
    terminated_B: Bool[Tensor, " B"]


class Decisions:
    """Decisions of H control steps over some episodes, by number in [0, len)."""

    def __init__(
        self,
        data: EpisodeData,
        observation_steps: int,
        decision_steps: int,
        discount: float,
        episodes: Sequence[int] | None = None,
        reward_N: Float[Tensor, " N"] | None = None,
    ) -> None:
        """Index the decisions.

        Args:
            data: the frames.
            observation_steps: O.
            decision_steps: H, control steps that a decision runs.
            discount: gamma per control step.
            episodes: episodes to draw from (None: all).
            reward_N: rewards of the frames, where they are not the recorded ones.

        Raises:
            UserError: the data have no rewards, or lack how episodes end.
        """
        if schema.REWARD not in data.columns and reward_N is None:
            raise UserError(
                f"reinforcement learning wants the column {schema.REWARD!r}, the data have {sorted(data.columns)}"
            )
        finals = [schema.FINAL_PREFIX + k for k in data.observation_spec]
        missing = [k for k in ("terminated", *finals) if k not in data.episodes or data.episodes[k].isna().any()]
        if missing:
            raise UserError(
                f"reinforcement learning wants {missing[0]!r} of every episode; data sets of 'vla-rl collect' have it"
            )
        self.data = data
        self.observation_steps = observation_steps
        self.steps = decision_steps
        self.discount = discount
        self.reward_N = data.columns[schema.REWARD].float().flatten() if reward_N is None else reward_N
        self.return_N = discounted_return(self.reward_N, data.episode_from_E, data.episode_to_E, discount)
        episode_N = data.frame_episode()
        chosen = list(range(data.num_episodes)) if episodes is None else list(episodes)
        self.frames_W = torch.nonzero(torch.isin(episode_N, torch.tensor(chosen))).squeeze(1)
        self.episode_W = episode_N[self.frames_W]
        self._from_N, self._to_N = data.episode_from_E[episode_N], data.episode_to_E[episode_N]
        self._episode_N = episode_N
        self._history_O = torch.arange(1 - observation_steps, 1)
        self._future_H = torch.arange(decision_steps)
        self._terminated_E = torch.tensor(data.episodes["terminated"].to_numpy(bool))
        self._final: Mapping[str, Tensor] = {k: torch.from_numpy(data.final(k)) for k in data.observation_spec}

    def __len__(self) -> int:
        return len(self.frames_W)

    @functools.cached_property
    def outcomes(self) -> tuple[Float[Tensor, " W"], Bool[Tensor, " W"]]:
        """Reward of every decision, and whether the task ended in it."""
        batches = [self.batch(rows) for rows in torch.arange(len(self)).split(PART)]
        return torch.cat([b.reward_B for b in batches]), torch.cat([b.terminated_B for b in batches])

    @functools.cached_property
    def reward_bounds(self) -> tuple[float, float]:
        """Smallest and largest reward of a decision."""
        reward_W, _ = self.outcomes
        return float(reward_W.min()), float(reward_W.max())

    def first(self) -> Int[Tensor, " E"]:
        """Number of each episode's first decision."""
        return torch.nonzero(self.frames_W == self._from_N[self.frames_W]).squeeze(1)

    def frame_advantage(
        self, value: Callable[[Observation], Float[Tensor, " B"]], gae_lambda: float
    ) -> Float[Tensor, " N"]:
        """GAE (arXiv 1506.02438, eq. 16) of each frame of the data, one control step at a time.

        Args:
            value: of states.
            gae_lambda: lambda per control step; 1 is the return above the value.
        """
        data = self.data
        episode_E = torch.arange(data.num_episodes)
        value_N = _in_parts(value, self, torch.arange(data.num_frames), self._episode_N)
        final_E = _in_parts(value, self, data.episode_to_E, episode_E) * ~self._terminated_E
        next_N = torch.cat([value_N[1:], final_E[-1:]])
        next_N[data.episode_to_E - 1] = final_E
        delta_N = self.reward_N + self.discount * next_N - value_N
        return discounted_return(delta_N, data.episode_from_E, data.episode_to_E, self.discount * gae_lambda)

    def observe(self, frame_B: Int[Tensor, " B"], episode_B: Int[Tensor, " B"]) -> Observation:
        """History up to each frame; one past an episode's last frame is its final observation."""
        low_B1, high_B1 = self.data.episode_from_E[episode_B][:, None], self.data.episode_to_E[episode_B][:, None]
        wanted_BO = torch.maximum(frame_B[:, None] + self._history_O, low_B1)
        after_BO = wanted_BO >= high_B1
        features = {}
        for key, final_ED in self._final.items():
            rows_BOD = self.data.columns[key][torch.minimum(wanted_BO, high_B1 - 1)]
            after_BO1 = after_BO.reshape(*after_BO.shape, *[1] * (rows_BOD.ndim - 2))  # points have two axes
            features[key] = torch.where(after_BO1, final_ED[episode_B][:, None], rows_BOD)
        return Observation.from_features(features)

    def batch(self, index_B: Int[Tensor, " B"]) -> DecisionBatch:
        """Gather decisions."""
        frame_B = self.frames_W[index_B]
        episode_B = self._episode_N[frame_B]
        wanted_BH = frame_B[:, None] + self._future_H
        last_B1 = self._to_N[frame_B][:, None] - 1
        is_pad_BH = wanted_BH > last_B1
        inside_BH = torch.minimum(wanted_BH, last_B1)
        discount_H = self.discount**self._future_H
        reward_B = (self.reward_N[inside_BH] * discount_H * ~is_pad_BH).sum(1)
        length_B = (~is_pad_BH).sum(1)
        after_B = frame_B + length_B
        ends_B = after_B == last_B1[:, 0] + 1
        return DecisionBatch(
            self.observe(frame_B, episode_B),
            self.data.columns[ACTION][inside_BH],
            is_pad_BH,
            reward_B,
            self.return_N[frame_B],
            self.discount**length_B,
            self.observe(after_B, episode_B),
            ends_B & self._terminated_E[episode_B],
        )


def _in_parts(
    value: Callable[[Observation], Tensor], decisions: Decisions, frame_N: Tensor, episode_N: Tensor
) -> Float[Tensor, " N"]:
    """Values at frames, a part at a time, since all their histories at once may be large."""
    parts = zip(frame_N.split(PART), episode_N.split(PART), strict=True)
    return torch.cat([value(decisions.observe(f, e)) for f, e in parts])
