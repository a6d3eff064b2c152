"""The one map between topics and features, both ways: the policy node, the recorder, the bag converter and the simulated robot use it.

Features and measured places are parts of messages, one after the other; commands are actions that are written into a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from real_robot import messages
from real_robot.messages import Message
from real_robot.parts import PartConfig, TopicConfig
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec, FeatureSpec, ObservationSpec


@dataclass(frozen=True)
class CommandPartConfig:
    """Actions that go into a message.

    actions: names of the action's dimensions
    part: where they go; the first topic to which several parts go is sent once, with all of them
    ahead_s: time_from_start of a trajectory's point (none: two control steps)
    frame: frame_id of the header
    """

    actions: tuple[str, ...]
    part: PartConfig
    ahead_s: float | None = None
    frame: str = ""


@dataclass(frozen=True)
class MapConfig:
    """All topics of a robot.

    topics: by a key of the map's own
    observations: parts of each feature
    measured: where each action's axis is measured: action names, separated by spaces, and the part
    commands: where the actions go
    status: part with success, reward and end of the episode, where the robot (a simulated one) knows them
    """

    topics: dict[str, TopicConfig]
    observations: dict[str, tuple[PartConfig, ...]]
    commands: tuple[CommandPartConfig, ...]
    measured: dict[str, PartConfig]
    status: PartConfig | None = None

    def check(self, spec: ActionSpec) -> None:
        """Raise UserError where the map does not fit together, or not to the actions."""
        parts = [part for parts in self.observations.values() for part in parts]
        parts += [command.part for command in self.commands] + list(self.measured.values())
        parts += [] if self.status is None else [self.status]
        for part in parts:
            if part.topic not in self.topics:
                raise UserError(f"the map has no topic {part.topic!r}; there are {', '.join(self.topics)}")
            part.require_type(self.topics[part.topic].type)
        for name, parts_of in self.observations.items():
            if not parts_of:
                raise UserError(f"the feature {name!r} is made of no part")
        if self.status is not None and math.prod(self.status.feature_shape) < 3:
            raise UserError(
                f"status wants success, reward and ended, got {math.prod(self.status.feature_shape)} numbers of {self.status.source}"
            )
        sent = [name for command in self.commands for name in command.actions]
        if sorted(sent) != sorted(spec.names):
            raise UserError(f"the map sends the actions {', '.join(sent)}; the robot takes {', '.join(spec.names)}")
        for names, part in [(" ".join(c.actions), c.part) for c in self.commands] + list(self.measured.items()):
            count = len(names.split())
            if (count,) != part.feature_shape:
                raise UserError(
                    f"{count} actions ({names}) for {part.feature_shape} numbers of {part.source} on {part.topic}"
                )
            self._check_units(spec, names.split(), part, sent=part not in self.measured.values())
        for command in self.commands:
            if self.topics[command.part.topic].quality != "command":
                raise UserError(
                    f"commands go to a topic of quality 'command', and {command.part.topic} has {self.topics[command.part.topic].quality!r}"
                )

    def _check_units(self, spec: ActionSpec, names: Sequence[str], part: PartConfig, sent: bool) -> None:
        for name in names:
            if name not in spec.names:
                raise UserError(f"the map speaks of an action {name!r}; the robot takes {', '.join(spec.names)}")
            unit = spec.units[spec.names.index(name)]
            wanted = unit
            if sent and part.source in ("linear", "angular") and spec.mode == "delta":
                wanted = f"{unit}/s"
            elif not sent:  # the place that a velocity moves
                wanted = unit.removesuffix("/s")
            if part.unit != wanted:
                raise UserError(f"action {name} wants {wanted}, and {part.source} on {part.topic} is in {part.unit}")

    def observation_spec(self) -> ObservationSpec:
        """Shape of each feature."""
        spec: ObservationSpec = {}
        for name, parts in self.observations.items():
            shapes = [part.feature_shape for part in parts]
            spec[name] = FeatureSpec(shapes[0] if len(shapes) == 1 else (sum(math.prod(shape) for shape in shapes),))
        return spec

    def sensed(self) -> dict[str, TopicConfig]:
        """Topics that are listened to, by key."""
        used = {part.topic for parts in self.observations.values() for part in parts}
        used |= {part.topic for part in self.measured.values()} | ({self.status.topic} if self.status else set())
        return {key: topic for key, topic in self.topics.items() if key in used}

    def commanded(self) -> dict[str, TopicConfig]:
        """Topics that commands go to, by key."""
        used = [command.part.topic for command in self.commands]
        return {key: self.topics[key] for key in dict.fromkeys(used)}

    def features(self, newest: Mapping[str, Message]) -> dict[str, np.ndarray]:
        """Features out of the newest message of each topic; floats are float32."""
        made = {}
        for name, parts in self.observations.items():
            values = [part.read(newest[part.topic]) for part in parts]
            joined = values[0] if len(values) == 1 else np.concatenate([v.ravel() for v in values])
            made[name] = joined if joined.dtype == np.uint8 else joined.astype(np.float32)
        return made

    def measured_places(self, newest: Mapping[str, Message], spec: ActionSpec) -> np.ndarray:
        """Where each axis is: (A,), NaN where it is not measured."""
        place_A = np.full(spec.dim, np.nan)
        for names, part in self.measured.items():
            place_A[[spec.names.index(name) for name in names.split()]] = part.read(newest[part.topic])
        return place_A

    def command_messages(self, action_A: np.ndarray, spec: ActionSpec, at_s: float) -> dict[str, Message]:
        """A message for each topic that commands go to, by key."""
        made: dict[str, Message] = {}
        for command in self.commands:
            key = command.part.topic
            type_ = self.topics[key].type
            message = made.setdefault(key, messages.empty(type_))
            values = action_A[[spec.names.index(name) for name in command.actions]] * _rate(command.part, spec)
            command.part.write(message, values, type_, at_s)
            if "header" in message:
                message["header"]["frame_id"] = command.frame
            if command.part.source == "trajectory":
                ahead_s = 2 / spec.control_hz if command.ahead_s is None else command.ahead_s
                message["points"][0]["time_from_start"] = messages.stamp(ahead_s)
                message["header"]["stamp"] = messages.stamp(0.0)  # begin now: the controller's clock may be another
        return made

    def action_of(self, newest: Mapping[str, Message], spec: ActionSpec) -> np.ndarray:
        """Undo ``command_messages``: (A,)."""
        action_A = np.zeros(spec.dim)
        for command in self.commands:
            values = command.part.read(newest[command.part.topic]) / _rate(command.part, spec)
            action_A[[spec.names.index(name) for name in command.actions]] = values
        return action_A

    def feature_messages(self, features: Mapping[str, np.ndarray], at_s: float) -> dict[str, Message]:
        """Undo ``features``: a message for each topic, by key. What no feature holds of a message stays empty."""
        made: dict[str, Message] = {}
        for name, parts in self.observations.items():
            rest = np.asarray(features[name])
            for part in parts:
                type_ = self.topics[part.topic].type
                size = math.prod(part.feature_shape)
                values = rest if len(parts) == 1 else rest[:size]
                rest = rest if len(parts) == 1 else rest[size:]
                part.write(made.setdefault(part.topic, messages.empty(type_)), values, type_, at_s)
        return made


def _rate(part: PartConfig, spec: ActionSpec) -> float:
    """A movement per step that goes into a twist becomes a velocity."""
    return spec.control_hz if spec.mode == "delta" and part.source in ("linear", "angular") else 1.0
