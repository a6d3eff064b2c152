"""Our transport on Debian's rospy, against nodes in other processes. ``test_ros1.py`` runs these in an environment that has rospy."""

from __future__ import annotations

import sys
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mujoco
import numpy as np
import pytest

from real_robot.messages import Message, conform, image_message, stamp
from real_robot.transports.base import Endpoint, Topic, TransportError
from real_robot.transports.ros1 import Ros1Config, Ros1Transport, to_plain, to_ros

sys.path.insert(0, str(Path(__file__).parent))
from peers import start_ros1_chain, start_ros1_echo, start_ros1_master
from samples import FLOATS, JOINTS, Record, listen, same, some, until

URDF = (Path(__file__).parent / "arm.urdf").read_text()
JOINT_STATE = "sensor_msgs/msg/JointState"
COMMANDS = Topic("/echo/float64_multi_array/in", FLOATS, "command", 50.0)
ECHOED = Topic("/echo/float64_multi_array/out", FLOATS, "state", 50.0)
POSES = 60
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def master() -> Iterator[dict[str, str]]:
    with start_ros1_master() as environment:
        yield environment


@contextmanager
def joined(master: dict[str, str]) -> Iterator[Ros1Transport]:
    transport = Ros1Config(master=master["ROS_MASTER_URI"], address="127.0.0.1").build()
    transport.open()
    try:
        yield transport
    finally:
        transport.close()


@pytest.fixture(scope="module")
def echo(master: dict[str, str]) -> Iterator[None]:
    with start_ros1_echo(master):
        yield


