"""Compare our reader's samples per second with LeRobot's own DataLoader on the same data set and windows."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_rl.cli.common import CommandConfig
from vla_rl.data.episode import Episode
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import Windows
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.seeding import numpy_generator
from vla_rl.types import ACTION, ENVIRONMENT_STATE, STATE, ActionSpec, FeatureSpec

EXAMPLE = "vla-rl bench data --json results/bench_data.json"
RATE_HZ = 20.0


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench data``.

    data: data set (none: a synthetic one of 50 episodes of 100 steps is written to a temporary folder)
    batch_size: windows per batch
    observation_steps: O
    chunk_steps: H
    rounds: interleaved rounds; medians are reported
    seconds: of each measurement
    """

    data: Path | None = None
    batch_size: int = 64
    observation_steps: int = 2
    chunk_steps: int = 16
    rounds: int = 3
    seconds: float = 3.0


def _synthetic(root: Path) -> Path:
    rng = numpy_generator(0, "bench")
    spec = ActionSpec(tuple("abcdefg"), ("1",) * 7, (-1.0,) * 7, (1.0,) * 7, "delta", RATE_HZ)
    shapes = {STATE: FeatureSpec((11,)), ENVIRONMENT_STATE: FeatureSpec((12,))}
    writer = EpisodeWriter.open_or_create(
        root, action_spec=spec, observation_spec=shapes, task="bench", recipe={"source": "bench"}
    )
    for scene in range(50):
        steps = 100
        action_TA = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
        observations = {k: rng.normal(size=(steps + 1, *v.shape)).astype(np.float32) for k, v in shapes.items()}
        zeros_T = np.zeros(steps, np.float32)
        writer.add(
            Episode(
                observations, action_TA, action_TA, zeros_T, zeros_T > 0, False, True, "bench", {"scene_seed": scene}
            )
        )
    return root


def _rate(step: Any, batch_size: int, seconds: float) -> float:
    step()
    batches, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step()
        batches += 1
    return batches * batch_size / (time.perf_counter() - started)


def run(config: Config) -> dict[str, Any]:
    """Measure both in turn, print and return samples per second."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    with tempfile.TemporaryDirectory() as scratch:
        root = config.data or _synthetic(Path(scratch) / "set")
        data = load_dataset(root)
        windows = Windows(data, config.observation_steps, config.chunk_steps)
        generator = torch.Generator().manual_seed(0)
        rate = data.action_spec.control_hz
        deltas = {k: [i / rate for i in range(1 - config.observation_steps, 1)] for k in data.observation_spec}
        deltas[ACTION] = [i / rate for i in range(config.chunk_steps)]
        theirs = LeRobotDataset("local/bench", root=root, delta_timestamps=deltas)
        loader = torch.utils.data.DataLoader(theirs, batch_size=config.batch_size, shuffle=True, num_workers=0)
        batches = iter(loader)

        def their_step() -> None:
            nonlocal batches
            try:
                next(batches)
            except StopIteration:
                batches = iter(loader)
                next(batches)

        def our_step() -> None:
            windows.batch(torch.randint(0, len(windows), (config.batch_size,), generator=generator))

        ours, lerobot = [], []
        for _ in range(config.rounds):
            ours.append(_rate(our_step, config.batch_size, config.seconds))
            lerobot.append(_rate(their_step, config.batch_size, config.seconds))
    result = {"ours_samples_per_s": float(np.median(ours)), "lerobot_samples_per_s": float(np.median(lerobot))}
    result["ratio"] = result["ours_samples_per_s"] / result["lerobot_samples_per_s"]
    ours_rate, their_rate = result["ours_samples_per_s"], result["lerobot_samples_per_s"]
    print(
        f"windows of {config.observation_steps} observations and {config.chunk_steps} actions, batches of {config.batch_size}:"
    )
    print(
        f"ours {ours_rate:,.0f} samples/s, LeRobot's DataLoader {their_rate:,.0f} samples/s, ratio {result['ratio']:,.0f}"
    )
    return result
