"""ROS 1 or ROS 2 through a rosbridge server (rosbridge protocol 2 over a websocket), for robots that already run one.

What the published servers do, as their sources say (rosbridge_suite 0.11.17 for ROS 1, 2.1 for ROS 2), shapes this file:

- What they refuse goes into ROS's log alone, so the log is read through them (``_rosbridge_voice.py``).
- They read JSON; CBOR is only what they send (``compression``), and what is larger than their ``max_message_size`` (10 MB in ROS 2) does
  not come in it. ``cbor-raw`` is not used: a client that asks for it changes what others of the same topic get, and it was no faster.
- A publisher of a ROS 2 server is reliable and transient-local with a lifespan of 1 s whatever a client asks for: a controller that starts
  late may take a command up to 1 s old. ``latch`` is false and ``queue_size`` 1; servers of 2026 on obey ``qos`` too (volatile, depth 1,
  deadline and lifespan of two periods), older ones ignore it. A ROS 1 server repeats what it was given in a topic's first second to
  those who join within it. Endpoints stay for ``unregister_timeout`` (10 s) after the last client has left.
- A ROS 2 server fits a subscription to the publishers that are there at that moment. One that has brought nothing is made anew.
- Services hold up what else a ROS 2 server does for a connection, so each call has its own.

The token goes as HTTP header ``Authorization: Bearer`` for a proxy in front of the server; the ``auth`` of ROS 1's rosauth is not spoken.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from real_robot.messages import Message
from real_robot.transports._rosbridge_link import Link, LostError, OversizeError, header_token, require_url, trust
from real_robot.transports._rosbridge_mail import Mail, Subscription
from real_robot.transports._rosbridge_voice import LOG, Complaint, Faults, Lookout, Voice, call, conflicts
from real_robot.transports._rosbridge_wire import (
    Fragments,
    FrameError,
    advertisement,
    compression,
    parse,
    publication,
    type_name,
)
from real_robot.transports.base import Endpoint, OnMessage, Topic, TransportConfig, TransportError
from vla_rl.runtime.errors import UserError

SILENT = (
    "the server at {url} sends no status messages and its /rosout does not reach us, so what it refuses would go unseen; does ROS run "
    "there, and is /rosout in its topics_glob? allow_silent does without"
)
FIRST_PAUSE_S = 0.1  # before the first try to connect again; doubled with each
TEND_S = 0.25
ABSENT_S = 15.0  # before rosapi is looked for again
LOOK_SHARE = 4  # a look that takes long is followed by a pause this many times as long
END_S = 2.0


@TransportConfig.register_subclass("rosbridge")
@dataclass(frozen=True)
class RosbridgeConfig(TransportConfig):
    """ROS 1 or ROS 2 through a rosbridge server.

    url: ws://HOST:PORT or wss://HOST:PORT of the server, with its path if it has one
    ros: which ROS the server runs, 1 or 2
    encoding: of what the server sends: cbor or json (what we send is always JSON)
    token_file: file with a token for a proxy in front of the server; wants wss:// unless the server is on this machine
    ca_file: certificates (PEM) that a wss:// server's may be signed with; none takes the system's
    link_timeout_s: after which a link on which nothing comes, not even answers to pings, is lost
    connect_timeout_s: that connecting may take
    reconnect_s: longest pause between two tries to connect again
    queue_length: messages of a topic that wait for their callback, here and at the server; older ones are dropped
    throttle_ms: least time between two messages of a topic that the server sends (0: as they come)
    max_message_bytes: largest message that is taken
    fragment_bytes: a message of more is sent in fragments
    allow_silent: use a server that cannot say what it refuses
    rosapi_s: between two looks, through the server's rosapi, at who else is on our topics (0: never; more where looks take long)
    """

    url: str = "ws://127.0.0.1:9090"
    ros: Literal[1, 2] = 2
    encoding: Literal["cbor", "json"] = "cbor"
    token_file: Path | None = None
    ca_file: Path | None = None
    link_timeout_s: float = 1.0
    connect_timeout_s: float = 5.0
    reconnect_s: float = 2.0
    queue_length: int = 1
    throttle_ms: int = 0
    max_message_bytes: int = 16 * 2**20
    fragment_bytes: int = 4 * 2**20
    allow_silent: bool = False
    rosapi_s: float = 2.0

    def __post_init__(self) -> None:
        require_url(self.url, self.token_file is not None, self.ca_file is not None)
        for name in ("link_timeout_s", "connect_timeout_s", "reconnect_s"):
            if not 0.05 <= getattr(self, name) <= 3600:
                raise ValueError(f"{name} wants 0.05 to 3600 s, got {getattr(self, name)}")
        for name, least in (
            ("queue_length", 1),
            ("throttle_ms", 0),
            ("max_message_bytes", 1024),
            ("fragment_bytes", 64),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} wants {least} or more, got {getattr(self, name)}")
        if not 0 <= self.rosapi_s <= 3600:
            raise ValueError(f"rosapi_s wants 0 to 3600 s, got {self.rosapi_s}")

    def build(self) -> RosbridgeTransport:
        """See ``TransportConfig``; the token and the certificates are read here."""
        try:
            importlib.import_module("websockets.sync.client")
            cbor2 = importlib.import_module("cbor2")
        except ImportError as error:
            raise UserError(
                f"transport rosbridge wants the packages of pip install 'vla-rl[rosbridge]': {error}"
            ) from error
        token = header_token(self.token_file)
        return RosbridgeTransport(self, token, trust(self.ca_file) if self.url.startswith("wss") else None, cbor2)


class RosbridgeTransport:
    """See ``Transport``.

    Attributes:
        reconnects: how often the link was lost and made again.
        blind: neither status messages nor the server's log reach us, so what it refuses does not either (only with ``allow_silent``).
    """

    def __init__(self, config: RosbridgeConfig, token: str, context: ssl.SSLContext | None, cbor2: ModuleType) -> None:
        self.config = config
        self.failure: str | None = None
        self.reconnects = 0
        self.blind = True
        self._connect = lambda: Link(config, token, context)
        self._read = lambda frame: parse(frame, cbor2)
        self._voice = Voice()
        self._lookout = Lookout(self._connect, self._read)
        self._faults = Faults(lambda text: setattr(self, "failure", text))
        self._mail = Mail(self._faults.add)
        self._fragments = Fragments(config.max_message_bytes)
        self._lock = threading.RLock()  # of what we have on the server, and of ``_link``
        self._link: Link | None = None  # only where all that we have is on the server
        self._advertised: dict[str, Topic] = {}
        self._seen: dict[str, list[Endpoint]] | None = None
        self._look_s = 0.0
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        """See ``Transport``; raises TransportError too where the server runs the other ROS."""
        link = self._connect()
        try:
            self._greet(link)
        except TransportError as error:
            link.close()
            if isinstance(error, LostError):
                raise TransportError(f"the link to {self.config.url} is lost: {error}") from error
            raise
        runs = {"receive": lambda: self._run(link), "deliver": self._mail.deliver, "tend": self._tend}
        self._threads = [
            threading.Thread(target=run, name=f"rosbridge-{name}", daemon=True) for name, run in runs.items()
        ]
        for thread in self._threads:
            thread.start()

    def _subscribe(self, link: Link, subscription: Subscription) -> None:
        config, topic = self.config, subscription.topic
        told = {"op": "subscribe", "id": self._voice.mark("subscribe", topic.name), "topic": topic.name}
        told |= {"type": type_name(topic.type, config.ros)}
        told |= {"compression": compression(topic.type, config.encoding, config.ros)}
        link.send(told | {"throttle_rate": config.throttle_ms, "queue_length": config.queue_length})
        subscription.begin()

    def _unsubscribe(self, link: Link, name: str) -> None:
        link.send({"op": "unsubscribe", "id": self._voice.mark("subscribe", name), "topic": name})

    def _advertise(self, link: Link, topic: Topic) -> None:
        link.send(advertisement(topic, self.config.ros, self._voice.mark("advertise", topic.name)))

    def _greet(self, link: Link) -> None:
        """Learn whether the server's complaints reach us, restore on it what we have, and make it our link; raises TransportError."""
        self._fragments = Fragments(self.config.max_message_bytes)
        self._voice.introduce(link, lambda wait_s: self._receive(link, wait_s), self._ending.is_set)
        self.blind = not self._voice.heard
        if self._voice.ros not in (None, self.config.ros):
            raise TransportError(
                f"the server at {self.config.url} runs ROS {self._voice.ros}, the option ros says {self.config.ros}"
            )
        if self.blind and not self.config.allow_silent:
            raise TransportError(SILENT.format(url=self.config.url))
        with self._lock:
            for topic in self._advertised.values():
                self._advertise(link, topic)
            for subscription in self._mail.subscriptions.values():
                self._subscribe(link, subscription)
            if self._ending.is_set():
                raise LostError("the transport is closed")
            self._link = link
            link.patience_s = self.config.link_timeout_s

    # threads

    def _run(self, link: Link | None) -> None:
        """Receive, and connect again where the link is lost."""
        pause_s = FIRST_PAUSE_S
        while link is not None and not self._ending.is_set():
            since_s = time.monotonic()
            try:
                while True:
                    self._receive(link, TEND_S)
            except Exception as error:  # noqa: BLE001 - this thread must not end unseen: what it cannot take in ends the link
                reason = str(error) if isinstance(error, LostError) else repr(error)
                self._lose(link, reason)
                if isinstance(error, OversizeError):
                    self._faults.add(Faults.LASTING, "", f"{self.config.url}: {error}")
            if time.monotonic() - since_s > self.config.reconnect_s:
                pause_s = FIRST_PAUSE_S
            link = None
            while link is None and not self._ending.wait(pause_s):
                pause_s = min(2 * pause_s, self.config.reconnect_s)
                link = self._again(reason)

    def _lose(self, link: Link, reason: str) -> None:
        link.reset()  # first: somebody may hold the lock and try to send
        with self._lock:
            self._link, self._seen = None, None
            if not self._ending.is_set():
                self._faults.lost(f"the link to {self.config.url} is lost: {reason}")

    def _again(self, reason: str) -> Link | None:
        try:
            link = self._connect()
        except TransportError as error:
            self._faults.lost(
                f"the link to {self.config.url} is lost: {reason}; the last try to connect again: {error}"
            )
            return None
        self._faults.lost(f"the link to {self.config.url} was lost and is being restored: {reason}")
        try:
            self._greet(link)
        except TransportError as error:
            self._lose(link, f"{reason}; the last try to restore it: {error}")
            return None
        self.reconnects += 1
        self._faults.restored()
        return link

    def _receive(self, link: Link, wait_s: float) -> None:
        """Take in what comes on a link within a while; raises LostError."""
        got = link.receive(wait_s)
        if got is None:
            return
        try:
            message = self._read(got[0])
            if message["op"] == "fragment":
                whole = self._fragments.add(message)
                if whole is None:
                    return
                message = self._read(whole)
            self._take(message, got[1])
        except FrameError as error:
            self._faults.add("frame", "", f"the server at {self.config.url} sent {error}")

    def _take(self, message: dict[str, Any], received_s: float) -> None:
        topic, subscriptions = message.get("topic"), self._mail.subscriptions
        complaint: Complaint | None = None
        if message["op"] == "status":
            complaint = self._voice.status(message)
        elif message["op"] == "publish" and topic == LOG:
            complaint = self._voice.line(message.get("msg"), (*self._advertised, *subscriptions))
        elif message["op"] == "publish":
            self._mail.put(topic, message.get("msg"), received_s)
        if complaint is None:
            return
        what, name, says = complaint.what, complaint.topic, "says"
        ours = (
            subscriptions[name].topic if what == "subscribe" and name in subscriptions else self._advertised.get(name)
        )
        if ours and what != "server":
            says = f"refuses to {what} {name} as {ours.type}"
        self._faults.add(what, name, f"the server at {self.config.url} {says}: {complaint.text}")

    def _tend(self) -> None:
        """Make silent subscriptions anew, and look who else is there."""
        while not self._ending.wait(TEND_S):
            with self._lock, contextlib.suppress(LostError):  # ``_run`` sees it too
                link, topics = self._link, dict(self._advertised)
                ends = {(name, True) for name in topics} | {(name, False) for name in self._mail.subscriptions}
                for name, subscription in self._mail.subscriptions.items():
                    topics[name] = subscription.topic
                    if link is not None and self.config.ros == 2 and subscription.silent():
                        self._unsubscribe(link, name)
                        self._subscribe(link, subscription)
            if link is not None and topics and self.config.rosapi_s and time.monotonic() > self._look_s:
                self._look(link, topics, ends)

    def _look(self, link: Link, topics: dict[str, Topic], ends: set[tuple[str, bool]]) -> None:
        began_s, self._look_s = time.monotonic(), math.inf
        seen = self._lookout.look(topics, ends, self._voice.node)
        now_s = time.monotonic()
        if self._look_s == math.inf:  # nothing has come since that wants a look at once
            pause_s = max(self.config.rosapi_s, LOOK_SHARE * (now_s - began_s))
            self._look_s = now_s + (ABSENT_S if seen is None else pause_s)
        with self._lock:
            if self._link is link:
                self._seen = seen
                self._faults.replace("rosapi", conflicts(seen or {}, topics))

    # what others use

    def _require_open(self) -> None:
        if not self._threads or self._ending.is_set():
            raise TransportError("the transport is not open")

    def subscribe(self, topic: Topic, on_message: OnMessage) -> None:
        """See ``Transport``; while the link is lost it is kept for when it is there again."""
        self._require_open()
        with self._lock, contextlib.suppress(LostError):
            known = self._mail.subscriptions.get(topic.name)
            if known is not None and known.topic.type != topic.type:
                raise UserError(f"{topic.name} is subscribed to as {known.topic.type}, got {topic.type}")
            subscription = known or Subscription(topic, self.config.queue_length)
            subscription.listeners.append(on_message)
            if known is None:
                self._mail.add(subscription)
                self._look_s = 0.0
                if self._link is not None:
                    self._subscribe(self._link, subscription)

    def advertise(self, topic: Topic) -> RosbridgePublisher:
        """See ``Transport``; while the link is lost it is kept for when it is there again."""
        self._require_open()
        with self._lock, contextlib.suppress(LostError):
            known = self._advertised.setdefault(topic.name, topic)
            if known.type != topic.type:
                raise UserError(f"{topic.name} is advertised as {known.type}, got {topic.type}")
            self._look_s = 0.0
            if self._link is not None:
                self._advertise(self._link, topic)
        return RosbridgePublisher(self, topic)

    def publish(self, topic: Topic, message: Message) -> None:
        """Send a message on an advertised topic; raises TransportError where the link is lost or the server refused the topic."""
        told = publication(topic, message, self.config.ros, self._voice.mark("publish", topic.name))
        link, refused = self._link, self._faults.refusal(topic.name)
        if link is None or refused:
            raise TransportError(f"{topic.name}: {refused or self.failure or 'the transport is not open'}")
        try:
            link.send(told)
        except LostError as error:
            raise TransportError(f"{topic.name}: the message was not taken: {error}") from error

    def endpoints(self, topic: str) -> list[Endpoint] | None:
        """See ``Transport``; of our own topics, up to ``rosapi_s`` old. The server's other clients are not seen where we are too."""
        seen = self._seen
        return None if seen is None else seen.get(topic)

    def call_service(self, name: str, request: Mapping[str, Any], timeout_s: float = 5.0) -> Message:
        """Call a service and return its response, both as JSON has them; raises TransportError where it fails or is late."""
        self._require_open()
        with contextlib.closing(self._connect()) as link:
            return call(link, name, request, timeout_s, self._read)

    def close(self) -> None:
        """See ``Transport``; a server keeps the endpoints for 10 s more unless it was told another ``unregister_timeout``."""
        with self._lock:
            self._ending.set()
            link, self._link, self._seen = self._link, None, None
        if link is not None:
            with contextlib.suppress(LostError):
                for name in self._advertised:
                    link.send({"op": "unadvertise", "id": self._voice.mark("advertise", name), "topic": name})
                for name in (*self._mail.subscriptions, LOG):
                    self._unsubscribe(link, name)
            link.close()
        self._mail.end()
        self._lookout.close()  # so that nobody waits for its answer
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(self.config.connect_timeout_s + END_S)
        self._lookout.close()


class RosbridgePublisher:
    """See ``Publisher``."""

    def __init__(self, transport: RosbridgeTransport, topic: Topic) -> None:
        self.topic = topic
        self._transport = transport

    def publish(self, message: Message) -> None:
        """See ``Publisher``."""
        self._transport.publish(self.topic, message)
