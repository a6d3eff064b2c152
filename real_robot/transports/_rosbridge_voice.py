"""What a rosbridge server says about what we asked of it, and what its rosapi says of who is there.

The published servers (rosbridge_suite 0.11.17 for ROS 1, 2.1 for ROS 2) send no status messages and know no ``set_level``: what they refuse
goes into ROS's log alone. So ``/rosout`` is read through them, for lines that carry our ids. The line about the unknown ``set_level``,
which is sent first, is the probe: it tells which ROS the server runs, its node's name and our number there.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from real_robot.messages import Message
from real_robot.transports._rosbridge_link import Link
from real_robot.transports._rosbridge_wire import Ros
from real_robot.transports.base import Endpoint, Topic, TransportError

LOG = "/rosout"
LINE = re.compile(r"\[Client (?P<client>\S+)\] (?:\[id: (?P<id>[^\]]*)\] )?(?P<text>.*)", re.DOTALL)
WARNING: dict[Ros, int] = {1: 4, 2: 30}  # levels of the messages on /rosout
NODE = "/rosbridge_websocket"
CALL_S = 2.0
PROBES = ("set_level", "probe")
TRY_S = 0.3  # between two probes: a node of ROS 1 hears its own log only a while after it has subscribed to it
TRIES = 7
LENGTH = 300  # characters that are shown of what a server says


@dataclass(frozen=True)
class Complaint:
    """A warning or error of the server's.

    what: the operation that it is about, or "server"
    topic: that it is about, or empty
    """

    what: str
    topic: str
    text: str


class Voice:
    """Understands what a server says.

    Attributes:
        heard: whether it has said anything of us since ``begin``, so that its complaints will reach us.
        ros: which ROS it runs, where its log has shown it.
        node: name of its node.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was said on an earlier link; ROS 2 repeats the log's last 10 s, so ids are new ones."""
        self._name = f"vla-rl-{secrets.token_hex(4)}"
        self.heard, self.node, self._client = False, NODE, ""
        self.ros: Ros | None = None

    def introduce(self, link: Link, receive: Callable[[float], None], ending: Callable[[], bool]) -> None:
        """Ask a server for its status messages, subscribe to its log, and wait a while until either speaks of us; raises LostError."""
        self.begin()
        link.send({"op": "subscribe", "id": self.mark("subscribe", LOG), "topic": LOG})
        link.send({"op": "set_level", "id": self.mark("set_level"), "level": "warning"})
        for _ in range(TRIES):
            until_s = time.monotonic() + TRY_S
            while not self.heard and not ending() and time.monotonic() < until_s:
                receive(TRY_S)
            if self.heard or ending():
                return
            link.send({"op": "probe", "id": self.mark("probe")})

    def mark(self, operation: str, topic: str = "") -> str:
        """An id for an operation, which the server repeats when it speaks of it."""
        return f"{self._name}:{operation}:{topic}"

    def _ours(self, mark: Any) -> tuple[str, str] | None:
        name, _, rest = str(mark).partition(":")
        operation, _, topic = rest.partition(":")
        return (operation, topic) if name == self._name else None

    def status(self, message: Mapping[str, Any]) -> Complaint | None:
        """Read a status message."""
        self.heard = True
        operation, topic = self._ours(message.get("id")) or ("server", "")
        if message.get("level") not in ("error", "warning") or operation in PROBES:
            return None
        return Complaint(operation, topic, _short(message.get("msg")))

    def line(self, message: Any, topics: Iterable[str]) -> Complaint | None:
        """Read a message on ``/rosout``: it concerns us with an id of ours, our number or, from the server's node, a topic of ours."""
        if not isinstance(message, Mapping) or not isinstance(message.get("level"), int):
            return None
        ros: Ros = 1 if "header" in message else 2
        text = str(message.get("msg", ""))
        node = "/" + str(message.get("name", "")).strip("/").replace(".", "/")
        found = LINE.match(text)
        ours = self._ours(found["id"]) if found else None
        if found and ours:
            self.heard, self.ros, self.node, self._client = True, ros, node, found["client"]
        if message["level"] < WARNING[ros] or (ours and ours[0] in PROBES):
            return None
        if found and ours:
            return Complaint(*ours, _short(found["text"]))
        if found and found["client"] != self._client:
            return None
        about = [topic for topic in topics if re.search(rf"(?<!\S)\[?{re.escape(topic)}\]?(?!\S)", text)]
        if found or (node == self.node and about):
            return Complaint("server", about[0] if about else "", _short(found["text"] if found else text))
        return None


