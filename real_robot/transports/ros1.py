"""ROS 1 through rospy as Debian packages it: for robots that still run it (its last release's life ended in May 2025).

What differs from ROS 2: a process has one node for its life, so ``close`` takes the topics back and the node goes with the process. There
is neither deadline nor lifespan, only a queue of the topic's depth, so a stalled connection delivers late. A subscriber learns nothing of a
publisher of another type, so nodes are asked for the types of their topics.
"""

from __future__ import annotations

import functools
import http.client
import importlib
import logging
import os
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from real_robot.messages import PRIMITIVES, Message, MessageError, message_types
from real_robot.transports.base import Endpoint, OnMessage, Topic, TransportConfig, TransportError
from vla_rl.runtime.errors import UserError

DEPTH = {"command": 1, "sensor": 5, "state": 10}
MASTER = "http://localhost:11311"
CALL_S = 1.0  # that a node may take to answer about itself
LOOK_S = 0.5  # between two looks at who is there
END_S = 5.0
BUFFER = 2**24  # rospy drops old messages only among those that it has read at once: room for pictures
TIMES = ("builtin_interfaces/msg/Time", "builtin_interfaces/msg/Duration")
ANY = "*"  # the type that a subscriber gives which takes any, as rostopic does
MISSING = (
    "transport ros1 wants Debian's packages python3-rospy, python3-sensor-msgs, python3-geometry-msgs, python3-std-msgs, "
    "python3-trajectory-msgs and python3-tf2-msgs, and a file NAME.pth in this environment's site-packages with the line "
    "/usr/lib/python3/dist-packages: {error}"
)
_LOST = (OSError, http.client.HTTPException, xmlrpc.client.Error)


@TransportConfig.register_subclass("ros1")
@dataclass(frozen=True)
class Ros1Config(TransportConfig):
    """ROS 1 through rospy.

    master: its address, http://HOST:11311; empty takes ROS_MASTER_URI
    address: of this machine as the robot reaches it; empty takes ROS_IP or what rospy finds
    node: name of our node, to which rospy adds a part
    """

    master: str = ""
    address: str = ""
    node: str = "vla_rl"

    def __post_init__(self) -> None:
        if self.master and not self.uri.startswith("http://"):
            raise ValueError(f"master wants http://HOST:PORT, got {self.master!r}")

    @property
    def uri(self) -> str:
        """Where the master is."""
        return self.master or os.environ.get("ROS_MASTER_URI") or MASTER

    def build(self) -> Ros1Transport:
        """See ``TransportConfig``."""
        try:
            import rospy  # noqa: F401
        except ImportError as error:
            raise UserError(MISSING.format(error=error)) from error
        return Ros1Transport(self)


# a message of ROS 1 <-> a dict


@functools.cache
def message_class(name: str) -> Any:
    """ROS 1's class of ``sensor_msgs/msg/JointState``; raises UserError where its package is not installed."""
    package, _, kind = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), kind)
    except ImportError as error:
        debian = package.replace("_", "-")
        raise UserError(
            f"{name}: the ROS package {package} is not installed (Debian: python3-{debian}): {error}"
        ) from error


def to_ros(name: str, message: Mapping[str, Any]) -> Any:
    """A message of ROS 1; a header's sequence number is rospy's to count."""
    return _fill(name, message_class(name)(), message)


def _fill(name: str, made: Any, message: Mapping[str, Any]) -> Any:
    if name in TIMES:
        made.secs, made.nsecs = int(message["sec"]), int(message["nanosec"])
        return made
    for field in message_types()[name]:
        value = message[field.name]
        if field.kind not in PRIMITIVES:
            if not field.many:
                _fill(field.kind, getattr(made, field.name), value)
                continue
            value = [to_ros(field.kind, item) for item in value]
        elif field.many:
            value = bytes(value) if field.kind == "uint8" else np.asarray(value).tolist()
        setattr(made, field.name, value)
    return made


def to_plain(name: str, message: Any) -> Message:
    """Undo ``to_ros``."""
    if name in TIMES:
        return {"sec": message.secs, "nanosec": message.nsecs}
    made: Message = {}
    for field in message_types()[name]:
        value = getattr(message, field.name)
        if field.kind not in PRIMITIVES:
            value = [to_plain(field.kind, item) for item in value] if field.many else to_plain(field.kind, value)
        elif field.many and field.kind in ("uint8", "string"):
            value = bytes(value) if field.kind == "uint8" else list(value)
        elif field.many:
            value = np.asarray(value, np.float64 if field.kind == "float64" else np.int64)
        made[field.name] = value
    return made


# the graph


class _Timed(xmlrpc.client.Transport):
    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = CALL_S
        return connection


def _ask(uri: str, method: str, *arguments: str) -> Any:
    """Call a node or the master and wait for no longer than ``CALL_S``."""
    with xmlrpc.client.ServerProxy(uri, transport=_Timed()) as proxy:
        code, text, value = getattr(proxy, method)("/vla_rl", *arguments)
    if code != 1:
        raise TransportError(f"{uri} answers {method} with {text!r}")
    return value


def _types(master: str, node: str, publishes: bool) -> dict[str, str]:
    """Types of a node's topics as it says itself; none where it does not answer any more (the master lists the dead)."""
    try:
        uri = _ask(master, "lookupNode", node)
        pairs = _ask(uri, "getPublications" if publishes else "getSubscriptions")
    except (*_LOST, TransportError):
        return {}
    return {topic: kind.replace("/", "/msg/") for topic, kind in pairs}


