"""What the filter did: the log of every step that a command was decided in, as JSON lines, and counts."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from real_robot.safety import Decision


@dataclass
class Tally:
    """What the filter did since the start.

    steps: control steps
    clipped: of them, those in which an action was limited
    faults: that were latched
    held: steps without motion of the policy's
    refused: chunks that were refused as a whole
    """

    steps: int = 0
    clipped: int = 0
    faults: int = 0
    held: int = 0
    refused: int = 0


class AuditLog:
    """What was wanted, what became of it and why, one JSON line for each step that a command was decided in.

    Attributes:
        failure: why a line could not be written, such as a full disk; None as long as all were.
    """

    def __init__(self, path: Path | None) -> None:
        """Open or create the file (None: nothing is written); raises OSError where that fails."""
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        self.failure: str | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1)  # a line at a time: what a kill leaves behind can be read

    def step(self, now_s: float, decision: Decision, measured_A: np.ndarray, clock_s: float) -> None:
        """Write a step."""
        if self._file is None:
            return
        wanted_A = decision.wanted_A
        line = {
            "t": round(now_s, 6),
            "utc": round(clock_s, 3),
            "wanted": None if wanted_A is None else _numbers(wanted_A),
            "sent": _numbers(decision.sent_A),
            "measured": _numbers(measured_A),
            "clipped": bool(decision.reasons),
            "reason": list(decision.reasons),
            "fault": decision.fault,
            "holding": decision.holding,
        }
        self._write(line)

    def event(self, now_s: float, what: str) -> None:
        """Write something else that happened."""
        self._write({"t": round(now_s, 6), "utc": round(time.time(), 3), "event": what})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.failure = f"record: {self._file.name} cannot be written ({error.strerror})"

    def close(self) -> None:
        """Close the file; may be called again."""
        with self._lock, contextlib.suppress(OSError):
            file, self._file = self._file, None
            if file is not None:
                file.close()


def _numbers(values_A: np.ndarray) -> list[float | None]:
    return [round(float(v), 9) if math.isfinite(v) else None for v in np.ravel(values_A)]