class Faults:
    """What is wrong, of several things at a time."""

    LASTING = "oversize"

    def __init__(self, tell: Callable[[str | None], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._texts: dict[tuple[str, str], str] = {}

    def add(self, what: str, topic: str, text: str) -> None:
        """Tell of a fault; of one kind and topic the first stands."""
        with self._lock:
            self._texts.setdefault((what, topic), text)
            self._say()

    def lost(self, text: str) -> None:
        """Tell that the link is lost, or why it still is; what else was wrong ended with it, unless it would come again."""
        with self._lock:
            self._texts = {key: kept for key, kept in self._texts.items() if key[0] == self.LASTING}
            self._texts["link", ""] = text
            self._say()

    def restored(self) -> None:
        """Take back ``lost``, not what has been added since."""
        with self._lock:
            self._texts.pop(("link", ""), None)
            self._say()

    def replace(self, what: str, texts: Mapping[str, str]) -> None:
        """Tell of all faults of a kind, by topic, in place of those of before."""
        with self._lock:
            self._texts = {key: kept for key, kept in self._texts.items() if key[0] != what}
            self._texts |= {(what, topic): text for topic, text in texts.items()}
            self._say()

    def refusal(self, topic: str) -> str | None:
        """Why the server does not take what we publish on a topic."""
        return next(filter(None, (self._texts.get((what, topic)) for what in ("advertise", "publish", "server"))), None)

    def _say(self) -> None:
        self._tell(self._texts.get(("link", "")) or next(iter(self._texts.values()), None))


def _short(text: Any) -> str:
    return " ".join(str(text).split())[:LENGTH]


class Lookout:
    """Asks a server's rosapi who is on topics, over a link of its own: services hold up what else a server does for a connection."""

    def __init__(self, connect: Callable[[], Link], read: Callable[[str | bytes], dict[str, Any]]) -> None:
        self._connect, self._read = connect, read
        self._link: Link | None = None

    def look(
        self, topics: Mapping[str, Topic], ends: set[tuple[str, bool]], node: str
    ) -> dict[str, list[Endpoint]] | None:
        """Others' endpoints on topics, by topic; None where the server has no rosapi, or does not answer.

        Args:
            topics: to look at.
            ends: (topic, whether we publish) of ours; the server's node has them for us, so there it is not counted.
            node: of the server.
        """
        try:
            link = self._link = self._link or self._connect()  # another thread may close it
            listed = self._call(link, "topics", {})
            types = dict(zip(listed.get("topics", ()), listed.get("types", ()), strict=False))
            found: dict[str, list[Endpoint]] = {}
            for name, topic in topics.items():
                said = types.get(name)
                kind = topic.type if said in (None, "", "*") else _ros2_name(str(said))
                found[name] = [
                    Endpoint(publishes, name, kind)
                    for publishes, side in ((True, "publishers"), (False, "subscribers"))
                    for other in self._call(link, side, {"topic": name}).get(side, ())
                    if not ((name, publishes) in ends and other == node)
                ]
        except (TypeError, ValueError):  # as UserErrors are: nobody, no rosapi, or none that keeps to its types
            self.close()
            return None
        return found

    def _call(self, link: Link, service: str, request: Message) -> Message:
        return call(link, f"/rosapi/{service}", request, CALL_S, self._read)

    def close(self) -> None:
        """End the link, if there is one."""
        link, self._link = self._link, None
        if link is not None:
            link.close()


def conflicts(seen: Mapping[str, list[Endpoint]], topics: Mapping[str, Topic]) -> dict[str, str]:
    """What to say of topics that others have under another type than ours."""
    others = {e.topic: e.type for found in seen.values() for e in found if e.type != topics[e.topic].type}
    return {name: f"others have {name} as {kind}, ours is {topics[name].type}" for name, kind in others.items()}


def call(
    link: Link,
    service: str,
    request: Mapping[str, Any],
    timeout_s: float,
    read: Callable[[str | bytes], dict[str, Any]],
) -> Message:
    """Call a service over a link that nobody else reads; raises TransportError where it fails or does not answer."""
    response = link.ask(
        {"op": "call_service", "id": service, "service": service, "args": dict(request)}, timeout_s, read
    )
    values = response.get("values")
    if response.get("result") is not True:
        raise TransportError(f"service {service} failed: {_short(values)}")
    return dict(values) if isinstance(values, Mapping) else {}


def _ros2_name(name: str) -> str:
    return name if "/msg/" in name else name.replace("/", "/msg/")
