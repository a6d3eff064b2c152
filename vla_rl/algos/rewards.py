"""Rewards that learning sees: the recorded sparse success, and what may be added to it, one interface for offline and online stages.

Step and smoothness penalties: RL-100 (arXiv 2510.14830; the released configs have neither). Progress of failed episodes: SRPO (2511.15605).
What is recorded stays as it is; evaluation never sees a shaped reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vla_rl.algos.progress import ProgressConfig, progress
from vla_rl.data.episode import Episode
from vla_rl.types import ActionSpec


@dataclass(frozen=True)
class RewardConfig:
    """What is added to the recorded reward; nothing by default.

    step_penalty: taken off at every control step
    smoothness_penalty: times the squared distance of an action from the mean of those before it, in halves of the action's range
    smoothness_window: how many actions before it
    progress: reward of failed episodes for how near they came to the run's own successes
    """

    step_penalty: float = 0.0
    smoothness_penalty: float = 0.0
    smoothness_window: int = 4
    progress: ProgressConfig = field(default_factory=ProgressConfig)

    def __post_init__(self) -> None:
        if self.step_penalty < 0 or self.smoothness_penalty < 0 or self.smoothness_window < 1:
            raise ValueError(
                "step_penalty and smoothness_penalty want numbers >= 0, smoothness_window at least 1, got "
                f"{self.step_penalty}, {self.smoothness_penalty}, {self.smoothness_window}"
            )

    @property
    def plain(self) -> bool:
        """Whether the recorded reward is left as it is."""
        return not (self.step_penalty or self.smoothness_penalty or self.progress.weight)


def roughness(action_TA: np.ndarray, spec: ActionSpec, window: int) -> np.ndarray:
    """Squared distance of each action from the mean of up to ``window`` before it, over half the range, meaned over A; 0 at first: (T,)."""
    half_A = (spec.high_array() - spec.low_array()) / 2
    unit_TA = action_TA / half_A
    summed = np.concatenate([np.zeros((1, unit_TA.shape[1])), np.cumsum(unit_TA, axis=0)])
    end_T = np.arange(len(unit_TA))
    begin_T = np.maximum(end_T - window, 0)
    mean_TA = (summed[end_T] - summed[begin_T]) / np.maximum(end_T - begin_T, 1)[:, None]
    rough_T = ((unit_TA - mean_TA) ** 2).mean(1)
    rough_T[0] = 0.0
    return rough_T


def shape_rewards(
    episodes: Sequence[Episode], spec: ActionSpec, config: RewardConfig, generator: torch.Generator
) -> list[np.ndarray]:
    """Rewards of each step of each episode, (T,) float32; failures are measured against the successes among ``episodes``.

    A part of an episode that the collection cut off earns no progress: it has not failed yet.
    """
    rewards = [e.reward_T.astype(np.float32).copy() for e in episodes]
    for episode, reward_T in zip(episodes, rewards, strict=True):
        reward_T -= config.step_penalty
        if config.smoothness_penalty:
            reward_T -= config.smoothness_penalty * roughness(episode.action_TA, spec, config.smoothness_window)
    if config.progress.weight:
        ended = [i for i, e in enumerate(episodes) if e.terminated or e.truncated]
        found_E = progress([episodes[i] for i in ended], config.progress, generator) if ended else np.zeros(0)
        for i, share in zip(ended, found_E, strict=True):
            if not episodes[i].success:
                rewards[i][-1] += config.progress.weight * share
    return rewards
