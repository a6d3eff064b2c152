"""What a denoiser net is: noisy chunk, noise time per action step, condition -> chunk."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass

import draccus
from jaxtyping import Float
from torch import Tensor, nn


class DenoiserNet(nn.Module, ABC):
    """Maps a noisy chunk to a chunk of the same shape.

    Every step of the chunk has its own noise time, so that a clean prefix (tau = 1) can be conditioned on.
    No dropout and no BatchNorm: the likelihood path must be a function (design.md). What its last layer reads is a description of
    observation and action that a pseudo-count can use at no further cost.
    """

    feature_dim: int

    def forward(
        self,
        x_BHA: Float[Tensor, "B H A"],
        tau_BH: Float[Tensor, "B H"],
        condition_BOD: Float[Tensor, "B O D"],
        jump_BH: Float[Tensor, "B H"] | None = None,
    ) -> Float[Tensor, "B H A"]:
        """Return the net's output for each action step."""
        return self.output(self.hidden(x_BHA, tau_BH, condition_BOD, jump_BH))

    @abstractmethod
    def hidden(self, x_BHA: Tensor, tau_BH: Tensor, condition_BOD: Tensor, jump_BH: Tensor | None = None) -> Tensor:
        """Return what the last layer reads.

        Args:
            x_BHA: noisy chunk.
            tau_BH: noise time of each step; one row may stand for all (the same goes for jump_BH).
            condition_BOD: what the policy sees; of fewer rows than the chunk has, each stands for equally many, one after another.
            jump_BH: how much later the noise time is that the output leads to, for nets that were built with ``jumps``.
        """

    @abstractmethod
    def output(self, hidden: Tensor) -> Float[Tensor, "B H A"]:
        """The last layer."""

    @abstractmethod
    def features(self, hidden: Tensor) -> Float[Tensor, "B F"]:
        """Pool ``hidden`` into one vector of ``feature_dim`` numbers."""


def repeat_to(x: Tensor, other: Tensor) -> Tensor:
    """Each row equally often, one after another, until there are as many as the other has."""
    rows, given = other.shape[0], x.shape[0]
    if rows == given:
        return x
    if not given or rows % given:
        raise ValueError(f"{given} rows cannot stand for {rows}")
    return x.repeat_interleave(rows // given, 0)


@dataclass(frozen=True)
class NetConfig(draccus.ChoiceRegistry):
    """Base of the nets' configs."""

    def build(
        self, *, action_dim: int, chunk_steps: int, observation_steps: int, condition_dim: int, jumps: bool = False
    ) -> DenoiserNet:
        """Build the net for A, H, O and D, with a second noise-time input if ``jumps``."""
        raise TypeError(f"{type(self).__name__} builds no net")


def discover_nets() -> None:
    """Import every module of this package, so that its configs are registered."""
    import vla_rl.nets

    for module in pkgutil.iter_modules(vla_rl.nets.__path__):
        importlib.import_module(f"vla_rl.nets.{module.name}")
