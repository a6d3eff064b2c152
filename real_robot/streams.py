"""The newest message of each topic and how old it really is, whatever its stamps say.

Clock rules. All times are of this computer's monotonic clock, at arrival; another computer's clock is never compared with ours. Stamps of
one publisher are compared with each other only: a message whose stamp is not newer than the last one's is dropped (reordered or repeated),
so it does not count as fresh. What a message took on its way is known up to a constant, the fastest one's time: the rest is added to its
age, so that a link that buffers cannot make old observations look new. One that seems to have taken much less than the fastest, or whose
stamp goes back by much, means that the publisher's clock jumped, and is a fault.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from real_robot.limits import Kind
from real_robot.messages import Message, stamp_of
from real_robot.parts import TopicConfig

DRIFT = 5e-4  # by which clocks of two computers drift apart at most, s/s
SETTLED = 5  # messages after which the fastest one's time is known well enough to tell a clock that jumps ahead from a late beginning


@dataclass
class _Stream:
    topic: TopicConfig
    message: Message | None = None
    received_s: float = 0.0
    stamp_s: float | None = None
    offset_s: float = 0.0  # least difference of arrival and stamp
    held_up_s: float = 0.0  # by which the newest message was slower than the fastest
    dropped: int = 0
    settled: int = 0
    count: int = 0
    began_s: float | None = None
    content: int | None = None
    changed_s: float = 0.0
    broken: list[str] = field(default_factory=list)


class Streams:
    """Newest messages by key; filled by a transport's threads, read by the loop's."""

    def __init__(self, topics: Mapping[str, TopicConfig], clock_jump_s: float) -> None:
        self._streams = {key: _Stream(topic) for key, topic in topics.items()}
        self._clock_jump_s = clock_jump_s
        self._lock = threading.Lock()

    def listener(self, key: str) -> Callable[[Message, float], None]:
        """What a transport is to call for each message of a topic."""
        return lambda message, received_s: self.take(key, message, received_s)

    def take(self, key: str, message: Message, received_s: float) -> None:
        """A message has arrived."""
        stream = self._streams[key]
        stamp_s = stamp_of(message)
        with self._lock:
            stream.count += 1
            stream.began_s = received_s if stream.began_s is None else stream.began_s
            if stamp_s is not None:
                offset_s = received_s - stamp_s
                if stream.stamp_s is not None:
                    advanced_s = stamp_s - stream.stamp_s
                    ahead_s = (
                        stream.offset_s - offset_s
                    )  # an arrival can be late, but not earlier than the fastest by much
                    ahead = ahead_s > self._clock_jump_s and stream.settled >= SETTLED
                    if ahead or advanced_s < -self._clock_jump_s:
                        elapsed_s = received_s - stream.received_s
                        stream.broken.append(
                            f"clock: stamps of {stream.topic.topic} advanced by {advanced_s:.3f} s in {elapsed_s:.3f} s"
                        )
                    if advanced_s <= 0:
                        stream.dropped += 1
                        return
                    stream.settled += 1
                    offset_s = min(stream.offset_s + DRIFT * (received_s - stream.received_s), offset_s)
                stream.offset_s, stream.held_up_s = offset_s, received_s - stamp_s - offset_s
            stream.message, stream.received_s, stream.stamp_s = message, received_s, stamp_s
            if stream.topic.ages_as == "camera":
                content = zlib.crc32(message["data"])
                if content != stream.content:
                    stream.content, stream.changed_s = content, received_s

    def forget_clock(self) -> None:
        """Take the stamps of every stream anew, after a person has looked: a clock that stepped back a little only seems late."""
        with self._lock:
            for stream in self._streams.values():
                stream.stamp_s, stream.settled, stream.broken, stream.held_up_s = None, 0, [], 0.0

    def newest(self) -> dict[str, Message] | None:
        """The newest message of each topic; None where one has not begun."""
        with self._lock:
            found = {key: stream.message for key, stream in self._streams.items()}
        return None if any(m is None for m in found.values()) else found  # type: ignore[return-value]

    def silent(self) -> list[str]:
        """Topics without any message."""
        with self._lock:
            return [s.topic.topic for s in self._streams.values() if s.message is None]

    def ages_s(self, now_s: float) -> dict[str, tuple[Kind, float]]:
        """Age of each topic's newest message, with what it was held up by."""
        with self._lock:
            return {
                key: (s.topic.ages_as, max(now_s - s.received_s, 0.0) + s.held_up_s)
                for key, s in self._streams.items()
                if s.message is not None
            }

    def broken(self, now_s: float) -> tuple[str, ...]:
        """Clocks that jumped and cameras that froze."""
        with self._lock:
            found = [reason for s in self._streams.values() for reason in s.broken]
            for s in self._streams.values():
                if s.content is not None and now_s - s.changed_s > s.topic.frozen_s:
                    found.append(
                        f"frozen camera: the pictures of {s.topic.topic} have not changed for {now_s - s.changed_s:.2f} s"
                    )
        return tuple(found)

    def rates_hz(self) -> dict[str, float]:
        """Messages per second of each topic since its first."""
        with self._lock:
            rates = {}
            for key, s in self._streams.items():
                took_s = 0.0 if s.began_s is None else s.received_s - s.began_s
                rates[key] = (s.count - s.dropped - 1) / took_s if took_s > 0 else 0.0
            return rates
