"""Bags into episodes by a robot's map: rosbag2 (MCAP, sqlite3) and ROS 1, on the policy's clock by the rules of ``resample.py``.

A bag is read twice: first all times, and whatever does not fit is refused before anything is written; then the messages that episodes are
made of, so that pictures need not be held in memory.
"""

from __future__ import annotations

import io
import itertools
import math
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from real_robot.messages import Message, MessageError, stamp_of
from real_robot.parts import CAMERAS
from real_robot.recorder import bag_package, files_of, from_bytes, type_store
from real_robot.resample import (
    ImportOptions,
    Piece,
    Span,
    Track,
    combine,
    command_phase,
    first_time,
    grid_times,
    how_of,
    newest,
    on_clock,
    runs,
    spans_by_gap,
    spans_by_status,
)  # fmt: skip
from real_robot.robots.ros import RosRobotConfig
from vla_rl.data.episode import Episode
from vla_rl.runtime.errors import UserError

SHORTEST_S = 1.0  # of what is left of an episode that had to be cut
MCAP_ENDS = b"\x89MCAP0\r\n"  # as it begins
DAMAGED = (OSError, ValueError, TypeError, KeyError, IndexError, AssertionError, EOFError, struct.error)


class BagFile:
    """A bag on disk: whole, or MCAPs that a killed process left without their end."""

    def __init__(self, path: Path) -> None:
        """Look at it; raises UserError where it is no bag, or damaged."""
        self.path, self.ros = path, 1 if path.suffix == ".bag" else 2
        self.types: dict[str, set[str]] = defaultdict(set)
        self.about: dict[str, str] = {}
        self._files = files_of(path)
        self.cut = any(map(is_cut, self._files))
        for file in self._files:
            with self._open(file) as reader:
                for connection in reader.connections:
                    self.types[connection.topic].add(connection.msgtype)
                    self._require_definition(connection)
                if self.ros == 2 and not self.cut:
                    self.about |= dict(reader.storage.metadata.custom or {})

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        package = bag_package("rosbag1" if self.ros == 1 else "rosbag2")
        try:
            with cut_reader(file) if is_cut(file) else package.Reader(file) as reader:
                yield reader
        except UserError:
            raise
        except (package.ReaderError, *DAMAGED) as error:
            raise UserError(f"{file} is no bag that can be read: {' '.join(str(error).split())[:160]}") from error

    def _require_definition(self, connection: Any) -> None:
        store, kind = type_store(self.ros), connection.msgtype
        if kind not in store.fielddefs or connection.digest in ("", "*"):
            return
        ours = store.hash_rihs01(kind) if self.ros == 2 else store.generate_msgdef(kind, ros_version=1)[1]
        if ours != connection.digest:
            raise UserError(f"{self.path}: {connection.topic} has another definition of {kind} than ROS has")

    def messages(self, topics: Mapping[str, str]) -> Iterator[tuple[str, int, Message]]:
        """Topic, time of receipt (ns) and content of each message on some topics, given with their types."""
        for file in self._files:
            with self._open(file) as reader:
                wanted = [c for c in reader.connections if c.topic in topics]
                read = reader.messages_scan if is_cut(file) else reader.messages
                for connection, at_ns, raw in read(wanted) if wanted else ():
                    yield connection.topic, at_ns, self._decode(connection.topic, topics[connection.topic], raw)

    def _decode(self, topic: str, kind: str, raw: bytes) -> Message:
        try:
            return from_bytes(self.ros, kind, raw)
        except (bag_package("serde").SerdeError, *DAMAGED) as error:
            raise UserError(f"{self.path}: a message on {topic} is no {kind}: {str(error)[:120]}") from error


def is_cut(file: Path) -> bool:
    """Whether a file is an MCAP without its end."""
    if file.suffix != ".mcap" or not file.is_file():
        return False
    with file.open("rb") as data:
        size = data.seek(0, io.SEEK_END)
        data.seek(max(size - len(MCAP_ENDS), 0))
        return size < 2 * len(MCAP_ENDS) or data.read() != MCAP_ENDS


@contextmanager
def cut_reader(file: Path) -> Iterator[Any]:
    """Open an MCAP without its end up to its last whole record."""
    reader = bag_package("rosbag2.storage_mcap").McapReader(file)
    size, ends = file.stat().st_size, len(MCAP_ENDS)
    with file.open("rb") as data:
        data.seek(ends)
        while len(head := data.read(9)) == 9 and data.seek(struct.unpack_from("<Q", head, 1)[0], io.SEEK_CUR) <= size:
            ends = data.tell()
        reader.bio, reader.data_start, reader.data_end = data, len(MCAP_ENDS), ends
        reader.meta_scan()
        yield reader


