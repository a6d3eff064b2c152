"""Evaluate a policy on scenes that no stage has seen: success with its interval, scene by scene, deterministic in the seed."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from vla_rl.data.episode import Episode
from vla_rl.inference.controller import Agent
from vla_rl.inference.perception import PerceivingEnv
from vla_rl.inference.rollout import CLIPPED_BY, Guard, deal, rollout
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import append_line, exclusive, read_lines, write_text
from vla_rl.runtime.seeding import SELECTION_SCENES
from vla_rl.statistics import PairedDifference, as_dict, paired_difference, proportion
from vla_rl.types import LATENT, ActionSpec, FeatureSpec, ObservationSpec, require_same_observation


@dataclass(frozen=True)
class SceneOutcome:
    """How one scene ended; one whose simulation diverged counts as a failure.

    clipped_steps: that the safety filter limited
    clipped_by: by reason; a step may have several
    fault: that it latched, which held the robot until the end
    """

    scene_seed: int
    success: bool
    length: int
    episode_return: float
    max_coverage: float | None = None
    diverged: str | None = None
    clipped_steps: int = 0
    clipped_by: Mapping[str, int] = field(default_factory=dict)
    fault: str | None = None


def outcome(scene_seed: int, episode: Episode) -> SceneOutcome:
    """Sum up an episode."""
    covered = episode.provenance.get("max_coverage")
    return SceneOutcome(
        scene_seed,
        episode.success,
        episode.length,
        float(episode.reward_T.sum()),
        None if covered is None else float(covered),
        episode.provenance.get("diverged"),  # type: ignore[arg-type]
        int(episode.provenance.get("clipped_steps", 0)),
        {k.removeprefix(CLIPPED_BY): int(n) for k, n in episode.provenance.items() if k.startswith(CLIPPED_BY)},
        episode.provenance.get("fault"),  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Arena:
    """A vector environment with what an evaluation has to know of it.

    recipe: the task's config as plain data
    guard: safety filter that evaluations run through; guarded_by: the robot whose limits it holds
    elsewhere: its environments are at an actor's, and are reached through orders only
    raw_spec: what is observed before a policy's encoder, where ``env`` is behind one (None: it is not)
    """

    env: gym.vector.VectorEnv
    action_spec: ActionSpec
    observation_spec: ObservationSpec
    task: str
    instruction: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    guard: Guard | None = None
    guarded_by: str | None = None
    elsewhere: bool = False
    raw_spec: ObservationSpec | None = None

    def through(self, policy: ChunkPolicy | None) -> Arena:
        """The arena behind a policy's frozen encoder: each observation is encoded once. Itself, where there is nothing to encode.

        Raises:
            SpecMismatchError: the policy was made for other observations.
        """
        if policy is None or policy.encoder is None or LATENT in self.observation_spec:
            return self
        policy.instruct(self.instruction)
        require_same_observation(
            policy.full_spec.observation_spec, self.observation_spec, me="the policy", them=f"task {self.task!r}"
        )
        kept = {k: f for k, f in self.observation_spec.items() if k not in policy.encoder.spec}
        spec = {**kept, LATENT: FeatureSpec((policy.encoder.latent_dim,))}
        return replace(self, env=PerceivingEnv(self.env, policy), observation_spec=spec, raw_spec=self.observation_spec)

    def identity(self) -> dict[str, Any]:
        """What of it a run's numbers hang on: the task as it is simulated, and the number of environments."""
        return {"task": dict(self.recipe) or self.task, "num_envs": self.env.num_envs}

    def require_fit(self, spec: PolicySpec, name: str) -> None:
        """Raise SpecMismatchError unless the policy was made for these actions and observations."""
        where = f"task {self.task!r}"
        spec.action_spec.require_equal(self.action_spec, mine=name, theirs=where)
        raw = self.raw_spec is not None and LATENT not in spec.observation_spec
        there = self.raw_spec if raw and self.raw_spec is not None else self.observation_spec
        require_same_observation(spec.observation_spec, there, me=name, them=where)


