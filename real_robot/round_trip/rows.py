"""What was measured, over all rounds of a pair and a kind of message, and against the bare library of the same rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Tally:
    """All bursts of one pair and kind.

    Attributes:
        delays_s: round trips that came back whole.
        medians_s: of each round; NaN where nothing came back.
    """

    pair: str
    echo: str
    kind: str
    hz: float
    delays_s: list[float] = field(default_factory=list)
    medians_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    sent: int = 0
    lost: int = 0
    wrong: int = 0
    twice: int = 0

    def add(self, burst: Mapping[str, Any]) -> None:
        """Count a burst; see ``Burst.result``."""
        delays_s = burst["delays_s"]
        self.delays_s += delays_s
        self.medians_s.append(float(np.median(delays_s)) if delays_s else float("nan"))
        self.cpu_s += burst["cpu_s"]
        for name in ("sent", "lost", "wrong", "twice"):
            setattr(self, name, getattr(self, name) + burst[name])

    def row(self, bare: Tally | None) -> dict[str, Any]:
        """Numbers of the pair; ratios to the bare library's, over all and from round to round, where there is one to compare with."""
        count = len(self.delays_s)
        told: dict[str, Any] = {"transport": self.pair, "echo": self.echo, "kind": self.kind, "hz": self.hz}
        told |= {"n": count, "sent": self.sent, "lost": self.lost, "wrong": self.wrong, "twice": self.twice}
        p50, p99 = 1e3 * np.percentile(self.delays_s, [50, 99]) if count else (None, None)
        cpu_ms = 1e3 * self.cpu_s / count if count else None
        told |= {"median_ms": _rounded(p50), "p99_ms": _rounded(p99), "cpu_ms": _rounded(cpu_ms)}
        if bare is None or p50 is None or not bare.delays_s:
            return told | {"median_ratio": None, "cpu_ratio": None, "median_ratio_of_rounds": None}
        told["median_ratio"] = _rounded(p50 / (1e3 * float(np.median(bare.delays_s))))
        told["cpu_ratio"] = _rounded((self.cpu_s / count) / (bare.cpu_s / len(bare.delays_s)))
        ratios = np.array(self.medians_s) / np.array(bare.medians_s)
        told["median_ratio_of_rounds"] = [_rounded(x) for x in (np.nanmin(ratios), np.nanmax(ratios))]
        return told


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 3)


def with_ratios(tallies: Sequence[Tally], bare: str) -> list[dict[str, Any]]:
    """Rows of all tallies, against the pair ``bare`` in the same kind."""
    reference = {tally.kind: tally for tally in tallies if tally.pair == bare}
    return [tally.row(reference.get(tally.kind)) for tally in tallies]
