"""One finished episode in memory: what was seen, what was executed, how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vla_rl.runtime.errors import UserError

Provenance = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Episode:
    """T control steps. Actions are those executed, after clamping and noise, in the units of the action spec.

    observations: by feature name, (T + 1, ...) float32, or uint8 of pictures; the last row is the true final observation
    action_TA: executed actions; intended_TA: what the policy or the expert wanted
    reward_T, success_T: of the step that begins at each observation
    terminated, truncated: how the episode ended; never both
    instruction: the task in words
    provenance: source ("expert", "policy", "human", "import", "replay"), round, scene_seed, strategy, policy_hash; and diverged, the
        reason, where the simulation broke down in the last step
    intervened_T: steps in which a human took over from the policy (None: nobody watched)
    """

    observations: Mapping[str, np.ndarray]
    action_TA: np.ndarray
    intended_TA: np.ndarray
    reward_T: np.ndarray
    success_T: np.ndarray
    terminated: bool
    truncated: bool
    instruction: str
    provenance: Provenance = field(default_factory=dict)
    intervened_T: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Number of control steps T."""
        return len(self.action_TA)

    @property
    def success(self) -> bool:
        """Whether any step succeeded."""
        return bool(self.success_T.any())

    def validate(self) -> None:
        """Raise UserError if a column has a length or a number that no episode may have."""
        if "diverged" in self.provenance:
            raise UserError(f"an episode that diverged enters no data set ({self.provenance['diverged']})")
        if self.length == 0:
            raise UserError("an episode wants at least one step, got 0")
        lengths = {k: len(v) - 1 for k, v in self.observations.items()}
        lengths |= {
            "intended_action": len(self.intended_TA),
            "next.reward": len(self.reward_T),
            "next.success": len(self.success_T),
        }
        if self.intervened_T is not None:
            lengths["intervened"] = len(self.intervened_T)
        for key, length in lengths.items():
            if length != self.length:
                raise UserError(f"ragged episode: {self.length} actions but {length} steps of {key!r}")
        columns = {**self.observations, "action": self.action_TA, "next.reward": self.reward_T}
        for key, value in columns.items():
            if value.dtype == np.uint8:
                continue  # pictures
            bad = np.argwhere(~np.isfinite(value))
            if len(bad):
                raise UserError(f"{key!r} is not finite at step {int(bad[0][0])} of an episode")
        if self.terminated and self.truncated:
            raise UserError("an episode is either terminated or truncated, got both")


class EpisodeRecorder:
    """The columns of an episode that is running."""

    def __init__(self, first: Mapping[str, np.ndarray], instruction: str, provenance: Provenance) -> None:
        self.instruction = instruction
        self.provenance = dict(provenance)
        self._observations = {k: [v] for k, v in first.items()}
        self._actions: list[np.ndarray] = []
        self._intended: list[np.ndarray] = []
        self._rewards: list[float] = []
        self._successes: list[bool] = []

    def add(
        self,
        *,
        executed_A: np.ndarray,
        intended_A: np.ndarray,
        observation: Mapping[str, np.ndarray],
        reward: float,
        success: bool,
    ) -> None:
        """Append a step and the observation after it; the arrays are kept, not copied."""
        self._actions.append(executed_A)
        self._intended.append(intended_A)
        self._rewards.append(reward)
        self._successes.append(success)
        for key, value in observation.items():
            self._observations[key].append(value)

    def episode(self, *, terminated: bool, truncated: bool) -> Episode:
        """Return the episode, which has at least one step."""
        return Episode(
            observations={k: np.stack(v) for k, v in self._observations.items()},
            action_TA=np.stack(self._actions),
            intended_TA=np.stack(self._intended),
            reward_T=np.asarray(self._rewards, np.float32),
            success_T=np.asarray(self._successes),
            terminated=terminated,
            truncated=truncated,
            instruction=self.instruction,
            provenance=self.provenance,
        )
