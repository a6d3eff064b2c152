"""A gate without a model: how well a policy explains what turned out well in episodes that nothing was trained on.

Models and Q functions are asked about actions that nobody took; this estimate asks about recorded actions only, and so also turns down
what is better than all of them. It is minus the denoising error on held-out windows, weighted by exp(A / beta) with generalised advantages
(AWR's objective, arXiv 1910.00177): an update that leaves the good actions loses, wherever it goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.algos.weights import WeightingConfig, is_demonstration, window_weights
from vla_rl.data.decisions import Decisions
from vla_rl.data.windows import Windows
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.seeding import torch_generator
from vla_rl.types import Observation

DRAWS = 8  # of noise and noise time, the same for every policy
WINDOWS_PER_EPISODE = 32
MILD = WeightingConfig(kind="advantage", temperature=0.5, largest=20.0, demo_share=0.0)


class HeldOutLikelihood:
    """Estimates for each draw of the noise and each held-out episode."""

    def __init__(self, unseen: Decisions, value: Callable[[Observation], Tensor], chunk_steps: int, seed: int) -> None:
        """Choose windows and weights once.

        Args:
            unseen: held-out decisions.
            value: of states, for the advantages.
            chunk_steps: H of the policies' chunks.
            seed: of windows and noise.
        """
        held_out = unseen.episode_W.unique()
        rolled_out = held_out[~is_demonstration(unseen.data)[held_out]]
        episodes = (
            rolled_out if len(rolled_out) > 1 else held_out
        ).tolist()  # earlier policies have seen the demonstrations
        self.windows = Windows(unseen.data, unseen.observation_steps, chunk_steps, episodes)
        advantage_N = unseen.frame_advantage(value, MILD.gae_lambda)
        weight_W = window_weights(self.windows, MILD, advantage_N) * len(self.windows)
        of_window_W = unseen.data.frame_episode()[self.windows.frames_W]
        generator = torch_generator(seed, "likelihood")
        chosen = []
        for episode in episodes:
            mine = torch.nonzero(of_window_W == episode)[:, 0]
            chosen.append(mine[torch.randint(0, len(mine), (WINDOWS_PER_EPISODE,), generator=generator)])
        self.window_B = torch.cat(chosen)
        self.weight_B = weight_W[self.window_B]
        self.seed = seed

    @torch.no_grad()
    def evaluate(self, policy: ChunkPolicy) -> Float[Tensor, "E N"]:
        """Minus the weighted error, for each draw and episode."""
        generator = torch_generator(self.seed, "likelihood noise")
        batch = self.windows.batch(self.window_B)
        values = []
        for _ in range(DRAWS):
            draw = policy.draw(len(self.window_B), generator)
            keep_BH = ~batch.is_pad_BH & ~draw.prefix_BH
            keep_BH[:, policy.config.execute_steps :] = False  # what is not executed does not count
            error_BH = policy.error(batch, draw)
            error_B = (error_BH * keep_BH).sum(1) / keep_BH.sum(1).clamp_min(1)
            values.append(-(self.weight_B * error_B).view(-1, WINDOWS_PER_EPISODE).mean(1))
        return torch.stack(values)

    def error(self, policy: ChunkPolicy) -> float:
        """The weighted error over all draws and episodes."""
        return -float(self.evaluate(policy).mean())
