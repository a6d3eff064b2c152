"""What the residual stage checks: its demonstrations, the critic's word against what came of it, and whether a policy is worse."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from vla_rl.algos.residual_td3 import ResidualTD3Config
from vla_rl.data.reader import EpisodeData
from vla_rl.data.replay import Replay
from vla_rl.data.steps import StepEpisode
from vla_rl.evaluate import Arena, evaluate
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.residual_controller import NoiseConfig, ResidualAgent
from vla_rl.inference.steps import Order
from vla_rl.policies.residual import ResidualPolicy
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import copy_directory
from vla_rl.runtime.seeding import SELECTION_SCENES
from vla_rl.statistics import evidence_of_worse
from vla_rl.types import require_same_observation

LOOKS = 4  # of a sequential test
SATURATION_ALARM, SLOPE_ALARM = (
    0.5,
    1e-3,
)  # more saturated than this while Q hardly depends on the action: the critic is lost
RECENT = 40  # episodes that roll-out success and drift are of
DRIFT_ALARM = 0.25  # of the range of returns, between predicted and realised ones
KEPT_BASE = "base"  # folder beside the residual


def keep_base(base: BaseSource, out: Path) -> BaseSource:
    """Keep a copy of a base's files beside the residual; return the base as its checkpoint refers to it."""
    if base.folder is None:
        return base
    if not (out / KEPT_BASE).exists():
        copy_directory(base.folder, out / KEPT_BASE)
    return replace(base, reference=KEPT_BASE)


def require_demonstrations(data: EpisodeData, base: BaseSource) -> None:
    """Refuse demonstrations that say nothing of how to succeed; raises UserError or SpecMismatchError."""
    if not base.labels:
        raise UserError(
            f"the base {base.reference!r} cannot be asked about demonstrations: it looks at environments, not at observations; leave "
            "out --data"
        )
    base.spec.policy.action_spec.require_equal(data.action_spec, mine="the base", theirs="the data")
    require_same_observation(base.spec.policy.observation_spec, data.observation_spec, me="the base", them="the data")
    if "success" not in data.episodes:
        raise UserError("a residual wants to know which demonstrations succeeded; the data do not say")
    if not data.episodes["success"].any():
        raise UserError(
            f"none of the {data.num_episodes} demonstrations succeeded; a residual wants at least one success"
        )


def shown_steps(episodes: Sequence[StepEpisode]) -> Int[Tensor, " B"]:
    """Numbers of the steps that a person or an expert acted in: all of a demonstration's, and those taken over of a policy's episode."""
    shown: list[np.ndarray] = []
    for steps in episodes:
        own, taken_T = steps.episode.provenance.get("source") == "policy", steps.episode.intervened_T
        nobodys_T = np.zeros(steps.length, bool)
        shown.append(~nobodys_T if not own else nobodys_T if taken_T is None else taken_T)
    return torch.from_numpy(np.flatnonzero(np.concatenate(shown)))


@dataclass(frozen=True)
class Judged:
    """Successes on the first of the selection scenes, on all of them where nothing ended it early, and what it cost."""

    successes: tuple[bool, ...]
    env_steps: int


Collect = Callable[[Order, ResidualPolicy], list[StepEpisode]]


def look(agent: ResidualAgent, arena: Arena, scenes: Sequence[int], seed: int, collect: Collect) -> Judged:
    """Run scenes once, through actors where only they reach the environments; what such a one leaves out has failed."""
    if not arena.elsewhere:
        result = evaluate(agent, arena, scenes, seed=seed, name="the residual in training", bar=False)
        return Judged(tuple(bool(s["success"]) for s in result["scenes"]), result["env_steps"])
    found = collect(Order(0, "deployed", tuple(scenes), seed, NoiseConfig()), agent.policy)
    episodes = {int(steps.episode.provenance["scene_seed"]): steps for steps in found}
    successes = tuple(scene in episodes and episodes[scene].episode.success for scene in scenes)
    return Judged(successes, sum(steps.length for steps in episodes.values()))


