"""The roll-outs that an offline round begins with, as a data set in the order of their scenes; a cut one goes on where it was."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vla_rl.data.episode import Episode, Provenance
from vla_rl.data.reader import load_datasets
from vla_rl.data.writer import EpisodeWriter
from vla_rl.evaluate import Arena
from vla_rl.inference.controller import Agent, PolicyAgent
from vla_rl.inference.rollout import deal, rollout
from vla_rl.inference.selectors import NoisySampler
from vla_rl.kernels import KernelConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import encode

BATCHES = 4  # scenes per slot between two writes


@dataclass(frozen=True)
class RolloutConfig:
    """Roll-outs at the beginning of a round.

    episodes: how many (0: none, the data stay as they are)
    exploratory: share that runs with the kernel's noise; the others run as the policy is deployed
    first_scene: seed of the first scene of the first round, the others follow
    """

    episodes: int = 300
    exploratory: float = 0.2
    first_scene: int = 10_000

    def __post_init__(self) -> None:
        if self.episodes < 0 or not 0 <= self.exploratory <= 1 or self.first_scene < 0:
            raise ValueError(
                "episodes and first_scene want numbers >= 0, exploratory one in [0, 1], got "
                f"{self.episodes}, {self.first_scene}, {self.exploratory}"
            )


def roll_out(
    policy: ChunkPolicy,
    path: Path,
    arena: Arena,
    config: RolloutConfig,
    kernel: KernelConfig,
    folder: Path,
    number: int,
    seed: int,
) -> int:
    """Collect a round's episodes into ``folder/rollouts``; return their control steps.

    Args:
        policy: acts.
        path: its folder, for provenance.
        arena: where.
        config: how many, and how many of them explore.
        kernel: noise of those that explore.
        folder: of the round.
        number: of the round, from 1.
        seed: of the policy's noise.
    """
    if not config.episodes:
        return 0
    arena.require_fit(policy.full_spec, str(path))
    policy_hash = folder_digest(path)
    recipe = {"source": "policy", "round": number, "policy": policy_hash, "seed": seed, **encode(config)}
    writer = EpisodeWriter.open_or_create(
        folder / "rollouts",
        action_spec=arena.action_spec,
        observation_spec=arena.observation_spec,
        task=arena.task,
        recipe=recipe,
    )
    noisy = PolicyAgent(policy, NoisySampler(policy, policy.make_kernel(kernel)))
    begin = config.first_scene + (number - 1) * config.episodes
    explored = begin + round(config.episodes * config.exploratory)  # the first scenes of a round explore
    bar = tqdm(
        total=config.episodes,
        initial=0 if writer.last_scene is None else writer.last_scene + 1 - begin,
        desc=f"round {number}: roll out",
        unit="episode",
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    for scenes, agent, strategy in (
        (range(begin, explored), noisy, "exploratory"),
        (range(explored, begin + config.episodes), PolicyAgent(policy), "deployed"),
    ):
        provenance: Provenance = {
            "source": "policy",
            "round": number,
            "strategy": strategy,
            "policy_hash": policy_hash,
        }
        record(agent, arena, scenes, seed, writer, provenance, bar)
    bar.close()
    return int(load_datasets([folder / "rollouts"]).num_frames)


def record(
    agent: Agent,
    arena: Arena,
    scenes: Sequence[int],
    seed: int,
    writer: EpisodeWriter,
    provenance: Provenance,
    bar: tqdm,
) -> None:
    """Run scenes that the writer does not have yet, and write their episodes; those that diverged are left out.

    Args:
        agent: acts.
        arena: where.
        scenes: seeds, rising; those up to the writer's last scene are done.
        seed: of the policy's noise.
        writer: of the data set.
        provenance: of the episodes, beside their scene.
        bar: shows episodes.
    """
    agent.instruct(arena.instruction)
    slots = arena.env.num_envs
    last = -1 if writer.last_scene is None else writer.last_scene
    batch = BATCHES * slots
    for at in range(0, len(scenes), batch):
        dealt = deal(scenes[at : at + batch], slots)  # each scene in its slot, also after a cut
        missing = [[scene for scene in slot if scene > last] for slot in dealt]
        found: dict[int, Episode] = {}
        rollout(
            arena.env,
            arena.action_spec,
            arena.instruction,
            agent.controller(slots, seed),
            missing,
            found.__setitem__,
            provenance=provenance,
        )
        for scene in sorted(found):
            if "diverged" not in found[scene].provenance:
                writer.add(found[scene])
            bar.update()
