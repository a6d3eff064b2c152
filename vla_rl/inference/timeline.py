"""When a chunk is asked for, what of it still runs when it comes, what runs while nothing is there: a schedule without a clock.

Time is counted in control steps. A chunk that was begun at step b has its action i for step b + i; what is due before the chunk arrives is
late and never runs. The same schedule serves the simulated latency (``vla_rl/inference/delayed.py``) and the thread that computes
chunks beside a running robot (``vla_rl/inference/worker.py``).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vla_rl.inference.base_policy import BaseSpec, Leftover
from vla_rl.policies.path import GuidanceConfig
from vla_rl.runtime.errors import UserError
from vla_rl.types import MOVES, ActionSpec

Method = Literal["synchronous", "asynchronous", "ensemble", "rtc", "rtc_prefix"]


@dataclass(frozen=True)
class ExecutionConfig:
    """How chunks become actions while the policy takes time: ensembling as in arXiv 2304.13705, real-time chunking 2506.07339, 2512.05964.

    method: synchronous (stand still meanwhile), asynchronous (go on, then switch), ensemble (mean), rtc (guided), rtc_prefix (clean prefix)
    execute_steps: of a chunk before the next is begun (0: the policy's own)
    ensemble_decay: m of the weights exp(-m i), the oldest chunk first
    guidance: of rtc
    """

    method: Method = "synchronous"
    execute_steps: int = 0
    ensemble_decay: float = 0.01
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def __post_init__(self) -> None:
        if self.execute_steps < 0 or self.ensemble_decay < 0:
            raise ValueError(
                f"execute_steps and ensemble_decay want numbers >= 0, got {self.execute_steps}, {self.ensemble_decay}"
            )

    @property
    def continues(self) -> bool:
        """Whether a chunk goes on from what is left of the last one."""
        return self.method in ("rtc", "rtc_prefix")


@dataclass
class Tally:
    """What happened.

    chunks: that arrived
    late: actions that were due before their chunk was there
    wasted: chunks of which that was all
    held: steps in which there was nothing to run
    steps: all control steps
    """

    chunks: int = 0
    late: int = 0
    wasted: int = 0
    held: int = 0
    steps: int = 0


class DelayEstimate:
    """How many control steps the next chunk will take: the longest of the last calls, the first ones (cold start) excluded."""

    def __init__(self, control_hz: float, window: int = 10, warm_up: int = 1) -> None:
        self._control_hz = control_hz
        self._warm_up = warm_up
        self._latencies_s: deque[float] = deque(maxlen=window)

    def add(self, latency_s: float) -> None:
        """A call took so long."""
        if self._warm_up:
            self._warm_up -= 1
        else:
            self._latencies_s.append(latency_s)

    def steps(self) -> int:
        """The estimate; none where no call after the cold start is known."""
        return steps_of(max(self._latencies_s, default=0.0), self._control_hz)


def steps_of(latency_s: float, control_hz: float) -> int:
    """Control steps after which a result is there."""
    return math.ceil(latency_s * control_hz - 1e-9)


def require_method(config: ExecutionConfig, spec: BaseSpec, delay_s: float = 0.0) -> None:
    """Refuse a method that a base, or a latency that is known beforehand, is not made for.

    Raises:
        UserError: the base does not go on from what the method leaves, or every chunk would be late as a whole.
    """
    steps = steps_of(delay_s, spec.policy.action_spec.control_hz)
    if config.method == "rtc" and not spec.guided:
        raise UserError(
            "method rtc wants a policy whose chunks are guided: one of this project without a selector ('vla-rl serve --guided' serves one)"
        )
    if config.method == "rtc_prefix" and not spec.prefix_steps:
        raise UserError(
            "method rtc_prefix wants a policy trained with clean prefixes (--policy.max-prefix-steps); take rtc, or train one"
        )
    if config.method == "rtc_prefix" and steps > spec.prefix_steps:
        raise UserError(
            f"a latency of {1000 * delay_s:g} ms is {steps} steps, and the policy was trained with prefixes of at most {spec.prefix_steps}"
        )
    if config.method != "synchronous" and spec.chunk_steps and steps >= spec.chunk_steps:
        raise UserError(
            f"a latency of {1000 * delay_s:g} ms is {steps} steps: chunks of {spec.chunk_steps} would always be late as a whole; "
            "train longer ones, or take method synchronous"
        )


class Timeline:
    """The chunks of one robot. Each control step: ``wants`` and ``begin``, ``deliver`` what has arrived, then ``next``."""

    def __init__(self, spec: ActionSpec, execute_steps: int, config: ExecutionConfig) -> None:
        self.config = config
        self._spec = spec
        self._execute = config.execute_steps or execute_steps
        self.tally = Tally()
        self.reset()

    def reset(self) -> None:
        """A new episode begins: what was planned, or is being computed, is of the last one."""
        self._step = 0
        self._begun: int | None = None
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._last_A: np.ndarray | None = None
        self.empty = True  # nothing has ever arrived in this episode
        self.standing = True  # the last step had nothing to run

    def drop(self) -> None:
        """What was planned is of no use any more, since somebody else moved the robot; what is being computed will not be delivered."""
        self._begun = None
        self._chunks.clear()
        self._last_A = None

    def wants(self, delay_steps: int) -> bool:
        """Whether a chunk should be begun now, if it takes so many steps: early enough that the last one lasts until it is there."""
        if self._begun is not None:
            return False
        if not self._chunks or self.config.method == "ensemble":
            return True
        origin, chunk_HA = self._chunks[-1]
        lasts = len(chunk_HA) if self.config.method == "synchronous" else len(chunk_HA) - delay_steps
        return self._step - origin >= min(self._execute, max(lasts, 1))

    def begin(self, delay_steps: int) -> Leftover | None:
        """A chunk is begun from what is seen now; return what it has to go on from, where the method wants it.

        Args:
            delay_steps: after how many it is expected.
        """
        self._begun = self._step
        if not self.config.continues or not self._chunks:
            return None
        origin, chunk_HA = self._chunks[-1]
        left_LA = chunk_HA[self._step - origin :]
        return Leftover(left_LA, min(delay_steps, len(left_LA))) if len(left_LA) else None

    def deliver(self, chunk_HA: np.ndarray) -> None:
        """The chunk that was begun is there."""
        assert self._begun is not None
        waited = self.config.method == "synchronous"
        origin = self._step if waited else self._begun
        self._begun, self.empty = None, False
        self.tally.chunks += 1
        self.tally.late += min(self._step - origin, len(chunk_HA))
        self.tally.wasted += self._step - origin >= len(chunk_HA)
        if self.config.method != "ensemble":
            self._chunks.clear()
        self._chunks.append((origin, chunk_HA))

    @property
    def late_steps(self) -> int:
        """Actions at the beginning of the chunk that is being computed that would be late if it came now."""
        return 0 if self._begun is None or self.config.method == "synchronous" else self._step - self._begun

    def give_up(self) -> None:
        """The chunk that was begun will not come."""
        self._begun = None

    def next(self) -> np.ndarray | None:
        """The action of this control step, (A,), within the limits; a robot without one stands still, and None is to send it nothing."""
        alive = [(origin, chunk) for origin, chunk in self._chunks if self._step - origin < len(chunk)]
        if self.config.method == "ensemble":
            self._chunks = alive
        # synchronous: what is beyond the executed steps is not run, the robot waits for the next chunk instead
        running = [chunk[self._step - origin] for origin, chunk in alive if self._runs(self._step - origin)]
        self.standing = not running
        if running:
            weight_C = np.exp(-self.config.ensemble_decay * np.arange(len(running)))
            mean_A = np.average(running, axis=0, weights=weight_C).astype(np.float32)
            action_A: np.ndarray | None = self._spec.clip(mean_A)
        else:
            action_A = self._hold()
            self.tally.held += 1
        self._step += 1
        self.tally.steps += 1
        self._last_A = action_A
        return action_A

    def _runs(self, index: int) -> bool:
        return self.config.method != "synchronous" or index < self._execute

    def _hold(self) -> np.ndarray | None:
        """Stand still: no movement where actions are movements, else the last target (None: there was none, and zero is a place)."""
        if self._spec.mode in MOVES:
            return self._spec.clip(np.zeros(self._spec.dim, np.float32))
        return self._last_A
