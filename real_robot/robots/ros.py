"""Any robot that speaks ROS, by configuration: a transport, and the map of its topics."""

from __future__ import annotations

import math
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from real_robot.messages import Message, conform
from real_robot.robot import FIRST_MESSAGE_S, Reading, RobotConfig, RobotError
from real_robot.robot_map import MapConfig
from real_robot.streams import Streams
from real_robot.transports.base import Publisher, Topic, Transport, TransportConfig, TransportError
from vla_rl.types import ObservationSpec

RATE_S = 1.0  # for which rates are watched before anything moves
SLOWEST = 0.7  # of the declared rate
LOOK_S = 1.0  # between two looks for another publisher of commands
RESET_TOPIC = Topic("/vla_rl/reset", "std_msgs/msg/Float64MultiArray", "state", 1.0)  # scene, token


@dataclass(frozen=True)
class ResetConfig:
    """How the robot comes to where an episode begins.

    how: operator (a person sets the scene, and says so), or topic (a simulated one is told the scene on /vla_rl/reset)
    timeout_s: that it may take
    """

    how: Literal["operator", "topic"] = "operator"
    timeout_s: float = 600.0


@RobotConfig.register_subclass("ros")
@dataclass(frozen=True, kw_only=True)
class RosRobotConfig(RobotConfig):
    """A robot behind ROS topics.

    transport: what carries them
    map: topics, features and commands
    reset: how an episode begins
    """

    transport: TransportConfig
    map: MapConfig
    reset: ResetConfig = field(default_factory=ResetConfig)

    def __post_init__(self) -> None:
        self.map.check(self.action)
        numbers = 0 if self.map.status is None else math.prod(self.map.status.feature_shape)
        if self.reset.how == "topic" and numbers < 4:
            raise ValueError(
                f"a reset by topic wants a status of success, reward, ended and the reset's token, got {numbers} numbers"
            )
        for topic in self.map.commanded().values():
            if not math.isclose(topic.hz, self.action.control_hz):
                raise ValueError(
                    f"commands on {topic.topic} go out at {topic.hz:g} Hz, and the robot's actions are for {self.action.control_hz:g} Hz"
                )

    @property
    def observation_spec(self) -> ObservationSpec:
        """See ``RobotConfig``."""
        return self.map.observation_spec()

    @property
    def set_by_person(self) -> bool:
        """See ``RobotConfig``."""
        return self.reset.how == "operator"

    def driver(self) -> RosDriver:
        """See ``RobotConfig``."""
        return RosDriver(self, self.transport.build())


