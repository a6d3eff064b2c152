"""Inference beside a running robot: a thread computes chunks, and the control loop never waits for it.

The loop asks ``act`` for an action at its own rate and gets one at once: of the newest chunk that is there, or standing still. A policy
that fails, a server that dies or answers too late cost the robot its motion, not its loop: the error is kept in ``failure`` and the
next observation is tried.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_rl.inference.base_policy import BasePolicy, Histories, Leftover, checked_chunks
from vla_rl.inference.timeline import DelayEstimate, ExecutionConfig, Tally, Timeline
from vla_rl.runtime.errors import UserError
from vla_rl.types import Observation

WARM_UP_CALLS = 3
RETRY_S = 0.2  # after a failure, so that a dead server is not asked without pause


@dataclass(frozen=True)
class _Job:
    observation: Observation
    leftover: Leftover | None
    episode: int


class RealTimeController:
    """One robot's controller; use it as a context, so that its thread ends with it."""

    def __init__(self, base: BasePolicy, config: ExecutionConfig, seed: int = 0) -> None:
        """Set up; raises UserError where the method wants more than the base can."""
        if config.continues and not base.spec.continues:
            raise UserError(f"method {config.method} wants a policy of this project, or a server of one")
        self.base, self.config, self.seed = base, config, seed
        spec = base.spec.policy.action_spec
        self.estimate = DelayEstimate(spec.control_hz, warm_up=0)
        self.failure: Exception | None = None
        self.failures = 0
        self.latencies_s: list[float] = []
        self._timeline = Timeline(spec, base.spec.execute_steps, config)
        self._histories = Histories(base.spec, 1)
        self._episode = 0
        self._wake = threading.Condition()
        self._job: _Job | None = None
        self._done: tuple[int, np.ndarray | None] | None = None  # of which episode, and the chunk (None: it failed)
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    @property
    def tally(self) -> Tally:
        """What happened so far."""
        return self._timeline.tally

    def __enter__(self) -> RealTimeController:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._wake:
            self._ends = True
            self._wake.notify()
        self._thread.join(timeout=5.0)

    def warm_up(self, features: Mapping[str, np.ndarray]) -> None:
        """Call the policy a few times, so that its first, slow call is not the robot's, and measure how long it takes."""
        seen = Histories(self.base.spec, 1)
        seen.see({k: v[None] for k, v in features.items()}, [0])
        self.base.reset([0], [self.seed])
        for call in range(WARM_UP_CALLS + 1):
            started = time.monotonic()
            checked_chunks(self.base.chunk(seen.observation(), [0]), self.base.spec, [self.seed])
            if call:  # the first one is the cold start
                self.estimate.add(time.monotonic() - started)

    def reset(self, seed: int) -> None:
        """A new episode begins; what is still computed for the last one will be dropped."""
        self._episode += 1
        self._timeline.reset()
        self._histories.reset(0)
        with self._wake:
            self._job = self._done = None
        self.seed = seed

    def act(self, features: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return the next action (A,) at once; None, before an episode's first chunk, where actions are places: send nothing then.

        Args:
            features: the newest observation by feature, without batch.
        """
        self._histories.see({k: v[None] for k, v in features.items()}, [0])
        with self._wake:
            done, self._done = self._done, None
        if done is not None and done[0] == self._episode:
            if done[1] is None:
                self._timeline.give_up()
            else:
                self._timeline.deliver(done[1])
        delay_steps = self.estimate.steps()
        if self._timeline.wants(delay_steps):
            left = self._timeline.begin(delay_steps)
            with self._wake:
                self._job = _Job(self._histories.observation(), left, self._episode)
                self._wake.notify()
        return self._timeline.next()

    def _work(self) -> None:
        episode = -1
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ends or self._job is not None)
                if self._ends:
                    return
                job, self._job = self._job, None
            assert job is not None
            started = time.monotonic()
            try:
                if job.episode != episode:
                    self.base.reset([0], [self.seed])
                    episode = job.episode
                leftovers = {0: job.leftover} if job.leftover is not None else None
                chunk_BHA = (
                    self.base.chunk(job.observation, [0], leftovers)
                    if self.config.continues
                    else self.base.chunk(job.observation, [0])
                )
                chunk_HA = checked_chunks(chunk_BHA, self.base.spec, [self.seed])[0]
            except (RuntimeError, ValueError, OSError) as error:
                self.failure, chunk_HA = error, None
                self.failures += 1
                episode = -1
                time.sleep(RETRY_S)
            else:
                self.failure = None
                latency_s = time.monotonic() - started
                self.estimate.add(latency_s)
                self.latencies_s.append(latency_s)
            with self._wake:
                self._done = (job.episode, chunk_HA)
