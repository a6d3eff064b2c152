"""Success rates with their intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Proportion:
    """k successes of n with the exact (Clopper-Pearson) 95 % interval."""

    successes: int
    n: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % ({self.successes}/{self.n}, 95 % interval {100 * self.low:.1f}-{100 * self.high:.1f} %)"


def proportion(successes: int, n: int) -> Proportion:
    """Exact interval of a success rate; n >= 1."""
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="exact")
    return Proportion(successes, n, successes / n, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class PairedDifference:
    """Success of B minus success of A on the same scenes.

    only_a, only_b: scenes where just one of them succeeded
    low, high: 95 % percentile bootstrap over scenes
    p_value: exact two-sided McNemar test, that is a binomial test on the scenes where they differ
    """

    n: int
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return (
            f"B - A = {100 * self.difference:+.1f} points (95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}), "
            f"only A {self.only_a}, only B {self.only_b} of {self.n} scenes, exact McNemar p = {self.p_value:.3g}"
        )


def paired_difference(success_a: Sequence[bool], success_b: Sequence[bool]) -> PairedDifference:
    """Compare two policies scene by scene.

    Raises:
        ValueError: the two are not of the same scenes.
    """
    if len(success_a) != len(success_b) or not len(success_a):
        raise ValueError(f"a paired comparison wants the same scenes twice, got {len(success_a)} and {len(success_b)}")
    a, b = np.asarray(success_a, bool), np.asarray(success_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    delta = b.astype(float) - a.astype(float)
    low = high = float(delta.mean())
    if only_a + only_b and len(delta) > 1:
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        interval = stats.bootstrap(
            (delta,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=rng
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    p_value = float(stats.binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedDifference(len(a), only_a, only_b, float(delta.mean()), low, high, p_value)


def as_dict(record: Any) -> dict[str, Any]:
    """A record as plain data for JSON."""
    return asdict(record)


def evidence_of_worse(only_a: int, only_b: int) -> float:
    """How much a paired comparison that is still going on speaks for B being worse than A.

    An e-value (test martingale of the scenes where just one of them succeeded, mixed over all chances above one half that it is A): if B is
    as good as A it exceeds 1 / alpha with probability alpha at most, however often it is looked at (Ville's inequality; Grunwald et al.,
    arXiv 1906.07801).
    """
    n = only_a + only_b
    mass = special.betaln(only_a + 1, only_b + 1) + np.log(special.betaincc(only_a + 1, only_b + 1, 0.5) + 1e-300)
    return float(np.exp(n * np.log(2) + np.log(2) + mass))
