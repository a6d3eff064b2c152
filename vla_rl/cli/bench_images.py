"""Measure policies that see: training samples/s against LeRobot's own DiffusionPolicy with its DataLoader, and the latency of a student.

Both train the same kind of net on the same data set: a ResNet-18 with GroupNorm and 32 keypoints, shared by the cameras, before a 1-D U-Net
of as many parameters, which are reported. LeRobot trains in float32; ours is measured in float32 and in bfloat16.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vla_rl.algos.bc import BCConfig, BehaviourCloning
from vla_rl.cli.common import CommandConfig
from vla_rl.data.reader import EpisodeData, load_dataset
from vla_rl.data.windows import Windows
from vla_rl.encoders.augment import AugmentConfig
from vla_rl.encoders.config import EncoderConfig
from vla_rl.encoders.resnet import ResNet18Config
from vla_rl.inference.base_policy import OwnBase
from vla_rl.nets.mlp import MLPConfig
from vla_rl.nets.unet1d import UNet1DConfig
from vla_rl.policies.base import discover_policies
from vla_rl.policies.diffusion import DiffusionConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.policies.student import StudentConfig
from vla_rl.pretrain import build_policy
from vla_rl.runtime.errors import UserError
from vla_rl.types import ACTION, IMAGE_PREFIX, Observation, kind_of

EXAMPLE = "vla-rl bench images --data runs/lift_rgb/collect --json results/bench_images.json"
prepare = discover_policies
CROP = 8  # pixels cut off each side length, by both
CALLS, WARM_UP = 2000, 100


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench images``.

    data: data set with pictures
    batch_size: windows per step
    channels: of LeRobot's U-Net
    own_channels: of ours, which has fewer convolutions a level: wider, so that it has as many parameters
    rounds: interleaved rounds; medians are reported
    steps: gradient steps of each in a round
    workers: processes of LeRobot's DataLoader
    """

    data: Path
    batch_size: int = 16
    channels: tuple[int, ...] = (64, 128, 256)
    own_channels: tuple[int, ...] = (104, 208, 424)
    rounds: int = 3
    steps: int = 4
    workers: int = 0


def run(config: Config) -> dict[str, Any]:
    """Measure, print and return the numbers."""
    data = load_dataset(config.data)
    cameras = [k for k in data.observation_spec if k.startswith(IMAGE_PREFIX)]
    if not cameras:
        raise UserError(f"{config.data} has no pictures; 'vla-rl collect --task lift_rgb' makes a set that has")
    training = _training(config, data.seen(data.observation_spec), cameras)
    latency = _latency(data)
    lerobot, ours_fp32, ours = (training[f"{k}_samples_per_s"] for k in ("lerobot", "ours_fp32", "ours"))
    print(
        f"training, {len(cameras)} cameras, batches of {config.batch_size}: LeRobot {lerobot:.1f} samples/s, "
        f"ours {ours_fp32:.1f} in float32, {ours:.1f} in bfloat16, ratio {training['ratio']:.2f}"
    )
    print(
        f"one-step student, {len(cameras)} cameras, one observation: median {latency['median_ms']:.2f} ms, p99 {latency['p99_ms']:.2f} ms"
    )
    return {"training": training, "latency": latency}


def _training(config: Config, data: EpisodeData, cameras: list[str]) -> dict[str, Any]:
    ours = {name: _our_step(config, data, bf16) for name, bf16 in (("ours_fp32", False), ("ours", True))}
    theirs = _their_step(config, data, cameras)
    steps = {**ours, "lerobot": theirs}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(config.rounds):
        for name, (step, _parameters) in steps.items():
            step()  # what was forgotten meanwhile is learnt again
            started = time.perf_counter()
            for _ in range(config.steps):
                step()
            rates[name].append(config.steps * config.batch_size / (time.perf_counter() - started))
    medians = {f"{name}_samples_per_s": float(np.median(r)) for name, r in rates.items()}
    return {
        **medians,
        "ratio": medians["ours_samples_per_s"] / medians["lerobot_samples_per_s"],
        "ratio_fp32": medians["ours_fp32_samples_per_s"] / medians["lerobot_samples_per_s"],
        "parameters": {name: parameters for name, (_, parameters) in steps.items()},
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        "workers": config.workers,
    }


