"""Write the report of a run folder: one self-contained HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.cli.common import CommandConfig
from vla_rl.report.build import write_report

EXAMPLE = "vla-rl report runs/can"
POSITIONALS = ("path",)


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl report``.

    path: run folder of ``vla-rl run``
    """

    path: Path


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """The report covers the whole run."""
    return {"path": str(run)}


def run(config: Config) -> dict[str, Any]:
    """Write ``report.html`` into the run folder."""
    target = write_report(config.path)
    return {"bytes": target.stat().st_size}