class BagImport:
    """A bag whose episodes are known, but for what their observations hold."""

    def __init__(self, path: Path, config: RosRobotConfig, options: ImportOptions) -> None:
        """Read all times and numbers.

        Raises:
            UserError: it is no bag, or does not fit the robot's map: a topic, a joint or a status is missing, another type, degrees, clocks
                that do not go together.
        """
        self.config, self.options, self.bag = config, options, BagFile(path)
        self.notes: Counter[str] = Counter({"cut short by a kill": int(self.bag.cut)})
        robot_map = config.map
        if robot_map.status is not None and robot_map.status.size < 3:
            raise UserError(
                f"the status of {config.name!r} wants success, reward and ended, got {robot_map.status.size} numbers"
            )
        self._observed = dict.fromkeys(p.topic for parts in robot_map.observations.values() for p in parts)
        self._commanded = tuple(robot_map.commanded())
        optional = {p.topic for p in robot_map.measured.values()} | (
            {robot_map.status.topic} if robot_map.status else set()
        )
        self._topics = self._require_topics({*self._observed, *self._commanded}, optional)
        tracks = self._survey()
        status = None if robot_map.status is None else robot_map.status.topic
        self._status = status if status in tracks and len(tracks[status].time_N) else None
        if options.split == "status" and self._status is None:
            raise UserError(f"{path} cannot be split by status: {self._lacks_status()}")
        told = {"status": "status" if self._status else "unknown", "all": "option", "none": "option"}
        self.judged_by = told[options.success]
        needed = {
            key: track for key, track in tracks.items() if key in {*self._observed, *self._commanded, self._status}
        }
        try:
            parts = on_clock(needed, options.clock, config.safety.clock_jump_s, self._topics.__getitem__, self.notes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        self.pieces = [piece for part in parts for piece in self._pieces(part)]

    def _lacks_status(self) -> str:
        status = self.config.map.status
        if status is None:
            return f"the map of {self.config.name!r} has none"
        return f"nothing is on {self.config.map.topics[status.topic].topic}"

    def _require_topics(self, required: set[str], optional: set[str]) -> dict[str, str]:
        """Keys that are there, with their topics."""
        types, topics = self.bag.types, self.config.map.topics
        for key in required | optional:
            topic = topics[key]
            if topic.topic in types and types[topic.topic] != {topic.type}:
                raise UserError(
                    f"{self.bag.path}: {topic.topic} is of type {', '.join(sorted(types[topic.topic]))}, "
                    f"the map of {self.config.name!r} says {topic.type}"
                )
            if topic.topic not in types and key in required:
                raise UserError(
                    f"{self.bag.path} has no topic {topic.topic}, which the map of {self.config.name!r} wants; "
                    f"it has {', '.join(sorted(types)) or 'none'}"
                )
        return {key: topics[key].topic for key in sorted(required | optional) if topics[key].topic in types}

    # first reading

    def _survey(self) -> dict[str, Track]:
        """All messages' times and stamps, and what commands and status say; s since the bag's first message."""
        found: dict[str, list[tuple[int, float, np.ndarray]]] = {key: [] for key in self._topics}
        readers = {key: self._reader(key) for key in self._topics}
        for key, at_ns, message in self._messages(self._topics):
            stamp_s = stamp_of(message)
            try:
                values_D = readers[key](message, not found[key])
            except MessageError as error:
                raise UserError(f"{self.bag.path}: {error}") from error
            found[key].append((at_ns, math.nan if stamp_s is None else stamp_s, values_D))
        empty = [
            self._topics[key] for key, rows in found.items() if not rows and key in {*self._observed, *self._commanded}
        ]
        if empty:
            raise UserError(f"{self.bag.path} has no message on {', '.join(empty)}")
        base_ns = min(rows[0][0] for rows in found.values() if rows)
        tracks = {}
        for key, rows in found.items():
            if not rows:
                continue
            values_ND = np.stack([values_D for *_, values_D in rows])
            received_N = np.array([1e-9 * (at_ns - base_ns) for at_ns, *_ in rows])
            stamp_N = np.array([stamp_s - 1e-9 * base_ns for _, stamp_s, _ in rows])
            finite_N = np.isfinite(values_ND).all(axis=1)
            self.notes["messages that hold no numbers"] += int((~finite_N).sum())
            order_N = np.argsort(received_N, kind="stable")
            tracks[key] = Track(received_N, received_N, stamp_N, np.arange(len(rows)), values_ND).only(
                order_N[finite_N[order_N]]
            )
        return tracks

    def _reader(self, key: str) -> Callable[[Message, bool], np.ndarray]:
        """What reads all numbers of a topic's messages, the pictures only of the first."""
        robot_map, spec = self.config.map, self.config.action
        parts = [p for parts in robot_map.observations.values() for p in parts if p.topic == key]
        places = [(names.split(), p) for names, p in robot_map.measured.items() if p.topic == key]
        sent = replace(robot_map, commands=tuple(c for c in robot_map.commands if c.part.topic == key))
        status = robot_map.status if robot_map.status is not None and robot_map.status.topic == key else None

        def read(message: Message, first: bool) -> np.ndarray:
            values = [p.read(message).ravel() for p in parts if p.source not in CAMERAS]
            for part in parts if first else ():
                part.read(message)
            for names, part in places:
                self._require_radians(names, part.read(message), self._topics[key])
            if sent.commands:
                action_A = sent.action_of({key: message}, spec)
                self._require_radians(spec.names, action_A, self._topics[key])
                return action_A
            if status is not None:
                return status.read(message)[:4]
            return np.concatenate([*values, np.zeros(0)])

        return read

    def _require_radians(self, names: Sequence[str], values: np.ndarray, topic: str) -> None:
        """Refuse numbers that only make sense as degrees."""
        spec = self.config.action
        for name, value in zip(names, values.tolist(), strict=True):
            axis = spec.names.index(name)
            low, high = spec.low[axis], spec.high[axis]
            turned = spec.mode == "absolute" and spec.units[axis] == "rad" and abs(value) > 2 * math.pi
            if turned and not low <= value <= high and low <= math.radians(value) <= high:
                raise UserError(
                    f"{self.bag.path}: {name} is at {value:g} on {topic}, outside {low:g} to {high:g} rad; it seems to be in degrees, "
                    "the map says rad"
                )

    def _messages(self, topics: Mapping[str, str]) -> Iterator[tuple[str, int, Message]]:
        keys: dict[str, list[str]] = defaultdict(list)
        for key, topic in topics.items():
            keys[topic].append(key)
        for topic, at_ns, message in self.bag.messages({t: self.config.map.topics[k[0]].type for t, k in keys.items()}):
            for key in keys[topic]:
                yield key, at_ns, message

    # from times to episodes

    def _pieces(self, tracks: Mapping[str, Track]) -> Iterator[Piece]:
        dt = 1 / self.config.action.control_hz
        if not all(len(tracks[key].time_N) for key in (*self._observed, *self._commanded)):
            return
        commands_N = np.sort(np.concatenate([tracks[key].time_N for key in self._commanded]))
        end_s = max(float(track.time_N[-1]) for track in tracks.values() if len(track.time_N))
        for span in self._spans(tracks, commands_N, dt, end_s):
            phase_s = command_phase(commands_N[(commands_N >= span.begin_s) & (commands_N < span.before_s)], dt)
            seen_s = [float(tracks[key].time_N[0]) for key in self._observed]
            lower_s = first_time(span, seen_s, [tracks[key].time_N for key in self._commanded], dt, phase_s)
            grid_T = np.zeros(0) if lower_s is None else grid_times(lower_s, span, dt, phase_s)
            if len(grid_T):
                yield from self._cut(tracks, grid_T)
            else:
                self.notes["episodes without a step"] += 1

    def _spans(self, tracks: Mapping[str, Track], commands_N: np.ndarray, dt: float, end_s: float) -> list[Span]:
        if self.options.split == "gap":
            return spans_by_gap(commands_N, self.options.gap_s, dt, end_s)
        if self.options.split == "bag":
            return [Span(-math.inf, end_s - dt / 2)]
        status = tracks[self._status or ""]
        done_N = np.maximum(status.values_ND[:, 0], status.values_ND[:, 2]) > 0.5
        scene_N = status.values_ND[:, 3] if status.values_ND.shape[1] > 3 else np.zeros(len(done_N))
        return spans_by_status(status.time_N, done_N, scene_N, commands_N, dt, end_s)

    def _cut(self, tracks: Mapping[str, Track], grid_T: np.ndarray) -> Iterator[Piece]:
        """The stretches in which no observation is too old."""
        dt, fresh_T, number_T, stale = 1 / self.config.action.control_hz, np.ones(len(grid_T), bool), {}, Counter[str]()
        for key in self._observed:
            track, topic = tracks[key], self.config.map.topics[key]
            index_T = newest(track.time_N, grid_T)
            old_T = grid_T - track.time_N[index_T] > self.config.safety.max_age_s(topic.ages_as)
            fresh_T, number_T[key] = fresh_T & ~old_T, track.number_N[index_T]
            stale[topic.topic] += int(old_T.sum())
        action_TA = self._actions(tracks, grid_T)
        for first, stop in runs(fresh_T):
            whole = (first, stop) == (0, len(grid_T))
            if stop - first < 2 or (not whole and (stop - first - 1) * dt < SHORTEST_S):
                self.notes["remains of cut episodes"] += 1
                continue
            reward_T, success_T, terminated = self._judge(tracks, grid_T[first:stop], stop == len(grid_T))
            cut = "" if whole else f"{stale.most_common(1)[0][0]} was too old"
            self.notes["episodes that were cut"] += not whole
            numbers = {key: numbers_T[first:stop] for key, numbers_T in number_T.items()}
            yield Piece(numbers, action_TA[first : stop - 1], reward_T, success_T, terminated, cut)

    def _actions(self, tracks: Mapping[str, Track], grid_T: np.ndarray) -> np.ndarray:
        spec = self.config.action
        action_TA = np.zeros((len(grid_T) - 1, spec.dim))
        for key in self._commanded:
            parts = {name: c.part for c in self.config.map.commands if c.part.topic == key for name in c.actions}
            twists = [name for name, part in parts.items() if part.source in ("linear", "angular")]
            how_A = [how_of(spec, axis, name in twists) for axis, name in enumerate(spec.names)]
            its_A = [spec.names.index(name) for name in parts]
            action_TA[:, its_A] = combine(tracks[key].time_N, tracks[key].values_ND, grid_T, how_A)[:, its_A]
        outside_T = ((action_TA < spec.low_array() - 1e-6) | (action_TA > spec.high_array() + 1e-6)).any(axis=1)
        self.notes["steps with actions beyond the robot's limits"] += int(outside_T.sum())
        return action_TA.astype(np.float32)

    def _judge(
        self, tracks: Mapping[str, Track], grid_T: np.ndarray, ends: bool
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Reward and success of each step, and whether the episode came to its end."""
        steps = len(grid_T) - 1
        reward_T, success_T, ended = np.zeros(steps, np.float32), np.zeros(steps, bool), False
        if self.judged_by == "status":
            status = tracks[self._status or ""]
            if len(status.time_N):
                index_T = newest(status.time_N, grid_T[1:])
                said_TD = np.where(index_T[:, None] >= 0, status.values_ND[index_T], 0.0)
                success_T, reward_T = said_TD[:, 0] > 0.5, said_TD[:, 1].astype(np.float32)
                ended = bool(success_T[-1] or said_TD[-1, 2] > 0.5)
        elif self.options.success == "all" and ends:
            success_T[-1], reward_T[-1], ended = True, 1.0, True
        return reward_T, success_T, ended

    # second reading

    def episodes(self, start: int = 0) -> Iterator[Episode]:
        """The bag's episodes, those before number ``start`` left out."""
        pieces = self.pieces[start:]
        rows = self._rows(
            [{k: int(n[t]) for k, n in p.number_T.items()} for p in pieces for t in range(len(p.reward_T) + 1)]
        )
        for piece in pieces:
            seen = list(itertools.islice(rows, len(piece.reward_T) + 1))
            yield Episode(
                {name: np.stack([features[name] for features in seen]) for name in seen[0]},
                piece.action_TA,
                piece.action_TA,
                piece.reward_T,
                piece.success_T,
                piece.terminated,
                not piece.terminated,
                self.options.instruction or self.bag.about.get("instruction", ""),
                {
                    "source": "import",
                    "strategy": "bag",
                    "robot": self.config.name,
                    "bag": self.bag.path.name,
                    "clock": self.options.clock,
                    "success_from": self.judged_by,
                    "cut": piece.cut,
                },
            )

    def _rows(self, wanted: list[dict[str, int]]) -> Iterator[dict[str, np.ndarray]]:
        """Features of one grid time after the other; a message is held only as long as one of them needs it."""
        uses = Counter(item for row in wanted for item in row.items())
        held: dict[tuple[str, int], Message] = {}
        count: Counter[str] = Counter()
        rest = iter(wanted)
        row = next(rest, None)
        for key, _, message in self._messages({key: self._topics[key] for key in self._observed}):
            if row is None:
                return
            if (key, count[key]) in uses:
                held[key, count[key]] = message
            count[key] += 1
            while row is not None and all(item in held for item in row.items()):
                yield self.config.map.features({key: held[key, number] for key, number in row.items()})
                for item in row.items():
                    uses[item] -= 1
                    if not uses[item]:
                        del held[item]
                row = next(rest, None)
