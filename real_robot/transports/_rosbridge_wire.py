"""What goes over the wire in rosbridge 2: operations, messages as JSON or CBOR with their times as ROS 1 or ROS 2 has them, fragments.

A server reads JSON alone; CBOR is what it may send. JSON knows no NaN: a server sends null for NaN and infinity, which comes out as NaN,
and a number that is not finite is not sent at all (a strict server would keep the text it cannot read in front of all that follows).
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np

from real_robot.messages import PRIMITIVES, Field, Message, MessageError, conform, message_types, ros1_name
from real_robot.transports.base import Topic
from vla_rl.runtime.errors import UserError

Ros = Literal[1, 2]
DEPTH = {"command": 1, "sensor": 5, "state": 10}
HEADER = "std_msgs/msg/Header"
TIMES = ("builtin_interfaces/msg/Time", "builtin_interfaces/msg/Duration")
ROS1_TIME = {"sec": "secs", "nanosec": "nsecs"}
DEEPEST = 32  # of what is nested in a frame
MOST_FRAGMENTED = 16  # messages at a time
OVERHEAD = 64  # characters that holding a fragment costs beside its own
# RFC 8746: tags of arrays, by the kind and order of their bytes; 76, 83 and 87 are no types of numpy
ARRAYS = {64: "u1", 65: ">u2", 66: ">u4", 67: ">u8", 68: "u1", 69: "<u2", 70: "<u4", 71: "<u8", 72: "i1", 73: ">i2"}
ARRAYS |= {
    74: ">i4",
    75: ">i8",
    77: "<i2",
    78: "<i4",
    79: "<i8",
    80: ">f2",
    81: ">f4",
    82: ">f8",
    84: "<f2",
    85: "<f4",
    86: "<f8",
}
# of no use here, so that nothing of a stranger's is compiled, parsed or made to share
REFUSED_TAGS = (0, 1, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000)


class FrameError(UserError):
    """What came is no message of rosbridge."""


def type_name(name: str, ros: Ros) -> str:
    """``sensor_msgs/msg/JointState`` as the server's ROS writes it."""
    return ros1_name(name) if ros == 1 else name


def advertisement(topic: Topic, ros: Ros, mark: str) -> dict[str, Any]:
    """The operation ``advertise``, under an id."""
    made: dict[str, Any] = {"op": "advertise", "id": mark, "topic": topic.name, "type": type_name(topic.type, ros)}
    made |= {"latch": False, "queue_size": DEPTH[topic.quality]}
    if ros == 2:  # obeyed by servers of 2026 on
        reliability = "best_effort" if topic.quality == "sensor" else "reliable"
        made["qos"] = {"history": "keep_last", "depth": DEPTH[topic.quality], "reliability": reliability}
        made["qos"] |= {"durability": "volatile"}
        if topic.quality == "command":
            made["qos"] |= {"deadline": 2 / topic.hz, "lifespan": 2 / topic.hz}
    return made


@functools.cache
def compression(name: str, encoding: str, ros: Ros) -> str:
    """How to have a type sent; in CBOR a server of ROS 1 fails at sequences of strings, without a word."""
    fields = message_types()[name]
    fails = any(f.many and f.kind == "string" for f in fields)
    nested = (compression(f.kind, encoding, ros) for f in fields if f.kind not in PRIMITIVES)
    return "none" if encoding == "json" or (ros == 1 and (fails or "none" in nested)) else "cbor"


def publication(topic: Topic, message: Mapping[str, Any], ros: Ros, mark: str) -> dict[str, Any]:
    """The operation ``publish``; raises MessageError, see ``to_wire``.

    Type, latch and queue are for servers that take a publication without an advertisement for one.
    """
    try:
        wire = to_wire(topic.type, message, ros)
    except MessageError as error:
        raise MessageError(f"{topic.name}: {error}") from error
    made = {"op": "publish", "id": mark, "topic": topic.name, "msg": wire}
    return made | {"type": type_name(topic.type, ros), "latch": False, "queue_size": DEPTH[topic.quality]}


def to_wire(name: str, message: Mapping[str, Any], ros: Ros) -> dict[str, Any]:
    """A message as it goes into JSON, with all fields of its type.

    Raises:
        MessageError: a field that the type lacks, of another kind, or not finite; it names the field.
    """
    return _to_wire(name, conform(name, message), ros, "")


def _to_wire(name: str, message: Message, ros: Ros, where: str) -> dict[str, Any]:
    if name in TIMES:
        return {ROS1_TIME[key]: value for key, value in message.items()} if ros == 1 else message
    return {f.name: _field_to_wire(f, message[f.name], ros, where + f.name) for f in message_types()[name]}


def _field_to_wire(field: Field, value: Any, ros: Ros, where: str) -> Any:
    if field.kind not in PRIMITIVES:
        if field.many:
            return [_to_wire(field.kind, item, ros, f"{where}[{i}].") for i, item in enumerate(value)]
        return _to_wire(field.kind, value, ros, f"{where}.")
    if field.kind == "float64" and not np.isfinite(value).all():
        raise MessageError(f"{where} is {value!s:.60}, and rosbridge carries finite numbers only")
    if field.many and field.kind == "uint8":
        return base64.b64encode(value).decode()
    return value.tolist() if isinstance(value, np.ndarray) else value


