"""Streams of messages onto the policy's clock: pure functions of arrays. These are the rules.

1. A message's time is when it was received (the bag's own time), or the stamp in its header where asked.
2. Stamps of one publisher are compared with each other as ``streams.py`` does it in operation: a message whose stamp is not newer than
   the last one's is dropped and counted, and a stamp that leaves its clock by more than ``jump_s`` ends the episode.
3. The grid has the policy's rate. It begins when every stream has had a message. Where commands come once a step, its times are moved
   by less than a step, to just before the commands: what was decided on an observation then stays with it, and jitter puts no two
   commands into one step.
4. At a grid time t, an observation is the newest message with time <= t: never one from the future, and nothing in between is made up.
   One that is older than the robot's limit ends the episode there.
5. The action of the step from t is what was executed from t on, out of the commands with t <= time < t + dt. Places: the last one, or,
   where none came, the one that is still in force. Movements: their sum. Velocities, efforts, and movements sent as velocities: their
   mean, or, where none came, the one still in force for ``EXPIRES_S``, and none after. What has no unit (grippers): the last one.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from real_robot.limits import FREE_UNIT
from real_robot.streams import DRIFT, SETTLED
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec

Clock = Literal["received", "header"]
How = Literal["last", "sum", "mean"]
Split = Literal["bag", "gap", "status"]
Success = Literal["status", "all", "none"]
EXPIRES_S = (
    0.5  # diff_drive_controller's cmd_vel_timeout, and MoveIt Servo's is 0.1 s: without a new velocity they stop
)
LOCKED = 0.8  # length of the mean of the commands' phases, as unit vectors, from which on they come once a step (jitter: a tenth of it)
EARLY = 0.01  # of the commands may come before the grid time that they belong to
LEAD = 0.01  # of a step, by which the grid is before those
SLACK = 1e-6  # of a step: rounding
BEHIND = 1e-5  # of a step, by which a last observation is at least behind what it has to show
RATE_S = 2.0  # of a stream that its clock's rate is judged by
SAME_RATE = 0.02  # by which two clocks may differ in rate
SAME_CLOCK_S = (
    1.0  # by which the delays of two streams may differ before their publishers' clocks count as not synchronised
)


@dataclass(frozen=True)
class ImportOptions:
    """How bags become episodes.

    clock: received (when messages arrived), or header (their stamps)
    split: bag (each one is an episode), gap (between commands), status (of the robot's scenes)
    gap_s: between commands that ends an episode
    success: status (what the robot's status says; without one it is not known, and recorded as none), all or none of the episodes
    instruction: the task in words (empty: the bag's own)
    """

    clock: Clock = "received"
    split: Split = "bag"
    gap_s: float = 1.0
    success: Success = "status"
    instruction: str = ""


@dataclass(frozen=True)
class Track:
    """The messages of a topic, in order of receipt.

    time_N: on the chosen clock, s, increasing
    received_N: s
    stamp_N: s; NaN where a message has none
    number_N: which message of the topic it is, in the order that the bag gives
    values_ND: actions of a command, numbers of a status; nothing of a camera
    """

    time_N: np.ndarray
    received_N: np.ndarray
    stamp_N: np.ndarray
    number_N: np.ndarray
    values_ND: np.ndarray

    def only(self, which_N: np.ndarray) -> Track:
        """Some of them, or all in another order."""
        columns = self.time_N, self.received_N, self.stamp_N, self.number_N, self.values_ND
        return Track(*(column[which_N] for column in columns))

    @property
    def stamped(self) -> bool:
        """Whether every message has a stamp."""
        return bool(len(self.stamp_N) and np.isfinite(self.stamp_N).all())


@dataclass(frozen=True)
class Clocked:
    """What a stream's stamps say.

    keep_N: messages that are not reordered or repeated
    breaks_s: times of receipt at which the publisher's clock had jumped
    """

    keep_N: np.ndarray
    breaks_s: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """A stretch of time that holds an episode.

    begin_s: before which nothing is of it
    end_s: its last observation is at the first grid time from here on
    before_s: and before this
    """

    begin_s: float
    end_s: float
    before_s: float = math.inf


@dataclass(frozen=True)
class Piece:
    """An episode that will be: T steps.

    number_T: which message of each observed topic each observation is made of, (T + 1,) each
    action_TA: executed
    reward_T, success_T: of each step
    terminated: it came to its end
    cut: why it is not all of the episode; "" where it is
    """

    number_T: dict[str, np.ndarray]
    action_TA: np.ndarray
    reward_T: np.ndarray
    success_T: np.ndarray
    terminated: bool
    cut: str


def check_stamps(received_N: np.ndarray, stamp_N: np.ndarray, jump_s: float) -> Clocked:
    """Find reordered messages and jumps of the publisher's clock, by the rules of ``Streams``; s, in order of receipt."""
    keep_N, breaks = np.ones(len(stamp_N), bool), []
    newest_s, offset_s, last_s, settled = -math.inf, math.inf, 0.0, 0
    for i, (received_s, stamp_s) in enumerate(zip(received_N.tolist(), stamp_N.tolist(), strict=True)):
        delay_s = received_s - stamp_s
        jumped_ahead = settled >= SETTLED and offset_s - delay_s > jump_s
        if jumped_ahead or stamp_s < newest_s - jump_s:
            breaks.append(received_s)
            offset_s, settled = math.inf, 0
        elif stamp_s <= newest_s:
            keep_N[i] = False
            continue
        else:
            settled += math.isfinite(newest_s)
        offset_s = min(offset_s + DRIFT * (received_s - last_s), delay_s)
        newest_s, last_s = stamp_s, received_s
    return Clocked(keep_N, tuple(breaks))


def clock_rate(received_N: np.ndarray, stamp_N: np.ndarray) -> float | None:
    """Seconds of the stamps per second of receipt, whatever jumps there are; None where the stream is too short to tell."""
    apart = len(received_N) // 4
    if apart < 5 or received_N[-1] - received_N[0] < RATE_S:
        return None
    elapsed_N = received_N[apart:] - received_N[:-apart]
    advanced_N = stamp_N[apart:] - stamp_N[:-apart]
    moved_N = elapsed_N > 0
    return float(np.median(advanced_N[moved_N] / elapsed_N[moved_N])) if moved_N.any() else None


def on_clock(
    tracks: Mapping[str, Track], clock: Clock, jump_s: float, name: Callable[[str], str], notes: Counter[str]
) -> list[dict[str, Track]]:
    """Put messages onto one clock, those between two jumps of a clock for themselves. See rules 1 and 2.

    Topics without stamps are put at their receipt less the others' usual delay where the clock is that of the stamps.

    Args:
        tracks: by key, on no clock yet.
        clock: to put them on.
        jump_s: by which a publisher's clock may leave its course.
        name: how a topic is called, by key, for messages.
        notes: what is left out is counted in it.

    Raises:
        UserError: the clocks differ in rate, or, where they are compared with each other, by too much.
    """
    stamped = {key: track for key, track in tracks.items() if track.stamped}
    found = {key: clock_rate(track.received_N, track.stamp_N) for key, track in stamped.items()}
    rates = {key: rate for key, rate in found.items() if rate is not None}
    common = _require_rates(rates, clock, name) if rates else 1.0
    if clock == "header":
        _require_synchronised(stamped, tracks, abs(common - 1) <= SAME_RATE, name)
    kept, breaks = dict(tracks), [math.inf]
    for key, track in stamped.items():
        clocked = check_stamps(track.received_N * common, track.stamp_N, jump_s)
        kept[key] = track.only(clocked.keep_N)
        breaks += [at_s / common for at_s in clocked.breaks_s]
        notes["messages that came out of order, or twice"] += int((~clocked.keep_N).sum())
        notes["jumps of a clock"] += len(clocked.breaks_s)
    parts, begin_s = [], -math.inf
    for end_s in sorted(set(breaks)):
        part = {k: t.only((t.received_N >= begin_s) & (t.received_N < end_s)) for k, t in kept.items()}
        parts.append(_timed(part, stamped) if clock == "header" else part)
        begin_s = end_s
    return parts


def _timed(part: Mapping[str, Track], stamped: Mapping[str, Track]) -> dict[str, Track]:
    delays = [part[key].received_N - part[key].stamp_N for key in stamped]
    delay_s = float(np.median(np.concatenate(delays))) if any(map(len, delays)) else 0.0
    return {
        key: replace(track, time_N=track.stamp_N if key in stamped else track.received_N - delay_s)
        for key, track in part.items()
    }


def _require_rates(rates: Mapping[str, float], clock: Clock, name: Callable[[str], str]) -> float:
    """The stamps' seconds per second of receipt; 1 where receipt counts."""
    low, high = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    if clock == "header":
        if rates[high] - rates[low] > SAME_RATE * abs(rates[high]):
            raise UserError(
                f"{name(high)} and {name(low)} have stamps of different clocks: they advance by {rates[high]:.3g} and "
                f"{rates[low]:.3g} s per second; take clock received"
            )
        return float(np.median(list(rates.values())))
    worst = max(rates, key=lambda key: abs(rates[key] - 1))
    if abs(rates[worst] - 1) > SAME_RATE:
        raise UserError(
            f"{name(worst)} has stamps that advance by {rates[worst]:.3g} s per second of the bag's own time: it was recorded from a "
            "replay or a simulation; take clock header"
        )
    return 1.0


def _require_synchronised(
    stamped: Mapping[str, Track], tracks: Mapping[str, Track], same_rate: bool, name: Callable[[str], str]
) -> None:
    bare = [key for key in tracks if key not in stamped]
    if not stamped or (bare and not same_rate):
        why = (
            "no topic has stamps in its headers"
            if not stamped
            else f"{name(bare[0])} has none, and the others' clock is another"
        )
        raise UserError(f"clock header wants stamps: {why}; take clock received")
    delays = {key: float(np.median(t.received_N - t.stamp_N)) for key, t in stamped.items()}
    low, high = min(delays, key=delays.__getitem__), max(delays, key=delays.__getitem__)
    if same_rate and delays[high] - delays[low] > SAME_CLOCK_S:
        raise UserError(
            f"{name(high)} and {name(low)} have stamps of clocks that are not synchronised: they were received {delays[high]:.3g} and "
            f"{delays[low]:.3g} s after them; take clock received"
        )


def newest(times_N: np.ndarray, grid_T: np.ndarray) -> np.ndarray:
    """Index of the newest message at each grid time: (T,), -1 where there is none yet; ``times_N`` increases."""
    return np.searchsorted(times_N, grid_T, side="right") - 1


def command_phase(times_N: np.ndarray, dt: float) -> float | None:
    """A grid time just before the commands where they come once a step; None where they do not. See rule 3."""
    if not len(times_N):
        return None
    angle_N = 2 * np.pi * ((times_N - times_N[0]) / dt)
    mean = np.exp(1j * angle_N).mean()
    if abs(mean) < LOCKED:
        return None
    centre = float(np.angle(mean))
    off_N = (angle_N - centre + np.pi) % (2 * np.pi) - np.pi
    early = float(np.quantile(off_N, EARLY))
    return float(times_N[0]) + dt * ((centre + early) / (2 * np.pi) - LEAD)


def grid_times(lower_s: float, span: Span, dt: float, phase_s: float | None) -> np.ndarray:
    """Grid times from ``lower_s`` on to the span's end: (T + 1,), s; empty where no step fits."""
    start_s = lower_s
    if phase_s is not None:
        start_s = phase_s + dt * math.ceil((lower_s - phase_s) / dt - SLACK)
    last = (span.end_s - start_s) / dt - SLACK
    if math.isfinite(span.before_s):
        last = min(last, (span.before_s - start_s) / dt - 1 - SLACK)
    steps = math.ceil(last)
    return start_s + dt * np.arange(steps + 1) if steps >= 1 else np.zeros(0)


def first_time(
    span: Span, seen_s: Sequence[float], commanded: Sequence[np.ndarray], dt: float, phase_s: float | None
) -> float | None:
    """When everything has begun: the earliest that a grid may begin at. None where the span has no command.

    Args:
        span: of the episode.
        seen_s: time of each observation's first message.
        commanded: times of each command, increasing.
        dt: of a step, s.
        phase_s: of the grid (None: it begins right here).
    """
    inside = [t_N[(t_N >= span.begin_s) & (t_N < span.before_s)] for t_N in commanded]
    begun = [float(t_N[0]) for t_N in inside if len(t_N)]
    if not begun or not all(len(t_N) for t_N in commanded):
        return None
    # the first of the span's commands, and of each kind one that is in force, in the first step at the latest
    first_s = max(min(begun), *(float(t_N[0]) for t_N in commanded))
    lead_s = 0.0 if phase_s is None else dt * (1 - SLACK)
    return max(span.begin_s, *seen_s, first_s - lead_s)


def how_of(spec: ActionSpec, axis: int, as_velocity: bool) -> How:
    """How several commands in a step become one action, by rule 5; ``as_velocity``: the message holds one whatever the mode is."""
    if spec.mode == "absolute" or spec.units[axis] == FREE_UNIT:
        return "last"
    return "sum" if spec.mode == "delta" and not as_velocity else "mean"


def combine(times_N: np.ndarray, action_NA: np.ndarray, grid_T: np.ndarray, how_A: Sequence[How]) -> np.ndarray:
    """Actions of the steps between grid times, by rule 5: (T, A) of T + 1 grid times. A command has come before the first step ends."""
    first_T = np.searchsorted(times_N, grid_T[:-1], side="left")
    stop_T = np.searchsorted(times_N, grid_T[1:], side="left")
    held_TA = action_NA[stop_T - 1]
    made_TA = held_TA.copy()
    sums_A, means_A = (np.array([how == kind for how in how_A]) for kind in ("sum", "mean"))
    for step, (first, stop) in enumerate(zip(first_T.tolist(), stop_T.tolist(), strict=True)):
        came_NA = action_NA[first:stop]
        made_TA[step, sums_A] = came_NA[:, sums_A].sum(axis=0)
        if len(came_NA):
            made_TA[step, means_A] = came_NA[:, means_A].mean(axis=0)
        elif grid_T[step] - times_N[stop - 1] > EXPIRES_S:
            made_TA[step, means_A] = 0.0
    return made_TA


def spans_by_gap(times_N: np.ndarray, gap_s: float, dt: float, end_s: float) -> list[Span]:
    """A span for each group of commands without a gap of more than ``gap_s``; all streams end at ``end_s``."""
    if not len(times_N):
        return []
    edges = np.flatnonzero(np.diff(times_N) > gap_s) + 1
    groups = np.split(times_N, edges)
    nexts = [float(group[0]) for group in groups[1:]] + [end_s + dt / 2]
    begins = [-math.inf] + [float(group[-1]) + SLACK * dt for group in groups[:-1]]
    lasts = [float(group[-1]) + BEHIND * dt for group in groups]
    return [Span(*numbers) for numbers in zip(begins, lasts, nexts, strict=True)]


def spans_by_status(
    times_N: np.ndarray, done_N: np.ndarray, scene_N: np.ndarray, commands_N: np.ndarray, dt: float, end_s: float
) -> list[Span]:
    """A span for each scene, up to where it is done; where it never is, up to the scene's last command.

    Args:
        times_N: of status messages, increasing.
        done_N: whether the episode had ended, in success or not.
        scene_N: what tells one episode from the next (all the same: an episode begins when the last one is no longer done).
        commands_N: times of all commands, increasing.
        dt: of a step, s.
        end_s: of all streams.
    """
    spans = []
    begins = [i for i in range(len(times_N)) if i == 0 or scene_N[i] != scene_N[i - 1] or (done_N[i - 1] > done_N[i])]
    for begin, stop in itertools.zip_longest(begins, begins[1:], fillvalue=len(times_N)):
        begin_s = float(times_N[begin])
        after_s = float(times_N[stop]) if stop < len(times_N) else end_s + dt / 2
        done = np.flatnonzero(done_N[begin:stop])
        if len(done):
            spans.append(Span(begin_s, float(times_N[begin + done[0]]) + BEHIND * dt))
            continue
        inside = commands_N[(commands_N >= begin_s) & (commands_N < after_s)]
        if len(inside):
            spans.append(Span(begin_s, float(inside[-1]) + BEHIND * dt, after_s))
    return spans


def runs(good_T: np.ndarray) -> list[tuple[int, int]]:
    """First index of each run of good grid times, and one past its last."""
    edges = np.diff(np.concatenate([[False], good_T, [False]]).astype(np.int8))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))
