"""A policy's frozen encoder before everything else: each observation is encoded once, and latents are what is kept and learnt from.

With it reinforcement learning, residual, students and selectors take pictures and point clouds as they take states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.data import schema
from vla_rl.data.reader import EpisodeData
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.files import sha256_text
from vla_rl.types import LATENT, STATE, FeatureSpec, Observation

PART = 256  # pictures that are encoded at once


@torch.no_grad()
def _encode(
    policy: ChunkPolicy, features: Mapping[str, Tensor], count: int, task: tuple[str, ...] | None = None
) -> Float[Tensor, "N L"]:
    """Latents of N moments: features are (N, ...); without a task it is what the policy was told."""
    assert policy.encoder is not None
    device = policy.action_normalizer.scale_SD.device
    moments = {k: features[k][:, None] for k in policy.encoder.spec}
    observation = Observation.from_features({STATE: torch.zeros(count, 1, 0), **moments}, task).to(device)
    return policy.encoder.eval()(policy.told(observation)).latent_BOL[:, 0].cpu()


def latent_features(policy: ChunkPolicy, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What N environments show, (N, ...) by feature, with latents in the place of what the policy's encoder reads."""
    encoder = policy.encoder
    if encoder is None or LATENT in features:
        return dict(features)
    policy.require_offered(features)
    count = len(next(iter(features.values())))
    latent_NL = _encode(policy, {k: torch.from_numpy(np.asarray(features[k])) for k in encoder.spec}, count)
    return {k: v for k, v in features.items() if k not in encoder.spec} | {LATENT: latent_NL.numpy()}


class PerceivingEnv(gym.vector.VectorWrapper):
    """A vector environment that shows latents; all else of it, its attributes too, is the inner one's."""

    def __init__(self, env: gym.vector.VectorEnv, policy: ChunkPolicy) -> None:
        super().__init__(env)
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, **kwargs: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reset the inner environment."""
        features, info = self.env.reset(**kwargs)
        return latent_features(self._policy, features), info

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the inner environment."""
        features, *outcome = self.env.step(actions)
        return (latent_features(self._policy, features), *outcome)


def encoded(data: EpisodeData, policy: ChunkPolicy) -> EpisodeData:
    """Recorded episodes as a policy's frozen encoder sees them: latents in the place of pictures and points, final observations too.

    Of the observations only those are kept that the policy reads. Raises UserError where a picture cannot be read.
    """
    encoder = policy.encoder
    if encoder is None:
        return data.seen(policy.full_spec.observation_spec)
    spec = {k: f for k, f in policy.full_spec.observation_spec.items() if k not in encoder.spec}
    parts = [
        _encode(policy, {k: data.rows(k, rows) for k in encoder.spec}, len(rows), data.instructions(rows))
        for rows in torch.arange(data.num_frames).split(PART)
    ]
    columns = {k: v for k, v in data.columns.items() if k not in encoder.spec} | {LATENT: torch.cat(parts)}
    finals = [schema.FINAL_PREFIX + k for k in encoder.spec]
    episodes = data.episodes.copy()
    if all(k in episodes and episodes[k].notna().all() for k in finals):
        last = []
        for rows in torch.arange(data.num_episodes).split(PART):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            shown = {k: torch.from_numpy(data.final(k, some)) for k in encoder.spec}
            last.append(_encode(policy, shown, len(rows), data.instructions(data.episode_from_E[rows])))
        episodes[schema.FINAL_PREFIX + LATENT] = list(torch.cat(last).numpy())
    weights = "".join(sha256_text(str(v.numpy(force=True).tobytes())) for v in encoder.state_dict().values())
    return replace(
        data,
        columns=columns,
        episodes=episodes.drop(columns=[k for k in finals if k in episodes]),
        observation_spec={**spec, LATENT: FeatureSpec((encoder.latent_dim,))},
        pictures={k: p for k, p in data.pictures.items() if k not in encoder.spec},
        digest=sha256_text(data.digest + weights),
    )
