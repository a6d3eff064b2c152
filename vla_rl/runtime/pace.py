"""A control loop's deadlines at a fixed rate, and its thread's place before other programs."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vla_rl.runtime.errors import UserError

SPIN_S = 0.002
SWITCH_INTERVAL_S = 1e-4  # Python's own of 5 ms would let the policy's thread hold the loop up that long


class Pace:
    """Waits for one deadline after another; a late one moves none that follow, and what it makes pass is skipped, not made up for.

    A processor that sleeps wakes late: by 0.2 ms as a rule, and by milliseconds now and then where it is a virtual one. So the last
    ``spin_s`` before a deadline go to looking at the clock. Python's lock stays with the loop meanwhile, but for those threads that ask
    for it (``sys.setswitchinterval``): keep it well below the period.
    """

    def __init__(self, hz: float, spin_s: float = SPIN_S, least_share: float = 0.0) -> None:
        """Set the rate; raises ValueError for one that cannot be kept.

        Args:
            hz: rate.
            spin_s: see above.
            least_share: of a period that lies between two returns of ``wait`` at least. What is so late that the next deadline is nearer
                moves the clock: a robot whose limits of velocity count by steps must not get two of them at once.
        """
        if not 0 <= least_share <= 1:
            raise ValueError(f"the least time of a pace wants to be a share of its period, got {least_share:g}")
        if not (hz > 0 and 0 <= spin_s < 1 / hz):
            raise ValueError(
                f"a pace wants a positive rate and to spin for less than a period, got {hz:g} Hz and {spin_s:g} s"
            )
        self.period_s, self.spin_s, self._least_share = 1 / hz, spin_s, least_share
        self._begun_s: float | None = None
        self._beats = 0
        self.skipped = 0

    def wait(self) -> float:
        """Return at the next deadline, or at once where it has passed, with the seconds it is late by.

        The first call sets the clock and is on time. Deadlines that have passed as well are left out and counted in ``skipped``: a robot
        that moved so many times at once would jump. Where the next deadline is nearer than
        ``least_share`` allows, the clock is moved by what is missing.
        """
        if self._begun_s is None:
            self._begun_s = time.monotonic()
            return 0.0
        self._beats += 1
        deadline = self._begun_s + self._beats * self.period_s
        time.sleep(max(deadline - self.spin_s - time.monotonic(), 0.0))
        while time.monotonic() < deadline:
            pass
        late_s = time.monotonic() - deadline
        passed = int(late_s / self.period_s)
        self._beats += passed
        self.skipped += passed
        self._begun_s += max(late_s - (passed + 1 - self._least_share) * self.period_s, 0.0)
        return late_s


@contextmanager
def fixed_priority(level: int) -> Iterator[None]:
    """Have the calling thread run before all that have no fixed priority (SCHED_FIFO) or a lower one; 0 changes nothing.

    Threads and processes that are started meanwhile inherit it. Threads that share Python's lock with the loop have to: one of them that
    holds the lock and waits for a processor holds the loop up. Others are to be started before it, or within ``usual_priority``.

    Raises:
        UserError: the system has no such thing, or does not allow it.
    """
    if not level:
        yield
        return
    if not hasattr(os, "sched_setscheduler"):
        raise UserError(f"a fixed priority, here {level}, is there on Linux only; leave it out")
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(level))
    except OSError as refused:
        raise UserError(
            f"the system refused priority {level} ({refused.strerror}); allow it (root, CAP_SYS_NICE, 'ulimit -r'), or leave it out"
        ) from refused
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@contextmanager
def usual_priority() -> Iterator[None]:
    """Have what is started meanwhile run as any other program, whatever priority the calling thread has."""
    if not hasattr(os, "sched_setscheduler") or os.sched_getscheduler(0) == os.SCHED_OTHER:
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@contextmanager
def without_pauses() -> Iterator[None]:
    """Keep Python's collector and its switch interval from holding the loop up."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        sys.setswitchinterval(switch)
