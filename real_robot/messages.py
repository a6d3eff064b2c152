"""ROS messages as plain data: nested dicts of numbers, text, bytes, lists and numpy arrays, one table of types for every transport.

``uint8[]`` is bytes, other numeric sequences are numpy arrays (lists are taken too), ``string[]`` is a list of str, a nested message is a
dict. Names are those of ROS 2 (``sensor_msgs/msg/JointState``); ROS 1 has the same fields but for those that ``transports/ros1.py`` maps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from vla_rl.runtime.errors import UserError

Message = dict[str, Any]

# as the interface packages of ROS 2 define them (Jazzy; the same since Foxy)
DEFINITIONS = """
builtin_interfaces/msg/Time: int32 sec, uint32 nanosec
builtin_interfaces/msg/Duration: int32 sec, uint32 nanosec
std_msgs/msg/Header: builtin_interfaces/msg/Time stamp, string frame_id
std_msgs/msg/Bool: bool data
std_msgs/msg/Float64: float64 data
std_msgs/msg/String: string data
std_msgs/msg/MultiArrayDimension: string label, uint32 size, uint32 stride
std_msgs/msg/MultiArrayLayout: std_msgs/msg/MultiArrayDimension[] dim, uint32 data_offset
std_msgs/msg/Float64MultiArray: std_msgs/msg/MultiArrayLayout layout, float64[] data
geometry_msgs/msg/Vector3: float64 x, float64 y, float64 z
geometry_msgs/msg/Point: float64 x, float64 y, float64 z
geometry_msgs/msg/Quaternion: float64 x, float64 y, float64 z, float64 w
geometry_msgs/msg/Pose: geometry_msgs/msg/Point position, geometry_msgs/msg/Quaternion orientation
geometry_msgs/msg/PoseStamped: std_msgs/msg/Header header, geometry_msgs/msg/Pose pose
geometry_msgs/msg/Twist: geometry_msgs/msg/Vector3 linear, geometry_msgs/msg/Vector3 angular
geometry_msgs/msg/TwistStamped: std_msgs/msg/Header header, geometry_msgs/msg/Twist twist
geometry_msgs/msg/Transform: geometry_msgs/msg/Vector3 translation, geometry_msgs/msg/Quaternion rotation
geometry_msgs/msg/TransformStamped: std_msgs/msg/Header header, string child_frame_id, geometry_msgs/msg/Transform transform
tf2_msgs/msg/TFMessage: geometry_msgs/msg/TransformStamped[] transforms
sensor_msgs/msg/JointState: std_msgs/msg/Header header, string[] name, float64[] position, float64[] velocity, float64[] effort
sensor_msgs/msg/Image: std_msgs/msg/Header header, uint32 height, uint32 width, string encoding, uint8 is_bigendian, uint32 step, uint8[] data
sensor_msgs/msg/CompressedImage: std_msgs/msg/Header header, string format, uint8[] data
sensor_msgs/msg/PointField: string name, uint32 offset, uint8 datatype, uint32 count
sensor_msgs/msg/PointCloud2: std_msgs/msg/Header header, uint32 height, uint32 width, sensor_msgs/msg/PointField[] fields, bool is_bigendian, uint32 point_step, uint32 row_step, uint8[] data, bool is_dense
trajectory_msgs/msg/JointTrajectoryPoint: float64[] positions, float64[] velocities, float64[] accelerations, float64[] effort, builtin_interfaces/msg/Duration time_from_start
trajectory_msgs/msg/JointTrajectory: std_msgs/msg/Header header, string[] joint_names, trajectory_msgs/msg/JointTrajectoryPoint[] points
"""  # noqa: E501

PRIMITIVES = {
    "bool": bool,
    "string": str,
    "uint8": int,
    "int32": int,
    "uint32": int,
    "float64": float,
}
RGB_ENCODINGS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "rgba8": 4, "bgra8": 4}


class MessageError(UserError):
    """A message does not hold what its type, or the map of the robot, says."""


@dataclass(frozen=True)
class Field:
    """A field of a message type; ``kind`` is a primitive or another type, ``many`` a sequence of them."""

    name: str
    kind: str
    many: bool


@functools.cache
def message_types() -> dict[str, tuple[Field, ...]]:
    """All known types with their fields."""
    table = {}
    for line in DEFINITIONS.strip().splitlines():
        name, _, body = line.partition(": ")
        fields = [item.split(" ") for item in body.split(", ")]
        table[name] = tuple(Field(called, kind.removesuffix("[]"), kind.endswith("[]")) for kind, called in fields)
    return table


def require_type(name: str) -> None:
    """Raise UserError for a type that is not known."""
    if name not in message_types():
        raise UserError(f"no message type {name!r}; there are {', '.join(message_types())}")


@functools.cache
def ros1_name(name: str) -> str:
    """``sensor_msgs/msg/JointState`` as ROS 1 writes it."""
    return name.replace("/msg/", "/")


def empty(name: str) -> Message:
    """A message of a type with all fields as ROS 2 begins them: zero or empty, and no rotation."""
    made: Message = {}
    if name == "geometry_msgs/msg/Quaternion":
        return {"x": 0.0, "y": 0.0, "z": 0.0, "w": 1.0}  # as ROS 2 has it: no rotation
    for field in message_types()[name]:
        if field.many:
            made[field.name] = b"" if field.kind == "uint8" else []
        else:
            made[field.name] = PRIMITIVES[field.kind]() if field.kind in PRIMITIVES else empty(field.kind)
    return made


def conform(name: str, value: Mapping[str, Any], where: str = "") -> Message:
    """Return a message with every field of its type, those not given zero or empty.

    Raises:
        MessageError: it has a field that the type lacks, or one of another kind; it names the field.
    """
    fields = {field.name: field for field in message_types()[name]}
    strange = [key for key in value if key not in fields]
    if strange:
        raise MessageError(f"{name} has no field {where}{strange[0]!r}; it has {', '.join(fields)}")
    made = empty(name)
    for key, given in value.items():
        made[key] = _conform(fields[key], given, f"{where}{key}")
    return made


def _conform(field: Field, given: Any, where: str) -> Any:
    if field.kind not in PRIMITIVES:
        if field.many:
            return [conform(field.kind, item, f"{where}[{i}].") for i, item in enumerate(given)]
        return conform(field.kind, given, f"{where}.")
    try:
        if field.many and field.kind == "uint8":
            return bytes(given)
        if field.many and field.kind == "string":
            return [str(item) for item in given]
        if field.many:
            return np.asarray(given, np.float64 if field.kind == "float64" else np.int64)
        return PRIMITIVES[field.kind](given)
    except (TypeError, ValueError) as error:
        raise MessageError(f"{where} wants {field.kind}{'[]' if field.many else ''}, got {given!r:.60}") from error


def stamp(seconds: float) -> Message:
    """``builtin_interfaces/msg/Time`` (or Duration) of seconds."""
    whole = math.floor(seconds)
    return {"sec": whole, "nanosec": min(round((seconds - whole) * 1e9), 999_999_999)}


def seconds_of(time: Mapping[str, Any]) -> float:
    """Undo ``stamp``."""
    return float(time["sec"]) + 1e-9 * float(time["nanosec"])


def stamp_of(message: Mapping[str, Any]) -> float | None:
    """Seconds of a message's header, or of its first transform; None where it has none or the stamp is zero."""
    header = message.get("header")
    if header is None and message.get("transforms"):
        header = message["transforms"][0]["header"]
    if header is None:
        return None
    return seconds_of(header["stamp"]) or None


