"""Subscriptions and their messages between the thread that receives and the one that calls back: a slow callback gets the newest."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from real_robot.messages import MessageError
from real_robot.transports._rosbridge_wire import from_wire
from real_robot.transports.base import OnMessage, Topic

SILENT_S = 3.0  # after which a subscription that has brought nothing is made anew


class Subscription:
    """One on the server, for all who listen to a topic here."""

    def __init__(self, topic: Topic, queue_length: int) -> None:
        self.topic = topic
        self.listeners: list[OnMessage] = []
        self.waiting: deque[tuple[float, Any]] = deque(maxlen=queue_length)
        self.begin()

    def begin(self) -> None:
        """Note that it was just made on the server."""
        self._made_s, self.brought = time.monotonic(), False

    def silent(self) -> bool:
        """Whether it has brought nothing for so long that the server may have made it for no publisher that is there."""
        return not self.brought and time.monotonic() - self._made_s > max(SILENT_S, 5 / self.topic.hz)


class Mail:
    """Messages that wait for their callbacks."""

    def __init__(self, fault: Callable[[str, str, str], None]) -> None:
        self._fault = fault
        self._news = threading.Condition()
        self._ended = False
        self.subscriptions: dict[str, Subscription] = {}

    def put(self, topic: Any, message: Any, received_s: float) -> None:
        """Take a message in; the oldest of its topic makes room."""
        with self._news:
            subscription = self.subscriptions.get(topic) if isinstance(topic, str) else None
            if subscription is not None:
                subscription.brought = True
                subscription.waiting.append((received_s, message))
                self._news.notify()

    def add(self, subscription: Subscription) -> None:
        """Take messages of a subscription from now on."""
        with self._news:
            self.subscriptions[subscription.topic.name] = subscription

    def deliver(self) -> None:
        """Call callbacks until ``end``, in the order in which messages came."""
        while True:
            with self._news:
                while not self._ended and not any(s.waiting for s in self.subscriptions.values()):
                    self._news.wait()
                if self._ended:
                    return
                first = min((s for s in self.subscriptions.values() if s.waiting), key=lambda s: s.waiting[0][0])
                received_s, raw = first.waiting.popleft()
            name = first.topic.name
            try:
                message = from_wire(first.topic.type, raw)
                for listener in tuple(first.listeners):
                    listener(message, received_s)
            except MessageError as error:
                self._fault("message", name, f"a message on {name}: {error}")
            except Exception as error:  # noqa: BLE001 - a callback may raise anything; the thread must not end with it
                self._fault("callback", name, f"a callback of the transport failed: {error!r:.200}")

    def end(self) -> None:
        """Call no callbacks any more."""
        with self._news:
            self._ended = True
            self._news.notify_all()
