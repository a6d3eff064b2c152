"""Messages to send around, and what checks of transports have in common."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from real_robot.messages import Message, compressed_message, image_message, points_message, stamp
from real_robot.transports.base import Topic, Transport

FLOATS = "std_msgs/msg/Float64MultiArray"
JOINTS = [f"joint_{i + 1}" for i in range(6)]
HEADER = {"stamp": stamp(1234.5), "frame_id": "base"}
Record = Callable[[str, float], None]


def some(rng: np.random.Generator) -> dict[str, tuple[str, Message]]:
    """A message of each kind that the arm echoes."""
    xyz = dict(zip("xyz", rng.normal(size=3).tolist(), strict=True))
    turn = dict(zip("xyzw", rng.normal(size=4).tolist(), strict=True))
    picture = rng.integers(0, 256, (96, 128, 3), np.uint8)
    point = {"positions": rng.normal(size=6), "velocities": [], "effort": [1.0], "time_from_start": stamp(0.75)}
    twist = {"linear": xyz, "angular": xyz}
    return {
        "joint_state": (
            "sensor_msgs/msg/JointState",
            {
                "header": HEADER,
                "name": [*JOINTS[:5], "Schultergelenk-ä"],
                "position": rng.normal(size=6),
                "velocity": [math.inf],
            },
        ),
        "image": ("sensor_msgs/msg/Image", image_message(picture, 7.25, "camera")),
        "compressed_image": ("sensor_msgs/msg/CompressedImage", compressed_message(picture, 7.25, "camera")),
        "float64_multi_array": (
            FLOATS,
            {"layout": {"dim": [{"label": "a", "size": 3, "stride": 3}]}, "data": rng.normal(size=3)},
        ),
        "twist": ("geometry_msgs/msg/Twist", twist),
        "twist_stamped": ("geometry_msgs/msg/TwistStamped", {"header": HEADER, "twist": twist}),
        "pose_stamped": (
            "geometry_msgs/msg/PoseStamped",
            {"header": HEADER, "pose": {"position": xyz, "orientation": turn}},
        ),
        "joint_trajectory": (
            "trajectory_msgs/msg/JointTrajectory",
            {
                "header": HEADER,
                "joint_names": JOINTS,
                "points": [point, {"positions": [0.0] * 6, "time_from_start": stamp(1.5)}],
            },
        ),
        "point_cloud2": ("sensor_msgs/msg/PointCloud2", points_message(rng.normal(size=(200, 3)), 3.5, "camera")),
    }


def same(one: Any, other: Any) -> bool:
    """Whether two messages hold the same values."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | np.ndarray) and len(one) and isinstance(one[0], dict):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, list | np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(other))
    return one == other


def listen(transport: Transport, topic: Topic) -> list[tuple[Message, float]]:
    """Subscribe; what is heard is appended as it comes, with the times of arrival."""
    heard: list[tuple[Message, float]] = []
    transport.subscribe(topic, lambda message, at_s: heard.append((message, at_s)))
    return heard


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for a condition and return what it gave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come about in time")
