"""A look at a run while it goes, or at its file afterwards, through rerun (extra ``view``).

Pictures, states, what was wanted, sent and measured of each action, why, and how long each part took. Never in the loop's way: it leaves a
step in a queue of few places, and a thread takes it from there. What finds no place is dropped and counted; where rerun fails, the view
ends and the robot goes on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from real_robot.loop import Timing
from real_robot.robot import Reading
from real_robot.safety import Decision
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec

LIVE = "live"
PLACES = 64  # steps that wait to be shown; a viewer that lags behind by more misses some
FLUSH_S = 1.0  # between two waits for the viewer to take all that rerun holds for it, which is without bound
CLOSE_S = 5.0  # that such a wait may take; at the end too
VIEWER_MEMORY = "1GB"
LINES = ("wanted", "sent", "measured")  # of each action's plot


@dataclass(frozen=True)
class _Step:
    number: int
    clock_s: float
    reading: Reading
    decision: Decision
    parts_ms: dict[str, float]  # of the step before: this one is not over


class View:
    """Shows the steps of a run. Use ``open_view``.

    Attributes:
        shown: steps that were handed to rerun.
        dropped: steps that found no place.
        failure: why the view has ended before the run; None as long as it has not.
        inference_s: latencies of the policy, the newest one last, where they are known.
    """

    def __init__(
        self, recording: Any, spec: ActionSpec, timing: Timing, viewer: subprocess.Popen[bytes] | None
    ) -> None:
        """Begin to show.

        Args:
            recording: rerun's stream, or what has its methods.
            spec: of the actions.
            timing: of the loop's parts, which the loop adds to.
            viewer: the program that shows it, if it is one of ours.
        """
        self.shown = self.dropped = 0
        self.failure: str | None = None
        self.inference_s: Sequence[float] = ()
        self._recording, self._spec, self._timing, self._viewer = recording, spec, timing, viewer
        self._steps: queue.Queue[_Step | None] = queue.Queue(PLACES)
        self._count = 0
        self._said = ""
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)
        self._thread.start()

    def step(self, reading: Reading, decision: Decision) -> None:
        """Leave a step to be shown; returns at once. For the loop's ``on_step``."""
        parts_ms = {part: 1e3 * seconds[-1] for part, seconds in self._timing.parts_s.items() if seconds}
        if self.inference_s:
            parts_ms["inference"] = 1e3 * self.inference_s[-1]
        self._count += 1
        try:
            self._steps.put_nowait(_Step(self._count, time.time(), reading, decision, parts_ms))
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        try:
            self._describe()
            flushed_s = time.monotonic()
            while not self._ends.is_set() or not self._steps.empty():
                with contextlib.suppress(queue.Empty):
                    step = self._steps.get(timeout=0.1)
                    if step is not None:
                        self._show(step)
                        self.shown += 1
                if self._viewer is not None and self._viewer.poll() is not None:
                    raise RuntimeError(f"the viewer has ended (exit code {self._viewer.returncode})")
                if time.monotonic() - flushed_s > FLUSH_S:
                    self._recording.flush(timeout_sec=CLOSE_S)
                    flushed_s = time.monotonic()
            self._recording.flush(timeout_sec=CLOSE_S)
            self._recording.disconnect()
        except Exception as error:  # noqa: BLE001 - whatever rerun has to say, the robot goes on
            self.failure = " ".join(str(error).split())[:200]
            sys.stderr.write(f"the view has ended, the robot goes on: {self.failure}\n")

    def _describe(self) -> None:
        """What does not change: names and colours of the lines."""
        import rerun as rr

        for name, unit in zip(self._spec.names, self._spec.units, strict=True):
            names = [f"{line} ({unit})" for line in LINES]
            self._recording.log(f"action/{name}", rr.SeriesLines(names=names), static=True)

    def _show(self, step: _Step) -> None:
        import rerun as rr

        log, decision = self._recording.log, step.decision
        self._recording.set_time("step", sequence=step.number)
        self._recording.set_time("time", timestamp=step.clock_s)
        for name, value in step.reading.features.items():
            log(name.replace(".", "/"), _shown(value))
        nothing_A = np.full(self._spec.dim, np.nan)
        wanted_A = nothing_A if decision.wanted_A is None else decision.wanted_A
        if wanted_A.shape != nothing_A.shape:  # such an action is a fault, and has been said to be one
            wanted_A = nothing_A
        for i, name in enumerate(self._spec.names):
            log(f"action/{name}", rr.Scalars([wanted_A[i], decision.sent_A[i], step.reading.measured_A[i]]))
        log("filter/holding", rr.Scalars(float(decision.holding)))
        why = f"fault: {decision.fault}" if decision.fault else ", ".join(decision.reasons)
        if why != self._said:
            self._said = why
            level = rr.TextLogLevel.ERROR if decision.fault else rr.TextLogLevel.WARN
            log("filter/reasons", rr.TextLog(why or "as wanted", level=level if why else rr.TextLogLevel.INFO))
        for part, milliseconds in step.parts_ms.items():
            log(f"latency_ms/{part}", rr.Scalars(milliseconds))
        for stream, (_, age_s) in step.reading.ages_s.items():
            log(f"age_ms/{stream}", rr.Scalars(1e3 * age_s))
        if self.dropped:
            log("view/dropped_steps", rr.Scalars(float(self.dropped)))

    def summary(self) -> dict[str, Any]:
        """What was shown, as plain data."""
        return {"shown": self.shown, "dropped": self.dropped, "failure": self.failure}

    def close(self) -> None:
        """Show what waits, for CLOSE_S at most; may be called again."""
        self._ends.set()
        self._thread.join(2 * CLOSE_S)
        if self.failure is None and self._thread.is_alive():
            self.failure = f"the viewer has not taken everything within {2 * CLOSE_S:g} s"


