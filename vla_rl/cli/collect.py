"""Collect demonstrations of a scripted expert into a LeRobotDataset v3.

Killed at any time, it loses at most the episode being written; the same command goes on.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from sim.collect import expert_episodes
from sim.experts.base import ExpertConfig
from sim.task import TaskConfig
from vla_rl.cli.common import CommandConfig, Simulation, open_task
from vla_rl.data.info import describe
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.config import encode
from vla_rl.runtime.files import exclusive
from vla_rl.runtime.seeding import TEST_SCENES, TRAINING_SCENES

EXAMPLE = "vla-rl collect --task can --episodes 50 --out runs/can/demos --expert.action-noise 0.1 --expert.strategies 0"
GROUPS = {"expert": "expert"}


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl collect``.

    task: name of a task in configs/task, or gym:<id>
    out: folder of the data set
    episodes: how many, failures included
    seed: seed of the first scene, the others follow (one whose simulation diverges is left out)
    workers: processes, 0 for one per core
    max_episode_steps: overrides the task's own limit
    simulation: how the task is simulated
    video: keep pictures as video: lossless, h264 or av1 (none: each as PNG)
    expert: knobs of the demonstrations
    """

    task: str
    out: Path
    episodes: int = 50
    seed: int = TRAINING_SCENES
    workers: int = 0
    max_episode_steps: int | None = None
    simulation: Simulation = field(default_factory=Simulation)
    video: Literal["lossless", "h264", "av1"] | None = None
    expert: ExpertConfig = field(default_factory=ExpertConfig)

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.workers < 0 or self.seed < 0:
            raise ValueError(
                f"episodes wants at least 1, workers and seed at least 0, got {self.episodes}, {self.workers}, {self.seed}"
            )
        if self.seed + self.episodes > TEST_SCENES:
            raise ValueError(
                f"scenes from {TEST_SCENES} are for tests, not for data; got scenes {self.seed} to {self.seed + self.episodes - 1}"
            )


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the data set."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes: which scenes are demonstrated."""
    return {"seed": TRAINING_SCENES + 1000 * seed}


def run(config: Config) -> dict[str, Any]:
    """Collect what is missing; return counts."""
    task = open_task(config.task, config.simulation, config.max_episode_steps)
    env = task.make_env()
    action_spec, observation_spec = env.action_spec, env.observation_spec
    env.close()
    recipe = {
        "source": "expert",
        "task": encode(task),
        "seed": config.seed,
        "episodes": config.episodes,
        "expert": encode(config.expert),
    }
    with exclusive(config.out):
        writer = EpisodeWriter.open_or_create(
            config.out,
            action_spec=action_spec,
            observation_spec=observation_spec,
            task=task.name,
            recipe=recipe,
            video=config.video,
        )
        _collect(config, task, writer)
    summary = describe(config.out)
    return {k: summary[k] for k in ("episodes", "frames", "success", "mean_length")}


def _collect(config: Config, task: TaskConfig, writer: EpisodeWriter) -> None:
    last = writer.last_scene
    scene = config.seed if last is None else last + 1
    bar = tqdm(
        total=config.episodes,
        initial=writer.total_episodes,
        desc=f"collect {task.name}",
        unit="episode",
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    while missing := config.episodes - writer.total_episodes:
        scenes = range(scene, scene + missing)
        for episode in expert_episodes(
            task, config.expert, scenes, min(config.workers or os.cpu_count() or 1, missing)
        ):
            scene += 1
            if "diverged" in episode.provenance:
                tqdm.write(f"scene {scene - 1} is left out: {episode.provenance['diverged']}", file=sys.stderr)
                continue
            writer.add(episode)
            bar.update()
    bar.close()
