"""Messages into bags: rosbag2 (MCAP, sqlite3) and ROS 1, through ``rosbags``; of a robot that runs, and of recorded episodes."""

from __future__ import annotations

import functools
import importlib
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from real_robot import messages
from real_robot.messages import PRIMITIVES, Message, conform, message_types
from real_robot.robots.ros import RESET_TOPIC, RosRobotConfig
from vla_rl.data.episode import Episode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import disk_errors

Storage = Literal["mcap", "sqlite3", "ros1"]
EPOCH_S = 946_684_800  # 2000-01-01: data sets hold no date, and the same command makes the same bag
DECIDED = 0.1  # of a step after an observation, when a bag made of a data set has the command
VERSION = 9  # of rosbag2's format: Jazzy's and later
FLUSH_S = 0.5  # between two times that a recording is handed to the disk; what a kill loses
QUEUE = 20_000  # messages, and
QUEUE_BYTES = 256 * 2**20  # bytes that may wait for the disk
CLOSE_S = 30.0  # for what waits to be written at the end
BARE = 200  # bytes of a message without its pictures
NO_MESSAGE = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, struct.error)


@functools.cache
def bag_package(module: str) -> Any:
    """A module of the package rosbags; raises UserError that says how to install it where it is missing."""
    try:
        return importlib.import_module(f"rosbags.{module}")
    except ImportError as error:
        raise UserError(f"bags want the package rosbags: pip install 'vla-rl[bags]' ({error})") from error


@functools.cache
def type_store(ros: int) -> Any:
    """Message types of ROS 2 (Jazzy) or ROS 1 (Noetic)."""
    typesys = bag_package("typesys")
    return typesys.get_typestore(typesys.Stores.ROS2_JAZZY if ros == 2 else typesys.Stores.ROS1_NOETIC)


def to_rosbags(ros: int, name: str, message: Mapping[str, Any]) -> Any:
    """A message as ``rosbags`` has it; ``message`` has all fields of its type."""
    values: dict[str, Any] = {}
    for part in message_types()[name]:
        value = message[part.name]
        if part.kind not in PRIMITIVES:
            made = [to_rosbags(ros, part.kind, v) for v in (value if part.many else [value])]
            value = made if part.many else made[0]
        elif part.many and part.kind == "uint8":
            value = np.frombuffer(value, np.uint8)
        elif part.many and part.kind != "string":
            value = np.asarray(value, part.kind)
        values[part.name] = value
    if ros == 1 and name == "std_msgs/msg/Header":
        values["seq"] = 0
    return type_store(ros).types[name](**values)


def from_rosbags(name: str, value: Any) -> Message:
    """Undo ``to_rosbags``."""
    made: Message = {}
    for part in message_types()[name]:
        given = getattr(value, part.name)
        if part.kind not in PRIMITIVES:
            given = [from_rosbags(part.kind, v) for v in given] if part.many else from_rosbags(part.kind, given)
        elif part.many and part.kind == "uint8":
            given = bytes(given)
        made[part.name] = given
    return made


def to_bytes(ros: int, name: str, message: Mapping[str, Any]) -> memoryview:
    """A message as it is in a bag."""
    store = type_store(ros)
    made = to_rosbags(ros, name, conform(name, message))
    return (store.serialize_cdr if ros == 2 else store.serialize_ros1)(made, name)


def from_bytes(ros: int, name: str, raw: bytes | memoryview) -> Message:
    """Undo ``to_bytes``."""
    store = type_store(ros)
    return from_rosbags(name, (store.deserialize_cdr if ros == 2 else store.deserialize_ros1)(raw, name))