def from_wire(name: str, value: Any) -> Message:
    """Undo ``to_wire``, whichever ROS it comes from and whether it was JSON or CBOR; raises MessageError for what is no such message."""
    return conform(name, _from_wire(name, value, name))


def _from_wire(name: str, value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise MessageError(f"{where} wants {name}, got {value!r:.60}")
    if name in TIMES:
        return {key: value.get(key, value.get(old, 0)) for key, old in ROS1_TIME.items()}
    made = dict(value)
    if name == HEADER:
        made.pop("seq", None)  # of ROS 1
    for field in message_types()[name]:
        if field.name in made:
            made[field.name] = _field_from_wire(field, made[field.name], f"{where}.{field.name}")
    return made


def _field_from_wire(field: Field, value: Any, where: str) -> Any:
    if field.many and not isinstance(value, list | tuple | np.ndarray | bytes | str):
        raise MessageError(f"{where} wants {field.kind}[], got {value!r:.60}")
    if field.kind not in PRIMITIVES:
        if field.many:
            return [_from_wire(field.kind, item, f"{where}[{i}]") for i, item in enumerate(value)]
        return _from_wire(field.kind, value, where)
    if field.many and field.kind == "uint8" and not isinstance(value, bytes):
        try:
            if isinstance(value, str):
                return base64.b64decode(value, validate=True)
            return bytes(value.tolist() if isinstance(value, np.ndarray) else value)
        except (binascii.Error, TypeError, ValueError) as error:
            raise MessageError(f"{where} wants bytes or base64, got {value!r:.60}") from error
    if value is None and field.kind == "float64":
        return math.nan
    return value


def parse(frame: str | bytes, cbor2: ModuleType) -> dict[str, Any]:
    """What a text (JSON) or binary (CBOR) frame holds: an object that says its ``op``; raises FrameError for anything else."""
    try:
        if isinstance(frame, str):
            made = json.loads(frame)
        else:
            made = cbor2.loads(frame, tag_hook=_array, semantic_decoders=_refused(), max_depth=DEEPEST)
    except (ValueError, RecursionError, cbor2.CBORError) as error:
        said = " ".join(f"{error}: {error.__cause__ or ''}".split())
        raise FrameError(f"a frame that cannot be read ({said:.100}): {frame[:60]!r}") from error
    if not isinstance(made, dict) or not isinstance(made.get("op"), str):
        raise FrameError(f"a frame wants an object with an op, got {made!r:.60}")
    return made


def _array(tag: Any, immutable: bool) -> np.ndarray:
    if tag.tag not in ARRAYS or not isinstance(tag.value, bytes):
        raise ValueError(f"tag {tag.tag} is no array of numbers")
    return np.frombuffer(tag.value, ARRAYS[tag.tag]).astype(np.dtype(ARRAYS[tag.tag]).newbyteorder("="))


@functools.cache
def _refused() -> dict[int, Any]:
    def refuse(value: Any, immutable: bool) -> None:
        raise ValueError("no message of ROS has a tag like this")

    return dict.fromkeys(REFUSED_TAGS, refuse)


def fragments(text: str, name: str, largest: int) -> Iterator[str]:
    """A frame, or where it is longer than ``largest`` characters its fragments, as frames."""
    if len(text) <= largest:
        yield text
        return
    parts = [text[i : i + largest] for i in range(0, len(text), largest)]
    for i, part in enumerate(parts):
        yield json.dumps({"op": "fragment", "id": name, "data": part, "num": i, "total": len(parts)})


class Fragments:
    """Puts messages together again."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._parts: dict[Any, dict[int, str]] = {}

    def add(self, message: Mapping[str, Any]) -> str | None:
        """Take a fragment and return the message if it was the last one that lacked.

        Raises:
            FrameError: it is none, does not fit those before, or there is more than ``largest`` characters of them.
        """
        name, data, num, total = (message.get(key) for key in ("id", "data", "num", "total"))
        # servers of Python 3 give the quotient that total was cut from, as 3.4
        whole = int(total) if isinstance(total, int | float) and math.isfinite(total) else 0
        if not isinstance(name, str | int) or not isinstance(data, str) or not isinstance(num, int):
            raise FrameError(f"a fragment wants an id, data and num, got {message!r:.80}")
        if not 0 <= num < whole:
            raise FrameError(f"fragment {num} of {total} of message {name!r:.40}")
        parts = self._parts.setdefault(name, {})
        parts[num] = data
        if len(parts) == whole:
            del self._parts[name]
            if set(parts) != set(range(whole)):
                raise FrameError(f"fragments {sorted(parts)!s:.40} of message {name!r:.40} in {whole} parts")
            return "".join(parts[i] for i in range(whole))
        held = sum(len(part) + OVERHEAD for kept in self._parts.values() for part in kept.values())
        if held > self._largest or len(self._parts) > MOST_FRAGMENTED:
            count = len(self._parts)
            self._parts.clear()
            raise FrameError(f"{held} characters in fragments of {count} messages; the most is {self._largest}")
        return None
