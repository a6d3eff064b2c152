"""Who looks whether the machine stood still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import fixed_priority
from vla_rl.runtime.stalls import STALL_S, meanwhile, watched

STOPPED_S = 0.1


def watches(of: int) -> list[psutil.Process]:
    found = psutil.Process(of).children()
    return [process for process in found if "vla_rl.runtime.stalls" in process.cmdline()]


@pytest.fixture(autouse=True)
def _allowed() -> None:
    try:
        with fixed_priority(1):
            pass
    except UserError as refused:
        pytest.skip(str(refused))


def test_a_processor_that_stands_still_is_seen() -> None:
    with watched() as stalls:
        found = watches(os.getpid())
        assert len(found) == len(os.sched_getaffinity(0))
        time.sleep(0.05)
        begun_s = time.monotonic()
        found[0].send_signal(signal.SIGSTOP)  # as a hypervisor does to all
        time.sleep(STOPPED_S)
        found[0].send_signal(signal.SIGCONT)
        ended_s = time.monotonic()
        time.sleep(0.05)
        assert stalls == []
    longest = max(stalls, key=lambda stall: stall[1] - stall[0])
    assert longest[1] - longest[0] > STOPPED_S - 0.005
    assert longest[0] > begun_s - STALL_S
    assert longest[1] > begun_s + STOPPED_S
    assert meanwhile(stalls, np.array([begun_s]), np.array([ended_s])).all()
    assert not any(process.is_running() for process in found)


def test_the_watches_end_with_who_started_them() -> None:
    words = "import time\nfrom vla_rl.runtime.stalls import watched\nwith watched():\n print('on', flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        left = watches(process.pid)
        assert left
        process.kill()
    assert psutil.wait_procs(left, timeout=20.0)[1] == []


def test_what_overlaps_a_stall() -> None:
    stalls = [(1.0, 1.5), (3.0, 3.1)]
    from_N, to_N = np.array([0.0, 0.0, 1.2, 1.4, 1.6, 2.9]), np.array([0.9, 1.1, 1.3, 2.0, 2.9, 4.0])
    np.testing.assert_array_equal(meanwhile(stalls, from_N, to_N), [False, True, True, True, False, True])
    assert not meanwhile([], from_N, to_N).any()