class BagWriter:
    """A new bag: a folder (rosbag2), or a file (ROS 1). Not readable before ``close``, but for MCAP after ``flush``: see ``bags.py``."""

    def __init__(
        self,
        path: Path,
        storage: Storage,
        topics: Mapping[str, str],
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Open it.

        Args:
            path: of the folder or file, which must not exist.
            storage: how it is stored.
            topics: type of each topic, by its name.
            about: what else is said of it (rosbag2 only).

        Raises:
            UserError: there is something already, or it cannot be made.
        """
        self.ros = 1 if storage == "ros1" else 2
        self._types = dict(topics)
        if path.exists():
            raise UserError(f"{path} exists already; choose another place for the bag")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if storage == "ros1":
                self._writer = bag_package("rosbag1").Writer(path)
            else:
                rosbag2 = bag_package("rosbag2")
                plugin = rosbag2.StoragePlugin[storage.upper()]
                self._writer = rosbag2.Writer(path, version=VERSION, storage_plugin=plugin)
                for name, text in (about or {}).items():
                    self._writer.set_custom_data(name, text)
            self._writer.open()
            self._mcap = storage == "mcap"
            self._connections = {
                topic: self._writer.add_connection(topic, kind, typestore=type_store(self.ros))
                for topic, kind in topics.items()
            }

    def write(self, topic: str, message: Mapping[str, Any], at_ns: int) -> None:
        """Append a message.

        Raises:
            MessageError: it does not hold what its type says.
            OSError: the disk is full, or gone.
        """
        self._writer.write(self._connections[topic], at_ns, to_bytes(self.ros, self._types[topic], message))

    def flush(self) -> None:
        """Hand what was written to the system, so that it outlives this process (MCAP only)."""
        storage = self._writer.storage if self._mcap else None
        if storage is not None:
            if storage.chunk.msgs:
                storage.close_chunk()
            storage.bio.flush()

    def close(self) -> None:
        """Finish it; raises OSError where the disk is full."""
        self._writer.close()

    def abort(self) -> None:
        """Leave it as it is, without index."""
        self._writer.abort()


@dataclass
class RecordedBag:
    """What became of the messages.

    written: by topic
    dropped: by topic, messages that found the queue full, or the recording ended or broken off
    refused: by topic, messages that were none of its type, or on no topic of the robot's map
    failure: why something is missing
    """

    written: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failure: str | None = None

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        counts = {"written": self.written, "dropped": self.dropped, "refused": self.refused}
        return {**{name: dict(count) for name, count in counts.items()}, "failure": self.failure}


class BagRecorder:
    """Every message seen and sent, as an MCAP rosbag2, written by a thread of its own: nobody who records waits for the disk.

    The bag's time is that of the system's clock when it began, and goes on with the monotonic clock. A process that is killed leaves
    a file without index, in which the last ``FLUSH_S`` are missing; ``bags.py`` reads it, and so does ``mcap recover``.
    """

    def __init__(self, path: Path, config: RosRobotConfig, about: Mapping[str, str] | None = None) -> None:
        """Begin a bag.

        Args:
            path: its folder, which must not exist.
            config: of the robot whose topics are recorded.
            about: kept in the bag's custom data, "instruction" for one.

        Raises:
            UserError: there is something already, it cannot be made, or rosbags is not installed.
        """
        self._types = {t.topic: t.type for t in (config.map.sensed() | config.map.commanded()).values()}
        if config.reset.how == "topic":
            self._types[RESET_TOPIC.name] = RESET_TOPIC.type
        self.path, self.result = path, RecordedBag()
        self._writer = BagWriter(path, "mcap", self._types, {"robot": config.name, **(about or {})})
        for kind in self._types.values():
            to_bytes(2, kind, messages.empty(kind))  # the first call is slow
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._waiting: deque[tuple[str, Message, int]] = deque()
        self._taken: deque[tuple[str, Message, int]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="bag", daemon=True)
        self._thread.start()

    def record(self, topic: str, message: Message, received_s: float) -> None:
        """Take a message, which must not change any more, at a time of ``time.monotonic``; returns at once, from any thread."""
        data = message.get("data")
        size = BARE + (len(data) if isinstance(data, bytes) else 0)
        with self._changed:
            if topic not in self._types:
                self.result.refused[topic] += 1
            elif self._ends or len(self._waiting) >= QUEUE or self._bytes + size > QUEUE_BYTES:
                self.result.dropped[topic] += 1
            else:
                self._waiting.append((topic, message, round(1e9 * received_s) + self._offset_ns))
                self._bytes += size  # the thread looks by itself: waking it here would hold the caller up

    def _run(self) -> None:
        try:
            self._write()
            self._writer.close()
        except OSError as error:
            self._leave(error.strerror or str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the robot's loop goes on and its user is told
            self._leave(repr(error))

    def _write(self) -> None:
        """Seldom and much at once: each time this thread wants Python's lock, the loop may lose its turn on the processor."""
        ends = False
        while not ends:
            with self._changed:
                if not self._ends:
                    self._changed.wait(FLUSH_S)
                ends, self._taken = self._ends, self._waiting
                self._waiting, self._bytes = deque(), 0
            while self._taken:
                self._append(*self._taken[0])
                self._taken.popleft()
            self._writer.flush()

    def _append(self, topic: str, message: Message, at_ns: int) -> None:
        try:
            self._writer.write(topic, message, at_ns)
            self.result.written[topic] += 1
        except NO_MESSAGE as error:
            self.result.refused[topic] += 1
            self.result.failure = self.result.failure or f"a message on {topic} is none of its type: {error!r:.120}"

    def _leave(self, reason: str) -> None:
        """Record nothing more; what comes is counted as dropped."""
        self.result.failure = f"nothing more is recorded in {self.path}: {reason}"
        with self._changed:
            self._ends = True
            self.result.dropped.update(topic for topic, *_ in (*self._taken, *self._waiting))
            self._waiting.clear()
        with suppress(OSError):
            self._writer.abort()

    def close(self) -> RecordedBag:
        """Write what waits and finish the bag; what became of the messages. May be called again."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        self.result.failure = f"{self.path} is not finished" if self._thread.is_alive() else self.result.failure
        return self.result

    def told(self) -> str:
        """What became of the messages, for people; once it is closed."""
        result = self.result
        lost = (result.dropped + result.refused).total()
        return f"{result.written.total()} messages are in {self.path}, {lost} are missing; {result.failure or 'it is whole'}"

    def __enter__(self) -> BagRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def files_of(path: Path) -> list[Path]:
    """What is to be read of a bag: itself, or the files of a folder that lacks its metadata; raises UserError where it is none."""
    if path.is_dir() and not (path / "metadata.yaml").exists():
        found = sorted(p for p in path.iterdir() if p.suffix in (".mcap", ".db3"))
        if not found:
            raise UserError(f"{path} holds no bag: neither metadata.yaml nor a .mcap or .db3 file")
        return found
    if not path.exists() or (path.is_file() and path.suffix not in (".mcap", ".db3", ".bag")):
        raise UserError(f"{path} is no bag; there are folders of rosbag2, and files .mcap, .db3 and .bag (ROS 1)")
    return [path]


def write_episode(path: Path, episode: Episode, config: RosRobotConfig, storage: Storage, number: int) -> None:
    """Write an episode as the messages that a robot would have sent and got: observation k after k control steps, its action soon after.

    Args:
        path: of the bag, which must not exist.
        episode: with the robot's features.
        config: of the robot.
        storage: how the bag is stored.
        number: of the episode, which tells its scene from others in the status.

    Raises:
        UserError: the bag cannot be made.
    """
    robot_map, dt = config.map, 1 / config.action.control_hz
    status = robot_map.status
    keys = dict.fromkeys(part.topic for parts in robot_map.observations.values() for part in parts)
    keys |= dict.fromkeys([status.topic] if status else []) | dict.fromkeys(robot_map.commanded())
    topics = {robot_map.topics[key].topic: robot_map.topics[key].type for key in keys}
    about = {"robot": config.name, "instruction": episode.instruction}
    writer = BagWriter(path, storage, topics, about)
    try:
        for step in range(episode.length + 1):
            at_s = EPOCH_S + step * dt
            made = robot_map.feature_messages({k: v[step] for k, v in episode.observations.items()}, at_s)
            if status is not None:
                reached = (episode.success_T[step - 1], episode.reward_T[step - 1]) if step else (False, 0.0)
                ended = episode.terminated and step == episode.length
                values = np.zeros(status.size)
                values[:4] = (*map(float, reached), float(ended), float(number))[: status.size]
                type_ = robot_map.topics[status.topic].type
                status.write(made.setdefault(status.topic, messages.empty(type_)), values, type_, at_s)
            for key, message in made.items():
                writer.write(robot_map.topics[key].topic, message, round(1e9 * at_s))
            if step < episode.length:
                at_s += DECIDED * dt
                sent = robot_map.command_messages(episode.action_TA[step].astype(float), config.action, at_s)
                for key, message in sent.items():
                    writer.write(robot_map.topics[key].topic, message, round(1e9 * at_s))
        writer.close()
    except BaseException:
        writer.abort()
        raise
