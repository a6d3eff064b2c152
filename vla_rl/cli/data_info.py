"""Print what a data set holds: episodes, lengths, success share, ranges, provenance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vla_rl.cli.common import CommandConfig
from vla_rl.data.info import describe
from vla_rl.statistics import Proportion

EXAMPLE = "vla-rl data info runs/can/demos"
POSITIONALS = ("path",)


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl data info``.

    path: folder of the data set
    """

    path: Path


def run(config: Config) -> dict[str, Any]:
    """Print the summary and return it."""
    summary = describe(config.path)
    console = Console()
    console.print(
        f'[bold]{summary["path"]}[/]: task {summary["task"]!r}, {summary["control_hz"]:g} Hz, "{"; ".join(summary["instructions"])}"'
    )
    lengths = summary["lengths"]
    console.print(
        f"{summary['episodes']} episodes, {summary['frames']} frames; length {lengths['min']:.0f} to {lengths['max']:.0f}, "
        f"median {lengths['median']:.0f}, mean {summary['mean_length']:.1f}"
    )
    if summary["success"]:
        console.print(f"success: {Proportion(**summary['success'])}")
    for name, counts in summary["provenance"].items():
        console.print(f"{name}: " + ", ".join(f"{v or '-'} x {n}" for v, n in counts.items()))
    table = Table("column", "dimension", "min", "max")
    for key, limits in summary["ranges"].items():
        for i, (low, high) in enumerate(zip(limits["min"], limits["max"], strict=True)):
            table.add_row(key if i == 0 else "", str(i), f"{low:.4f}", f"{high:.4f}")
    console.print(table)
    return summary
