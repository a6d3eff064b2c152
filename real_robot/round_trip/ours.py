"""A client or an echo over one of our transports.

``python -m real_robot.round_trip.ours '{"role": "client", "transport": {"type": "dds"}, "prefix": "/x", "hz": {"joints": 50.0, ...}}'``;
the role may be ``echo``.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from real_robot.messages import Message, image_message
from real_robot.round_trip.stopwatch import (
    CONTENTS,
    JOINTS,
    KINDS,
    Heard,
    Kind,
    Mark,
    answer,
    image_mark,
    joints_mark,
    standard_output_alone,
    tell,
    unheard,
    wait_for_end,
)
from real_robot.transports.base import Publisher, Topic, Transport, TransportConfig, discover_transports
from vla_rl.runtime.config import decode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.platform import keep_freed_memory


def made(kind: Kind, number: int) -> Message:
    """The message of a number, but for its stamp."""
    if kind.height:
        shape = kind.height, kind.width, 3
        return image_message(np.frombuffer(kind.pixels(number), np.uint8).reshape(shape), 0.0)
    values = dict(zip(("position", "velocity", "effort"), map(np.array, kind.joints(number)), strict=True))
    return {"header": {"stamp": {"sec": 0, "nanosec": 0}, "frame_id": ""}, "name": list(JOINTS), **values}


def content(kind: Kind, message: Message) -> Mark:
    """Length and checksum of a message."""
    if kind.height:
        return image_mark(message["height"], message["width"], message["encoding"], message["data"])
    return joints_mark(message["name"], message["position"], message["velocity"], message["effort"])


class OurClient:
    """See ``Client``."""

    def __init__(self, transport: Transport, prefix: str, hz: Mapping[str, float]) -> None:
        self.heard: Heard = unheard
        self._messages = {kind.name: [made(kind, i) for i in range(CONTENTS)] for kind in KINDS.values()}
        self._publishers = {}
        for kind in KINDS.values():
            transport.subscribe(topic_of(kind, prefix, "back", hz), self._listener(kind))
            self._publishers[kind.name] = transport.advertise(topic_of(kind, prefix, "there", hz))

    def _listener(self, kind: Kind) -> Callable[[Message, float], None]:
        def came(message: Message, _: float) -> None:
            at_s = time.monotonic()  # when it is decoded, which is later than when its bytes came
            self.heard(kind.name, message["header"]["stamp"]["sec"], at_s, lambda: content(kind, message))

        return came

    def send(self, kind: Kind, number: int) -> None:
        """See ``Client``."""
        header = {"stamp": {"sec": number, "nanosec": 0}, "frame_id": ""}
        self._publishers[kind.name].publish(self._messages[kind.name][number % CONTENTS] | {"header": header})


def topic_of(kind: Kind, prefix: str, way: str, hz: Mapping[str, float]) -> Topic:
    """A topic that carries a kind: reliable, of depth 1, as commands are."""
    return Topic(kind.topic(prefix, way), kind.type, "command", hz[kind.name])


def echo(transport: Transport, prefix: str, hz: Mapping[str, float]) -> None:
    """Send back what comes."""
    for kind in KINDS.values():
        publisher = transport.advertise(topic_of(kind, prefix, "back", hz))
        transport.subscribe(topic_of(kind, prefix, "there", hz), functools.partial(_send_back, publisher))


def _send_back(publisher: Publisher, message: Message, _: float) -> None:
    publisher.publish(message)


def main() -> None:
    """Run as the first argument says; what a user can mend is said as ``{"error": TEXT}``."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    keep_freed_memory()  # as every command does
    discover_transports()
    with standard_output_alone() as out:
        try:
            transport = decode(TransportConfig, asked["transport"]).build()
            transport.open()
        except UserError as error:
            tell(out, {"error": str(error)})
            return
        try:
            if asked["role"] == "client":
                answer(OurClient(transport, asked["prefix"], asked["hz"]), out)
            else:
                echo(transport, asked["prefix"], asked["hz"])
                wait_for_end(out)
        except UserError as error:
            tell(out, {"error": str(error)})
        finally:
            transport.close()


if __name__ == "__main__":
    main()