class _Node:
    """The process's node: rospy makes one, once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._master: str | None = None

    def join(self, config: Ros1Config) -> str:
        """Make it unless it is there; returns its name."""
        import rospy

        with self._lock:
            if rospy.is_shutdown() and self._master is not None:
                raise TransportError("rospy was shut down, and cannot start again in the same process")
            if self._master not in (None, config.uri):
                raise TransportError(
                    f"this process's ROS 1 node is at {self._master}, and cannot join {config.uri} too"
                )
            if self._master is None:
                os.environ["ROS_MASTER_URI"] = config.uri  # where rospy looks
                if config.address:
                    os.environ["ROS_IP"] = config.address
                root = logging.getLogger()
                before = root.handlers[:], root.level  # rospy sets up logging for the whole process
                quiet = {"disable_signals": True, "disable_rosout": True, "disable_rostime": True}
                rospy.init_node(config.node, argv=[], anonymous=True, **quiet)
                root.handlers[:], root.level = before
                self._master = config.uri
            return rospy.get_name()


_node = _Node()


class Ros1Transport:
    """See ``Transport``."""

    def __init__(self, config: Ros1Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.name = ""
        self._open = False
        self._ending = threading.Event()
        self._topics: dict[str, Topic] = {}
        self._ends: list[Any] = []
        self._seen: dict[str, list[Endpoint]] | None = None

    def open(self) -> None:
        """See ``Transport``."""
        uri = self.config.uri
        try:
            _ask(uri, "getPid")
        except _LOST as error:
            raise TransportError(f"no ROS 1 master answers at {uri}: {error}") from error
        self.name = _node.join(self.config)
        self._open = True
        self._ending.clear()
        threading.Thread(target=self._watch, args=(self._ending,), name="ros1", daemon=True).start()

    def _require_open(self) -> None:
        if not self._open:
            raise TransportError("the transport is not open")

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason

    def _watch(self, ending: threading.Event) -> None:
        """Look who is there, in a thread of its own: nodes may take their time to answer."""
        while not ending.wait(LOOK_S):
            try:
                self._seen = self._look()
            except (*_LOST, TransportError):
                self._seen = None  # without the master nothing is known of others; what is connected goes on
                continue
            for topic in tuple(self._topics.values()):
                for other in self._seen.get(topic.name, ()):
                    if other.type != topic.type:
                        does = "publishes" if other.publishes else "subscribes to"
                        self._fail(f"another node {does} {topic.name} as {other.type}, ours is {topic.type}")

    def _look(self) -> dict[str, list[Endpoint]]:
        """Others' endpoints on our topics."""
        ours = dict(self._topics)
        found: dict[str, list[Endpoint]] = {name: [] for name in ours}
        publishers, subscribers, _ = _ask(self.config.uri, "getSystemState")
        for publishes, side in ((True, publishers), (False, subscribers)):
            asked: dict[str, dict[str, str]] = {}
            for topic, nodes in side:
                for node in nodes if topic in ours else ():
                    if node == self.name:
                        continue
                    if node not in asked:
                        asked[node] = _types(self.config.uri, node, publishes)
                    kind = asked[node].get(topic)
                    if kind is not None:
                        found[topic].append(Endpoint(publishes, topic, ours[topic].type if kind == ANY else kind))
        return found

    def subscribe(self, topic: Topic, on_message: OnMessage) -> None:
        """See ``Transport``."""
        import rospy

        self._require_open()
        one_by_one = threading.Lock()  # rospy has a thread for each publisher

        def received(message: Any) -> None:
            received_s = time.monotonic()
            with one_by_one:
                try:
                    if self._open:
                        on_message(to_plain(topic.type, message), received_s)
                except Exception as error:  # noqa: BLE001 - a callback may raise anything; rospy would only write it into a log
                    self._fail(f"a callback of the transport failed: {error!r:.200}")

        self._topics[topic.name] = topic
        depth, kind = DEPTH[topic.quality], message_class(topic.type)
        self._ends.append(
            rospy.Subscriber(topic.name, kind, received, queue_size=depth, buff_size=BUFFER, tcp_nodelay=True)
        )

    def advertise(self, topic: Topic) -> Ros1Publisher:
        """See ``Transport``."""
        import rospy

        self._require_open()
        self._topics[topic.name] = topic
        kind = message_class(topic.type)
        made = rospy.Publisher(topic.name, kind, queue_size=DEPTH[topic.quality], tcp_nodelay=True)
        self._ends.append(made)
        return Ros1Publisher(topic, made)

    def endpoints(self, topic: str) -> list[Endpoint] | None:
        """See ``Transport``; of our own topics, and up to ``LOOK_S`` old."""
        self._require_open()
        return None if self._seen is None else self._seen.get(topic)

    def close(self) -> None:
        """See ``Transport``; the node itself, without topics, stays until the process ends."""
        if not self._open:
            return
        self._open = False
        self._ending.set()
        ends, self._ends, self._topics, self._seen = self._ends, [], {}, None
        _within(END_S, lambda: [end.unregister() for end in ends])


def _within(limit_s: float, action: Callable[[], object]) -> None:
    """Do something that talks to the master, and leave it to itself if that hangs."""
    thread = threading.Thread(target=action, name="ros1-close", daemon=True)
    thread.start()
    thread.join(limit_s)


class Ros1Publisher:
    """See ``Publisher``."""

    def __init__(self, topic: Topic, publisher: Any) -> None:
        self.topic = topic
        self._publisher = publisher

    def publish(self, message: Message) -> None:
        """See ``Publisher``; a thread of rospy's sends it, so that a slow subscriber holds nobody up."""
        import rospy

        try:
            self._publisher.publish(to_ros(self.topic.type, message))
        except rospy.ROSSerializationException as error:
            raise MessageError(f"{self.topic.name}: {error}") from error
        except rospy.ROSException as error:
            raise TransportError(f"{self.topic.name}: the message was not taken: {error}") from error