def evaluate(
    agent: Agent,
    arena: Arena,
    scenes: Sequence[int],
    *,
    seed: int,
    name: str,
    journal: Path | None = None,
    header: str = "",
    bar: bool = True,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Run every scene once and return plain data for JSON; times stand under ``timing``.

    Args:
        agent: what acts.
        arena: where.
        scenes: seeds of the scenes, all different.
        seed: of the policy's noise.
        name: of the policy, for messages.
        journal: file of finished scenes; what it holds is not run again.
        header: identifies the evaluation; a journal of another one is refused.
        bar: show progress.
        words: what the policy is told, in place of the task's own: scene i hears the i-th of them, and so on in turn.
    """
    arena.require_fit(agent.spec, name)
    said = tuple(words) or (arena.instruction,)
    for sentence in said:
        agent.instruct(sentence)  # one that is not understood is refused before anything runs
    slots, calls, thought_s = arena.env.num_envs, 0, 0.0
    started = time.monotonic()
    steps_here = 0

    def on_episode(scene_seed: int, episode: Episode) -> None:
        nonlocal steps_here
        done[scene_seed] = outcome(scene_seed, episode)
        steps_here += episode.length
        if journal:
            append_line(journal, json.dumps(asdict(done[scene_seed])))
        shown.update()
        shown.set_postfix(success=f"{np.mean([o.success for o in done.values()]):.3f}", refresh=False)

    with _journalled(journal, header) as done:
        shown = tqdm(
            disable=not bar,
            total=len(scenes),
            initial=len(done),
            desc=f"eval {arena.task}",
            unit="scene",
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        for turn, sentence in enumerate(said):
            agent.instruct(sentence)
            controller = agent.controller(slots, seed)
            remaining = [[s for s in slot if s not in done] for slot in deal(scenes[turn :: len(said)], slots)]
            rollout(arena.env, arena.action_spec, sentence, controller, remaining, on_episode, guard=arena.guard)
            calls, thought_s = calls + controller.calls, thought_s + controller.seconds
        shown.close()
    seconds = time.monotonic() - started
    outcomes = [done[s] for s in scenes]
    return {
        "task": arena.task,
        "policy": name,
        "episodes": len(outcomes),
        "policy_seed": seed,
        **({"words": list(said)} if words else {}),
        "num_envs": slots,
        "success": as_dict(proportion(sum(o.success for o in outcomes), len(outcomes))),
        "mean_length": float(np.mean([o.length for o in outcomes])),
        "mean_length_of_successes": _mean([o.length for o in outcomes if o.success]),
        "mean_return": float(np.mean([o.episode_return for o in outcomes])),
        "mean_max_coverage": _mean([o.max_coverage for o in outcomes if o.max_coverage is not None]),
        "diverged": sum(o.diverged is not None for o in outcomes),
        "safety": _safety(arena, outcomes),
        "env_steps": int(sum(o.length for o in outcomes)),
        "scenes": [asdict(o) for o in outcomes],
        "timing": {
            "seconds": seconds,
            "env_steps_per_s": steps_here / seconds if seconds else 0.0,
            "policy_calls": calls,
            "policy_calls_per_s": calls / thought_s if thought_s else 0.0,
        },
    }


def _safety(arena: Arena, outcomes: Sequence[SceneOutcome]) -> dict[str, Any] | None:
    """Share of steps that were limited and of episodes with a fault; None where no robot's limits are known."""
    if arena.guard is None:
        return None
    steps = sum(o.length for o in outcomes)
    faults = [o.fault for o in outcomes if o.fault is not None]
    clipped_by: Counter[str] = Counter()
    for o in outcomes:
        clipped_by.update(o.clipped_by)
    return {
        "robot": arena.guarded_by,
        "clip_rate": sum(o.clipped_steps for o in outcomes) / steps,
        "clipped_by": {name: count / steps for name, count in clipped_by.most_common()},
        "fault_rate": len(faults) / len(outcomes),
        "faults": sorted(set(faults)),
    }


def _mean(values: Sequence[float | int]) -> float | None:
    return float(np.mean(values)) if values else None


@contextlib.contextmanager
def _journalled(path: Path | None, header: str) -> Iterator[dict[int, SceneOutcome]]:
    """Hold the journal for this process alone; hand out the scenes that it says are finished."""
    if path is None:
        yield {}
        return
    if not path.exists():
        write_text(path, header + "\n")
    with exclusive(path):
        lines = read_lines(path)
        if lines[:1] != [header]:
            raise UserError(
                f"{path} is what a killed evaluation of another policy or with other settings left; remove it"
            )
        yield {o.scene_seed: o for o in (SceneOutcome(**json.loads(line)) for line in lines[1:])}


def film(
    agent: Agent,
    arena: Arena,
    scenes_per_slot: Sequence[Sequence[int]],
    *,
    seed: int,
    size: tuple[int, int],
) -> dict[int, tuple[list[np.ndarray], Episode]]:
    """Run chosen scenes again and return their frames; each scene must be in the slot it was evaluated in.

    Returns:
        By scene seed, the frames ((height, width, 3) uint8, one per step) and the episode.
    """
    frames: list[list[np.ndarray]] = [[] for _ in scenes_per_slot]
    waiting = [list(s) for s in scenes_per_slot]
    films: dict[int, tuple[list[np.ndarray], Episode]] = {}

    def on_step(env: gym.vector.VectorEnv, active_N: np.ndarray) -> None:
        pictures = env.render_rgb(*size)  # type: ignore[attr-defined]
        for slot in np.flatnonzero(active_N):
            frames[slot].append(pictures[slot])

    def on_episode(scene_seed: int, episode: Episode) -> None:
        slot = next(i for i, scenes in enumerate(waiting) if scene_seed in scenes)
        films[scene_seed] = (frames[slot], episode)
        frames[slot] = []

    agent.instruct(arena.instruction)
    controller = agent.controller(arena.env.num_envs, seed)
    rollout(
        arena.env,
        arena.action_spec,
        arena.instruction,
        controller,
        scenes_per_slot,
        on_episode,
        on_step,
        guard=arena.guard,
    )
    return films


def compare(
    agents: Mapping[str, Agent], arena: Arena, scenes: int, seed: int, *, first: str, second: str
) -> tuple[PairedDifference, dict[str, Any]]:
    """Run agents on the same selection scenes with the same noise: second - first, and it and each one's rate as plain data.

    Args:
        agents: by name.
        arena: where.
        scenes: how many of the selection scenes.
        seed: of the policies' noise.
        first: name of the one that is compared with.
        second: name of the one that may be better.
    """
    seeds = range(SELECTION_SCENES, SELECTION_SCENES + scenes)
    successes = {
        name: [bool(s["success"]) for s in evaluate(agent, arena, seeds, seed=seed, name=name)["scenes"]]
        for name, agent in agents.items()
    }
    paired = paired_difference(successes[first], successes[second])
    rates = {name: as_dict(proportion(sum(s), len(s))) for name, s in successes.items()}
    return paired, {"paired": as_dict(paired), **rates}
