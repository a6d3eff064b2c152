"""A plain node of rclpy or rospy, for comparison: nothing of ours between it and ROS but the stopwatch.

``python -m real_robot.round_trip.bare '{"role": "client", "ros": 2, "prefix": "/x", "hz": {"joints": 50.0, ...}}'``; the role may be
``echo``. Runs where ROS is, with Python's own library alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    unheard,
    wait_for_end,
)

BUFFER = 2**24  # rospy's own is too small for pictures
Publish = Callable[[Any], None]


def message_class(kind: Kind) -> Any:
    """ROS's own class."""
    return getattr(importlib.import_module("sensor_msgs.msg"), kind.type.rpartition("/")[2])


class RclpyNode:
    """Endpoints of ROS 2: reliable, of depth 1; publishers have deadline and lifespan of two periods, as ours have."""

    def __init__(self, hz: Mapping[str, float]) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        rclpy.init(args=[])
        self._hz = hz
        self._node = rclpy.create_node(f"bare_{time.monotonic_ns()}")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)

    def subscribe(self, kind: Kind, topic: str, heard: Publish) -> None:
        """Call ``heard`` with each message."""
        from rclpy.qos import QoSProfile

        self._node.create_subscription(message_class(kind), topic, heard, QoSProfile(depth=1))

    def advertise(self, kind: Kind, topic: str) -> Publish:
        """What publishes a message."""
        from rclpy.duration import Duration
        from rclpy.qos import QoSProfile

        two_periods = Duration(seconds=2 / self._hz[kind.name])
        qos = QoSProfile(depth=1, deadline=two_periods, lifespan=two_periods)
        return self._node.create_publisher(message_class(kind), topic, qos).publish

    def begin(self) -> None:
        """Deliver messages from now on."""
        self._thread.start()

    def _spin(self) -> None:
        while not self._ended.is_set():
            self._executor.spin_once(timeout_sec=0.5)

    def close(self) -> None:
        """Leave: the thread ends first, or the library ends the process."""
        import rclpy

        self._ended.set()
        self._thread.join()
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown()


class RospyNode:
    """Endpoints of ROS 1, without Nagle's algorithm, as ours are."""

    def __init__(self, hz: Mapping[str, float]) -> None:
        import rospy

        rospy.init_node("bare", argv=[], anonymous=True, disable_signals=True)

    def subscribe(self, kind: Kind, topic: str, heard: Publish) -> None:
        """Call ``heard`` with each message."""
        import rospy

        rospy.Subscriber(topic, message_class(kind), heard, queue_size=1, buff_size=BUFFER, tcp_nodelay=True)

    def advertise(self, kind: Kind, topic: str) -> Publish:
        """What publishes a message."""
        import rospy

        return rospy.Publisher(topic, message_class(kind), queue_size=1, tcp_nodelay=True).publish

    def begin(self) -> None:
        """Deliver messages from now on: rospy does so anyway."""

    def close(self) -> None:
        """Leave."""
        import rospy

        rospy.signal_shutdown("done")


def made(kind: Kind, number: int) -> Any:
    """ROS's message of a number."""
    message = message_class(kind)()
    if kind.height:
        message.height, message.width, message.step = kind.height, kind.width, 3 * kind.width
        message.encoding = "rgb8"
        pixels = kind.pixels(number)
        message.data = type(message.data)("B", pixels) if not isinstance(message.data, bytes) else pixels
    else:
        message.name = list(JOINTS)
        message.position, message.velocity, message.effort = kind.joints(number)
    return message


def content(kind: Kind, message: Any) -> Mark:
    """Length and checksum of a message of ROS's."""
    if kind.height:
        return image_mark(message.height, message.width, message.encoding, message.data)
    return joints_mark(message.name, message.position, message.velocity, message.effort)


class BareClient:
    """See ``Client``."""

    def __init__(self, node: RclpyNode | RospyNode, prefix: str, ros: int) -> None:
        self.heard: Heard = unheard
        self._seconds = "sec" if ros == 2 else "secs"
        self._messages = {kind.name: [made(kind, i) for i in range(CONTENTS)] for kind in KINDS.values()}
        self._publish = {}
        for kind in KINDS.values():
            node.subscribe(kind, kind.topic(prefix, "back"), functools.partial(self._came, kind))
            self._publish[kind.name] = node.advertise(kind, kind.topic(prefix, "there"))

    def _came(self, kind: Kind, message: Any) -> None:
        at_s = time.monotonic()
        number = getattr(message.header.stamp, self._seconds)
        self.heard(kind.name, number, at_s, lambda: content(kind, message))

    def send(self, kind: Kind, number: int) -> None:
        """See ``Client``."""
        message = self._messages[kind.name][number % CONTENTS]
        setattr(message.header.stamp, self._seconds, number)
        self._publish[kind.name](message)


@contextlib.contextmanager
def joined(ros: int, hz: Mapping[str, float]) -> Iterator[RclpyNode | RospyNode]:
    """A node that leaves when the block ends."""
    node = (RclpyNode if ros == 2 else RospyNode)(hz)
    try:
        yield node
    finally:
        node.close()


def main() -> None:
    """Run as the first argument says."""
    asked = json.loads(sys.argv[1])
    with standard_output_alone() as out, joined(asked["ros"], asked["hz"]) as node:
        prefix = asked["prefix"]
        if asked["role"] == "client":
            client = BareClient(node, prefix, asked["ros"])
            node.begin()
            answer(client, out)
            return
        for kind in KINDS.values():
            node.subscribe(kind, kind.topic(prefix, "there"), node.advertise(kind, kind.topic(prefix, "back")))
        node.begin()
        wait_for_end(out)


if __name__ == "__main__":
    main()
