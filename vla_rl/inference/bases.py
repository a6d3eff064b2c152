"""Find a base by what a user calls it: a policy folder of ours or of LeRobot's, or the address of a policy server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_rl.inference.base_policy import BasePolicy, BaseSpec, Leftover, OwnBase
from vla_rl.inference.controller import Agent, PolicyAgent
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.types import Observation

# a base for a number of environments, with the seed of its noise
OpenBase = Callable[[int, int], BasePolicy]


@dataclass(frozen=True)
class BaseSource:
    """A base that can be opened for any number of environments.

    reference: what it is found by
    digest: of its weights and settings
    spec: what it was made for
    open: opens it
    policy: one of this project's policies, where it is one
    labels: it decides from observations alone, so that it can be asked about demonstrations
    folder: its files, where they are on this machine; a copy is kept beside a residual
    """

    reference: str
    digest: str
    spec: BaseSpec
    open: OpenBase
    policy: ChunkPolicy | None = None
    labels: bool = True
    folder: Path | None = None


FindBase = Callable[[str], BaseSource]


class AgentBase:
    """Whatever acts step by step (a residual on its base, say) as a base whose chunks are one action long."""

    def __init__(self, agent: Agent, num_envs: int, seed: int) -> None:
        self.spec = BaseSpec(agent.spec, observation_steps=1, execute_steps=1, chunk_steps=1)
        self._controller = agent.controller(num_envs, seed)
        self._num_envs = num_envs

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``."""
        for env_id, scene_seed in zip(env_ids, scene_seeds, strict=True):
            self._controller.reset(int(env_id), int(scene_seed))

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``; it has to be asked in every step of an episode."""
        active_N = np.zeros(self._num_envs, dtype=bool)
        active_N[list(env_ids)] = True
        newest = {k: v[:, -1].numpy() for k, v in observation.features().items()}
        return self._controller.act(newest, active_N)[list(env_ids)][:, None]


def agent_base(path: Path, agent: Agent) -> BaseSource:
    """Whatever a folder holds as a base, as it is deployed.

    Args:
        path: the folder.
        agent: what was loaded from it.
    """
    folder = resolve_policy(path)
    if isinstance(agent, PolicyAgent):
        policy, sampler = agent.policy, agent.sampler

        def open_policy(num_envs: int, seed: int) -> OwnBase:
            return OwnBase(policy, num_envs, seed, sampler)

        return BaseSource(str(path), folder_digest(folder), open_policy(1, 0).spec, open_policy, policy, folder=folder)

    def open_agent(num_envs: int, seed: int) -> AgentBase:
        return AgentBase(agent, num_envs, seed)

    return BaseSource(str(path), folder_digest(folder), BaseSpec(agent.spec, 1, 1, 1), open_agent, folder=folder)


def own_base(path: Path) -> BaseSource:
    """One of this project's policies, behind its encoder where it has one; raises UserError where there is none."""
    policy = load_policy(path)
    policy.see_latents()

    def open_base(num_envs: int, seed: int) -> OwnBase:
        return OwnBase(policy, num_envs, seed)

    folder = resolve_policy(path)
    return BaseSource(str(path), folder_digest(folder), OwnBase(policy, 1, 0).spec, open_base, policy, folder=folder)