def _shown(value: np.ndarray) -> Any:
    """A feature as rerun shows it: pictures (3, h, w) uint8, depth (1, h, w), points (P, 3), numbers (S,)."""
    import rerun as rr

    if value.ndim == 3 and value.shape[0] == 1:
        return rr.DepthImage(value[0])
    if value.ndim == 3:
        return rr.Image(np.ascontiguousarray(np.moveaxis(value, 0, 2)))
    return rr.Points3D(value) if value.ndim == 2 else rr.Scalars(value.astype(float).ravel())


def require_view(view: str) -> None:
    """Raise UserError where a view cannot be: no package, no display, a file that is there already."""
    try:
        import rerun  # noqa: F401
    except ImportError as error:
        raise UserError("a view wants the package rerun-sdk: pip install 'vla-rl[view]'") from error
    if view == LIVE:
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError(
                "a live view wants a display, and neither DISPLAY nor WAYLAND_DISPLAY is set; take a file.rrd"
            )
        return
    if not view.endswith(".rrd"):
        raise UserError(f"view wants 'live', or a file that ends with .rrd, got {view!r}")
    if Path(view).exists():
        raise UserError(f"{view} is there already; choose another file for the view")


@contextlib.contextmanager
def open_view(view: str, spec: ActionSpec, timing: Timing) -> Iterator[View]:
    """Show a run for the time of the block, in a window or in a file.

    Args:
        view: 'live', or a file that ends with .rrd.
        spec: of the actions.
        timing: that the loop will add to.

    Raises:
        UserError: as ``require_view``.
    """
    require_view(view)
    import rerun as rr

    viewer, recording = None, rr.RecordingStream("vla-rl")
    if view == LIVE:
        viewer, address = _start_viewer()
        recording.connect_grpc(address)
    else:
        Path(view).parent.mkdir(parents=True, exist_ok=True)
        recording.save(view)
    shown = View(recording, spec, timing, viewer)
    try:
        yield shown
    finally:
        shown.close()


def _start_viewer() -> tuple[subprocess.Popen[bytes], str]:
    """Rerun's window, which stays when we go; reached on loopback only, and without its reports to its makers."""
    environment = {**os.environ, "XDG_CONFIG_HOME": tempfile.mkdtemp(prefix="vla-rl-rerun-")}
    program = [sys.executable, "-m", "rerun_cli"]
    subprocess.run([*program, "analytics", "disable"], env=environment, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    viewer = subprocess.Popen(
        [
            *program,
            "--bind",
            "127.0.0.1",
            "--port",
            str(port),
            "--hide-welcome-screen",
            "--memory-limit",
            VIEWER_MEMORY,
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # it outlives us, and who reads our output must not wait for it
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return viewer, f"rerun+http://127.0.0.1:{port}/proxy"
