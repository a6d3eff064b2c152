"""A robot whose messages are recorded as they come and go: its transport, with a recorder at its side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from real_robot.messages import Message
from real_robot.recorder import BagRecorder
from real_robot.robot import Robot
from real_robot.robots.ros import RosDriver
from real_robot.transports.base import Endpoint, OnMessage, Publisher, Topic, Transport
from vla_rl.runtime.errors import UserError


@contextmanager
def recorded(robot: Robot, path: Path, about: Mapping[str, str]) -> Iterator[BagRecorder]:
    """Record all that a robot says and is told, until the block ends; the robot connects in it.

    Args:
        robot: not yet connected.
        path: folder of the bag, which must not exist.
        about: kept in the bag, "instruction" for one.

    Raises:
        UserError: the robot has no topics, or the bag cannot be made.
    """
    driver = robot.driver
    if not isinstance(driver, RosDriver):
        raise UserError(f"robot {robot.config.name!r} has no topics to record; bags want a robot of type ros")
    with BagRecorder(path, driver.config, about) as recorder:
        driver.transport = RecordedTransport(driver.transport, recorder)
        yield recorder


class RecordedTransport:
    """A transport of which every message is recorded; see ``Transport``."""

    def __init__(self, transport: Transport, recorder: BagRecorder) -> None:
        self.transport, self.recorder = transport, recorder

    @property
    def failure(self) -> str | None:
        """See ``Transport``."""
        return self.transport.failure

    @failure.setter
    def failure(self, reason: str | None) -> None:
        self.transport.failure = reason

    def open(self) -> None:
        """See ``Transport``."""
        self.transport.open()

    def subscribe(self, topic: Topic, on_message: OnMessage) -> None:
        """See ``Transport``."""

        def received(message: Message, received_s: float) -> None:
            self.recorder.record(topic.name, message, received_s)
            on_message(message, received_s)

        self.transport.subscribe(topic, received)

    def advertise(self, topic: Topic) -> RecordedPublisher:
        """See ``Transport``."""
        return RecordedPublisher(self.transport.advertise(topic), topic.name, self.recorder)

    def endpoints(self, topic: str) -> list[Endpoint] | None:
        """See ``Transport``."""
        return self.transport.endpoints(topic)

    def close(self) -> None:
        """See ``Transport``."""
        self.transport.close()


@dataclass(frozen=True)
class RecordedPublisher:
    """See ``Publisher``; what could not be sent is not recorded."""

    publisher: Publisher
    name: str
    recorder: BagRecorder

    def publish(self, message: Message) -> None:
        """See ``Publisher``."""
        self.publisher.publish(message)
        self.recorder.record(self.name, message, time.monotonic())
