"""Find a base by what a user calls it: a policy folder of ours or of LeRobot's, or the address of a policy server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vla_rl.inference.base_policy import BasePolicy, BaseSpec, OwnBase
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy
from vla_rl.runtime.checkpoints import folder_digest

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


def own_base(path: Path) -> BaseSource:
    """One of this project's policies; raises UserError where there is none."""
    policy = load_policy(path)

    def open_base(num_envs: int, seed: int) -> OwnBase:
        return OwnBase(policy, num_envs, seed)

    folder = resolve_policy(path)
    return BaseSource(str(path), folder_digest(folder), OwnBase(policy, 1, 0).spec, open_base, policy, folder=folder)