def judge(
    agent: ResidualAgent,
    arena: Arena,
    scenes: int,
    seed: int,
    collect: Collect,
    rival: tuple[bool, ...] = (),
    worse_evidence: float = math.inf,
) -> Judged:
    """Run the selection scenes, in a few looks; no more of them once the agent is worse than a rival beyond doubt.

    Args:
        agent: as it is deployed.
        arena: where.
        scenes: how many.
        seed: of the policy's noise.
        collect: carries an order out, where only actors reach the environments.
        rival: successes on the same scenes (none: all are run).
        worse_evidence: e-value at which it is beyond doubt.
    """
    successes: tuple[bool, ...] = ()
    env_steps = 0
    step = math.ceil(scenes / LOOKS)
    for first in range(0, scenes, step):
        chosen = range(SELECTION_SCENES + first, SELECTION_SCENES + min(first + step, scenes))
        seen = look(agent, arena, list(chosen), seed, collect)
        env_steps += seen.env_steps
        successes += seen.successes
        if rival and evidence(rival, successes) >= worse_evidence:
            break
    return Judged(successes, env_steps)


def evidence(rival: tuple[bool, ...], successes: tuple[bool, ...]) -> float:
    """E-value of being worse than a rival, on the scenes that both have seen."""
    pairs = list(zip(rival, successes, strict=False))
    return evidence_of_worse(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def takes_the_place(
    best: tuple[bool, ...], successes: tuple[bool, ...], worse_evidence: float, *, of_base: bool
) -> bool:
    """Whether a policy becomes the best: the base's place wants evidence, a residual's as many successes.

    Of equal residuals the later one has learned from more. Looked at often enough, a residual that is worse than the base has as many
    successes by luck.
    """
    if of_base:
        return evidence(successes, best) >= worse_evidence
    return sum(successes) >= sum(best)


def require_known_returns(return_N: Float[Tensor, " N"], td3: ResidualTD3Config) -> None:
    """Refuse returns outside of those that the target is clamped to, since they would be cut off; raises UserError."""
    lowest, highest = float(return_N.min()), float(return_N.max())
    slack = 1e-3 * (td3.return_highest - td3.return_lowest)
    if lowest < td3.return_lowest - slack or highest > td3.return_highest + slack:
        raise UserError(
            f"returns of {lowest:.4g} to {highest:.4g} were met, and td3.return_lowest to td3.return_highest is {td3.return_lowest:g} to "
            f"{td3.return_highest:g}: what lies beyond would be cut off; set both to what there can be"
        )


def newest_episodes(replay: Replay, policy: ResidualPolicy, td3: ResidualTD3Config) -> dict[str, float]:
    """How the newest episodes went, and how far the critic's word on their first step was from what came of them."""
    chosen = [(first, e) for first, e in replay.spans() if e["source"] == "policy"][-RECENT:]
    first_B = torch.tensor([first for first, _ in chosen])
    batch = replay.gather(first_B, 1, td3.discount)
    with torch.no_grad():
        value_B = policy.critic(policy.inputs(batch.now, policy.encoder(batch.now), batch.action_BA)).mean(0)
    off = float((value_B - replay.returns(td3.discount)[first_B]).mean())
    return {
        "rollout/success": sum(e["success"] for _, e in chosen) / len(chosen),
        "critic/drift": off / (td3.return_highest - td3.return_lowest),
    }


def alarms(metrics: Mapping[str, float]) -> Iterator[str]:
    """Signs of a critic that has lost its way; the sequential test is what acts on it."""
    saturation, drift = metrics.get("actor/saturation", 0.0), metrics["critic/drift"]
    if saturation > SATURATION_ALARM and metrics["actor/slope"] < SLOPE_ALARM:
        yield f"{100 * saturation:.0f} % of residuals are at the end of their reach while Q hardly depends on them"
    if abs(drift) > DRIFT_ALARM:
        yield f"Q is {drift:+.2f} of the range of returns away from what roll-outs return"


def corrections(policy: ResidualPolicy, replays: Sequence[tuple[Replay, int]]) -> dict[str, Any] | None:
    """How many steps were a human's, and the share of them that no residual can make of the base's action, which is also printed.

    Each replay comes with how often it holds each step.
    """
    count = 0
    beyond = 0.0
    for replay, copies in replays:
        index_B = replay.interventions()
        if len(index_B):
            batch = replay.gather(index_B, 1, 1.0)
            count += len(index_B) // copies
            beyond += int(policy.composition.beyond(batch.now.base_BA, batch.action_BA).sum()) / copies
    if not count:
        return None
    if beyond:
        tqdm.write(
            f"{100 * beyond / count:.0f} % of {count} corrections lie out of the residual's reach: a larger scale, or a base trained on "
            "them, could follow",
            file=sys.stderr,
        )
    return {"steps": count, "out_of_reach": beyond / count}
