"""Run all stages of an experiment file: skip what is done, resume what was killed, and write the report."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.task import load_task
from vla_rl.cli import main
from vla_rl.cli.common import CommandConfig
from vla_rl.pipeline import run_experiment
from vla_rl.runtime.config import CONFIG_ROOT, decode, encode, expand_named, names_in
from vla_rl.runtime.errors import UserError

EXAMPLE = "vla-rl run configs/experiment/can.yaml --out runs/can"
POSITIONALS = ("file",)
MOST_SEEDS = 10  # each has a thousand scenes of demonstrations of its own, below those of roll-outs


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl run``.

    file: experiment file, or the name of one in configs/experiment
    out: run folder
    seed: of all that is trained, and which scenes are demonstrated; test scenes stay the same
    """

    file: Path
    out: Path
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < MOST_SEEDS:
            raise ValueError(f"seed wants 0 to {MOST_SEEDS - 1}, got {self.seed}")


@dataclass(frozen=True)
class _Stage:
    """A command of this package as a stage of the pipeline."""

    module: types.ModuleType
    seed: int = 0

    def _decode(self, options: Mapping[str, Any]) -> Any:
        if hasattr(self.module, "prepare"):
            self.module.prepare()
        return decode(self.module.Config, expand_named(options, getattr(self.module, "GROUPS", {})))

    def run_stage(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return self.module.run(self._decode(options))

    def resolved(self, options: Mapping[str, Any]) -> dict[str, Any]:
        plain = encode(self._decode(options))
        if isinstance(options.get("task"), str):
            plain["task"] = encode(load_task(options["task"]))  # a changed file in configs/task counts as a change
        return plain

    def stage_options(self, folder: Path, task: str, run: Path) -> dict[str, Any]:
        seeded = self.module.seed_options(self.seed) if self.seed and hasattr(self.module, "seed_options") else {}
        return {**self.module.stage_options(folder, task, run), **seeded}


def _stage(name: str, seed: int = 0) -> _Stage:
    stages = {
        words: module for words in main.command_names() if hasattr(module := main.load_command(words), "stage_options")
    }
    if name not in stages:
        raise UserError(f"no stage named {name!r}; there are {', '.join(stages)}")
    return _Stage(stages[name], seed)


def run(config: Config) -> dict[str, Any]:
    """Run the stages; return the results of each."""
    path = config.file
    if not path.exists() and path.suffix == "" and path.name in names_in("experiment"):
        path = CONFIG_ROOT / "experiment" / f"{path.name}.yaml"
    results = run_experiment(
        path, config.out, lambda name: _stage(name, config.seed), lambda line: print(line, file=sys.stderr, flush=True)
    )
    report = config.out / "report.html"
    if report.exists():
        print(f"report: {report}")
    return results