def _our_step(config: Config, data: EpisodeData, bf16: bool) -> tuple[Any, int]:
    encoder = EncoderConfig(
        image=ResNet18Config(),
        shared=True,
        pool="keypoints",
        augment=AugmentConfig(crop=CROP, shift=0),
        bf16=bf16,
    )
    policy = DiffusionConfig(net=UNet1DConfig(channels=config.own_channels), encoder=encoder)
    windows = Windows(data, policy.observation_steps, policy.chunk_steps)
    built = build_policy(windows, policy, 0).train()
    bc = BCConfig(batch_size=config.batch_size, warmup_steps=1)
    algorithm = BehaviourCloning(built, bc, Accelerator(cpu=not torch.cuda.is_available()), 0)
    return lambda: algorithm.update(windows), sum(p.numel() for p in built.parameters())


def _their_step(config: Config, data: EpisodeData, cameras: list[str]) -> tuple[Any, int]:
    """A gradient step as LeRobot's own training takes it: batch, processors, loss, gradient, clip, AdamW."""
    from lerobot.configs.types import FeatureType
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.utils import dataset_to_policy_features
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig as TheirConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as TheirPolicy
    from lerobot.policies.factory import make_pre_post_processors

    rate, (_, height, width) = data.action_spec.control_hz, data.observation_spec[cameras[0]].shape
    plain = LeRobotDataset("local/bench", root=config.data)
    features = dataset_to_policy_features(plain.meta.features)
    theirs = TheirConfig(
        input_features={k: f for k, f in features.items() if k in data.observation_spec},
        output_features={k: f for k, f in features.items() if f.type is FeatureType.ACTION and k == ACTION},
        crop_shape=(height - CROP, width - CROP),
        pretrained_backbone_weights=None,
        down_dims=config.channels,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    deltas = {k: [i / rate for i in theirs.observation_delta_indices] for k in theirs.input_features}
    deltas[ACTION] = [i / rate for i in theirs.action_delta_indices]
    dataset = LeRobotDataset("local/bench", root=config.data, delta_timestamps=deltas)
    loader = torch.utils.data.DataLoader(
        dataset, config.batch_size, shuffle=True, num_workers=config.workers, drop_last=True
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    policy = TheirPolicy(theirs).train().to(theirs.device)
    before, _after = make_pre_post_processors(theirs, dataset_stats=dataset.meta.stats)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4)

    def step() -> None:
        loss, _ = policy.forward(before(next(batches)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in policy.parameters())


def _latency(data: EpisodeData) -> dict[str, Any]:
    """From an observation as a camera gives it to a chunk in the units of the robot, one thread, small CNN, as a robot's loop asks."""
    student = StudentConfig(net=MLPConfig(width=256), observation_steps=1, chunk_steps=8, execute_steps=4)
    torch.manual_seed(0)
    policy = replace(student).build(PolicySpec(data.observation_spec, data.action_spec, data.task)).eval()
    base = OwnBase(policy, 1, 0)
    base.reset([0], [0])
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(WARM_UP + CALLS):
        seen = {
            k: rng.integers(0, 256, f.shape).astype(np.uint8)
            if kind_of(k) is np.uint8
            else rng.normal(size=f.shape).astype(np.float32)
            for k, f in policy.full_spec.observation_spec.items()
        }
        started = time.perf_counter()
        base.chunk(Observation.from_features({k: torch.from_numpy(v)[None, None] for k, v in seen.items()}), [0])
        seconds.append(time.perf_counter() - started)
    ms = 1e3 * np.array(seconds[WARM_UP:])
    return {
        "calls": CALLS,
        "median_ms": float(np.median(ms)),
        "p99_ms": float(np.quantile(ms, 0.99)),
        "max_ms": float(ms.max()),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "cameras": [k for k in data.observation_spec if k.startswith(IMAGE_PREFIX)],
        "threads": torch.get_num_threads(),
    }
