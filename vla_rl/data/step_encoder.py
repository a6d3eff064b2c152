"""What actor and critic of a residual read in a step: normalised state, actions, and the step's place in its chunk.

Absolute actions are read relative to the newest state of the same names, where there is one: targets a hand's breadth away say what is
done, their places on the table do not.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.data.normalizer import Normalizer
from vla_rl.data.steps import StepContext
from vla_rl.runtime.errors import UserError
from vla_rl.types import ENVIRONMENT_STATE, LATENT, STATE, ActionSpec, ObservationSpec

SMALLEST_SPREAD = 0.01  # of half the range of actions: what hardly varies is not blown up
FARTHEST = 10.0  # standard deviations; a state further out says no more


class StepEncoder(nn.Module):
    """Maps steps to vectors; its statistics are fitted once and travel with the weights."""

    def __init__(self, observation_spec: ObservationSpec, action_spec: ActionSpec, chunk_steps: int) -> None:
        """Set up unfitted.

        Args:
            observation_spec: of the environment; states and latents are read.
            action_spec: of base and environment.
            chunk_steps: actions of the base's chunk that are executed.

        Raises:
            UserError: the observations hold no state.
        """
        super().__init__()
        self.keys = [k for k in (STATE, ENVIRONMENT_STATE, LATENT) if k in observation_spec]
        if not self.keys:
            raise UserError(
                f"a residual reads {STATE} or {ENVIRONMENT_STATE}, got observations {sorted(observation_spec)}"
            )
        self.observation_spec = {k: observation_spec[k] for k in self.keys}
        self.action_spec = action_spec
        self.chunk_steps = chunk_steps
        names = observation_spec[STATE].names if STATE in observation_spec else ()
        relative = action_spec.mode == "absolute" and set(action_spec.names) <= set(names)
        self._reference_A = [names.index(name) for name in action_spec.names] if relative else None
        width = sum(f.shape[0] for f in self.observation_spec.values())
        self.state = Normalizer(width)
        self.base = Normalizer(action_spec.dim)
        self.context_dim = width + action_spec.dim + 2

    def fit(self, steps: StepContext, action_BA: Float[Tensor, "B A"]) -> None:
        """Fit the statistics on rows of steps, and on what was executed in them: without a base, that alone varies."""
        self.state.load_state_dict(Normalizer.fit(self._state(steps)[:, None], "mean_std").state_dict())
        moved_BA = torch.cat([a_BA - self._reference(steps) for a_BA in (steps.base_BA, action_BA)])
        self.base.load_state_dict(Normalizer.fit(moved_BA[:, None], "mean_std").state_dict())
        half_A = torch.from_numpy(self.action_spec.high_array() - self.action_spec.low_array()) / 2
        self.base.scale_SD.copy_(torch.maximum(self.base.scale_SD, SMALLEST_SPREAD * half_A))

    def _state(self, steps: StepContext) -> Float[Tensor, "B S"]:
        return torch.cat([steps.features[k] for k in self.keys], dim=1)

    def forward(self, steps: StepContext) -> Float[Tensor, "B D"]:
        """Return the context of each step."""
        state_BS = self.state.normalize(self._state(steps)).clamp(-FARTHEST, FARTHEST)
        base_BA = self.scaled(steps.base_BA, steps)
        angle_B1 = (2 * math.pi / self.chunk_steps) * steps.phase_B[:, None]
        return torch.cat([state_BS, base_BA, angle_B1.sin(), angle_B1.cos()], dim=1)

    def scaled(self, action_BA: Float[Tensor, "B A"], steps: StepContext) -> Float[Tensor, "B A"]:
        """Actions in units of how much they vary."""
        return self.base.normalize(action_BA - self._reference(steps)).clamp(-FARTHEST, FARTHEST)

    def _reference(self, steps: StepContext) -> Tensor | float:
        """What actions are relative to: (B, A), or zero."""
        return 0.0 if self._reference_A is None else steps.features[STATE][:, self._reference_A]
