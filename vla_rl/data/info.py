"""What a data set holds: episodes, lengths, successes, ranges, provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.reader import PROVENANCE_PREFIX, EpisodeData, load_dataset
from vla_rl.statistics import as_dict, proportion


def describe(root: Path) -> dict[str, Any]:
    """Summarise a set as plain data; raises UserError as ``load_dataset`` does."""
    data = load_dataset(root)
    lengths = data.episodes["length"].to_numpy()
    return {
        "path": str(root),
        "task": data.task,
        "instructions": list(data.tasks),
        "episodes": data.num_episodes,
        "frames": data.num_frames,
        "control_hz": data.action_spec.control_hz,
        "mean_length": float(lengths.mean()),
        "lengths": {name: float(np.quantile(lengths, q)) for name, q in (("min", 0), ("median", 0.5), ("max", 1))},
        "success": _success(data),
        "ranges": _ranges(data),
        "pictures": {key: list(pictures.shape) for key, pictures in data.pictures.items()},
        "provenance": _provenance(data),
        "digest": data.digest,
    }


def _success(data: EpisodeData) -> dict[str, Any] | None:
    if "success" not in data.episodes:
        return None
    return as_dict(proportion(int(data.episodes["success"].sum()), data.num_episodes))


def _ranges(data: EpisodeData) -> dict[str, dict[str, list[float]]]:
    """Of each number of a vector; of clouds and depth as a whole."""
    keys = [k for k in data.columns if k.startswith(("observation.", "action", "next.reward"))]
    ranges = {}
    for key in sorted(keys):
        column = data.columns[key]
        flat = column.reshape(-1, 1 if column.ndim > 2 else column[0].numel()).float()
        ranges[key] = {"min": flat.amin(0).tolist(), "max": flat.amax(0).tolist()}
    return ranges


def _provenance(data: EpisodeData) -> dict[str, dict[str, int]]:
    """How many episodes have each value, for columns with few values; a range of seeds otherwise."""
    counts = {}
    for column in data.episodes.columns:
        if column.startswith(PROVENANCE_PREFIX):
            values = data.episodes[column].value_counts()
            if len(values) <= 10:
                counts[column.removeprefix(PROVENANCE_PREFIX)] = {str(k): int(v) for k, v in values.items()}
    return counts
