"""Distil a residual back: the composed policy's successes train the generative policy, which then goes on alone.

Filtered imitation on demonstrations and roll-outs together, from the base's weights or from fresh ones. What comes out takes the base's
place only if a paired test on selection scenes says that it is better; otherwise the base stays what it was.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla_rl.algos.bc import BCConfig
from vla_rl.data.episode import Provenance
from vla_rl.data.reader import load_datasets
from vla_rl.data.writer import EpisodeWriter
from vla_rl.evaluate import Arena, compare
from vla_rl.inference.controller import Agent, PolicyAgent
from vla_rl.inference.perception import encoded
from vla_rl.inference.residual_controller import ResidualAgent
from vla_rl.policies.checkpoint import load_policy, resolve_policy
from vla_rl.pretrain import PretrainSettings, imitate
from vla_rl.record import record
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import copy_directory, exclusive, write_json
from vla_rl.runtime.seeding import SELECTION_SCENES


@dataclass(frozen=True)
class DistillBackBCConfig(BCConfig):
    """Optimisation with defaults of its own (a default of a field would be lost as soon as one option of it is given)."""

    steps: int = 5000
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class DistillBackSettings:
    """Everything that determines the weights, beside residual, data and task.

    episodes: roll-outs of the composed policy
    first_scene: seed of the first one's scene, the others follow
    retrain: imitation starts from fresh weights and normalisers, or goes on from the base's
    selection_scenes: on which it is decided whether the new policy takes the base's place
    seed: of all draws
    bc: imitation
    """

    episodes: int = 300
    first_scene: int = 20_000
    retrain: bool = True
    selection_scenes: int = 200
    seed: int = 0
    bc: DistillBackBCConfig = field(default_factory=DistillBackBCConfig)

    def __post_init__(self) -> None:
        if min(self.episodes, self.selection_scenes) < 1 or self.first_scene < 0:
            raise ValueError("episodes and selection_scenes want at least 1, first_scene a number >= 0")
        if self.first_scene + self.episodes > SELECTION_SCENES:
            raise ValueError(
                f"scenes from {SELECTION_SCENES} are for selection and tests, not for data; got scenes up to "
                f"{self.first_scene + self.episodes - 1}"
            )


def distill_back(
    residual: Path, agent: Agent, demonstrations: list[Path], out: Path, settings: DistillBackSettings, arena: Arena
) -> dict[str, Any]:
    """Roll out, imitate, test; leave the better of base and new policy in ``out/policy`` and return what was done.

    Args:
        residual: folder of the residual.
        agent: what it holds.
        demonstrations: data sets that are merged with the roll-outs.
        out: run folder.
        settings: everything else.
        arena: where the composed policy acts.

    Raises:
        UserError: the folder holds no residual on one of this project's policies, no roll-out succeeded, or ``out`` holds another run.
    """
    if not isinstance(agent, ResidualAgent) or agent.base.policy is None:
        raise UserError(f"{residual} holds no residual on a policy of this project; only those can be distilled back")
    arena.require_fit(agent.spec, str(residual))
    digest = folder_digest(resolve_policy(residual))
    with exclusive(out):
        data_digest = load_datasets(demonstrations).digest if demonstrations else "none"
        claim_folder(out, {**encode(settings), "residual": digest, "data": data_digest, **arena.identity()})
        steps = _roll_out(agent, digest, out, settings, arena)
        data = encoded(load_datasets([*demonstrations, out / "rollouts"]), agent.base.policy)
        pretraining = PretrainSettings(policy=agent.base.policy.config, bc=settings.bc, seed=settings.seed)
        initial = None if settings.retrain else Path(agent.base.reference)
        imitate(data, out / "imitation", pretraining, initial=initial, like=agent.base.policy)
        agents: dict[str, Agent] = {
            "base": PolicyAgent(load_policy(Path(agent.base.reference))),
            "new": PolicyAgent(load_policy(out / "imitation")),
            "composed": agent,
        }
        paired, compared = compare(agents, arena, settings.selection_scenes, settings.seed, first="base", second="new")
        kept = paired.low > 0
        shutil.rmtree(out / "policy", ignore_errors=True)
        chosen = out / "imitation" / "policy" if kept else resolve_policy(Path(agent.base.reference))
        copy_directory(chosen, out / "policy")
        results = {
            "env_steps": steps,
            "episodes": settings.episodes,
            "gradient_steps": settings.bc.steps,
            "kept": kept,
            **compared,
        }
        write_json(out / "results.json", results)
    return results


def _roll_out(agent: ResidualAgent, digest: str, out: Path, settings: DistillBackSettings, arena: Arena) -> int:
    """Collect what is missing into ``out/rollouts``; return its control steps."""
    recipe = {"source": "policy", "policy": digest, "seed": settings.seed, "episodes": settings.episodes}
    writer = EpisodeWriter.open_or_create(
        out / "rollouts",
        action_spec=arena.action_spec,
        observation_spec=arena.observation_spec,
        task=arena.task,
        recipe=recipe,
    )
    begin = settings.first_scene
    bar = tqdm(
        total=settings.episodes,
        initial=0 if writer.last_scene is None else writer.last_scene + 1 - begin,
        desc="distill back: roll out",
        unit="episode",
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    provenance: Provenance = {"source": "policy", "round": 0, "strategy": "composed", "policy_hash": digest}
    record(agent, arena, range(begin, begin + settings.episodes), settings.seed, writer, provenance, bar)
    bar.close()
    rollouts = load_datasets([out / "rollouts"])
    if not rollouts.episodes["success"].any():
        raise UserError(
            f"none of the {settings.episodes} roll-outs of the composed policy succeeded; there is nothing to imitate"
        )
    return int(rollouts.num_frames)
