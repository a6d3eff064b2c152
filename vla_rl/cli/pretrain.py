"""Train a diffusion or flow policy on demonstrations by imitation.

Killed at any time, the same command goes on and ends with the same weights. Several processes:
``accelerate launch --num_processes 2 -m vla_rl.cli.main pretrain ...``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.cli.common import CommandConfig, settings_of
from vla_rl.policies.base import discover_policies
from vla_rl.pretrain import PretrainSettings, pretrain

EXAMPLE = "vla-rl pretrain --data runs/can/demos --out runs/can/pretrain --policy flow_mlp --bc.steps 10000"
GROUPS = {"policy": "policy"}
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig, PretrainSettings):
    """Options of ``vla-rl pretrain``.

    data: folder of a data set, or a list of several
    out: run folder, in the end with the policy in it
    """

    data: list[Path]
    out: Path


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the policy."""
    return {"out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Train; return what was done."""
    return pretrain(config.data, config.out, settings_of(PretrainSettings, config))
