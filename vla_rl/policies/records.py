"""What goes in and out of a policy: what it was made for, the random part of a training sample, prefixes, chunks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_rl.encoders.observation import EncoderDraw
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec, FeatureSpec, ObservationSpec


@dataclass(frozen=True)
class PolicySpec:
    """What a policy was made for: the observations it reads, the actions it gives, the task."""

    observation_spec: ObservationSpec
    action_spec: ActionSpec
    task: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML."""
        return {
            "observation_spec": {k: v.to_dict() for k, v in self.observation_spec.items()},
            "action_spec": self.action_spec.to_dict(),
            "task": self.task,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> PolicySpec:
        """Undo ``to_dict``."""
        observations = {k: FeatureSpec.from_dict(v) for k, v in raw["observation_spec"].items()}
        return cls(observations, ActionSpec.from_dict(raw["action_spec"]), raw["task"])


def selected(spec: PolicySpec, names: Collection[str]) -> ObservationSpec:
    """The named features of what is observed, or all of them; raises UserError for a name that is not there."""
    there = spec.observation_spec
    for name in names:
        if name not in there:
            raise UserError(f"observations wants names among {', '.join(sorted(there))}, got {name!r}")
    return {k: f for k, f in there.items() if not names or k in names}


@dataclass(frozen=True)
class Draw:
    """The random part of a training sample: noise, what picks the noise time in [0, 1), the clean prefix, the encoder's."""

    noise_BHA: Float[Tensor, "B H A"]
    uniform_B: Float[Tensor, " B"]
    prefix_BH: Bool[Tensor, "B H"]
    encoder: EncoderDraw | None = None

    def rows(self, index: Tensor | slice) -> Draw:
        """Return some rows of the draw."""
        encoder = None if self.encoder is None else self.encoder.rows(index)
        return Draw(self.noise_BHA[index], self.uniform_B[index], self.prefix_BH[index], encoder)

    def to(self, device: torch.device | str) -> Draw:
        """Return the draw on another device."""
        encoder = None if self.encoder is None else self.encoder.to(device)
        return Draw(self.noise_BHA.to(device), self.uniform_B.to(device), self.prefix_BH.to(device), encoder)


@dataclass(frozen=True)
class Seen:
    """What the net is conditioned on, and what the encoder adds to the loss of each sample (None: nothing)."""

    condition_BOD: Float[Tensor, "B O D"]
    regularizer_B: Float[Tensor, " B"] | None = None


@dataclass(frozen=True)
class Prefix:
    """Actions that are already decided, and what the last chunk meant to do after them.

    action_BHA: those actions; after the known ones anything
    fixed_B: how many are decided: these run whatever is sampled
    known_B: how many are known, decided ones included
    """

    action_BHA: Float[Tensor, "B H A"]
    fixed_B: Int[Tensor, " B"]
    known_B: Int[Tensor, " B"]

    def mask(self) -> Bool[Tensor, "B H"]:
        """Which steps are decided."""
        return torch.arange(self.action_BHA.shape[1], device=self.action_BHA.device) < self.fixed_B[:, None]


@dataclass(frozen=True)
class Generated:
    """Chunks in normalised units, and what the net's last layer read when it ended them."""

    action_BHA: Float[Tensor, "B H A"]
    features_BF: Float[Tensor, "B F"]
