"""Small data for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from vla_rl.data.episode import Episode, Provenance
from vla_rl.data.writer import EpisodeWriter
from vla_rl.nets.base import DenoiserNet
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.types import ENVIRONMENT_STATE, STATE, ActionSpec, FeatureSpec

TOY_ACTION = ActionSpec(("x", "y"), ("m", "m"), (-2.0, -2.0), (2.0, 2.0), "absolute", 20.0)
TOY_OBSERVATION = {STATE: FeatureSpec((3,)), ENVIRONMENT_STATE: FeatureSpec((4,))}
REACHING_OBSERVATION = {STATE: FeatureSpec((2,))}


class PlainNet(DenoiserNet):
    """A net that is a function written down in a test: its last layer does nothing."""

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flatten(1)


def toy_episode(rng: np.random.Generator, length: int, *, success: bool = True, scene: int = 0) -> Episode:
    """An episode whose action is a function of its state."""
    state = rng.normal(size=(length + 1, 3)).astype(np.float32)
    scenery = rng.normal(size=(length + 1, 4)).astype(np.float32)
    action = np.tanh(state[:-1, :2] + scenery[:-1, :2]).astype(np.float32)
    success_T = (np.arange(length) == length - 1) & success
    return Episode(
        {STATE: state, ENVIRONMENT_STATE: scenery},
        action,
        action,
        success_T.astype(np.float32),
        success_T,
        success,
        not success,
        "do the toy task",
        {"source": "expert", "round": 0, "scene_seed": scene, "strategy": "only", "policy_hash": ""},
    )


def write_toy_set(root: Path, lengths: list[int], *, seed: int = 0, successes: list[bool] | None = None) -> Path:
    """Write a small data set."""
    rng = np.random.default_rng(seed)
    writer = EpisodeWriter.open_or_create(
        root, action_spec=TOY_ACTION, observation_spec=TOY_OBSERVATION, task="toy", recipe={"seed": seed}
    )
    for i, length in enumerate(lengths):
        writer.add(toy_episode(rng, length, success=True if successes is None else successes[i], scene=i))
    return root


def reaching_episode(
    rng: np.random.Generator,
    provenance: Provenance,
    *,
    gains: tuple[float, float] = (-0.2, 0.5),
    noise: float = 0.15,
    limit: int = 24,
    near: float = 0.15,
) -> Episode:
    """A point in the plane that actions move; it succeeds near the origin. The controller's gain differs from episode to episode."""
    position, gain, states, actions = rng.uniform(-1, 1, 2), rng.uniform(*gains), [], []
    success = False
    while len(actions) < limit and not success:
        states.append(position)
        action = np.clip(-gain * position + noise * rng.normal(size=2), -2, 2)
        actions.append(action)
        position = position + action
        success = bool(np.linalg.norm(position) < near)
    states.append(position)
    success_T = (np.arange(len(actions)) == len(actions) - 1) & success
    action_TA = np.asarray(actions, np.float32)
    return Episode(
        {STATE: np.asarray(states, np.float32)},
        action_TA,
        action_TA,
        success_T.astype(np.float32),
        success_T,
        success,
        not success,
        "reach the origin",
        provenance,
    )


def write_reaching_set(
    root: Path, episodes: int, seed: int = 0, provenance: Callable[[int], Provenance] | None = None, **world: Any
) -> Path:
    """Write a data set of a world simple enough to know the truth of; a quarter of it an expert's, where provenance does not say."""
    rng = np.random.default_rng(seed)
    writer = EpisodeWriter.open_or_create(
        root, action_spec=TOY_ACTION, observation_spec=REACHING_OBSERVATION, task="reach", recipe={"seed": seed}
    )
    for scene in range(episodes):
        whose: Provenance = (
            {"source": "expert" if scene % 4 == 0 else "policy", "round": 0}
            if provenance is None
            else provenance(scene)
        )
        writer.add(reaching_episode(rng, {**whose, "scene_seed": scene}, **world))
    return root


def tiny_flow(chunk_steps: int, execute_steps: int, sample_steps: int) -> FlowConfig:
    """A flow policy that is trained and sampled in no time."""
    return FlowConfig(
        net=MLPConfig(width=16, depth=1, time_dim=4),
        observation_steps=1,
        chunk_steps=chunk_steps,
        execute_steps=execute_steps,
        sample_steps=sample_steps,
    )


def reaching_policy(chunk_steps: int) -> ChunkPolicy:
    """An untrained policy for the reaching world."""
    torch.manual_seed(0)
    return tiny_flow(chunk_steps, 2, 3).build(PolicySpec(REACHING_OBSERVATION, TOY_ACTION, "reach")).eval()


COUNTDOWN_LIMIT = 7  # control steps until a time-out
COUNTDOWN_ACTION = ActionSpec(("x", "y"), ("m", "m"), (-0.5, -0.5), (0.5, 0.5), "delta", 20.0)
COUNTDOWN_SPEC = PolicySpec({STATE: FeatureSpec((4,)), ENVIRONMENT_STATE: FeatureSpec((1,))}, COUNTDOWN_ACTION, "toy")


class Countdown(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """A point that adds up its actions; even scenes end by themselves after 2 to 6 steps, odd ones run into the time limit."""

    observation_space = gym.spaces.Dict(
        {
            STATE: gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
            ENVIRONMENT_STATE: gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
        }
    )
    action_space = gym.spaces.Box(-0.5, 0.5, (2,), np.float32)

    def __init__(self, diverges: int = -1) -> None:
        self.diverges = diverges

    def _see(self) -> dict[str, np.ndarray]:
        state = np.array([self.scene / 10, self.count / COUNTDOWN_LIMIT, *self.place], np.float32)
        return {STATE: state, ENVIRONMENT_STATE: np.array([self.scene % 3], np.float32)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert seed is not None, "a scene follows from its seed"
        self.scene, self.count = seed, 0
        self.place = np.random.default_rng(seed).normal(size=2).astype(np.float32)
        return self._see(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        assert (np.abs(action) <= 0.5).all()
        self.place = self.place + action
        self.count += 1
        reward = 100.0 * self.scene + self.count + float(action[0])  # no two alike
        if self.scene == self.diverges:
            return self._see(), 0.0, False, True, {"success": False, "diverged": "the point exploded"}
        done = self.scene % 2 == 0 and self.count == 2 + self.scene // 2 % 5
        return self._see(), reward, done, self.count == COUNTDOWN_LIMIT and not done, {"success": done}


def countdown_env(slots: int, diverges: int = -1) -> SyncVectorEnv:
    """Build a vector environment that refuses to step an episode that has ended."""
    return SyncVectorEnv([lambda: Countdown(diverges)] * slots, autoreset_mode=AutoresetMode.DISABLED)


TINY_PUSH = replace(tiny_flow(8, 8, 2), observation_normalizer="mean_std")
PUSH_LIMIT = 48  # control steps of push_t, where tests act in it
