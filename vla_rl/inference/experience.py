"""On-policy experience: a noisy policy decides for all slots of a vector environment at once, chunk by chunk.

Every collection starts from fresh scenes, so that it follows from the weights, the scenes and the generator alone; an episode that
is still running at the end is cut, and what follows is left to the value function as at a time-out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_rl.data.episode import Episode, EpisodeRecorder, Provenance
from vla_rl.inference.rollout import really_executed, row
from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import Chain, sample_chain
from vla_rl.types import ActionSpec, Observation, kind_of


@dataclass(frozen=True)
class Segment:
    """An episode, or the part of one that the collection saw, and where it stands in the arrays."""

    slot: int
    first_decision: int
    decisions: int
    episode: Episode


@dataclass(frozen=True)
class Experience:
    """T decisions of N slots, each running up to He control steps.

    observation, next_observation: by feature, (T, N, O, D); the next one is the true observation after the decision's last step
    chain: of the T * N decisions, in that order
    reward_TNH: of each control step, zero where none ran
    executed_TNH: which control steps ran
    terminated_TN: the task ended in this decision
    ended_TN: terminated, timed out, or cut off by the end of the collection
    segments: episodes and parts of episodes
    """

    observation: Mapping[str, Tensor]
    next_observation: Mapping[str, Tensor]
    chain: Chain
    reward_TNH: Float[Tensor, "T N He"]
    executed_TNH: Bool[Tensor, "T N He"]
    terminated_TN: Bool[Tensor, "T N"]
    ended_TN: Bool[Tensor, "T N"]
    segments: tuple[Segment, ...]

    @property
    def steps(self) -> Int[Tensor, "T N"]:
        """Control steps of each decision."""
        return self.executed_TNH.sum(-1)

    @property
    def env_steps(self) -> int:
        """Control steps in all."""
        return int(self.executed_TNH.sum())

    def finished(self) -> list[Episode]:
        """Episodes that ended by themselves."""
        return [s.episode for s in self.segments if s.episode.terminated or s.episode.truncated]

    def success(self) -> float:
        """Share of the slots whose first episode succeeded: of the later ones only the short end in time, and those are the successes."""
        return float(np.mean([s.episode.success for s in self.segments if s.first_decision == 0]))

    def decision_reward(self, discount: float, reward_TNH: Tensor | None = None) -> Float[Tensor, "T N"]:
        """Reward of each decision, discounted per control step inside it."""
        reward_TNH = self.reward_TNH if reward_TNH is None else reward_TNH
        return (reward_TNH * discount ** torch.arange(reward_TNH.shape[-1])).sum(-1)


def collect(
    env: gym.vector.VectorEnv,
    action_spec: ActionSpec,
    instruction: str,
    policy: ChunkPolicy,
    kernel: Kernel,
    decisions: int,
    scenes: Callable[[], int],
    generator: torch.Generator,
) -> Experience:
    """Run the noisy policy.

    Args:
        env: vector environment of N slots without autoreset, whose ``info`` has ``success``.
        action_spec: of the environment.
        instruction: the task in words.
        policy: decides.
        kernel: its noise.
        decisions: T, per slot.
        scenes: hands out the seed of the next scene.
        generator: of the chains' noise.
    """
    slots, steps = env.num_envs, policy.config.execute_steps
    history = _History(policy, slots)
    recorders: list[EpisodeRecorder | None] = [None] * slots
    first = [0] * slots
    segments: list[Segment] = []
    seen: list[dict[str, Tensor]] = []
    following: list[dict[str, Tensor]] = []
    chains: list[Chain] = []
    reward_TNH = torch.zeros(decisions, slots, steps)
    executed_TNH = torch.zeros(decisions, slots, steps, dtype=torch.bool)
    terminated_TN = torch.zeros(decisions, slots, dtype=torch.bool)
    ended_TN = torch.zeros(decisions, slots, dtype=torch.bool)

    def close(slot: int, decision: int, terminated: bool, truncated: bool) -> None:
        recorder = recorders[slot]
        assert recorder is not None
        episode = recorder.episode(terminated=terminated, truncated=truncated)
        segments.append(Segment(slot, first[slot], decision + 1 - first[slot], episode))
        recorders[slot] = None

    for t in range(decisions):
        begin_N = np.array([r is None for r in recorders])
        if begin_N.any():
            seeds = [scenes() if begins else None for begins in begin_N]
            mask = None if begin_N.all() else {"reset_mask": begin_N}
            features, _ = env.reset(seed=seeds, options=mask)  # type: ignore[arg-type]
            history.begin(features, begin_N)
            for slot in map(int, np.flatnonzero(begin_N)):
                provenance: Provenance = {"source": "policy", "scene_seed": int(seeds[slot] or 0)}
                recorders[slot] = EpisodeRecorder(row(features, slot), instruction, provenance)
                first[slot] = t
        seen.append(history.tensors())
        observation = Observation.from_features(seen[-1])
        noise_KNHA = torch.randn(kernel.steps + 1, slots, *policy.chunk_shape, generator=generator)
        chain = sample_chain(policy, kernel, policy.condition(observation), noise_KNHA)
        intended_NHA = policy.unnormalize_action(chain.chunk, observation).numpy()
        chains.append(chain)
        for h in range(steps):
            active_N = np.array([r is not None for r in recorders])
            if not active_N.any():
                break
            executed_NA = action_spec.clip(intended_NHA[:, h])
            features, reward_N, stop_N, timeout_N, info = env.step(executed_NA)
            success_N = np.asarray(info["success"], dtype=bool)
            executed_NA = really_executed(info, executed_NA)
            history.advance(features, active_N)
            for slot in map(int, np.flatnonzero(active_N)):
                recorder = recorders[slot]
                assert recorder is not None
                recorder.add(
                    executed_A=executed_NA[slot].copy(),
                    intended_A=intended_NHA[slot, h].copy(),
                    observation=row(features, slot),
                    reward=float(reward_N[slot]),
                    success=bool(success_N[slot]),
                )
                if "diverged" in info and info["_diverged"][slot]:
                    recorder.provenance["diverged"] = str(info["diverged"][slot])
                reward_TNH[t, slot, h] = float(reward_N[slot])
                executed_TNH[t, slot, h] = True
                if stop_N[slot] or timeout_N[slot]:
                    terminated_TN[t, slot] = bool(stop_N[slot])
                    ended_TN[t, slot] = True
                    close(slot, t, bool(stop_N[slot]), bool(timeout_N[slot]))
            done_N = np.asarray(stop_N | timeout_N)
            if done_N.any() and any(
                r is not None for r in recorders
            ):  # a place to idle in until the chunk of the others ends
                env.reset(seed=[0] * slots, options={"reset_mask": done_N})  # type: ignore[arg-type]
        following.append(history.tensors())
    for slot, recorder in enumerate(recorders):
        if recorder is not None:
            ended_TN[-1, slot] = True
            close(slot, decisions - 1, False, False)
    whole = Chain(torch.cat([c.x_BKHA for c in chains]), torch.cat([c.log_prob_BKH for c in chains]))
    return Experience(
        _stack(seen), _stack(following), whole, reward_TNH, executed_TNH, terminated_TN, ended_TN, tuple(segments)
    )


class _History:
    """The last O observations of every slot."""

    def __init__(self, policy: ChunkPolicy, slots: int) -> None:
        steps = policy.config.observation_steps
        spec = policy.spec.observation_spec
        self._rows = {k: np.zeros((slots, steps, *f.shape), kind_of(k)) for k, f in spec.items()}

    def begin(self, features: Mapping[str, np.ndarray], begin_N: np.ndarray) -> None:
        """An episode's first observation stands for those before it."""
        for key, rows in self._rows.items():
            rows[begin_N] = features[key][begin_N][:, None]

    def advance(self, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> None:
        """Append an observation to the slots that moved."""
        for key, rows in self._rows.items():
            rows[active_N] = np.concatenate([rows[active_N, 1:], features[key][active_N][:, None]], axis=1)

    def tensors(self) -> dict[str, Tensor]:
        """A copy, (N, O, D) each."""
        return {k: torch.from_numpy(rows.copy()) for k, rows in self._rows.items()}


def _stack(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([p[k] for p in parts]) for k in parts[0]}
