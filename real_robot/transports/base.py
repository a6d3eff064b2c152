"""How messages reach a robot: one small interface, whatever carries it. A transport is one file and is found by its name.

Commands are reliable, volatile, of depth 1, with deadline and lifespan, never transient-local: a command that was not taken in time must
not move a robot later. Sensors are best effort with depth 5.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import draccus

from real_robot.messages import Message, require_type
from vla_rl.runtime.errors import UserError

Quality = Literal["command", "sensor", "state"]
OnMessage = Callable[[Message, float], None]


class TransportError(UserError):
    """The link is lost, was refused, or an endpoint on the other side does not fit ours."""


@dataclass(frozen=True)
class Topic:
    """A topic of messages.

    name: as ROS calls it, "/joint_states"
    type: of its messages, "sensor_msgs/msg/JointState"
    quality: "command" (reliable, depth 1), "sensor" (best effort, depth 5), "state" (reliable, depth 10; what drivers of joints use)
    hz: messages per second
    """

    name: str
    type: str
    quality: Quality
    hz: float

    def __post_init__(self) -> None:
        if (
            not self.name.startswith("/")
            or self.name != self.name.strip()
            or "//" in self.name
            or self.name.endswith("/")
        ):
            raise ValueError(f"a topic looks like /arm/joint_states, got {self.name!r}")
        require_type(self.type)
        if not self.hz > 0:
            raise ValueError(f"hz of topic {self.name} wants a rate > 0, got {self.hz}")


@dataclass(frozen=True)
class Endpoint:
    """A publisher or subscriber of somebody else, as far as the transport can see it."""

    publishes: bool
    topic: str
    type: str


@runtime_checkable
class Publisher(Protocol):
    """One end of a topic that we send on."""

    def publish(self, message: Message) -> None:
        """Send a message that conforms to the topic's type; raises TransportError where the link is known to be lost."""


@runtime_checkable
class Transport(Protocol):
    """A link to a robot. Callbacks run in a thread of the transport's, one after the other for each topic.

    Attributes:
        failure: why the link is of no use, or an endpoint of the other side does not match; None as long as all is well.
    """

    failure: str | None

    def open(self) -> None:
        """Join; raises TransportError where nobody can be reached, UserError where a package is missing."""

    def subscribe(self, topic: Topic, on_message: OnMessage) -> None:
        """Call ``on_message(message, received_s)`` for each message; the time is of ``time.monotonic``."""

    def advertise(self, topic: Topic) -> Publisher:
        """Announce that we send on a topic."""

    def endpoints(self, topic: str) -> list[Endpoint] | None:
        """Who else publishes or subscribes to it; None where this transport cannot know."""

    def close(self) -> None:
        """Leave, so that others see no endpoint of ours any more; may be called again."""


@dataclass(frozen=True)
class TransportConfig(draccus.ChoiceRegistry):
    """Base of all transports' configs."""

    def build(self) -> Transport:
        """Make the transport, not yet open; raises UserError that says what to install where its package is missing."""
        raise TypeError(f"{type(self).__name__} builds no transport")


def discover_transports() -> None:
    """Import every module of ``real_robot.transports`` so that its config is registered; none imports its middleware at import."""
    import real_robot.transports

    for module in pkgutil.iter_modules(real_robot.transports.__path__):
        importlib.import_module(f"real_robot.transports.{module.name}")
