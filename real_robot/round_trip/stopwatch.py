"""Round trips of messages at a fixed rate, whatever carries them: what is sent, when it comes back, and whether it is the same.

A client sends numbered messages on ``PREFIX/KIND/there``; an echo in another process sends each back on ``PREFIX/KIND/back``. The number
is in the header's stamp (seconds). What is in a message changes with its number, and its length and checksum are compared when it comes
back, so that neither an old message nor a damaged one counts. Nothing here needs more than Python, so it runs where ROS is.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from vla_rl.runtime.pace import Pace

JOINTS = tuple(f"joint_{i + 1}" for i in range(7))
CONTENTS = 8  # messages of different content, in turn
WARM_UP = 5  # messages before each burst that do not count
JOIN_S = 25.0  # in which both sides find each other
QUIET_S = 2.0  # without anything that comes back, after which what is missing is lost
LOOK_S = 0.1
Mark = tuple[int, int]  # length and checksum of what a message holds


@dataclass(frozen=True)
class Kind:
    """What is sent; a picture of rgb8, or the state of seven joints where it has no height."""

    name: str
    height: int = 0
    width: int = 0

    @property
    def type(self) -> str:
        """As ROS 2 names it."""
        return "sensor_msgs/msg/Image" if self.height else "sensor_msgs/msg/JointState"

    def topic(self, prefix: str, way: str) -> str:
        """Name of the topic ``there`` or ``back``."""
        return f"{prefix}/{self.name}/{way}"

    def pixels(self, number: int) -> bytes:
        """What the picture of a number holds."""
        return random.Random(number % CONTENTS).randbytes(3 * self.height * self.width)

    def joints(self, number: int) -> tuple[list[float], list[float], list[float]]:
        """Position, velocity and effort of the joints of a number."""
        drawn = random.Random(number % CONTENTS)
        position, velocity, effort = ([drawn.gauss(0.0, 1.0) for _ in JOINTS] for _ in range(3))
        return position, velocity, effort

    def mark(self, number: int) -> Mark:
        """What the message of a number has to hold when it comes back."""
        if self.height:
            return image_mark(self.height, self.width, "rgb8", self.pixels(number))
        return joints_mark(JOINTS, *self.joints(number))


KINDS = {
    kind.name: kind
    for kind in (
        Kind("joints"),
        Kind("image_96x96", 96, 96),
        Kind("image_240x320", 240, 320),
        Kind("image_480x640", 480, 640),
    )
}


def image_mark(height: int, width: int, encoding: str, data: Any) -> Mark:
    """Length and checksum of a picture; ``data`` is anything that holds bytes."""
    return len(data), zlib.crc32(data, zlib.crc32(f"{height} {width} {encoding}".encode()))


def joints_mark(names: Any, *values: Any) -> Mark:
    """Length and checksum of the state of joints."""
    numbers = [float(x) for part in values for x in part]
    return len(numbers), zlib.crc32(struct.pack(f"<{len(numbers)}d", *numbers), zlib.crc32(" ".join(names).encode()))


class Burst:
    """Messages of one kind that are sent one after the other, and what came back of them.

    Attributes:
        sent_s: when each was given to the transport, by number, of ``time.monotonic``.
        came_s: when each was back in the hands of whoever listens.
        wrong: messages that came back with another content.
        twice: messages that came back again.
        checking_s: processor time that the comparing took, which is none of the transport's.
    """

    def __init__(self, first: int, count: int, marks: Mapping[int, Mark]) -> None:
        """Begin.

        Args:
            first: number of the first message.
            count: of messages.
            marks: what they hold, by number modulo ``CONTENTS``.
        """
        self.numbers = range(first, first + count)
        self.sent_s: dict[int, float] = {}
        self.came_s: dict[int, float] = {}
        self.wrong = self.twice = 0
        self.checking_s = 0.0
        self._marks = marks

    def returned(self, number: int, at_s: float, mark: Callable[[], Mark]) -> None:
        """Note a message that came back; one that was sent in an earlier burst does not count."""
        if number not in self.sent_s:
            return
        begun_s = time.thread_time()
        if number in self.came_s:
            self.twice += 1
        elif mark() == self._marks[number % CONTENTS]:
            self.came_s[number] = at_s
        else:
            self.wrong += 1
        self.checking_s += time.thread_time() - begun_s

    @property
    def complete(self) -> bool:
        """Whether all have come back."""
        return len(self.came_s) == len(self.numbers)

    def result(self, cpu_s: float) -> dict[str, Any]:
        """As plain data; ``cpu_s`` is the processor time of the whole process meanwhile."""
        delays_s = [came_s - self.sent_s[number] for number, came_s in self.came_s.items()]
        lost = len(self.numbers) - len(self.came_s) - self.wrong
        told = {"sent": len(self.numbers), "lost": lost, "wrong": self.wrong, "twice": self.twice}
        return {**told, "delays_s": delays_s, "cpu_s": cpu_s - self.checking_s}


Heard = Callable[[str, int, float, Callable[[], Mark]], None]  # kind, number, when, content


def unheard(kind: str, number: int, at_s: float, mark: Callable[[], Mark]) -> None:
    """Before somebody listens."""


class Client(Protocol):
    """Sends messages over some transport; hands what comes back to ``heard``."""

    heard: Heard

    def send(self, kind: Kind, number: int) -> None:
        """Send the message of a number, made before as far as possible."""


class Timer:
    """Measures with a client."""

    def __init__(self, client: Client) -> None:
        self._client, self._next = client, 1
        self._marks = {kind.name: {i: kind.mark(i) for i in range(CONTENTS)} for kind in KINDS.values()}
        self._burst, self._kind = Burst(0, 0, {}), ""
        self._complete, self._heard_s = threading.Event(), 0.0
        client.heard = self._heard

    def _heard(self, kind: str, number: int, at_s: float, mark: Callable[[], Mark]) -> None:
        self._heard_s = time.monotonic()
        if kind == self._kind:
            self._burst.returned(number, at_s, mark)
            if self._burst.complete:
                self._complete.set()

    def _send(self, kind: Kind, count: int, hz: float) -> Burst:
        """Send messages and wait for all, or until nothing comes any more: what is still on its way must not get into the next burst."""
        self._complete.clear()
        self._burst = burst = Burst(self._next, count, self._marks[kind.name])
        self._kind = kind.name
        self._next += count
        pace = Pace(hz, spin_s=0.0)
        for number in burst.numbers:
            pace.wait()
            burst.sent_s[number] = time.monotonic()
            self._client.send(kind, number)
        sent_s = time.monotonic()
        while not self._complete.wait(LOOK_S) and time.monotonic() - max(sent_s, self._heard_s) < QUIET_S:
            pass
        return burst

    def join(self, kind: Kind) -> bool:
        """Send one after the other until a few in a row come back; whether they did in time.

        The first are often lost while both sides find each other. There is never more than one on its way, so a slow server is not flooded.
        """
        until_s, in_a_row = time.monotonic() + JOIN_S, 0
        while time.monotonic() < until_s and in_a_row < WARM_UP:
            in_a_row = in_a_row + 1 if self._send(kind, 1, 1.0).complete else 0
        return in_a_row == WARM_UP

    def measure(self, kind: Kind, count: int, hz: float) -> dict[str, Any]:
        """Send ``count`` messages; see ``Burst.result``."""
        self._send(kind, WARM_UP, hz)
        gc.collect()
        gc.disable()  # as in a control loop
        try:
            begun_s = time.process_time()
            burst = self._send(kind, count, hz)
            return burst.result(time.process_time() - begun_s)
        finally:
            gc.enable()


@contextlib.contextmanager
def standard_output_alone() -> Any:
    """Give a stream to standard output, and send what libraries write there to standard error."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", buffering=1) as mine:
        os.dup2(2, 1)
        yield mine


def answer(client: Client, out: TextIO) -> None:
    """Do what is asked on standard input, a line each, until it ends."""
    timer = Timer(client)
    tell(out, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        kind = KINDS[asked["kind"]]
        if asked["do"] == "join":
            tell(out, {"joined": timer.join(kind)})
        else:
            tell(out, timer.measure(kind, asked["count"], asked["hz"]))


def wait_for_end(out: TextIO) -> None:
    """Be an echo, in threads, until standard input ends."""
    gc.collect()
    gc.disable()
    tell(out, {"ready": True})
    sys.stdin.read()


def tell(out: TextIO, what: Mapping[str, Any]) -> None:
    """Write a line of JSON."""
    out.write(json.dumps(what) + "\n")
    out.flush()
