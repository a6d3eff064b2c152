"""Import a robomimic HDF5 file or a Diffusion Policy zarr folder as a LeRobotDataset v3."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla_rl.cli.common import CommandConfig
from vla_rl.data.importers import Format, open_source
from vla_rl.data.info import describe
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import exclusive

EXAMPLE = "vla-rl data import low_dim.hdf5 --out runs/imported --instruction 'lift the cube'"
POSITIONALS = ("source",)


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl data import``.

    source: HDF5 file or zarr folder
    out: folder of the data set
    format: robomimic or diffusion_policy (none: by the name's ending)
    control_hz: rate of the recording, where the file does not say
    instruction: the task in words
    """

    source: Path
    out: Path
    format: Format | None = None
    control_hz: float = 20.0
    instruction: str = ""


def run(config: Config) -> dict[str, Any]:
    """Import what is missing; return counts."""
    kind = config.format
    if kind is None:
        endings: dict[str, Format] = {".hdf5": "robomimic", ".h5": "robomimic", ".zarr": "diffusion_policy"}
        if config.source.suffix not in endings:
            raise UserError(
                f"cannot tell the format of {str(config.source)!r} by its ending; give --format robomimic or diffusion_policy"
            )
        kind = endings[config.source.suffix]
    source = open_source(config.source, kind, control_hz=config.control_hz, instruction=config.instruction)
    with exclusive(config.out):
        writer = EpisodeWriter.open_or_create(
            config.out,
            action_spec=source.action_spec,
            observation_spec=source.observation_spec,
            task=source.task,
            recipe={"source": str(config.source), "format": kind, "instruction": config.instruction},
        )
        if writer.total_episodes:
            source = open_source(
                config.source,
                kind,
                control_hz=config.control_hz,
                instruction=config.instruction,
                start=writer.total_episodes,
            )
        for episode in tqdm(
            source.episodes,
            total=source.count,
            initial=writer.total_episodes,
            desc="import",
            unit="episode",
            disable=not sys.stderr.isatty(),
        ):
            writer.add(episode)
    summary = describe(config.out)
    print(f"{summary['episodes']} episodes, {summary['frames']} frames in {config.out}")
    return {k: summary[k] for k in ("episodes", "frames", "success", "mean_length")}