class RosDriver:
    """See ``Driver``."""

    def __init__(self, config: RosRobotConfig, transport: Transport) -> None:
        self.config, self.transport = config, transport
        self._map, self._spec = config.map, config.action
        self._sensed = config.map.sensed()
        self._commanded = config.map.commanded()
        self._streams = Streams(self._sensed, config.safety.clock_jump_s)
        self._publishers: dict[str, Publisher] = {}
        self._strangers: tuple[str, ...] = ()
        self._ends = threading.Event()
        self._watcher: threading.Thread | None = None
        self._features: dict[str, np.ndarray] = {}
        self._fault: str | None = None

    def open(self, silent: bool) -> None:
        """See ``Driver``.

        Raises:
            TransportError: an endpoint is of another type, or (unless silent) somebody else publishes commands.
            RobotError: a topic does not begin, is slower than the map says, or is in another unit.
        """
        self._streams, self._strangers = Streams(self._sensed, self.config.safety.clock_jump_s), ()
        self.transport.open()
        for key, topic in self._sensed.items():
            self.transport.subscribe(topic.wire, self._streams.listener(key))
        if not silent:
            for key, topic in self._commanded.items():
                self._publishers[key] = self.transport.advertise(topic.wire)
            if self.config.reset.how == "topic":
                self._publishers["reset"] = self.transport.advertise(RESET_TOPIC)
        deadline = time.monotonic() + FIRST_MESSAGE_S
        while self._streams.silent() and self.transport.failure is None:
            self._require_types()
            if time.monotonic() > deadline:
                raise RobotError(f"robot {self.config.name!r}: {self.missing()} within {FIRST_MESSAGE_S:g} s")
            time.sleep(0.05)
        if self.transport.failure is not None:
            raise TransportError(self.transport.failure)
        time.sleep(RATE_S)
        self._require_types()
        self._require_rates()
        self._require_meaning()
        if silent:
            return
        others = self._others()
        if others:
            raise TransportError(others[0])
        self._ends.clear()
        self._watcher = threading.Thread(target=self._watch, name="second-publishers", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """Look for other publishers now and then, beside the loop: a look at all endpoints takes milliseconds."""
        while not self._ends.wait(LOOK_S):
            try:
                self._strangers = self._others()
            except TransportError:
                return  # it is being closed, or the link is lost, which its failure says

    def _require_types(self) -> None:
        for topic in (*self._sensed.values(), *self._commanded.values()):
            for endpoint in self.transport.endpoints(topic.topic) or ():
                if endpoint.type != topic.type:
                    raise TransportError(
                        f"{topic.topic} is of type {endpoint.type} on the robot's side, the map of {self.config.name!r} says {topic.type}"
                    )

    def _require_rates(self) -> None:
        rates = self._streams.rates_hz()
        for key, topic in self._sensed.items():
            if rates[key] < SLOWEST * topic.hz:
                raise RobotError(
                    f"{topic.topic} arrives at {rates[key]:.1f} Hz, the map of {self.config.name!r} says {topic.hz:g} Hz"
                )

    def _require_meaning(self) -> None:
        """Read everything once; numbers that only make sense as degrees are refused."""
        newest = self._streams.newest()
        assert newest is not None
        self._map.features(newest)
        place_A = self._map.measured_places(newest, self._spec)
        if self._spec.mode != "absolute":
            return
        for i, unit in enumerate(self._spec.units):
            low, high, place = self._spec.low[i], self._spec.high[i], place_A[i]
            outside = not low - 0.1 <= place <= high + 0.1
            if unit == "rad" and outside and low <= math.radians(place) <= high and abs(place) > 2 * math.pi:
                raise RobotError(
                    f"{self._spec.names[i]} is at {place:g}, outside {low:g} to {high:g} rad; "
                    "the robot seems to send degrees, the map says rad"
                )

    def _others(self) -> tuple[str, ...]:
        """Others that publish commands: two that steer one arm tear it."""
        found = []
        for topic in self._commanded.values():
            others = [e for e in self.transport.endpoints(topic.topic) or () if e.publishes]
            if others:
                found.append(
                    f"second publisher: somebody else sends commands on {topic.topic} too ({len(others)} beside this robot's)"
                )
        return tuple(found)

    def missing(self) -> str:
        """See ``Driver``."""
        return f"no message on {', '.join(self._streams.silent()) or 'any topic'}"

    def read(self) -> Reading | None:
        """See ``Driver``."""
        newest = self._streams.newest()
        if newest is None:
            return None
        now_s = time.monotonic()
        broken = list(self._streams.broken(now_s))
        if self.transport.failure is not None:
            broken.append(f"link: {self.transport.failure}")
        place_A = np.full(self._spec.dim, np.nan)
        status: tuple[bool | None, float | None, bool] = (None, None, False)
        try:
            self._features = self._map.features(newest)
            place_A = self._map.measured_places(newest, self._spec)
            status = self._status(newest)
        except Exception as error:  # a message can be wrong in any way, and the robot is to be held then
            if not self._features:
                raise
            broken.append(f"observation: {error}")
        success, reward, ended = status
        return Reading(
            self._features,
            place_A,
            self._streams.ages_s(now_s),
            (*broken, *self._strangers),
            success,
            ended,
            reward,
        )

    def _status(self, newest: dict[str, Message]) -> tuple[bool | None, float | None, bool]:
        if self._map.status is None:
            return None, None, False
        success, reward, ended = self._map.status.read(newest[self._map.status.topic])[:3]
        return bool(success > 0.5), float(reward), bool(ended > 0.5)

    def write(self, action_A: np.ndarray) -> None:
        """See ``Driver``."""
        for key, message in self._map.command_messages(action_A, self._spec, time.time()).items():
            self._publishers[key].publish(message)

    def reset(self, seed: int) -> None:
        """See ``Driver``; an operator is asked by the loop, so there is nothing to do here."""
        if self.config.reset.how == "operator":
            return
        assert self._map.status is not None  # the config asks for it
        deadline = time.monotonic() + self.config.reset.timeout_s
        token = secrets.randbelow(2**31)
        asked = conform(RESET_TOPIC.type, {"data": [float(seed), float(token)]})
        while True:
            self._publishers["reset"].publish(asked)
            for _ in range(100):
                newest = self._streams.newest()
                assert newest is not None
                status = self._map.status.read(newest[self._map.status.topic])
                if status[3] == token:
                    return
                if self.transport.failure is not None:
                    raise TransportError(self.transport.failure)
                time.sleep(0.01)
            if time.monotonic() > deadline:
                raise RobotError(f"the robot is not in scene {seed} within {self.config.reset.timeout_s:g} s")

    def acknowledge(self) -> None:
        """See ``Driver``."""
        self._streams.forget_clock()

    def close(self) -> None:
        """See ``Driver``."""
        self._ends.set()
        if self._watcher is not None:
            self._watcher.join(LOOK_S)
            self._watcher = None
        self.transport.close()
