"""Windows over episodes by index: a history of O observations and a chunk of H actions around each frame.

The same samples as ``LeRobotDataset`` with ``delta_timestamps`` (clamped to the episode, padding marked), without going
through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_rl.data.reader import EpisodeData
from vla_rl.types import ACTION, Observation


@dataclass(frozen=True)
class WindowBatch:
    """A batch of windows. ``is_pad_BH`` marks actions past the end of the episode; they repeat its last action."""

    observation: Observation
    action_BHA: Float[Tensor, "B H A"]
    is_pad_BH: Bool[Tensor, "B H"]

    def to(self, device: torch.device | str) -> WindowBatch:
        """Return the batch on another device."""
        return WindowBatch(self.observation.to(device), self.action_BHA.to(device), self.is_pad_BH.to(device))


class Windows:
    """One window per frame of the chosen episodes; pictures among the observations have to be decoded (``EpisodeData.seen``)."""

    def __init__(
        self, data: EpisodeData, observation_steps: int, chunk_steps: int, episodes: Sequence[int] | None = None
    ) -> None:
        """Index the windows.

        Args:
            data: the frames.
            observation_steps: O, the newest being the frame itself.
            chunk_steps: H, the first being the action at the frame.
            episodes: episodes to draw from (None: all).
        """
        self.data = data
        episode_N = data.frame_episode()
        if episodes is None:
            self.frames_W = torch.arange(data.num_frames)
        else:
            chosen_E = torch.zeros(data.num_episodes, dtype=torch.bool)
            chosen_E[list(episodes)] = True
            self.frames_W = torch.nonzero(chosen_E[episode_N]).squeeze(1)
        self._from_N = data.episode_from_E[episode_N]
        self._to_N = data.episode_to_E[episode_N]
        self._history_O = torch.arange(1 - observation_steps, 1)
        self._future_H = torch.arange(chunk_steps)

    def __len__(self) -> int:
        return len(self.frames_W)

    def gather(
        self, key: str, window_B: Int[Tensor, " B"], delta_D: Int[Tensor, " D"]
    ) -> tuple[Tensor, Bool[Tensor, "B D"]]:
        """Column ``key`` at offsets ``delta_D`` (steps) from each window's frame: (B, D, ...) and which of it is padding."""
        frame_B1 = self.frames_W[window_B][:, None]
        wanted_BD = frame_B1 + delta_D
        low_B1, high_B1 = self._from_N[frame_B1], self._to_N[frame_B1]
        inside_BD = torch.minimum(torch.maximum(wanted_BD, low_B1), high_B1 - 1)
        return self.data.columns[key][inside_BD], (wanted_BD < low_B1) | (wanted_BD >= high_B1)

    def chunks(self) -> Float[Tensor, "W H A"]:
        """The actions of all windows."""
        return self.gather(ACTION, torch.arange(len(self)), self._future_H)[0]

    def padding(self, window_B: Int[Tensor, " B"]) -> Bool[Tensor, "B H"]:
        """Which actions of each chunk are padding, without gathering anything else."""
        frame_B1 = self.frames_W[window_B][:, None]
        return frame_B1 + self._future_H >= self._to_N[frame_B1]

    def batch(self, window_B: Int[Tensor, " B"]) -> WindowBatch:
        """Gather windows by number in [0, len)."""
        features = {k: self.gather(k, window_B, self._history_O)[0] for k in self.data.observation_spec}
        action_BHA, is_pad_BH = self.gather(ACTION, window_B, self._future_H)
        return WindowBatch(Observation.from_features(features, self.instructions(window_B)), action_BHA, is_pad_BH)

    def instructions(self, window_B: Int[Tensor, " B"]) -> tuple[str, ...]:
        """What each window's episode was to do."""
        return self.data.instructions(self.frames_W[window_B])
