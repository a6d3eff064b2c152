"""How often each window is drawn in weighted imitation: filtered, advantage-weighted, with a fixed share of demonstrations.

Advantage weighting: AWR (arXiv 1910.00177), weight exp(A / beta), with generalised advantages of what really happened, so that it
takes no ranking of actions by a Q function. A demonstration is an episode that no policy rolled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.data.reader import PROVENANCE_PREFIX, EpisodeData
from vla_rl.data.windows import Windows
from vla_rl.runtime.errors import UserError

SOURCE = PROVENANCE_PREFIX + "source"
Weighting = Literal["none", "success", "advantage"]


@dataclass(frozen=True)
class WeightingConfig:
    """Which windows imitation draws.

    kind: none (all alike), success (episodes that succeeded), advantage (exp(A / temperature))
    temperature: beta, in standard deviations of the advantage
    gae_lambda: lambda of the advantages, per control step (1: return minus value)
    largest: largest weight, as a multiple of an average decision's
    demo_share: share of the draws that are demonstrations, however many roll-outs there are (0: by their number)
    """

    kind: Weighting = "advantage"
    temperature: float = 0.05
    gae_lambda: float = 0.8
    largest: float = 100.0
    demo_share: float = 0.1

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.largest >= 1 and 0 <= self.demo_share <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(
                "temperature wants a positive number, largest at least 1, demo_share and gae_lambda numbers in [0, 1], got "
                f"{self.temperature}, {self.largest}, {self.demo_share}, {self.gae_lambda}"
            )


def is_demonstration(data: EpisodeData) -> Tensor:
    """Which episodes no policy rolled out: (E,) bool."""
    if SOURCE not in data.episodes:
        return torch.ones(data.num_episodes, dtype=torch.bool)
    return torch.tensor((data.episodes[SOURCE] != "policy").to_numpy(bool))


def window_weights(
    windows: Windows,
    config: WeightingConfig,
    advantage_N: Float[Tensor, " N"] | None = None,
    leave_out: Sequence[int] = (),
) -> Float[Tensor, " W"]:
    """Weight of each window.

    Args:
        windows: of the merged data.
        config: which weights.
        advantage_N: of every frame, for kind ``advantage``.
        leave_out: episodes that are not drawn.

    Raises:
        UserError: nothing is left to draw, or advantages are missing.
    """
    data = windows.data
    episode_W = data.frame_episode()[windows.frames_W]
    weight_W = torch.ones(len(windows))
    if config.kind == "success":
        weight_W = torch.tensor(data.episodes["success"].to_numpy(bool))[episode_W].float()
    elif config.kind == "advantage":
        if advantage_N is None:
            raise UserError("advantage weighting wants a critic; use the weighting success or none")
        advantage_W = advantage_N[windows.frames_W]
        spread = advantage_W.std(correction=0).clamp_min(1e-8)
        exponent_W = (advantage_W - advantage_W.mean()) / spread / config.temperature
        weight_W = exponent_W.clamp_max(torch.tensor(config.largest).log()).exp()
    weight_W[torch.isin(episode_W, torch.tensor(list(leave_out), dtype=episode_W.dtype))] = 0.0
    if not bool(weight_W.sum() > 0):
        raise UserError(f"none of the {data.num_episodes} episodes succeeded; there is nothing to imitate")
    demo_W = is_demonstration(data)[episode_W]
    of_demos, of_rollouts = weight_W[demo_W].sum(), weight_W[~demo_W].sum()
    if config.demo_share and bool(of_demos > 0) and bool(of_rollouts > 0):
        share = config.demo_share
        weight_W = torch.where(demo_W, weight_W * share / of_demos, weight_W * (1 - share) / of_rollouts)
    return weight_W / weight_W.sum()
