"""A loop's deadlines by a clock of our own, and priorities of threads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from vla_rl.runtime import pace
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace, fixed_priority, usual_priority


class Clock:
    """Stands in for the time module: each look costs a little, a sleep ends late by what is told."""

    def __init__(self, look_s: float = 1e-5, oversleep_s: tuple[float, ...] = (0.0,)) -> None:
        self.now_s, self._look_s, self._late_s = 100.0, look_s, itertools.cycle(oversleep_s)
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        self.now_s += self._look_s
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept_s.append(seconds)
        self.now_s += seconds + next(self._late_s) * (seconds > 0)


def late_by(pace_: Pace, clock: Clock, works_s: list[float]) -> list[float]:
    found = []
    for work_s in works_s:
        found.append(pace_.wait())
        clock.now_s += work_s
    return found


def test_deadlines_are_met_and_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(oversleep_s=(0.0002, 0.0015))
    monkeypatch.setattr(pace, "time", clock)
    found = late_by(Pace(100.0), clock, [0.001, 0.003, 0.0] * 100)
    assert max(found) <= 2e-5  # what a look at the clock costs
    assert clock.now_s == pytest.approx(100.0 + 299 * 0.01, abs=1e-3)
    assert max(clock.slept_s) <= 0.008  # the last 2 ms are spent awake


def test_without_spinning_a_sleep_that_ends_late_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(oversleep_s=(0.0015,))
    monkeypatch.setattr(pace, "time", clock)
    assert late_by(Pace(100.0, spin_s=0.0), clock, [0.0] * 5)[1:] == pytest.approx([0.0015] * 4, abs=1e-4)


@pytest.mark.parametrize(
    ("stall_s", "late_s", "skipped", "ends_s"), [(0.015, 0.005, 0, 0.03), (0.525, 0.515, 51, 0.54)]
)
def test_a_late_deadline_moves_no_other_and_those_that_passed_are_skipped_and_not_made_up_for(
    monkeypatch: pytest.MonkeyPatch, stall_s: float, late_s: float, skipped: int, ends_s: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    kept = Pace(100.0)
    assert late_by(kept, clock, [0.0, stall_s, 0.0, 0.0]) == pytest.approx([0.0, 0.0, late_s, 0.0], abs=1e-3)
    assert kept.skipped == skipped
    assert clock.now_s == pytest.approx(100.0 + ends_s, abs=1e-3)


@pytest.mark.parametrize("stall_s", [0.0, 0.011, 0.0125, 0.013, 0.018, 0.0199, 0.0201, 0.525])
def test_a_late_deadline_leaves_the_least_time_before_the_next(monkeypatch: pytest.MonkeyPatch, stall_s: float) -> None:
    """Two returns within a control step would be twice the velocity that a robot's limits allow."""
    clock, woke_s = Clock(), []
    monkeypatch.setattr(pace, "time", clock)
    kept = Pace(100.0, least_share=0.75)
    for work_s in (0.0, stall_s, 0.0, 0.0, 0.0, 0.0):
        kept.wait()
        woke_s.append(clock.now_s)
        clock.now_s += work_s
    gaps = [after - before for before, after in itertools.pairwise(woke_s)]
    assert min(gaps) >= 0.0075 - 1e-5
    assert gaps[-2:] == pytest.approx([0.01, 0.01], abs=1e-4), "no deadline but the one after the late one moves"
    moved_s = (woke_s[-1] - woke_s[0]) % 0.01
    assert min(moved_s, 0.01 - moved_s) < 1e-3 or stall_s % 0.01 > 0.0025, "a little late moves nothing"


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_least_time_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share of its period"):
        Pace(100.0, least_share=share)


@pytest.mark.parametrize(("hz", "spin_s"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (100.0, 0.01), (100.0, -1.0)])
def test_a_pace_that_cannot_be_kept_is_refused(hz: float, spin_s: float) -> None:
    with pytest.raises(ValueError, match="pace"):
        Pace(hz, spin_s)


def test_a_fixed_priority_is_for_the_time_of_its_context() -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    try:
        with fixed_priority(7):
            assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == (os.SCHED_FIFO, 7)
    except UserError:
        pytest.skip("this system allows no fixed priorities")
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
    with fixed_priority(0):
        assert os.sched_getscheduler(0) == before[0]


def test_what_is_started_inherits_a_fixed_priority_unless_it_is_to_run_as_usual() -> None:
    def of_a_process() -> str:
        words = [
            sys.executable,
            "-c",
            "import os; print(os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)",
        ]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        with fixed_priority(7):
            assert of_a_process() == f"{os.SCHED_FIFO} 7"
            with usual_priority():
                assert of_a_process() == f"{os.SCHED_OTHER} 0"
            assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == (os.SCHED_FIFO, 7)
    except UserError:
        pytest.skip("this system allows no fixed priorities")
    with usual_priority():
        assert of_a_process() == f"{os.SCHED_OTHER} 0"


def test_a_priority_that_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with pytest.raises(UserError, match=r"priority 5 .*Operation not permitted"), fixed_priority(5):
        pass
