"""DDS: encoded as an independent library encodes it; and against real ROS 2 in another process and another environment."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from real_robot.messages import Message, conform, image_message, message_types, stamp
from real_robot.robot import Robot, load_robot
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.base import Topic, TransportError
from real_robot.transports.dds import DdsConfig, DdsTransport, _data_type, decode, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import HERE, Process, free_domain, loopback_environment, ros_environment, start_arm
from samples import same, until

KINDS = {
    "joint_state": "sensor_msgs/msg/JointState",
    "image": "sensor_msgs/msg/Image",
    "compressed_image": "sensor_msgs/msg/CompressedImage",
    "float64_multi_array": "std_msgs/msg/Float64MultiArray",
    "twist": "geometry_msgs/msg/Twist",
    "twist_stamped": "geometry_msgs/msg/TwistStamped",
    "pose_stamped": "geometry_msgs/msg/PoseStamped",
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "point_cloud2": "sensor_msgs/msg/PointCloud2",
}


def random_message(name: str, rng: np.random.Generator, *, most: int = 5) -> Message:
    """A message with something in every field."""
    made: Message = {}
    for field in message_types()[name]:

        def one(kind: str = field.kind) -> Any:
            if "/" in kind:
                return random_message(kind, rng, most=most)
            drawn = {
                "bool": lambda: bool(rng.integers(2)),
                "string": lambda: "".join(rng.choice(list("abcxyz_ äß"), rng.integers(0, 9))),
                "uint8": lambda: int(rng.integers(256)),
                "int32": lambda: int(rng.integers(-(2**31), 2**31)),
                "uint32": lambda: int(rng.integers(2**32)),
                "float64": lambda: float(rng.normal() * 10.0 ** rng.integers(-5, 6)),
            }
            return drawn[kind]()

        many = [one() for _ in range(rng.integers(1, most))]
        made[field.name] = many if field.many else one()
    return conform(name, made)


def rosbags_message(store: Any, name: str, message: Message) -> Any:
    values = {}
    for field in message_types()[name]:
        value = message[field.name]
        if "/" in field.kind:
            value = (
                [rosbags_message(store, field.kind, v) for v in value]
                if field.many
                else rosbags_message(store, field.kind, value)
            )
        elif field.many and field.kind != "string":
            value = np.frombuffer(value, np.uint8) if field.kind == "uint8" else np.asarray(value, field.kind)
        values[field.name] = value
    return store.types[name](**values)


@pytest.mark.parametrize("name", sorted(message_types()))
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_every_type_is_encoded_as_rosbags_encodes_it(name: str, seed: int) -> None:
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    message = random_message(name, np.random.default_rng(seed))
    theirs = bytes(store.serialize_cdr(rosbags_message(store, name, message), name))
    ours = encode(name, message)
    assert ours.ljust(len(theirs), b"\0") == theirs.ljust(len(ours), b"\0")
    assert same(decode(name, theirs), message)


def test_the_table_of_types_is_that_of_ros() -> None:
    from rosbags.typesys import Stores, get_typestore

    fields = get_typestore(Stores.ROS2_JAZZY).fielddefs
    for name, ours in message_types().items():
        assert [f.name for f in ours] == [f for f, _ in fields[name][1]], name


def test_a_picture_is_encoded_at_once() -> None:
    message = conform(KINDS["image"], image_message(np.zeros((480, 640, 3), np.uint8), 1.0))
    encode(KINDS["image"], message)
    begun = time.perf_counter()
    for _ in range(10):
        decode(KINDS["image"], encode(KINDS["image"], message))
    assert (time.perf_counter() - begun) / 10 < 0.02, "byte by byte it takes 0.06 s"


@contextmanager
def joined(domain: int) -> Iterator[DdsTransport]:
    transport = DdsConfig(domain=domain).build()
    transport.open()
    try:
        yield transport
    finally:
        transport.close()


@pytest.fixture
def domain() -> Iterator[int]:
    with free_domain() as number:
        yield number


def test_two_of_ours_talk_and_leave(domain: int) -> None:
    topic = Topic("/joint_states", KINDS["joint_state"], "state", 50.0)
    heard: list[tuple[Message, float]] = []
    with joined(domain) as one, joined(domain) as other:
        other.subscribe(topic, lambda *message: heard.append(message))
        publisher = one.advertise(topic)
        until(lambda: other.endpoints(topic.name))
        message = conform(topic.type, {"name": ["a"], "position": [0.5], "header": {"stamp": stamp(3.5)}})
        until(lambda: publisher.publish(message) or heard)
        assert same(heard[0][0], message)
        assert time.monotonic() - 1 < heard[0][1] <= time.monotonic()
        assert [(e.publishes, e.type) for e in other.endpoints(topic.name) or ()] == [(True, topic.type)]
        one.close()
        one.close()
        until(lambda: not other.endpoints(topic.name))
        with pytest.raises(TransportError, match="not open"):
            one.advertise(topic)
        assert other.failure is None


def test_an_interface_that_is_not_there_is_named(domain: int) -> None:
    with pytest.raises(TransportError, match=r"domain \d+ on nowhere0"):
        DdsConfig(domain=domain, interface="nowhere0").build().open()


def test_the_machine_alone_is_reached_by_default() -> None:
    assert DdsConfig().loopback
    assert 'multicast="false"' in DdsConfig().xml()
    assert 'name="eth0" multicast="default"' in DdsConfig(interface="eth0").xml()
    with pytest.raises(ValueError, match="domain wants 0 to 232"):
        DdsConfig(domain=300)


DISTROS = ["kilted", pytest.param("jazzy", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=DISTROS)
def peer(request: pytest.FixtureRequest) -> Iterator[tuple[int, Process]]:
    """An arm on real rclpy, and the domain that it is in."""
    with free_domain() as number, start_arm(request.param, number, "--rate-hz", "100") as arm:
        yield number, arm


def report_of(transport: DdsTransport) -> Callable[[], dict[str, Any]]:
    """What the arm says of itself, as it comes."""
    heard: list[dict[str, Any]] = []
    transport.subscribe(
        Topic("/report", "std_msgs/msg/String", "state", 10.0), lambda m, _: heard.append(json.loads(m["data"]))
    )

    def newest() -> dict[str, Any]:
        count = len(heard)
        return until(lambda: len(heard) > count and heard[-1])

    return newest


def echo(transport: DdsTransport, kind: str, message: Message) -> Message:
    """What the arm sends back."""
    heard: list[Message] = []
    transport.subscribe(Topic(f"/echo/{kind}/out", KINDS[kind], "state", 20.0), lambda m, _: heard.append(m))
    publisher = transport.advertise(Topic(f"/echo/{kind}/in", KINDS[kind], "state", 20.0))
    until(lambda: publisher.publish(message) or time.sleep(0.1) or heard, 15)  # the first reply is often lost
    return heard[0]


def test_every_type_comes_back_from_ros_as_it_went(peer: tuple[int, Process]) -> None:
    rng = np.random.default_rng(0)
    with joined(peer[0]) as transport:
        for kind, type_ in KINDS.items():
            message = random_message(type_, rng)
            if kind == "image":
                message = conform(type_, image_message(rng.integers(0, 255, (240, 320, 3), np.uint8), 5.0))
            assert same(echo(transport, kind, message), message), kind
        assert transport.failure is None


ARM = "position_group_arm"


def arm_robot(domain: int, **changes: Any) -> RosRobotConfig:
    config = load_robot(ARM)
    assert isinstance(config, RosRobotConfig)
    patient = replace(
        config.safety, joints_age_s=0.5, heartbeat_s=1.0
    )  # the suite shares two cores with all that it starts
    return replace(config, transport=DdsConfig(domain=domain), safety=patient, **changes)


def test_a_robot_on_real_ros_goes_where_it_is_sent(peer: tuple[int, Process]) -> None:
    config = arm_robot(peer[0])
    robot = Robot(config)
    robot.connect()
    try:
        goal_A = robot.state.command_A + np.array([0.1, -0.1, 0.05, 0.0, 0.02, -0.05])
        pace, ages = Pace(config.action.control_hz), []
        for _ in range(150):
            pace.wait()
            ages.append(robot.observe().ages_s["joints"][1])
            decision = robot.send(goal_A)
            assert decision.fault is None
        np.testing.assert_allclose(decision.sent_A, goal_A, atol=1e-6)
        until(lambda: abs(robot.observe().measured_A - goal_A).max() < 1e-3)
        assert np.median(ages) < 0.1
        state = robot.observe().features["observation.state"]
        np.testing.assert_allclose(state[:6], goal_A, atol=1e-3)
    finally:
        robot.stop()


def test_endpoints_are_gone_from_the_robots_graph_when_we_leave(peer: tuple[int, Process]) -> None:
    topic = Topic("/position_controller/commands", "std_msgs/msg/Float64MultiArray", "command", 100.0)
    with joined(peer[0]) as watcher:
        report = report_of(watcher)
        with joined(peer[0]) as transport:
            transport.advertise(topic)
            until(lambda: report()["graph"][topic.name]["publishers"])
        until(lambda: not report()["graph"][topic.name]["publishers"], 3.0)


TIME_OF_KILTED = bytes(
    (212, 133, 79, 19, 174, 243, 45, 254, 33, 87, 243, 230, 50, 13)
)  # its identifier, as nodes send it


def test_no_type_of_ours_is_one_that_nodes_of_ros_ask_for() -> None:
    for name in message_types():
        told = _data_type(name).__idl__
        told.populate()
        identifiers = [
            bytes(pair.type_identifier.value) for pair in told.get_type_mapping().identifier_object_pair_complete
        ]
        assert identifiers
        assert TIME_OF_KILTED not in identifiers, name


@pytest.mark.slow
def test_nodes_of_ros_meet_as_before_while_we_are_there() -> None:
    """Cyclone answers what nodes ask each other about types: with parts of an answer, nodes of Kilted waited for the rest for ever."""
    with free_domain() as number, start_arm("kilted", number), joined(number) as transport:
        for kind, type_ in KINDS.items():
            transport.advertise(Topic(f"/ours/{kind}", type_, "state", 10.0))
        argv, environment = (
            [str(ros_environment("kilted")), str(HERE / "late_node.py")],
            loopback_environment("kilted", number),
        )
        nodes = [
            subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        told = [node.communicate(timeout=60) for node in nodes]
    assert [out.strip() for out, _ in told] == ["heard"] * 3
    assert not [err for _, err in told if "Inconsistent TypeObject" in err]


def test_a_second_publisher_of_commands_is_refused(peer: tuple[int, Process]) -> None:
    with joined(peer[0]) as somebody:
        somebody.advertise(Topic("/position_controller/commands", "std_msgs/msg/Float64MultiArray", "command", 10.0))
        robot = Robot(arm_robot(peer[0]))
        try:
            with pytest.raises(
                TransportError, match="second publisher: somebody else sends commands on /position_controller/commands"
            ):
                robot.connect()
        finally:
            robot.stop()


def test_a_publisher_that_comes_later_is_a_fault(peer: tuple[int, Process]) -> None:
    robot = Robot(arm_robot(peer[0]))
    robot.connect()
    try:
        assert robot.observe().broken == ()
        with joined(peer[0]) as somebody:
            somebody.advertise(
                Topic("/position_controller/commands", "std_msgs/msg/Float64MultiArray", "command", 10.0)
            )
            assert "second publisher" in until(lambda: robot.observe().broken)[0]
            assert "second publisher" in str(robot.send(None).fault)
    finally:
        robot.stop()


def changed_topic(config: RosRobotConfig, key: str, **changes: Any) -> RosRobotConfig:
    topics = {**config.map.topics, key: replace(config.map.topics[key], **changes)}
    return replace(config, map=replace(config.map, topics=topics))


def test_a_topic_of_another_type_is_refused_naming_both(peer: tuple[int, Process]) -> None:
    config = arm_robot(peer[0])
    other = changed_topic(config, "arm", topic="/joint_trajectory_controller/joint_trajectory")
    robot = Robot(other)
    with pytest.raises(
        TransportError,
        match=r"is of type trajectory_msgs/msg/JointTrajectory on the robot's side, the map .*Float64MultiArray",
    ):
        robot.connect()
    robot.stop()


def test_a_rate_that_is_not_the_maps_is_refused(peer: tuple[int, Process]) -> None:
    robot = Robot(changed_topic(arm_robot(peer[0]), "joints", hz=400.0))
    with pytest.raises(
        UserError, match=r"/joint_states arrives at \d+\.\d Hz, the map of 'six_axis_arm_group' says 400 Hz"
    ):
        robot.connect()
    robot.stop()


def test_a_missing_joint_is_refused_naming_both(peer: tuple[int, Process]) -> None:
    config = arm_robot(peer[0])
    names = ("joint_1", "joint_2", "elbow", "joint_4", "joint_5", "joint_6")
    measured = {key: replace(part, names=names) for key, part in config.map.measured.items()}
    robot = Robot(replace(config, map=replace(config.map, measured=measured)))
    with pytest.raises(UserError, match=r"has the joints joint_1, .*joint_6; the map wants joint_1, joint_2, elbow"):
        robot.connect()
    robot.stop()


def test_quality_that_does_not_match_is_an_error_on_either_side(peer: tuple[int, Process]) -> None:
    with joined(peer[0]) as transport:
        transport.subscribe(Topic("/best_effort", KINDS["float64_multi_array"], "state", 10.0), lambda *_: None)
        failure = until(lambda: transport.failure)
        assert "incompatible QoS on /best_effort: the other side offers less than we ask for in reliability" in failure
    with joined(peer[0]) as transport:
        transport.advertise(Topic("/latched", KINDS["float64_multi_array"], "command", 10.0))
        failure = until(lambda: transport.failure)
        assert "incompatible QoS on /latched: the other side asks for more than we offer in durability" in failure


def test_a_killed_robot_is_noticed_by_our_own_watchdog(tmp_path: Path) -> None:
    with free_domain() as number, start_arm("kilted", number, "--rate-hz", "100") as arm:
        robot = Robot(arm_robot(number), tmp_path / "log.jsonl")
        robot.connect()
        pace, killed_s = Pace(100.0), 0.0
        for step in range(300):
            pace.wait()
            robot.observe()
            decision = robot.send(robot.state.command_A + 0.001)
            if step == 30:
                killed_s = time.monotonic()
                arm.popen.kill()
            if decision.fault:
                break
        assert "stale observation: 'joints'" in str(robot.fault)
        assert time.monotonic() - killed_s < 1.5
        robot.stop()
