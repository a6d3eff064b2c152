"""Metrics of a run: one JSON object per line, and TensorBoard beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from vla_rl.runtime.files import append_line, read_lines, write_text

FILE = "metrics.jsonl"


class MetricsLog:
    """Append-only log; on resume, what lies at or after the step of the checkpoint is cut off."""

    def __init__(self, folder: Path, from_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        kept = [line for line in read_lines(self._path) if json.loads(line)["step"] <= from_step]
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values under names like ``group/name``."""
        append_line(self._path, json.dumps({"step": step, **values}))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard."""
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The log of a folder, oldest first."""
    return [json.loads(line) for line in read_lines(folder / FILE)]
