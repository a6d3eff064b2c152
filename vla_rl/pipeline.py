"""Run the stages that an experiment file lists: skip what is done, resume what was killed, write down what went in and out.

This module knows no stage: a stage is a command (``vla_rl/cli/run.py`` hands them in), its options, and references to folders
of earlier stages, written ``@name``.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vla_rl.runtime.config import read_yaml, write_yaml
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import (
    TEMPORARY_SUFFIX,
    exclusive,
    read_json,
    sha256_file,
    sha256_text,
    write_json,
    write_text,
)

MANIFEST = "manifest.json"
RESULTS = "results.json"
REPORTED_PACKAGES = ("torch", "mujoco", "robosuite", "diffusers", "lerobot", "gymnasium", "numpy", "opencv-python")
_BUDGET = ("env_steps", "frames", "episodes", "gradient_steps")


@dataclass(frozen=True)
class Experiment:
    """An experiment file.

    task: the task of all stages
    stages: by name, the options of each stage in order; ``command`` names the command where it is not the stage's name
    """

    task: str
    stages: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Experiment:
        """Read and check a file.

        Raises:
            UserError: a key is unknown or missing, or a stage refers to one that does not come before it.
        """
        raw = read_yaml(path)
        try:
            json.dumps(raw, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} wants plain numbers, words, lists and mappings: {error}") from error
        unknown = set(raw) - {"task", "stages"}
        if unknown or "task" not in raw or not isinstance(raw.get("stages"), dict) or not raw["stages"]:
            raise UserError(f"{path} wants the keys task and stages, got {sorted(map(str, raw))}")
        seen: list[str] = []
        for name, options in raw["stages"].items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise UserError(f"{path}: a stage's name wants letters, digits, '_' and '-', got {name!r}")
            if options is not None and not isinstance(options, dict):
                raise UserError(f"{path}: stage {name!r} wants a mapping of options, got {options!r}")
            for reference in references(options or {}):
                if reference not in seen:
                    raise UserError(
                        f"{path}: stage {name!r} refers to '@{reference}', which does not come before it; before it come {seen}"
                    )
            command = (options or {}).get("command", name)
            if not isinstance(command, str):
                raise UserError(f"{path}: stage {name!r} wants the name of a command, got {command!r}")
            seen.append(name)
        return cls(str(raw["task"]), {name: dict(options or {}) for name, options in raw["stages"].items()})


@runtime_checkable
class StageCommand(Protocol):
    """A command that can be a stage."""

    def run_stage(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Run with plain options and return plain results."""

    def resolved(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Decode the options and return the whole config as plain data; raise UserError for a bad one."""

    def stage_options(self, folder: Path, task: str, run: Path) -> dict[str, Any]:
        """Options that the pipeline fills in: where results go."""


def references(value: Any) -> list[str]:
    """Names of the stages that options refer to."""
    if isinstance(value, str):
        return [value[1:].partition("/")[0]] if value.startswith("@") else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [name for item in value for name in references(item)] if isinstance(value, list | tuple) else []


def resolve(value: Any, run: Path) -> Any:
    """Replace ``@stage/...`` by the path in the run folder."""
    if isinstance(value, str):
        return str(run / value[1:]) if value.startswith("@") else value
    if isinstance(value, Mapping):
        return {k: resolve(v, run) for k, v in value.items()}
    return [resolve(v, run) for v in value] if isinstance(value, list | tuple) else value


def content_digest(folder: Path) -> str:
    """Hash of what a stage left, without logs and training state, which differ between runs of equal outcome."""
    noise = {"tensorboard", "checkpoints", "videos", "replay"}
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file()
        and p.suffix not in (TEMPORARY_SUFFIX, ".jsonl")
        and p.name != RESULTS
        and not noise & set(p.relative_to(folder).parts)
    )
    return sha256_text("\n".join(f"{p.relative_to(folder)} {sha256_file(p)}" for p in files))


def versions() -> dict[str, str]:
    """Versions that numbers depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    return found | {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}


def run_experiment(
    path: Path, run: Path, command: Callable[[str], StageCommand], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run all stages of a file in a folder; return the results by stage.

    Args:
        path: experiment file.
        run: run folder.
        command: returns the command of a name, or raises UserError.
        progress: called with a line as each stage begins.
    """
    experiment = Experiment.read(path)
    stages = {name: command(options.get("command", name)) for name, options in experiment.stages.items()}
    filled = {
        name: {
            **stages[name].stage_options(run / name, experiment.task, run),
            **resolve({k: v for k, v in options.items() if k != "command"}, run),
        }
        for name, options in experiment.stages.items()
    }
    # what a stage's outcome hangs on, decoded before anything runs: a typo in the last stage costs no hours
    configs = {name: stages[name].resolved(filled[name]) for name in stages}
    with exclusive(run):
        manifest = read_json(run / MANIFEST) if (run / MANIFEST).exists() else {"stages": {}, "begun": {}}
        if manifest.get("task", experiment.task) != experiment.task:
            raise UserError(
                f"{run} holds a run of task {manifest['task']!r}, not {experiment.task!r}; choose another --out"
            )
        manifest |= {"task": experiment.task, "experiment": path.stem}
        manifest["stages"] = {k: v for k, v in manifest["stages"].items() if k in experiment.stages}
        write_text(run / "experiment.yaml", write_yaml({"task": experiment.task, "stages": experiment.stages}))
        for number, (name, options) in enumerate(experiment.stages.items(), start=1):
            line = f"[{number}/{len(stages)}] {name}"
            folder = run / name
            inputs = {ref: manifest["stages"][ref]["output"] for ref in references(options)}
            if not inputs:  # a stage without inputs of its own, such as a report, looks at all before it
                inputs = {k: manifest["stages"][k]["output"] for k in list(stages)[: number - 1]}
            begun = {"config": configs[name], "inputs": inputs}
            record = manifest["stages"].get(name)
            if record and record["begun"] == begun and record["output"] == content_digest(folder):
                progress(f"{line}: done before, {record['seconds']:.0f} s")
                continue
            for later in list(stages)[number - 1 :]:
                manifest["stages"].pop(later, None)
            if folder.exists() and manifest["begun"].get(name) != begun:
                aside = run / f"{name}.previous"
                progress(f"{line}: its options or inputs have changed; what it left before is now in {aside}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            resumed = folder.exists()
            manifest["begun"][name] = begun
            write_json(run / MANIFEST, manifest)
            progress(line)
            started = time.monotonic()
            results = stages[name].run_stage(filled[name])
            manifest["stages"][name] = {
                "command": options.get("command", name),
                "begun": begun,
                "seed": configs[name].get("seed"),
                "output": content_digest(folder),
                "seconds": round(time.monotonic() - started, 1),
                "resumed": resumed,  # then the seconds are those since
                "budget": {k: results[k] for k in _BUDGET if k in results},
                "versions": versions(),
                "results": {k: v for k, v in results.items() if k not in ("scenes", "ranges")},
            }
            write_json(run / MANIFEST, manifest)
            write_json(run / RESULTS, {k: v["results"] for k, v in manifest["stages"].items()})
    return {name: record["results"] for name, record in manifest["stages"].items()}
