"""The one map: writing undoes reading, names decide and not places, what does not fit is named on both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from real_robot import messages
from real_robot.messages import MessageError, conform, message_types
from real_robot.parts import TYPES, PartConfig, TopicConfig
from real_robot.robot import load_robot
from real_robot.robots.ros import RosRobotConfig
from vla_rl.runtime.config import names_in
from vla_rl.runtime.errors import UserError

PARTS = {
    "position": PartConfig("t", "position", ("a", "b"), "rad"),
    "velocity": PartConfig("t", "velocity", ("a", "b"), "rad/s"),
    "effort": PartConfig("t", "effort", ("a", "b"), "Nm"),
    "data": PartConfig("t", "data", size=1),
    "pose_position": PartConfig("t", "pose_position", unit="m"),
    "rotation6": PartConfig("t", "rotation6"),
    "rotvec": PartConfig("t", "rotvec", unit="rad"),
    "quaternion": PartConfig("t", "quaternion"),
    "linear": PartConfig("t", "linear", unit="m/s"),
    "angular": PartConfig("t", "angular", ("z", "x"), "rad/s"),
    "picture": PartConfig("t", "picture", shape=(8, 12)),
    "depth": PartConfig("t", "depth", shape=(8, 12)),
    "points": PartConfig("t", "points", size=20),
    "trajectory": PartConfig("t", "trajectory", ("a", "b"), "rad"),
}


def values_for(source: str, rng: np.random.Generator) -> np.ndarray:
    rotation = Rotation.random(rng=rng)
    if source == "rotation6":
        return rotation.as_matrix()[:, :2].T.ravel()
    if source in ("rotvec", "quaternion"):
        return rotation.as_rotvec() if source == "rotvec" else rotation.as_quat(canonical=True)
    shape = PARTS[source].feature_shape
    if source == "picture":  # smooth, as JPEG keeps it
        ramp = np.linspace(0, 200, shape[1] * shape[2]).reshape(shape[1:])
        return np.stack([ramp, ramp[::-1], 255 - ramp]).astype(np.uint8)
    return rng.uniform(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize(("source", "type_"), [(s, t) for s, types in TYPES.items() for t in types])
def test_every_part_reads_what_it_wrote(source: str, type_: str) -> None:
    part = PARTS[source]
    values = values_for(source, np.random.default_rng(1))
    if type_.endswith("Bool"):
        values = np.array([1.0])
    message = messages.empty(type_)
    part.write(message, values, type_, 12.5)
    read = part.read(conform(type_, message))
    assert read.shape == part.feature_shape
    if source == "quaternion":
        read = read * np.sign(read[3])
    if type_.endswith("CompressedImage"):  # JPEG
        assert abs(read.astype(float) - values.astype(float)).mean() < 8
    else:
        np.testing.assert_allclose(read.astype(float), values.astype(float), atol=1e-6)
    if "header" in message:
        assert messages.stamp_of(message) == 12.5


@given(order=st.permutations(["a", "b", "c", "d"]))
@settings(max_examples=24, deadline=None)
def test_joints_are_found_by_name_in_any_order(order: list[str]) -> None:
    place = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    message = conform("sensor_msgs/msg/JointState", {"name": order, "position": [place[n] for n in order]})
    assert PartConfig("t", "position", ("c", "a"), "rad").read(message).tolist() == [3.0, 1.0]


def test_a_missing_joint_names_both_sides() -> None:
    message = conform("sensor_msgs/msg/JointState", {"name": ["left", "right"], "position": [0, 0]})
    with pytest.raises(MessageError, match=r"t has the joints left, right; the map wants elbow"):
        PartConfig("t", "position", ("elbow",), "rad").read(message)
    short = conform("sensor_msgs/msg/JointState", {"name": ["elbow", "wrist"], "position": [0]})
    with pytest.raises(MessageError, match="2 joints and 1 numbers"):
        PartConfig("t", "position", ("elbow",), "rad").read(short)


def test_degrees_are_no_unit_of_a_topic() -> None:
    with pytest.raises(ValueError, match=r"the unit of position on t is 'deg'; topics are in SI units"):
        PartConfig("t", "position", ("a",), "deg")


ROBOTS = [name for name in names_in("robot") if isinstance(load_robot(name), RosRobotConfig)]


def ros_robot(name: str) -> RosRobotConfig:
    robot = load_robot(name)
    assert isinstance(robot, RosRobotConfig)
    return robot


@pytest.mark.parametrize("name", names_in("robot"))
def test_every_robot_has_limits_and_a_driver(name: str) -> None:
    robot = load_robot(name)
    rules = robot.rules()
    assert np.isfinite(rules.v_max_A[rules.moving_A]).all()
    assert robot.observation_spec


@pytest.mark.parametrize("name", ROBOTS)
def test_every_map_undoes_itself(name: str) -> None:
    robot = ros_robot(name)
    rng, spec = np.random.default_rng(2), robot.action
    action_A = rng.uniform(spec.low, spec.high)
    sent = robot.map.command_messages(action_A, spec, 3.0)
    received = {key: conform(robot.map.topics[key].type, message) for key, message in sent.items()}
    np.testing.assert_allclose(robot.map.action_of(received, spec), action_A, atol=1e-9)
    features = {}
    for key, parts in robot.map.observations.items():
        values = []
        for part in parts:
            is_turn = part.source in ("rotation6", "quaternion", "rotvec")
            values.append(values_for(part.source, rng) if is_turn else rng.uniform(0, 1, part.feature_shape))
        joined = values[0] if len(values) == 1 else np.concatenate([v.ravel() for v in values])
        features[key] = (255 * joined).astype(np.uint8) if parts[0].source == "picture" else joined.astype(np.float32)
    made = robot.map.feature_messages(features, 3.0)
    back = robot.map.features({key: conform(robot.map.topics[key].type, m) for key, m in made.items()})
    for key, parts in robot.map.observations.items():
        compressed = any(robot.map.topics[p.topic].type.endswith("CompressedImage") for p in parts)
        assert back[key].shape == robot.observation_spec[key].shape
        if not compressed:
            np.testing.assert_allclose(back[key], features[key], atol=1e-6)


def test_a_map_that_does_not_fit_the_actions_is_refused() -> None:
    robot = ros_robot("lift_dds")
    some = replace(robot.map, commands=robot.map.commands[:2])
    with pytest.raises(UserError, match="the map sends the actions dx, dy, dz, drx, dry, drz; the robot takes"):
        some.check(robot.action)
    wrong = replace(robot.map.commands[0], part=replace(robot.map.commands[0].part, unit="m"))
    with pytest.raises(UserError, match="action dx wants m/s, and linear on servo is in m"):
        replace(robot.map, commands=(wrong, *robot.map.commands[1:])).check(robot.action)
    lost = {**robot.map.observations, "observation.state": (PartConfig("arm", "pose_position", unit="m"),)}
    with pytest.raises(UserError, match="the map has no topic 'arm'"):
        replace(robot.map, observations=lost).check(robot.action)
    typed = {**robot.map.topics, "tool": replace(robot.map.topics["tool"], type="geometry_msgs/msg/Twist")}
    with pytest.raises(UserError, match="pose_position is in messages of geometry_msgs/msg/PoseStamped"):
        replace(robot.map, topics=typed).check(robot.action)


def test_commands_go_out_at_the_rate_of_the_actions() -> None:
    robot = ros_robot("lift_dds")
    topics = {**robot.map.topics, "servo": replace(robot.map.topics["servo"], hz=50.0)}
    with pytest.raises(ValueError, match="go out at 50 Hz, and the robot's actions are for 20 Hz"):
        replace(robot, map=replace(robot.map, topics=topics))


@pytest.mark.parametrize("topic", ["joint_states", "/joint states/", "//x"])
def test_a_topic_has_a_name_of_ros(topic: str) -> None:
    with pytest.raises(ValueError, match="a topic looks like"):
        TopicConfig(topic, "sensor_msgs/msg/JointState", 20.0, "state")


@pytest.mark.parametrize("name", sorted(message_types()))
def test_every_message_conforms_to_itself(name: str) -> None:
    empty = messages.empty(name)
    assert conform(name, empty).keys() == empty.keys()
    with pytest.raises(MessageError, match="has no field 'colour'"):
        conform(name, {"colour": 1})


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8"])
def test_pictures_of_every_encoding_with_padded_rows(encoding: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    if encoding == "mono8":
        rgb[..., 1:] = rgb[..., :1]
    channels = {"rgb8": [0, 1, 2], "bgr8": [2, 1, 0], "rgba8": [0, 1, 2, 0], "bgra8": [2, 1, 0, 0], "mono8": [0]}[
        encoding
    ]
    raw = rgb[..., channels]
    rows = np.pad(raw.reshape(5, -1), ((0, 0), (0, 3)))
    message = {
        "height": 5,
        "width": 7,
        "encoding": encoding,
        "is_bigendian": 0,
        "step": rows.shape[1],
        "data": rows.tobytes(),
    }
    np.testing.assert_array_equal(messages.picture(message), rgb)
    with pytest.raises(MessageError, match="an image of 7x5"):
        messages.picture({**message, "data": rows.tobytes()[:-4]})


def test_depth_is_in_metres_whatever_the_encoding() -> None:
    depth_m = np.random.default_rng(0).uniform(0.2, 3, (6, 5)).astype(np.float32)
    for made in (messages.image_message(depth_m, 1.0), messages.image_message((1e3 * depth_m).astype(np.uint16), 1.0)):
        np.testing.assert_allclose(messages.depth_m(made), depth_m, atol=1e-3)
    big = messages.image_message((1e3 * depth_m).astype(np.uint16).byteswap(), 1.0) | {"is_bigendian": 1}
    np.testing.assert_allclose(messages.depth_m(big), depth_m, atol=1e-3)
    depth_m[0, :3] = np.nan, np.inf, 0.0
    assert messages.depth_m(messages.image_message(depth_m, 1.0))[0, :3].tolist() == [0, 0, 0], (
        "nothing was measured there"
    )
