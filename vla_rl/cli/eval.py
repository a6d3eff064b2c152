"""Evaluate one policy, or two against each other, on unseen scenes.

Success with its exact 95 % interval, scene by scene; two policies are compared on the same scenes by an exact McNemar test. The same
seed gives the same numbers; killed, the same command goes on.
"""

from __future__ import annotations

import json as json_module
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from real_robot.robot import load_robot
from sim.task import TaskConfig
from vla_rl.algos.iql import load_critic
from vla_rl.cli.common import CommandConfig, Simulation, base_finder, guarded, open_arena, open_task
from vla_rl.evaluate import Arena, evaluate, film
from vla_rl.inference.checkpoint import load_agent, spec_of
from vla_rl.inference.controller import Agent, PolicyAgent
from vla_rl.inference.delayed import DelayedAgent, LatencyConfig
from vla_rl.inference.rules import SelectorConfig
from vla_rl.inference.selector_checkpoint import Selector
from vla_rl.inference.selectors import NoisySampler
from vla_rl.inference.timeline import ExecutionConfig
from vla_rl.kernels import KernelConfig
from vla_rl.policies.checkpoint import resolve_policy
from vla_rl.report.video import caption, write_mp4
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_text, write_json
from vla_rl.runtime.seeding import TEST_SCENES
from vla_rl.statistics import Proportion, as_dict, paired_difference

