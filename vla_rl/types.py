"""The records that cross borders, and THE legend of shapes.

Arrays carry their shape as a suffix: ``B`` batch, ``O`` observation steps, ``H`` chunk steps, ``A`` action
dims, ``S`` state dims, ``D`` features, ``K`` denoising steps, ``N`` candidates, ``E`` ensemble. So
``action_BHA`` is a batch of chunks of actions. Noise time: tau = 0 is noise, tau = 1 is the action. Actions
are normalised to [-1, 1] inside a policy and in the units of their ``ActionSpec`` outside it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vla_rl.runtime.errors import UserError

STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
IMAGE_PREFIX = "observation.images."
POINTS = "observation.points"
LATENT = "observation.latent"  # what a frozen encoder makes of pictures and points, in their place
ACTION = "action"

ActionMode = Literal["absolute", "delta", "velocity", "effort"]
MOVES = ("delta", "velocity")  # modes of actions in which zero is standing still


class SpecMismatchError(ValueError):
    """Two parts of a run disagree on what an action or an observation is."""


@dataclass(frozen=True)
class ActionSpec:
    """What an action means: one entry per action dimension, plus the rate at which actions are executed.

    Travels dataset -> checkpoint -> robot; ``require_equal`` is called at each border.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mode: ActionMode
    control_hz: float

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.units), len(self.low), len(self.high)}
        if len(lengths) != 1 or not self.names:
            raise UserError(f"names, units, low and high of an action want one entry per dimension, got {lengths}")
        if not all(np.isfinite(lo) and np.isfinite(hi) and lo < hi for lo, hi in zip(self.low, self.high, strict=True)):
            raise UserError(f"action limits want finite low < high, got low {self.low}, high {self.high}")
        if not self.control_hz > 0:
            raise UserError(f"control_hz wants a positive rate, got {self.control_hz}")

    @property
    def dim(self) -> int:
        """Number of action dimensions A."""
        return len(self.names)

    def low_array(self) -> np.ndarray:
        """Lower limits, (A,) float32."""
        return np.asarray(self.low, dtype=np.float32)

    def high_array(self) -> np.ndarray:
        """Upper limits, (A,) float32."""
        return np.asarray(self.high, dtype=np.float32)

    def clip(self, action_A: np.ndarray) -> np.ndarray:
        """Return the action within its limits; any leading batch shape."""
        low_A, high_A = self._limits
        return np.minimum(np.maximum(action_A, low_A), high_A).astype(np.float32, copy=False)

    def clip_tensor(self, action: Tensor) -> Tensor:
        """Return the action within its limits, as ``clip`` does for arrays."""
        low_A, high_A = (torch.from_numpy(limit).to(action.device) for limit in self._limits)
        return torch.minimum(torch.maximum(action, low_A), high_A)

    @functools.cached_property
    def _limits(self) -> tuple[np.ndarray, np.ndarray]:
        return self.low_array(), self.high_array()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ActionSpec:
        """Undo ``to_dict``."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**plain)

    def require_equal(self, other: ActionSpec, *, mine: str, theirs: str) -> None:
        """Raise ``SpecMismatchError`` that names the first field in which the two differ."""
        for name, value in asdict(self).items():
            if value != getattr(other, name):
                raise SpecMismatchError(
                    f"action spec of {mine} and of {theirs} differ in {name}: {value} and {getattr(other, name)}"
                )


@dataclass(frozen=True)
class FeatureSpec:
    """Shape and channel names of one observation feature, without batch and time."""

    shape: tuple[int, ...]
    names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON and YAML."""
        return {"shape": list(self.shape), "names": list(self.names)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> FeatureSpec:
        """Undo ``to_dict``."""
        return cls(shape=tuple(raw["shape"]), names=tuple(raw.get("names") or ()))


ObservationSpec = dict[str, FeatureSpec]


def kind_of(key: str) -> type[np.generic]:
    """Type of a feature's numbers: pictures are bytes, all else is float32."""
    return np.uint8 if key.startswith(IMAGE_PREFIX) else np.float32


def require_same_observation(mine: ObservationSpec, theirs: ObservationSpec, *, me: str, them: str) -> None:
    """Raise ``SpecMismatchError`` unless ``theirs`` offers each feature of ``mine`` in the same shape."""
    for key, feature in mine.items():
        if key not in theirs:
            raise SpecMismatchError(f"{me} wants the observation {key!r}, which {them} lacks; it has {sorted(theirs)}")
        if feature.shape != theirs[key].shape:
            raise SpecMismatchError(
                f"observation {key!r} has shape {feature.shape} in {me} and {theirs[key].shape} in {them}"
            )


@dataclass(frozen=True)
class Observation:
    """What a policy sees: a batch of histories of O steps, oldest first. Not every policy uses every part.

    latent_BOL: stands for pictures and points, where an encoder that no longer changes has read them already
    """

    state_BOS: Float[Tensor, "B O S"]
    environment_state_BOS: Float[Tensor, "B O Se"] | None = None
    images: Mapping[str, UInt8[Tensor, "B O C h w"]] = field(default_factory=dict)
    points_BOP3: Float[Tensor, "B O P 3"] | None = None
    latent_BOL: Float[Tensor, "B O L"] | None = None
    task: tuple[str, ...] | None = None

    @classmethod
    def from_features(cls, features: Mapping[str, Tensor], task: tuple[str, ...] | None = None) -> Observation:
        """Build from tensors keyed by dataset feature name, each (B, O, ...)."""
        images = {k.removeprefix(IMAGE_PREFIX): v for k, v in features.items() if k.startswith(IMAGE_PREFIX)}
        return cls(
            state_BOS=features[STATE],
            environment_state_BOS=features.get(ENVIRONMENT_STATE),
            images=images,
            points_BOP3=features.get(POINTS),
            latent_BOL=features.get(LATENT),
            task=task,
        )

    def features(self) -> dict[str, Tensor]:
        """Undo ``from_features``."""
        parts = {STATE: self.state_BOS, ENVIRONMENT_STATE: self.environment_state_BOS}
        parts |= {POINTS: self.points_BOP3, LATENT: self.latent_BOL}
        named = {k: v for k, v in parts.items() if v is not None}
        return named | {IMAGE_PREFIX + name: image for name, image in self.images.items()}

    @property
    def batch_size(self) -> int:
        """Number of histories B."""
        return self.state_BOS.shape[0]

    def to(self, device: torch.device | str) -> Observation:
        """Return the observation on another device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return Observation(
            state_BOS=self.state_BOS.to(device),
            environment_state_BOS=move(self.environment_state_BOS),
            images={k: v.to(device) for k, v in self.images.items()},
            points_BOP3=move(self.points_BOP3),
            latent_BOL=move(self.latent_BOL),
            task=self.task,
        )


@dataclass(frozen=True)
class ActionChunk:
    """Actions of the next H control steps in the units of ``spec``, of which the first ``execute_steps`` are meant to run."""

    action_BHA: Float[Tensor, "B H A"]
    execute_steps: int
    spec: ActionSpec
