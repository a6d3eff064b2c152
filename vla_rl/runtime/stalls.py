"""When the machine stood still: a watch on each processor that runs before every program, so that what holds it up is none of ours."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import fixed_priority

BEAT_S = 0.001
STALL_S = 0.002
PRIORITY = 99  # of SCHED_FIFO: nothing goes before it but the kernel and what runs below it
LOOK_EVERY = 500  # beats between two looks whether who started it is still there


def watch(processor: int, parent: int, path: Path) -> None:
    """Wake up each millisecond on one processor; write down from when to when (monotonic, s) that was late by ``STALL_S``.

    Args:
        processor: which.
        parent: process whose end ends it.
        path: file of a line for each stall.
    """
    os.sched_setaffinity(0, {processor})
    gc.disable()
    with fixed_priority(PRIORITY), path.open("w", buffering=1) as log:
        sys.stdout.write("watching\n")
        sys.stdout.flush()
        due_s, beats = time.monotonic() + BEAT_S, 0
        while beats % LOOK_EVERY or os.getppid() == parent:
            time.sleep(max(due_s - time.monotonic(), 0.0))
            now_s, beats = time.monotonic(), beats + 1
            if now_s - due_s > STALL_S:
                log.write(f"{due_s!r} {now_s!r}\n")
            due_s = max(due_s, now_s - BEAT_S) + BEAT_S


@contextmanager
def watched() -> Iterator[list[tuple[float, float]]]:
    """Yield a list that is full at the end: from when to when (monotonic, seconds) a processor stood still.

    Raises:
        UserError: the system has no fixed priorities, or does not allow them.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("processors can be watched on Linux only")
    stalls: list[tuple[float, float]] = []
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for processor in sorted(os.sched_getaffinity(0)):
                words = ["-m", "vla_rl.runtime.stalls", str(processor), str(os.getpid()), f"{folder}/{processor}"]
                process = subprocess.Popen(
                    [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
                processes.append(process)
            for process in processes:
                assert process.stdout is not None
                if process.stdout.readline() != "watching\n":
                    said = process.communicate()[1].strip().splitlines()[-1:]
                    raise UserError(f"processors cannot be watched: {' '.join(said)}")
            yield stalls
        finally:
            for process in processes:
                process.kill()
                process.communicate()
            for log in Path(folder).iterdir():
                whole, _, _ = log.read_text().rpartition("\n")  # the last line may have been cut
                for line in whole.splitlines():
                    begun, ended = line.split()
                    stalls.append((float(begun), float(ended)))


def meanwhile(stalls: Sequence[tuple[float, float]], from_N: np.ndarray, to_N: np.ndarray) -> np.ndarray:
    """(N,) whether a stall overlaps each interval; all times on one clock, seconds."""
    stall_S2 = np.asarray(stalls, float).reshape(-1, 2)
    overlaps_NS = (stall_S2[None, :, 0] < to_N[:, None]) & (stall_S2[None, :, 1] > from_N[:, None])
    return np.any(overlaps_NS, axis=1)


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
