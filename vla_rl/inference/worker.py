"""Inference beside a running robot: a thread computes chunks, and the control loop never waits for it.

The loop asks ``act`` for an action at its own rate and gets one at once: of the newest chunk that is there, or standing still. A policy
that fails, a server that dies or answers too late cost the robot its motion, not its loop: the error is kept in ``failure`` and the
next observation is tried.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vla_rl.inference.base_policy import BasePolicy, Histories, Leftover, checked_chunks
from vla_rl.inference.timeline import DelayEstimate, ExecutionConfig, Tally, Timeline, require_method
from vla_rl.runtime.pace import fixed_priority
from vla_rl.types import Observation

WARM_UP_CALLS = 4
RETRY_S = 0.2  # after a failure, so that a dead server is not asked without pause


@dataclass(frozen=True)
class _Job:
    observation: Observation
    leftover: Leftover | None
    episode: int
    plan: int


class RealTimeController:
    """One robot's controller; use it as a context, so that its thread ends with it."""

    def __init__(
        self,
        base: BasePolicy,
        config: ExecutionConfig,
        seed: int = 0,
        priority: int = 0,
        admit: Callable[[np.ndarray], str | None] = lambda _: None,
    ) -> None:
        """Set up; raises UserError where the method wants another base.

        Args:
            base: computes the chunks.
            config: how they become actions.
            seed: of the base's noise until the first ``reset``.
            priority: of the thread, where the loop has a fixed one: below it. Without, other programs may keep the thread waiting while
                it holds Python's lock, and the loop with it.
            admit: says why a chunk must not be queued, as far as it is not late already (None: it may); called in the policy's thread.
        """
        require_method(config, base.spec, 1 / base.spec.policy.action_spec.control_hz)  # a thread takes a step at least
        self.base, self.config, self.seed, self._priority = base, config, seed, priority
        spec = base.spec.policy.action_spec
        # cold starts: the first call, and the first that goes on from another chunk
        self.estimate = DelayEstimate(spec.control_hz, warm_up=2 if config.continues else 1)
        self.failure: Exception | None = None
        self.failures = self.refused = 0
        self._admit = admit
        self.latencies_s: list[float] = []
        self._timeline = Timeline(spec, base.spec.execute_steps, config)
        self._histories = Histories(base.spec, 1)
        self._episode = self._plan = 0  # what is computed for an earlier plan, of this episode or not, is dropped
        self._wake = threading.Condition()
        self._job: _Job | None = None
        self._done: tuple[int, np.ndarray | None] | None = None  # of which plan, and the chunk (None: it failed)
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    @property
    def tally(self) -> Tally:
        """What happened so far."""
        return self._timeline.tally

    def __enter__(self) -> RealTimeController:
        """Start the thread; raises UserError where its priority is refused."""
        with fixed_priority(self._priority):  # in vain, so that it is refused here and not in the thread
            pass
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
        left: Leftover | None = None
        for _ in range(WARM_UP_CALLS):
            started = time.monotonic()
            (chunk_HA,) = self._ask(seen.observation(), left)
            self.estimate.add(time.monotonic() - started)
            left = Leftover(chunk_HA, min(1, len(chunk_HA))) if self.config.continues else None

    def _ask(self, observation: Observation, left: Leftover | None) -> np.ndarray:
        """The base's chunk, (1, H, A), if it is what was asked for."""
        made_BHA = self.base.chunk(observation, [0], None if left is None else {0: left})
        return checked_chunks(made_BHA, self.base.spec, [self.seed])

    def reset(self, seed: int) -> None:
        """A new episode begins; what is still computed for the last one will be dropped."""
        self._episode += 1
        self._timeline.reset()
        self._histories.reset(0)
        self._forget()
        self.seed = seed

    def drop(self) -> None:
        """Somebody else moved the robot, or it was held: plan anew from what is seen now, and forget what was planned before."""
        self._timeline.drop()
        self._forget()

    def _forget(self) -> None:
        self._plan += 1
        with self._wake:
            self._job = self._done = None

    def act(self, features: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return the next action (A,) at once; None, before an episode's first chunk, where actions are places: send nothing then.

        Args:
            features: the newest observation by feature, without batch.
        """
        self._histories.see({k: v[None] for k, v in features.items()}, [0])
        with self._wake:
            done, self._done = self._done, None
        if done is not None and done[0] == self._plan:
            if done[1] is None:
                self._timeline.give_up()
            else:
                self._timeline.deliver(done[1])
        delay_steps = self.estimate.steps()
        if self._timeline.wants(delay_steps):
            left = self._timeline.begin(delay_steps)
            with self._wake:
                self._job = _Job(self._histories.observation(), left, self._episode, self._plan)
                self._wake.notify()
        return self._timeline.next()

    def _refuses(self, chunk_HA: np.ndarray) -> bool:
        """Whether a chunk is refused; the robot may go a step further meanwhile, which ``admit`` has to bear."""
        due_HA = chunk_HA[self._timeline.late_steps :]
        refused = bool(len(due_HA)) and self._admit(due_HA) is not None
        self.refused += refused
        return refused

    @property
    def standing(self) -> bool:
        """Whether the last ``act`` had no action of the policy's to give."""
        return self._timeline.standing

    def _run(self) -> None:
        with fixed_priority(self._priority):
            self._work()

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
                (chunk_HA,) = self._ask(job.observation, job.leftover)
            except Exception as error:  # noqa: BLE001 - of a plug-in's policy it can be any, and the loop is to know it
                self.failure, chunk_HA = error, None
                self.failures += 1
                episode = -1
                time.sleep(RETRY_S)
            else:
                self.failure = None
                latency_s = time.monotonic() - started
                self.estimate.add(latency_s)
                self.latencies_s.append(latency_s)
                if job.plan == self._plan and self._refuses(chunk_HA):
                    chunk_HA = None
            with self._wake:
                self._done = (job.plan, chunk_HA)
