"""Intervals and paired tests against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vla_rl.statistics import evidence_of_worse, paired_difference, proportion


def test_exact_interval_of_all_successes_is_the_closed_form() -> None:
    result = proportion(250, 250)
    assert result.high == 1.0
    assert result.low == pytest.approx(0.025 ** (1 / 250))


def test_exact_interval_covers_at_least_95_percent() -> None:
    n, p = 30, 0.8
    covered = sum(stats.binom.pmf(k, n, p) for k in range(n + 1) if proportion(k, n).low <= p <= proportion(k, n).high)
    assert covered >= 0.95


def test_mcnemar_is_the_binomial_test_of_the_scenes_that_differ() -> None:
    a = [True] * 10 + [False] * 9 + [True] * 1
    b = [True] * 10 + [True] * 9 + [False] * 1
    result = paired_difference(a, b)
    assert (result.only_a, result.only_b) == (1, 9)
    assert result.difference == pytest.approx(8 / 20)
    assert result.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert result.low < result.difference < result.high
    assert result == paired_difference(a, b)


def test_equal_policies_differ_by_nothing() -> None:
    result = paired_difference([True, False, True], [True, False, True])
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_swapping_the_policies_swaps_the_sign() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(100) < 0.5, rng.random(100) < 0.8
    forward, backward = paired_difference(a.tolist(), b.tolist()), paired_difference(b.tolist(), a.tolist())
    assert forward.difference == -backward.difference
    assert forward.p_value == backward.p_value


def test_other_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([True] * 3, [True] * 2)


def test_evidence_of_being_worse_is_the_mixture_over_all_chances_above_one_half() -> None:
    for only_a, only_b in ((0, 0), (5, 0), (0, 5), (7, 2), (30, 25)):
        chance = np.linspace(0.5, 1.0, 200_001)
        bet = (2 * chance) ** only_a * (2 * (1 - chance)) ** only_b
        assert evidence_of_worse(only_a, only_b) == pytest.approx(2 * np.trapezoid(bet, chance), rel=1e-4)


def test_a_policy_that_is_as_good_is_seldom_called_worse_however_often_one_looks() -> None:
    rng = np.random.default_rng(0)
    steps = rng.random((2000, 200)) < 0.5
    only_a = steps.cumsum(1)
    only_b = np.arange(1, 201) - only_a
    found = {(a, b): evidence_of_worse(int(a), int(b)) for a, b in set(zip(only_a.flat, only_b.flat, strict=True))}
    called = [any(found[pair] >= 10 for pair in zip(a, b, strict=True)) for a, b in zip(only_a, only_b, strict=True)]
    assert 0 < np.mean(called) < 0.1
    assert evidence_of_worse(12, 1) > 50
