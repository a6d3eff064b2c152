"""Figures of benchmarks, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_rl.runtime.files import write_atomically


def success_against_delay(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw success with its interval over latency, one line per method.

    Args:
        rows: each with ``method``, ``delay_s`` and ``success`` (a proportion as plain data).
        path: the .png file.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["delay_s"]))
        rate = [100 * row["success"]["rate"] for row in mine]
        below = [100 * (row["success"]["rate"] - row["success"]["low"]) for row in mine]
        above = [100 * (row["success"]["high"] - row["success"]["rate"]) for row in mine]
        delay_ms = [1000 * row["delay_s"] for row in mine]
        axes.errorbar(delay_ms, rate, [below, above], marker="o", capsize=3, label=method)
    axes.set(xlabel="latency of the policy, ms", ylabel="success, %", ylim=(0, 103))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)

    def write(temporary: Path) -> None:
        temporary.write_bytes(buffer.getvalue())

    write_atomically(path, write)
