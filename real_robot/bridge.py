"""An arm behind the topics of a robot's map, as a robot's own bridge would be: in the simulated arm's process, or in one of its own."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from real_robot import messages
from real_robot.messages import Message
from real_robot.robots.ros import RESET_TOPIC, RosRobotConfig
from vla_rl.runtime.wire import WireError, connect

ANSWER_S = 10.0
NEXT_S = 0.5  # that the next observation is waited for before somebody looks whether all is to end


class Seen(Protocol):
    """What an arm gives out after a step; see ``sim.real_time.Snapshot``."""

    @property
    def number(self) -> int:
        """Of the step."""

    @property
    def stamp_s(self) -> float:
        """By the arm's own clock."""

    @property
    def token(self) -> int:
        """That the reset came with, which began the episode."""

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Observation by feature."""

    @property
    def success(self) -> bool:
        """Whether the task is done."""

    @property
    def ended(self) -> bool:
        """Whether the episode is over."""

    @property
    def reward(self) -> float:
        """Of the step."""


@runtime_checkable
class Arm(Protocol):
    """``sim.real_time.RealTimeArm``, or one that is far away."""

    def command(self, action_A: np.ndarray) -> None:
        """Take a command."""

    def reset(self, scene: int, token: int) -> None:
        """Begin another episode."""

    def newest(self, after: int = -1, timeout_s: float = 0.0) -> Seen | None:
        """What is given out, as soon as its number is beyond ``after``; None where that takes longer than ``timeout_s``."""


@dataclass(frozen=True)
class _Snapshot:
    number: int
    stamp_s: float
    token: int
    features: dict[str, np.ndarray]
    success: bool
    ended: bool
    reward: float


class RemoteArm:
    """See ``Arm``: a simulated arm in another process (``vla-rl robot simulate``), asked by its address."""

    def __init__(self, address: str) -> None:
        """Connect; raises WireError where nobody is there."""
        self._commands, self._observations = connect(address, ""), connect(address, "")
        self._spoken, self._heard = threading.Lock(), threading.Lock()

    def command(self, action_A: np.ndarray) -> None:
        """See ``Arm``; raises WireError where the arm is gone."""
        with self._spoken:
            self._commands.ask({"call": "command", "action": action_A}, ANSWER_S)

    def reset(self, scene: int, token: int) -> None:
        """See ``Arm``."""
        with self._spoken:
            self._commands.ask({"call": "reset", "scene": scene, "token": token}, ANSWER_S)

    def newest(self, after: int = -1, timeout_s: float = 0.0) -> _Snapshot | None:
        """See ``Arm``."""
        with self._heard:
            answer = self._observations.ask({"call": "next", "after": after, "timeout_s": timeout_s}, ANSWER_S)
        if answer["features"] is None:
            return None
        return _Snapshot(**{name: answer[name] for name in _Snapshot.__dataclass_fields__})

    def close(self) -> None:
        """Leave."""
        self._commands.close()
        self._observations.close()


def serve_topics(arm: Arm, config: RosRobotConfig) -> contextlib.ExitStack:
    """Publish the arm's state on a robot's topics and take commands from them, in threads, until the stack is closed."""
    transport, stack = config.transport.build(), contextlib.ExitStack()
    transport.open()
    stack.callback(transport.close)
    newest: dict[str, Message] = {}
    commanded = config.map.commanded()

    def take(key: str, message: Message, _: float) -> None:
        newest[key] = message
        if len(newest) == len(commanded) and key == list(commanded)[-1]:
            arm.command(config.map.action_of(newest, config.action))

    for key, topic in commanded.items():
        transport.subscribe(topic.wire, functools.partial(take, key))
    transport.subscribe(RESET_TOPIC, lambda message, _: _reset(arm, *map(int, message["data"][:2])))
    publishers = {key: transport.advertise(topic.wire) for key, topic in config.map.sensed().items()}
    ends = threading.Event()
    thread = threading.Thread(target=_publish, args=(arm, config, publishers, ends), daemon=True)
    thread.start()
    stack.callback(thread.join, 2.0)
    stack.callback(ends.set)
    return stack


def _reset(arm: Arm, scene: int, token: int) -> None:
    """Resets are asked for until they are seen: one that is there already is not begun again."""
    newest = arm.newest()
    if newest is None or newest.token != token:
        arm.reset(scene, token)


def _publish(arm: Arm, config: RosRobotConfig, publishers: Mapping[str, Any], ends: threading.Event) -> None:
    number = -1
    status = config.map.status
    while not ends.is_set():
        try:
            snapshot = arm.newest(number, NEXT_S)
        except WireError:
            return  # the arm is gone, and its silence says so
        if snapshot is None:
            continue
        number = snapshot.number
        made = config.map.feature_messages(snapshot.features, snapshot.stamp_s)
        if status is not None:
            values = np.array([snapshot.success, snapshot.reward, snapshot.ended, snapshot.token], float)
            type_ = config.map.topics[status.topic].type
            status.write(made.setdefault(status.topic, messages.empty(type_)), values, type_, snapshot.stamp_s)
        for key, message in made.items():
            publishers[key].publish(message)
