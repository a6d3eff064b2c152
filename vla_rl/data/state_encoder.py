"""Flat, normalised states (and latents of a frozen encoder) and chunks for critics and models, with statistics of their own.

They travel with the critic: a policy that is re-trained on grown data gets new normalisers, and its critic still sees what it was
trained on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.data.decisions import Decisions
from vla_rl.data.normalizer import Normalizer
from vla_rl.types import ACTION, ENVIRONMENT_STATE, LATENT, STATE, Observation, ObservationSpec


class StateEncoder(nn.Module):
    """Maps observations and executed chunks to vectors; fitted once on the data that critics and models learn from."""

    def __init__(
        self, observation_spec: ObservationSpec, observation_steps: int, action_dim: int, decision_steps: int
    ) -> None:
        """Set up unfitted, for histories of O observations and H executed actions."""
        super().__init__()
        self.keys = [k for k in (STATE, ENVIRONMENT_STATE, LATENT) if k in observation_spec]
        self._widths = [observation_spec[k].shape[0] for k in self.keys]
        self._history = observation_steps
        self.state = Normalizer(sum(self._widths))
        self.action = Normalizer(action_dim)
        self.state_dim = observation_steps * sum(self._widths)
        self.action_dim = decision_steps * action_dim

    @classmethod
    def fit(cls, decisions: Decisions) -> StateEncoder:
        """Fit on all frames of the data."""
        data = decisions.data
        encoder = cls(data.observation_spec, decisions.observation_steps, data.action_spec.dim, decisions.steps)
        states_ND = torch.cat([data.columns[k] for k in encoder.keys], dim=-1)
        encoder.state = Normalizer.fit(states_ND[:, None], "mean_std")
        encoder.action = Normalizer.fit(data.columns[ACTION][:, None], "mean_std")
        return encoder

    def encode(self, observation: Observation) -> Float[Tensor, "B D"]:
        """Histories, normalised and flat."""
        parts = observation.features()
        return self.state.normalize(torch.cat([parts[k] for k in self.keys], dim=-1)).flatten(1)

    def decode(self, state_BD: Float[Tensor, "B D"]) -> Observation:
        """Undo ``encode``."""
        rows_BOD = self.state.unnormalize(state_BD.unflatten(1, (self._history, -1)))
        return Observation.from_features(dict(zip(self.keys, rows_BOD.split(self._widths, dim=-1), strict=True)))

    def encode_action(self, action_BHA: Tensor) -> Float[Tensor, "B D"]:
        """Chunks, normalised and flat."""
        return self.action.normalize(action_BHA).flatten(1)