@pytest.fixture
def link(master: dict[str, str], echo: None) -> Iterator[Ros1Transport]:
    with joined(master) as transport:
        yield transport


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Write a measured number into the results."""
    return lambda name, value: record_property(name, f"{value:.4g}")


def test_no_master_is_said_at_once() -> None:
    begun_s = time.monotonic()
    with pytest.raises(TransportError, match="no ROS 1 master answers at http://127\\.0\\.0\\.1:9"):
        Ros1Config(master="http://127.0.0.1:9").build().open()
    assert time.monotonic() - begun_s < 3.0


@pytest.mark.parametrize("kind", some(np.random.default_rng(0)))
def test_every_type_comes_back_equal(link: Ros1Transport, kind: str) -> None:
    there, back = f"/echo/{kind}/in", f"/echo/{kind}/out"
    messages = [conform(*some(np.random.default_rng(seed))[kind]) for seed in range(5)]
    name = some(np.random.default_rng(0))[kind][0]
    assert all(same(to_plain(name, to_ros(name, message)), message) for message in messages)
    heard, publisher = listen(link, Topic(back, name, "state", 50.0)), link.advertise(Topic(there, name, "state", 50.0))
    wanted = [Endpoint(True, back, name)], [Endpoint(False, there, name)]
    until(lambda: (link.endpoints(back), link.endpoints(there)) == wanted)
    while not heard:
        publisher.publish(messages[0])
        time.sleep(0.1)
    time.sleep(0.2)
    heard.clear()
    sent_s = time.monotonic()
    for message in messages:
        publisher.publish(message)
    until(lambda: len(heard) == len(messages))
    assert all(same(came, sent) for (came, _), sent in zip(heard, messages, strict=True))
    assert sent_s < heard[0][1] <= heard[-1][1] < time.monotonic()
    assert link.failure is None


def test_a_topic_of_another_type_is_named(link: Ros1Transport) -> None:
    link.subscribe(Topic("/echo/twist/out", FLOATS, "state", 10.0), lambda message, at_s: None)
    link.advertise(Topic("/echo/image/in", FLOATS, "command", 10.0))
    until(lambda: link.endpoints("/echo/twist/out") == [Endpoint(True, "/echo/twist/out", "geometry_msgs/msg/Twist")])
    until(lambda: link.endpoints("/echo/image/in") == [Endpoint(False, "/echo/image/in", "sensor_msgs/msg/Image")])
    assert until(lambda: link.failure) in (
        f"another node publishes /echo/twist/out as geometry_msgs/msg/Twist, ours is {FLOATS}",
        f"another node subscribes to /echo/image/in as sensor_msgs/msg/Image, ours is {FLOATS}",
    )


def test_close_leaves_no_endpoint_and_it_opens_again(master: dict[str, str], link: Ros1Transport) -> None:
    def ours() -> set[str]:
        with xmlrpc.client.ServerProxy(master["ROS_MASTER_URI"]) as proxy:
            publishers, subscribers, _ = proxy.getSystemState("/checks")[2]
        return {topic for topic, nodes in [*publishers, *subscribers] if link.name in nodes}

    assert not ours()
    link.advertise(COMMANDS)
    listen(link, ECHOED)
    assert ours() == {COMMANDS.name, ECHOED.name}
    link.close()
    link.close()
    assert not ours()
    with pytest.raises(TransportError, match="not open"):
        link.advertise(COMMANDS)
    link.open()
    heard = listen(link, ECHOED)
    publisher = link.advertise(COMMANDS)

    def echoed() -> bool:
        publisher.publish(conform(FLOATS, {"data": [1.0]}))
        return bool(heard)

    until(echoed)


def test_another_master_is_refused(master: dict[str, str], link: Ros1Transport) -> None:
    with (
        start_ros1_master() as other,
        pytest.raises(TransportError, match=r"this process's ROS 1 node is at .* cannot join"),
    ):
        Ros1Config(master=other["ROS_MASTER_URI"]).build().open()


def test_a_callback_that_fails_is_reported(link: Ros1Transport) -> None:
    def fail(message: Message, at_s: float) -> None:
        raise KeyError("elbow")

    link.subscribe(ECHOED, fail)
    publisher = link.advertise(COMMANDS)

    def failed() -> str | None:
        publisher.publish(conform(FLOATS, {"data": [1.0]}))
        return link.failure

    assert "a callback of the transport failed: KeyError('elbow')" in until(failed)


def test_round_trips_are_quick_and_publishing_takes_bounded_time(link: Ros1Transport, record: Record) -> None:
    came, publisher = threading.Event(), link.advertise(COMMANDS)
    link.subscribe(ECHOED, lambda message, at_s: came.set())
    until(lambda: link.endpoints(ECHOED.name))
    time.sleep(0.5)
    sent, sent_s, came_s = conform(FLOATS, {"data": np.zeros(6)}), [], []
    for _ in range(150):
        came.clear()
        begun_s = time.monotonic()
        publisher.publish(sent)
        sent_s.append(time.monotonic() - begun_s)
        assert came.wait(5.0)
        came_s.append(time.monotonic() - begun_s)
        time.sleep(0.005)
    record("publish_median_us", np.median(sent_s) * 1e6)
    record("publish_most_us", max(sent_s) * 1e6)
    record("round_trip_median_ms", np.median(came_s) * 1e3)
    record("round_trip_p99_ms", np.percentile(came_s, 99) * 1e3)
    assert np.median(sent_s) < 0.005
    assert max(sent_s) < 0.2
    assert np.median(came_s) < 0.05


def test_a_killed_peer_hangs_nothing(master: dict[str, str], record: Record) -> None:
    with joined(master) as link, start_ros1_echo(master | {"ROS_NAMESPACE": "/doomed"}) as doomed:
        image = "sensor_msgs/msg/Image"
        heard = listen(link, Topic("/echo/image/out", image, "state", 50.0))
        pictures = link.advertise(Topic("/echo/image/in", image, "state", 50.0))
        picture = conform(image, image_message(np.zeros((240, 320, 3), np.uint8), 1.0))

        def echoed() -> bool:
            pictures.publish(picture)
            return bool(heard)

        until(echoed)
        until(lambda: Endpoint(False, "/echo/image/in", image) in (link.endpoints("/echo/image/in") or ()))
        before = len(link.endpoints("/echo/image/in") or ())
        doomed.kill()
        slowest_s = 0.0
        for _ in range(80):
            begun_s = time.monotonic()
            pictures.publish(picture)
            link.endpoints("/echo/image/in")
            slowest_s = max(slowest_s, time.monotonic() - begun_s)
            time.sleep(0.01)
        until(lambda: len(link.endpoints("/echo/image/in") or ()) == before - 1)
        begun_s = time.monotonic()
        link.close()
        closed_s = time.monotonic() - begun_s
        record("slowest_publish_beside_a_dead_peer_ms", slowest_s * 1e3)
        record("close_beside_a_dead_peer_s", closed_s)
        assert slowest_s < 0.5
        assert closed_s < 5.0


def pose_of(transform: Message) -> np.ndarray:
    """The 4x4 matrix of a geometry_msgs/Transform."""
    made = np.eye(4)
    turn = transform["rotation"]
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, np.array([turn["w"], turn["x"], turn["y"], turn["z"]]))
    made[:3, :3] = rotation.reshape(3, 3)
    made[:3, 3] = [transform["translation"][axis] for axis in "xyz"]
    return made


def test_joints_that_we_command_come_back_as_the_frames_of_our_forward_kinematics(
    master: dict[str, str], record: Record
) -> None:
    """Debian's joint_state_publisher, then its robot_state_publisher (C++, KDL), against MuJoCo's reading of the same URDF."""
    model = mujoco.MjModel.from_xml_string(URDF)
    data = mujoco.MjData(model)
    assert [model.joint(i).name for i in range(model.njnt)] == JOINTS
    low_J, high_J = model.jnt_range.T
    rng = np.random.default_rng(0)
    with start_ros1_chain(master, URDF), joined(master) as link:
        frames: dict[str, tuple[str, np.ndarray]] = {}  # by child: parent, and the child in the parent

        def took(message: Message, at_s: float) -> None:
            for item in message["transforms"]:
                frames[item["child_frame_id"]] = item["header"]["frame_id"], pose_of(item["transform"])

        link.subscribe(Topic("/tf", "tf2_msgs/msg/TFMessage", "state", 50.0), took)
        states = listen(link, Topic("/joint_states", JOINT_STATE, "state", 50.0))
        publisher = link.advertise(Topic("/joint_commands", JOINT_STATE, "state", 50.0))
        until(lambda: len(frames) == len(JOINTS) and states, 20.0)
        until(lambda: link.endpoints("/joint_commands"))
        worst, waited_s = 0.0, []

        def errors() -> list[float]:
            found, T_base_link = [], np.eye(4)
            for i in range(len(JOINTS)):
                parent, T_parent_link = frames[f"link_{i + 1}"]
                assert parent == (f"link_{i}" if i else "base_link")
                T_base_link = T_base_link @ T_parent_link
                body = data.body(f"link_{i + 1}")
                found.append(np.abs(T_base_link[:3, 3] - body.xpos).max())
                found.append(np.abs(T_base_link[:3, :3] - body.xmat.reshape(3, 3)).max())
            return found

        for _ in range(POSES):
            data.qpos[:] = rng.uniform(low_J, high_J)
            mujoco.mj_forward(model, data)
            command = {"header": {"stamp": stamp(time.time())}, "name": JOINTS, "position": data.qpos.copy()}
            begun_s = time.monotonic()
            publisher.publish(conform(JOINT_STATE, command))
            while max(errors()) > TOLERANCE:
                assert time.monotonic() - begun_s < 5.0, max(errors())
                time.sleep(0.002)
            waited_s.append(time.monotonic() - begun_s)
            worst = max(worst, *errors())
        assert states[-1][0]["name"] == JOINTS
        record("poses", POSES)
        record("largest_error", worst)
        record("command_to_tf_median_ms", np.median(waited_s) * 1e3)
        assert link.failure is None


def test_without_the_master_what_is_connected_goes_on(master: dict[str, str], link: Ros1Transport) -> None:
    """Stays the last: it ends the master."""
    heard, publisher = listen(link, ECHOED), link.advertise(COMMANDS)
    until(lambda: link.endpoints(ECHOED.name))
    with xmlrpc.client.ServerProxy(master["ROS_MASTER_URI"]) as proxy:
        proxy.shutdown("/checks", "the master ends")
    until(lambda: link.endpoints(ECHOED.name) is None)
    heard.clear()

    def echoed() -> bool:
        publisher.publish(conform(FLOATS, {"data": [1.0]}))
        return bool(heard)

    until(echoed)
    begun_s = time.monotonic()
    link.close()
    assert time.monotonic() - begun_s < 6.0
    with pytest.raises(TransportError, match="no ROS 1 master answers"):
        link.open()