def image_message(rgb: np.ndarray, at_s: float, frame: str = "") -> Message:
    """``sensor_msgs/msg/Image`` of an (h, w, 3) uint8 RGB, (h, w) float32 (m) or (h, w) uint16 (mm) array."""
    encoding = {("uint8", 3): "rgb8", ("float32", 2): "32FC1", ("uint16", 2): "16UC1"}[rgb.dtype.name, rgb.ndim]
    height, width = rgb.shape[:2]
    return {
        "header": {"stamp": stamp(at_s), "frame_id": frame},
        "height": height,
        "width": width,
        "encoding": encoding,
        "is_bigendian": 0,
        "step": rgb.strides[0] if rgb.flags.c_contiguous else rgb.itemsize * math.prod(rgb.shape[1:]),
        "data": rgb.tobytes(),
    }


def compressed_message(rgb: np.ndarray, at_s: float, frame: str = "", quality: int = 90) -> Message:
    """``sensor_msgs/msg/CompressedImage``: JPEG of an (h, w, 3) uint8 RGB array."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return {"header": {"stamp": stamp(at_s), "frame_id": frame}, "format": "jpeg", "data": encoded.tobytes()}


def picture(message: Mapping[str, Any]) -> np.ndarray:
    """The picture in an Image or CompressedImage: (h, w, 3) uint8 RGB.

    Raises:
        MessageError: its encoding is no colour picture's, or its bytes do not fit its size.
    """
    if "format" in message:
        data = np.frombuffer(message["data"], np.uint8)
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if decoded is None:
            raise MessageError(f"a compressed image of format {message['format']!r} cannot be decoded")
        return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    encoding = message["encoding"]
    if encoding not in RGB_ENCODINGS:
        raise MessageError(
            f"an image of encoding {encoding!r} is no colour picture; there are {', '.join(RGB_ENCODINGS)}"
        )
    channels = RGB_ENCODINGS[encoding]
    image = _rows(message, np.dtype(np.uint8), channels)
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    return np.ascontiguousarray(image[..., [2, 1, 0]] if encoding.startswith("bgr") else image[..., :3])


def depth_m(message: Mapping[str, Any]) -> np.ndarray:
    """The distances in an Image of encoding 16UC1 (mm) or 32FC1 (m): (h, w) float32, m; 0 where nothing was measured (ROS: 0, NaN or inf).

    Raises:
        MessageError: its encoding is another one.
    """
    encoding = message["encoding"]
    if encoding not in ("16UC1", "32FC1"):
        raise MessageError(f"an image of encoding {encoding!r} holds no depth; there are 16UC1 (mm), 32FC1 (m)")
    kind = np.dtype(np.uint16 if encoding == "16UC1" else np.float32)
    values = _rows(message, kind.newbyteorder(">" if message["is_bigendian"] else "<"), 1)[..., 0]
    distances = values.astype(np.float32) * (1e-3 if encoding == "16UC1" else 1.0)
    return np.where(np.isfinite(distances), distances, np.float32(0))


def _rows(message: Mapping[str, Any], kind: np.dtype, channels: int) -> np.ndarray:
    height, width, step = int(message["height"]), int(message["width"]), int(message["step"])
    used = width * channels * kind.itemsize
    if height < 1 or width < 1 or step < used or len(message["data"]) < step * height:
        raise MessageError(
            f"an image of {width}x{height} {message['encoding']} wants {used * height} bytes, got {len(message['data'])} in rows of {step}"
        )
    rows = np.frombuffer(message["data"], np.uint8, step * height).reshape(height, step)[:, :used]
    return np.ascontiguousarray(rows).view(kind).reshape(height, width, channels)


_FLOAT32, _XYZ = 7, ("x", "y", "z")


def points_message(points_P3: np.ndarray, at_s: float, frame: str = "") -> Message:
    """``sensor_msgs/msg/PointCloud2`` of points (P, 3), m."""
    return {
        "header": {"stamp": stamp(at_s), "frame_id": frame},
        "height": 1,
        "width": len(points_P3),
        "fields": [{"name": name, "offset": 4 * i, "datatype": _FLOAT32, "count": 1} for i, name in enumerate(_XYZ)],
        "is_bigendian": False,
        "point_step": 12,
        "row_step": 12 * len(points_P3),
        "data": np.asarray(points_P3, "<f4").tobytes(),
        "is_dense": True,
    }


def points_of(message: Mapping[str, Any]) -> np.ndarray:
    """The finite points of a PointCloud2: (P, 3) float32, m; raises MessageError where it lacks x, y, z as float32 or bytes."""
    offsets = {f["name"]: f["offset"] for f in message["fields"] if f["datatype"] == _FLOAT32}
    if not set(_XYZ) <= set(offsets):
        raise MessageError(f"a point cloud wants x, y, z as float32, got {[f['name'] for f in message['fields']]}")
    count, step = int(message["width"]) * int(message["height"]), int(message["point_step"])
    if len(message["data"]) < count * step:
        raise MessageError(f"a point cloud of {count} points wants {count * step} bytes, got {len(message['data'])}")
    order = ">" if message["is_bigendian"] else "<"
    layout = np.dtype(
        {"names": _XYZ, "formats": [f"{order}f4"] * 3, "offsets": [offsets[n] for n in _XYZ], "itemsize": step}
    )
    raw = np.frombuffer(message["data"], layout, count)
    points_P3 = np.stack([raw[n] for n in _XYZ], axis=1).astype(np.float32)
    return points_P3[np.isfinite(points_P3).all(axis=1)]