EXAMPLE = "vla-rl eval runs/can/pretrain --task can --episodes 250 --seed 100000 --json out.json --video out.mp4"
POSITIONALS = ("policies*",)
GROUPS = {"kernel": "kernel"}
VIDEO_SIZE_PX = (256, 256)
FILM_NAME = re.compile(r"(success|failure)_\d+\.mp4")


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl eval``.

    policies: one or two policy folders
    task: name of the task (none: the one the policy was trained on)
    episodes: scenes, each run once
    seed: seed of the first scene, the others follow
    policy_seed: seed of the policy's noise
    num_envs: environments in parallel (0: 4 in threads for robosuite, 16 in turn for other tasks)
    max_episode_steps: overrides the task's own limit
    simulation: how the task is simulated
    instruction: what the policy is told, in place of the task's own words (a wrong one, say)
    wordings: of the task: own, or unseen ones that no demonstration was told in; scene i hears the i-th of them, and so on in turn
    robot: whose safety limits hold: file or name in configs/robot (none: those of the task's simulated robot)
    video: an .mp4 file, or a folder for one file per scene, of the last policy given
    videos: how many successes and how many failures to film
    critic: folder of a critic that the offline stage trained, to run the best of several chunks (IDQL)
    candidates: chunks that it chooses from
    execution: how chunks become actions while the policy takes time
    latency: how long it takes (simulated; 0: no time)
    explore: sample with the kernel's noise, as roll-outs for learning do, instead of as deployed
    kernel: that noise
    """

    policies: tuple[Path, ...]
    task: str | None = None
    episodes: int = 250
    seed: int = TEST_SCENES
    policy_seed: int = 0
    num_envs: int = 0
    max_episode_steps: int | None = None
    simulation: Simulation = field(default_factory=Simulation)
    instruction: str | None = None
    wordings: Literal["own", "unseen"] = "own"
    robot: str | None = None
    video: Path | None = None
    videos: int = 3
    critic: Path | None = None
    candidates: int = 16
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    explore: bool = False
    kernel: KernelConfig = field(default_factory=KernelConfig)

    def __post_init__(self) -> None:
        if len(self.policies) not in (1, 2):
            raise ValueError(f"eval takes one policy, or two to compare, got {len(self.policies)}")
        if self.candidates < 1:
            raise ValueError(f"candidates wants at least 1, got {self.candidates}")
        if self.instruction is not None and (self.wordings != "own" or not self.instruction.strip()):
            raise ValueError(
                f"instruction wants words, and wordings own beside it, got {self.instruction!r}, {self.wordings}"
            )
        if self.explore and self.critic is not None:
            raise ValueError("explore and critic are two ways to draw a chunk; give one of them")
        if self.episodes < 1 or self.videos < 0 or self.num_envs < 0 or self.seed < 0:
            raise ValueError("episodes wants at least 1; videos, num_envs and seed at least 0")


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants numbers and films."""
    return {"task": task, "json": str(folder / "eval.json"), "video": str(folder / "videos")}


def run(config: Config) -> dict[str, Any]:
    """Evaluate, print and return the numbers."""
    task_name = config.task or spec_of(config.policies[0]).task
    task = open_task(task_name, config.simulation, config.max_episode_steps)
    arena = guarded(open_arena(task, config.num_envs), config.robot)
    scenes = list(range(config.seed, config.seed + config.episodes))
    words = _words(config, task)
    results = []
    try:
        agents = [_agent(config, path, arena) for path in config.policies]
        for index, (path, agent) in enumerate(zip(config.policies, agents, strict=True)):
            digest = folder_digest(resolve_policy(path))
            settings = [
                digest,
                encode(task),
                config.episodes,
                config.seed,
                config.policy_seed,
                arena.env.num_envs,
            ]
            if config.robot is not None:
                settings += [encode(load_robot(config.robot))]
            if config.critic is not None:
                settings += [folder_digest(config.critic), config.candidates]
            if config.explore:
                settings += [encode(config.kernel)]
            if words:
                settings += [list(words)]
            if _delays(config):
                settings += [encode(config.execution), encode(config.latency)]
            header = json_module.dumps({"evaluation": sha256_text(json_module.dumps(settings))})
            journal = None if config.json is None else config.json.with_name(f"{config.json.name}.{index}.journal")
            result = evaluate(
                agent,
                arena,
                scenes,
                seed=config.policy_seed,
                name=str(path),
                journal=journal,
                header=header,
                words=words,
            )
            results.append({**result, "policy_digest": digest})
            print(
                f"{path} on {task_name}: success {Proportion(**result['success'])}, mean length {result['mean_length']:.1f}"
                f"{_safety_line(result['safety'])}"
            )
        summary = _summarise(config, results)
        if config.video is not None:
            told = replace(arena, instruction=words[0]) if len(words) == 1 else arena
            _film_or_warn(config, agents[-1], told, results[-1])
    finally:
        arena.env.close()
    return summary


def _words(config: Config, task: TaskConfig) -> tuple[str, ...]:
    """What the policy is told, where it is not the task's own words."""
    if config.wordings == "unseen" and not task.unseen_wordings:
        raise UserError(f"task {task.name!r} has no unseen_wordings in its file; wordings own is allowed")
    return task.unseen_wordings if config.wordings == "unseen" else (config.instruction,) if config.instruction else ()


def _safety_line(safety: dict[str, Any] | None) -> str:
    """What the safety filter did, for people."""
    if safety is None:
        return ""
    by = ", ".join(f"{name} {100 * share:.1f} %" for name, share in safety["clipped_by"].items())
    clipped = f"{100 * safety['clip_rate']:.1f} % of the steps clipped{f' ({by})' if by else ''}"
    return f"; limits of {safety['robot']}: {clipped}, {100 * safety['fault_rate']:.1f} % of the episodes with a fault"


def _delays(config: Config) -> bool:
    """Whether the policy is run otherwise than chunk after chunk, without taking time."""
    return (config.execution, config.latency) != (ExecutionConfig(), LatencyConfig())


def _agent(config: Config, path: Path, arena: Arena) -> Agent:
    """What a folder holds, as it is to be run."""
    agent = _sampling_agent(config, path, arena)
    if not _delays(config):
        return agent
    if not isinstance(agent, PolicyAgent):
        raise UserError(f"execution and latency are for chunk policies; {path} holds a residual on one")
    return DelayedAgent(agent, config.execution, config.latency)


def _sampling_agent(config: Config, path: Path, arena: Arena) -> Agent:
    """As deployed; or a chunk policy with noise, or running the best of several by a critic of the offline stage."""
    agent = load_agent(path, base_finder(arena))
    if not (config.explore or config.critic):
        return agent
    if not isinstance(agent, PolicyAgent) or agent.sampler is not None:
        raise UserError(f"explore and critic are for chunk policies; {path} holds a residual or a selector on one")
    policy = agent.policy
    if config.explore:
        return PolicyAgent(policy, NoisySampler(policy, policy.make_kernel(config.kernel)))
    assert config.critic is not None
    critic = load_critic(config.critic, policy)
    best = Selector(SelectorConfig("q", candidates=config.candidates), critic=critic)
    return PolicyAgent(policy, best.sampler(policy))


def _summarise(config: Config, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare two policies, and write the numbers before anything else may fail."""
    if len(results) == 1:
        summary = results[0]
    else:
        a, b = ([scene["success"] for scene in r["scenes"]] for r in results)
        paired = paired_difference(a, b)
        print(f"A = {config.policies[0]}, B = {config.policies[1]}: {paired}")
        summary = {"a": results[0], "b": results[1], "paired": as_dict(paired)}
    if config.json is not None:
        write_json(config.json, summary)
        for index in range(len(results)):
            config.json.with_name(f"{config.json.name}.{index}.journal").unlink(missing_ok=True)
    return summary


def _film_or_warn(config: Config, agent: Agent, arena: Arena, result: dict[str, Any]) -> None:
    """Film; where there is no OpenGL, say so and go on, since the numbers stand without films."""
    assert config.video is not None
    if config.video.suffix != ".mp4" and config.video.is_dir():
        for old in config.video.iterdir():
            if FILM_NAME.fullmatch(old.name):  # films of an evaluation with other settings
                old.unlink()
    if not config.videos:
        return
    try:
        if len(result.get("words", ())) > 1:
            raise UserError("scenes that hear several wordings are not filmed; give one with --instruction")
        _film(config, agent, arena, result)
    except UserError as error:
        print(
            f"no films: {' '.join(str(error).split())[:200]}; 'vla-rl doctor' says how to get rendering",
            file=sys.stderr,
        )


def _film(config: Config, agent: Agent, arena: Arena, result: dict[str, Any]) -> None:
    """Run some scenes again in the slots they had, and write their frames."""
    assert config.video is not None
    slots = arena.env.num_envs
    chosen: dict[int, list[int]] = defaultdict(list)
    for wanted in (True, False):
        matching = [i for i, scene in enumerate(result["scenes"]) if scene["success"] is wanted]
        for index in matching[: config.videos]:
            chosen[index % slots].append(result["scenes"][index]["scene_seed"])
    in_slots = [chosen[slot] for slot in range(slots)]
    films = film(agent, arena, in_slots, seed=config.policy_seed, size=VIDEO_SIZE_PX)
    by_seed = {scene["scene_seed"]: scene for scene in result["scenes"]}
    reel = []
    for scene_seed, (frames, episode) in sorted(films.items(), key=lambda item: (not item[1][1].success, item[0])):
        if episode.success != by_seed[scene_seed]["success"]:
            raise UserError(
                f"scene {scene_seed} did not repeat when it was filmed; please report this with the versions that doctor prints"
            )
        word = "success" if episode.success else "failure"
        named = [caption(f, f"{arena.task} scene {scene_seed}: {word}") for f in frames]
        if config.video.suffix == ".mp4":
            reel += named + [named[-1]] * int(arena.action_spec.control_hz / 2)
        else:
            write_mp4(config.video / f"{word}_{scene_seed}.mp4", named, arena.action_spec.control_hz)
    if reel:
        write_mp4(config.video, reel, arena.action_spec.control_hz)
