"""Topics of a robot, and parts of their messages: joints by name, a position, a twist, a picture. Read and written.

Numbers on topics are in SI units, as ROS REP 103 wants them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from real_robot import messages
from real_robot.limits import Kind
from real_robot.messages import Message, MessageError
from real_robot.transports.base import Quality, Topic
from vla_rl.runtime.errors import UserError

Source = Literal[
    "position", "velocity", "effort", "data", "pose_position", "rotation6", "rotvec", "quaternion", "linear", "angular", "picture",
    "depth", "points", "trajectory",
]  # fmt: skip
UNITS = ("m", "rad", "m/s", "rad/s", "N", "Nm", "1")
JOINTS = ("position", "velocity", "effort", "trajectory")
CAMERAS = ("picture", "depth", "points")
TYPES: dict[str, tuple[str, ...]] = {
    "position": ("sensor_msgs/msg/JointState",),
    "velocity": ("sensor_msgs/msg/JointState",),
    "effort": ("sensor_msgs/msg/JointState",),
    "data": ("std_msgs/msg/Float64MultiArray", "std_msgs/msg/Float64", "std_msgs/msg/Bool"),
    "pose_position": ("geometry_msgs/msg/PoseStamped",),
    "rotation6": ("geometry_msgs/msg/PoseStamped",),
    "rotvec": ("geometry_msgs/msg/PoseStamped",),
    "quaternion": ("geometry_msgs/msg/PoseStamped",),
    "linear": ("geometry_msgs/msg/TwistStamped", "geometry_msgs/msg/Twist"),
    "angular": ("geometry_msgs/msg/TwistStamped", "geometry_msgs/msg/Twist"),
    "picture": ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"),
    "depth": ("sensor_msgs/msg/Image",),
    "points": ("sensor_msgs/msg/PointCloud2",),
    "trajectory": ("trajectory_msgs/msg/JointTrajectory",),
}
SIZES = {"pose_position": 3, "rotation6": 6, "rotvec": 3, "quaternion": 4}
AXES = ("x", "y", "z")
_STAMPED = "geometry_msgs/msg/TwistStamped"


@dataclass(frozen=True)
class TopicConfig:
    """A topic of the robot.

    topic: name, "/joint_states"
    type: of its messages, "sensor_msgs/msg/JointState"
    hz: rate that the robot sends it at, or that we do
    quality: command, sensor (best effort) or state (reliable)
    kind: how old it may be: joints, camera or other (none: as its type says)
    frozen_s: after which pictures that never change count as frozen (.inf: a simulated scene may stand still)
    """

    topic: str
    type: str
    hz: float
    quality: Quality
    kind: Kind | None = None
    frozen_s: float = 1.0

    def __post_init__(self) -> None:
        self.wire  # noqa: B018 - checks name, type and rate
        if not self.frozen_s > 0:
            raise ValueError(f"frozen_s of {self.topic} wants a time > 0, got {self.frozen_s}")

    @functools.cached_property
    def wire(self) -> Topic:
        """As transports know it."""
        return Topic(self.topic, self.type, self.quality, self.hz)

    @property
    def ages_as(self) -> Kind:
        """How it ages."""
        if self.kind is not None:
            return self.kind
        if self.type.rsplit("/", 1)[-1] in ("Image", "CompressedImage", "PointCloud2"):
            return "camera"
        return "joints" if self.type == "sensor_msgs/msg/JointState" else "other"


@dataclass(frozen=True)
class PartConfig:
    """Numbers in a message.

    topic: key of one of the map's topics
    source: what of the message
    names: joints, in the order of the feature; or axes (x, y, z) of a twist (none: all three)
    unit: of the numbers on the topic
    size: how many numbers of an array (data); points of a cloud
    first: index of the first of them (data)
    shape: height and width that pictures and depth are brought to
    """

    topic: str
    source: Source
    names: tuple[str, ...] = ()
    unit: str = "1"
    size: int = 0
    first: int = 0
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(
                f"the unit of {self.source} on {self.topic} is {self.unit!r}; topics are in SI units (REP 103): {', '.join(UNITS)}"
            )
        if self.source in JOINTS and not self.names:
            raise ValueError(f"{self.source} of {self.topic} wants names of joints")
        if self.source in ("linear", "angular") and not set(self.names) <= set(AXES):
            raise ValueError(f"names of {self.source} are axes x, y, z, got {', '.join(self.names)}")
        if self.source in ("data", "points") and self.size < 1:
            raise ValueError(f"{self.source} of {self.topic} wants a size of at least 1, got {self.size}")
        if self.source in ("picture", "depth") and (len(self.shape) != 2 or min(self.shape) < 1):
            raise ValueError(f"{self.source} of {self.topic} wants a shape of height and width, got {self.shape}")

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Of what it gives."""
        if self.source == "picture":
            return (3, *self.shape)
        if self.source == "depth":
            return (1, *self.shape)
        if self.source == "points":
            return (self.size, 3)
        return (SIZES.get(self.source) or len(self.names) or self.size or 3,)

    def require_type(self, type_: str) -> None:
        """Raise UserError where it cannot be in messages of a type."""
        if type_ not in TYPES[self.source]:
            raise UserError(
                f"{self.source} is in messages of {' or '.join(TYPES[self.source])}, and {self.topic} has {type_}"
            )

    def read(self, message: Mapping[str, Any]) -> np.ndarray:
        """The numbers in a message; raises MessageError where it lacks some, naming both sides."""
        source = self.source
        if source in CAMERAS:
            return self._read_camera(message)
        if source == "trajectory":
            point = message["points"][0] if message["points"] else {"positions": ()}
            return self._by_name(message["joint_names"], point["positions"])
        if source in JOINTS:
            return self._by_name(message["name"], message[source])
        if source == "data":
            values = np.atleast_1d(np.asarray(message["data"], float))
            if len(values) < self.first + self.size:
                raise MessageError(
                    f"{self.topic} has {len(values)} numbers, the map wants {self.first} to {self.first + self.size}"
                )
            return values[self.first : self.first + self.size]
        if source in ("linear", "angular"):
            twist = message.get("twist", message)[source]
            return np.array([twist[axis] for axis in self.names or AXES], float)
        pose = message["pose"]
        if source == "pose_position":
            return np.array([pose["position"][axis] for axis in AXES], float)
        return self._rotation(np.array([pose["orientation"][axis] for axis in (*AXES, "w")], float))

    def _rotation(self, quaternion_4: np.ndarray) -> np.ndarray:
        norm = np.linalg.norm(quaternion_4)
        if not 0.9 < norm < 1.1:
            raise MessageError(f"the orientation on {self.topic} is no unit quaternion: {quaternion_4.tolist()}")
        if self.source == "quaternion":
            return quaternion_4 / norm
        rotation = Rotation.from_quat(quaternion_4)
        return rotation.as_rotvec() if self.source == "rotvec" else rotation.as_matrix()[:, :2].T.ravel()

    def _by_name(self, names: Sequence[str], values: Sequence[float] | np.ndarray) -> np.ndarray:
        missing = [name for name in self.names if name not in names]
        if missing:
            raise MessageError(
                f"{self.topic} has the joints {', '.join(names) or 'none'}; the map wants {', '.join(self.names)}"
            )
        if len(values) != len(names):
            raise MessageError(f"{self.topic} has {len(names)} joints and {len(values)} numbers of {self.source}")
        order = [list(names).index(name) for name in self.names]
        return np.asarray(values, float)[order]

    def _read_camera(self, message: Mapping[str, Any]) -> np.ndarray:
        if self.source == "points":
            return resample(messages.points_of(message), self.size)
        height, width = self.shape
        if self.source == "picture":
            return np.moveaxis(_resized(messages.picture(message), height, width, cv2.INTER_AREA), 2, 0)
        return _resized(messages.depth_m(message), height, width, cv2.INTER_NEAREST)[None]

    def write(self, message: Message, values: np.ndarray, type_: str, at_s: float) -> None:
        """Put numbers into a message: undo ``read``."""
        source = self.source
        if source in CAMERAS:
            message |= self._camera_message(values, type_, at_s)
        elif source == "trajectory":
            known = dict(zip(message["joint_names"], _first_point(message), strict=True)) | dict(
                zip(self.names, values, strict=True)
            )
            message["joint_names"] = list(known)
            message["points"] = [
                messages.empty("trajectory_msgs/msg/JointTrajectoryPoint")
                | {"positions": list(map(float, known.values()))}
            ]
        elif source in JOINTS:
            joints = list(dict.fromkeys([*message["name"], *self.names]))
            old = dict(zip(message["name"], message[source], strict=False)) | dict(
                zip(self.names, map(float, values), strict=True)
            )
            message["name"], message[source] = joints, [old.get(name, 0.0) for name in joints]
        elif source == "data":
            self._write_data(message, values, type_)
        elif source in ("linear", "angular"):
            twist = message["twist"] if type_ == _STAMPED else message
            twist[source] |= dict(zip(self.names or AXES, map(float, values), strict=True))
        elif source == "pose_position":
            message["pose"]["position"] = dict(zip(AXES, map(float, values), strict=True))
        else:
            message["pose"]["orientation"] = dict(zip((*AXES, "w"), map(float, self._quaternion(values)), strict=True))
        if "header" in message:
            message["header"]["stamp"] = messages.stamp(at_s)

    def _write_data(self, message: Message, values: np.ndarray, type_: str) -> None:
        if type_ == "std_msgs/msg/Float64MultiArray":
            data = np.zeros(max(len(message["data"]), self.first + self.size))
            data[: len(message["data"])] = message["data"]
            data[self.first : self.first + self.size] = values
            message["data"] = data
        else:
            message["data"] = bool(values[0] > 0.5) if type_ == "std_msgs/msg/Bool" else float(values[0])

    def _quaternion(self, values: np.ndarray) -> np.ndarray:
        if self.source == "quaternion":
            return values
        if self.source == "rotvec":
            return Rotation.from_rotvec(values).as_quat()
        first, second = values[:3], values[3:]
        return Rotation.from_matrix(np.column_stack([first, second, np.cross(first, second)])).as_quat()

    def _camera_message(self, values: np.ndarray, type_: str, at_s: float) -> Message:
        if self.source == "points":
            return messages.points_message(values, at_s)
        picture = np.ascontiguousarray(np.moveaxis(values, 0, 2)) if self.source == "picture" else values[0]
        make = messages.compressed_message if type_.endswith("CompressedImage") else messages.image_message
        return make(picture, at_s)


def _first_point(message: Message) -> Sequence[float]:
    return message["points"][0]["positions"] if message["points"] else ()


def _resized(image: np.ndarray, height: int, width: int, how: int) -> np.ndarray:
    return image if image.shape[:2] == (height, width) else cv2.resize(image, (width, height), interpolation=how)


def resample(points_P3: np.ndarray, count: int) -> np.ndarray:
    """So many of a cloud's points, evenly over their order; raises MessageError where there is none."""
    if not len(points_P3):
        raise MessageError("a point cloud without a finite point")
    return points_P3[np.linspace(0, len(points_P3) - 1, count).round().astype(int)]
