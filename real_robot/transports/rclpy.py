"""ROS 2 through its own client library, where one is sourced: topics, and services and actions of any type that is installed.

A node of its own in a context of its own, spun by one thread; nothing of rclpy is imported before ``build``. (The module's name is no trap:
imports are absolute, so ``import rclpy`` below is ROS's.)
"""

from __future__ import annotations

import array
import contextlib
import functools
import importlib
import math
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from real_robot.messages import Message, MessageError
from real_robot.transports.base import Endpoint, OnMessage, Topic, TransportConfig, TransportError
from vla_rl.runtime.errors import UserError

if TYPE_CHECKING:
    from rclpy.qos import QoSProfile

DEPTH = {"command": 1, "sensor": 5, "state": 10}
SPIN_S = 0.05  # that the thread waits at most before it looks whether it shall end
LOOK_S = 0.3  # between two looks for endpoints that cannot match ours
POLL_S = 0.01
END_S = 5.0
CANCEL_S = 1.0
STATUSES = {4: "succeeded", 5: "canceled", 6: "aborted"}  # of action_msgs/msg/GoalStatus
MISSING = (
    "transport rclpy wants a ROS 2 that was built for this Python ({version}): source its setup.bash before you start; "
    "where there is none, transport dds wants no ROS: {error}"
)


@TransportConfig.register_subclass("rclpy")
@dataclass(frozen=True)
class RclpyConfig(TransportConfig):
    """ROS 2 through rclpy.

    domain: ROS_DOMAIN_ID of the robot; none takes the environment's
    node: name of our node, to which a random part is added
    """

    domain: int | None = None
    node: str = "vla_rl"

    def __post_init__(self) -> None:
        if self.domain is not None and not 0 <= self.domain <= 232:
            raise ValueError(f"domain wants 0 to 232, got {self.domain}")
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", self.node):
            raise ValueError(f"node wants letters, digits and underscores, got {self.node!r}")

    def build(self) -> RclpyTransport:
        """See ``TransportConfig``."""
        try:
            import rclpy  # noqa: F401
        except ImportError as error:
            raise UserError(MISSING.format(version=platform.python_version(), error=error)) from error
        return RclpyTransport(self)


_NUMBERS = {"double": "d", "float": "f", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i"}
_NUMBERS |= {"uint32": "I", "int64": "q", "uint64": "Q"}  # the codes of ``array`` and of numpy alike
_SINGLE = {"boolean": bool, "double": float, "float": float} | dict.fromkeys(set(_NUMBERS) - {"double", "float"}, int)
_WIDE = {"f": "d"} | dict.fromkeys("bhiBHI", "q")  # numbers come as float64 and int64, as ``conform`` makes them


@functools.cache
def interface(name: str, what: Literal["msg", "srv", "action"]) -> Any:
    """ROS's class of ``std_srvs/srv/Trigger``; raises UserError for a name of another form or a package that is not installed."""
    package, _, rest = name.partition("/")
    if not rest.startswith(f"{what}/") or rest.count("/") != 1:
        raise UserError(f"a type of this kind looks like package/{what}/Name, got {name!r}")
    try:
        return getattr(importlib.import_module(f"{package}.{what}"), rest.removeprefix(f"{what}/"))
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{name}: the ROS package {package} is not installed, not sourced, or lacks it: {error}"
        ) from error


@functools.cache
def _codecs(kind: Any) -> dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]:
    """For each field of a class of ROS: to it, and from it."""
    return {name: _codec(text) for name, text in kind.get_fields_and_field_types().items()}


def _codec(text: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    many = re.fullmatch(r"sequence<(.+?)(?:, \d+)?>|(.+)\[\d+\]", text)
    kind = (many[1] or many[2]) if many else text
    if "/" in kind:
        nested = interface(kind.replace("/", "/msg/"), "msg")
        if many:
            return lambda v: [to_ros(nested, item) for item in v], lambda v: [to_plain(item) for item in v]
        return functools.partial(to_ros, nested), to_plain
    if kind == "octet":
        return (lambda v: [bytes([b]) for b in v], b"".join) if many else (lambda v: bytes([v]), lambda v: v[0])
    if many and kind in _NUMBERS:
        code, fixed = _NUMBERS[kind], many[2] is not None
        wide = functools.partial(np.array, dtype=_WIDE.get(code, code))
        return functools.partial(_packed, code, fixed), (bytes if code == "B" else wide)
    single = _SINGLE.get(kind, str)
    return (lambda v: [single(item) for item in v], list) if many else (single, lambda v: v)


def _packed(code: str, fixed: bool, values: Any) -> Any:
    """Numbers as ROS holds them, copied as a block."""
    if not isinstance(values, bytes | bytearray | memoryview):
        values = np.asarray(values, code).tobytes()
    return np.frombuffer(values, code) if fixed else array.array(code, bytes(values))


def to_ros(kind: Any, message: Mapping[str, Any]) -> Any:
    """A message of a class of ROS; fields not given stay as ROS makes them.

    Raises:
        MessageError: a field that the class lacks, or a value that does not fit; it names the field.
    """
    codecs, made = _codecs(kind), kind()
    for name, value in message.items():
        if name not in codecs:
            raise MessageError(f"{kind.__name__} has no field {name!r}; it has {', '.join(codecs)}")
        try:
            setattr(made, name, codecs[name][0](value))
        except MessageError:
            raise
        except (TypeError, ValueError, OverflowError, AssertionError) as error:
            wanted = kind.get_fields_and_field_types()[name]
            raise MessageError(f"{kind.__name__}.{name} wants {wanted}, got {value!r:.60}") from error
    return made


def to_plain(message: Any) -> Message:
    """Undo ``to_ros``."""
    return {name: out(getattr(message, name)) for name, (_, out) in _codecs(message.__class__).items()}


def _qos(topic: Topic, writes: bool) -> QoSProfile:
    from rclpy.duration import Duration
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    reliability = ReliabilityPolicy.BEST_EFFORT if topic.quality == "sensor" else ReliabilityPolicy.RELIABLE
    made = QoSProfile(depth=DEPTH[topic.quality], reliability=reliability)  # the rest is volatile, keep last
    if topic.quality == "command" and writes:
        # a deadline is only offered: asked for, it would match no ordinary publisher
        made.deadline = made.lifespan = Duration(seconds=2 / topic.hz)
    return made


def _words(qos: QoSProfile) -> str:
    deadline_s = qos.deadline.nanoseconds * 1e-9
    late = f", deadline {deadline_s:g} s" if 0 < deadline_s < 1e6 else ""
    return f"{qos.reliability.name}, {qos.durability.name}{late}".lower().replace("_", " ")


@dataclass(frozen=True)
class Outcome:
    """How an action ended.

    status: succeeded, canceled or aborted
    result: as its type says
    """

    status: str
    result: Message


class RclpyTransport:
    """See ``Transport``."""

    def __init__(self, config: RclpyConfig) -> None:
        self.config = config
        self.failure: str | None = None
        self.name = f"{config.node}_{secrets.token_hex(4)}"
        self._context: Any = None
        self._node: Any = None
        self._thread: Any = None
        self._ending = threading.Event()
        self._ours: dict[tuple[Topic, bool], QoSProfile] = {}  # by topic, and whether we write
        self._unfit: dict[tuple[Topic, bool], tuple[str, float]] = {}
        self._met: set[bytes] = set()
        self._clients: dict[tuple[str, str], Any] = {}

    def open(self) -> None:
        """See ``Transport``."""
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        context = rclpy.Context()
        try:
            rclpy.init(args=[], context=context, domain_id=self.config.domain)  # installs no signal handlers
            quiet = {"use_global_arguments": False, "enable_rosout": False, "start_parameter_services": False}
            self._node = Node(self.name, context=context, **quiet)
        except _errors() as error:
            context.try_shutdown()
            raise TransportError(f"rclpy cannot join domain {self.config.domain}: {error}") from error
        self._context = context
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(self._node)
        self._ending.clear()
        self._thread = threading.Thread(target=self._spin, args=(executor,), name="rclpy", daemon=True)
        self._thread.start()

    def _joined(self) -> Any:
        if self._node is None:
            raise TransportError("the transport is not open")
        return self._node

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason

    def _spin(self, executor: Any) -> None:
        look_s = 0.0
        while not self._ending.is_set():
            try:
                executor.spin_once(timeout_sec=SPIN_S)
                if time.monotonic() > look_s:
                    self._look()
                    look_s = time.monotonic() + LOOK_S
            except Exception as error:  # noqa: BLE001 - a callback may raise anything; the link must not end unseen
                if not self._ending.is_set():
                    self._fail(f"a callback of the transport failed: {error!r:.200}")
                if not self._context.ok():
                    break
        executor.shutdown(timeout_sec=END_S)

    def _infos(self, topic: str) -> list[tuple[bool, Any]]:
        """What the graph says of others' endpoints: whether it publishes, and its information."""
        node = self._joined()
        looks = ((True, node.get_publishers_info_by_topic), (False, node.get_subscriptions_info_by_topic))
        return [(publishes, i) for publishes, look in looks for i in look(topic) if i.node_name != self.name]

    def _look(self) -> None:
        """Report others' endpoints that cannot match ours: no message comes of them, and nobody else would say why."""
        for (topic, writes), qos in tuple(self._ours.items()):
            others = self._infos(topic.name)
            for publishes, info in others:
                gid = bytes(info.endpoint_gid)
                if info.topic_type != topic.type and gid in self._met:
                    does = "publishes" if publishes else "subscribes to"
                    self._fail(f"{info.node_name} {does} {topic.name} as {info.topic_type}, ours is {topic.type}")
                self._met.add(gid)
            policy, since_s = self._unfit.get((topic, writes), ("", math.inf))
            if time.monotonic() - since_s > LOOK_S:
                does = "subscribes to" if writes else "publishes"
                unlike = [f"{i.node_name} {does} it as {_words(i.qos_profile)}" for p, i in others if p != writes]
                sides = f"{', '.join(unlike) or f'nobody {does} it any more'}; ours is {_words(qos)} ({topic.quality})"
                self._fail(f"incompatible QoS on {topic.name} ({policy}): {sides}")

    def _note(self, topic: Topic, writes: bool, event: Any) -> None:
        from rclpy.qos import qos_policy_name_from_kind

        policy = qos_policy_name_from_kind(event.last_policy_kind).lower()
        self._unfit.setdefault((topic, writes), (policy, time.monotonic()))  # the name of its node may come later

    def subscribe(self, topic: Topic, on_message: OnMessage) -> None:
        """See ``Transport``."""
        from rclpy.event_handler import SubscriptionEventCallbacks

        def received(message: Any) -> None:
            received_s = time.monotonic()
            on_message(to_plain(message), received_s)

        qos, kind = _qos(topic, writes=False), interface(topic.type, "msg")
        events = SubscriptionEventCallbacks(incompatible_qos=functools.partial(self._note, topic, False))
        self._joined().create_subscription(kind, topic.name, received, qos, event_callbacks=events)
        self._ours[topic, False] = qos

    def advertise(self, topic: Topic) -> RclpyPublisher:
        """See ``Transport``."""
        from rclpy.event_handler import PublisherEventCallbacks

        qos, kind = _qos(topic, writes=True), interface(topic.type, "msg")
        events = PublisherEventCallbacks(incompatible_qos=functools.partial(self._note, topic, True))
        made = self._joined().create_publisher(kind, topic.name, qos, event_callbacks=events)
        self._ours[topic, True] = qos
        return RclpyPublisher(topic, made, kind)

    def endpoints(self, topic: str) -> list[Endpoint] | None:
        """See ``Transport``."""
        return [Endpoint(publishes, topic, info.topic_type) for publishes, info in self._infos(topic)]

    def call_service(self, name: str, kind: str, request: Mapping[str, Any], timeout_s: float) -> Message:
        """Call a service of any installed type and return its response.

        Raises:
            TransportError: nobody offers it, or it does not answer in time (it may have acted all the same).
        """
        service, until_s = interface(kind, "srv"), time.monotonic() + timeout_s
        asked = to_ros(service.Request, request)
        client = self._client(name, kind, lambda node: node.create_client(service, name), "service_is_ready", until_s)
        future = client.call_async(asked)
        try:
            return to_plain(self._result(future, f"service {name}", until_s))
        finally:
            client.remove_pending_request(future)

    def send_goal(
        self,
        name: str,
        kind: str,
        goal: Mapping[str, Any],
        timeout_s: float,
        on_feedback: Callable[[Message], None] | None = None,
    ) -> Outcome:
        """Have an action of any installed type done and wait for its end; the goal is cancelled where the wait ends before.

        Raises:
            TransportError: nobody offers it, it refuses the goal, or it does not end in time.
        """
        from rclpy.action import ActionClient

        action, until_s = interface(kind, "action"), time.monotonic() + timeout_s
        asked = to_ros(action.Goal, goal)
        client = self._client(name, kind, lambda node: ActionClient(node, action, name), "server_is_ready", until_s)
        tell = None if on_feedback is None else (lambda message: on_feedback(to_plain(message.feedback)))
        sending = client.send_goal_async(asked, feedback_callback=tell)
        try:
            handle = self._result(sending, f"action {name}", until_s)
        except TransportError:  # what is accepted only now would run with nobody to wait for it
            sending.add_done_callback(lambda late: late.result().accepted and late.result().cancel_goal_async())
            raise
        if not handle.accepted:
            raise TransportError(f"action {name} refuses the goal")
        done = None
        try:
            done = self._result(handle.get_result_async(), f"action {name}", until_s)
        finally:
            if done is None:
                with contextlib.suppress(TransportError):
                    self._result(handle.cancel_goal_async(), f"action {name}", time.monotonic() + CANCEL_S)
        return Outcome(STATUSES.get(done.status, f"status {done.status}"), to_plain(done.result))

    def _client(self, name: str, kind: str, make: Callable[[Any], Any], ready: str, until_s: float) -> Any:
        node = self._joined()
        if threading.current_thread() is self._thread:
            raise TransportError(f"{name} is called from a callback, whose thread would have to bring the answer")
        if (name, kind) not in self._clients:
            self._clients[name, kind] = make(node)
        while not getattr(self._clients[name, kind], ready)():
            if time.monotonic() > until_s:
                raise TransportError(f"nobody offers {name} as {kind}")
            time.sleep(POLL_S)
        return self._clients[name, kind]

    @staticmethod
    def _result(future: Any, what: str, until_s: float) -> Any:
        event = threading.Event()
        future.add_done_callback(lambda _: event.set())
        if not event.wait(max(0.0, until_s - time.monotonic())):
            raise TransportError(f"{what} did not answer in time")
        return future.result()

    def close(self) -> None:
        """See ``Transport``: the thread ends first, since the library aborts the process where it is shut down under a spinning thread."""
        node, self._node = self._node, None
        if node is None:
            return
        self._ending.set()
        self._thread.join(END_S)
        if self._thread.is_alive():
            raise TransportError(f"a callback has not returned for {END_S:g} s, so the node cannot leave")
        for client in self._clients.values():
            client.destroy()
        self._ours, self._unfit, self._clients = {}, {}, {}
        node.destroy_node()
        self._context.try_shutdown()


def _errors() -> tuple[type[Exception], ...]:
    from rclpy.impl.implementation_singleton import rclpy_implementation

    return rclpy_implementation.RCLError, rclpy_implementation.InvalidHandle, RuntimeError


class RclpyPublisher:
    """See ``Publisher``."""

    def __init__(self, topic: Topic, publisher: Any, kind: Any) -> None:
        self.topic = topic
        self._publisher, self._kind = publisher, kind

    def publish(self, message: Message) -> None:
        """See ``Publisher``."""
        made = to_ros(self._kind, message)
        try:
            self._publisher.publish(made)
        except _errors() as error:
            raise TransportError(f"{self.topic.name}: the message was not taken: {error}") from error
