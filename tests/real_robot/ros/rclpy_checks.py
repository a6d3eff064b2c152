"""Our transport on real rclpy against an arm in another process. ``test_rclpy.py`` runs these in an environment that has rclpy."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from real_robot.messages import (
    Message,
    MessageError,
    conform,
    empty,
    image_message,
    stamp,
)
from real_robot.transports.base import Endpoint, Topic, TransportError
from real_robot.transports.rclpy import RclpyConfig, RclpyTransport, interface, to_plain, to_ros
from vla_rl.runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from peers import Process, free_domain, start_arm
from samples import FLOATS, JOINTS, Record, listen, same, some, until

DISTRO, DOMAIN = os.environ["PEER_DISTRO"], int(os.environ["ROS_DOMAIN_ID"])
COMMANDS = Topic("/position_controller/commands", FLOATS, "command", 50.0)
STATES = Topic("/joint_states", "sensor_msgs/msg/JointState", "state", 100.0)
REPORT = Topic("/report", "std_msgs/msg/String", "state", 10.0)
MOVE = "peer_interfaces/action/Move"


@contextmanager
def joined(domain: int = DOMAIN) -> Iterator[RclpyTransport]:
    transport = RclpyConfig(domain=domain).build()
    transport.open()
    try:
        yield transport
    finally:
        transport.close()


@pytest.fixture(scope="module")
def arm() -> Iterator[Process]:
    with start_arm(DISTRO, DOMAIN) as process:
        yield process


@pytest.fixture
def link(request: pytest.FixtureRequest, arm: Process) -> Iterator[RclpyTransport]:
    with joined() as transport:
        yield transport
        assert transport.failure is None or "expected" in request.node.keywords


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Write a measured number into the results."""
    return lambda name, value: record_property(name, f"{value:.4g}")


def reports(transport: RclpyTransport) -> Callable[[], dict[str, Any]]:
    """The newest of what the arm says it took and sees."""
    heard = listen(transport, REPORT)
    until(lambda: heard)
    return lambda: json.loads(heard[-1][0]["data"])


@pytest.mark.parametrize("kind", some(np.random.default_rng(0)))
def test_every_type_comes_back_equal(link: RclpyTransport, kind: str) -> None:
    there, back = f"/echo/{kind}/in", f"/echo/{kind}/out"
    messages = [conform(*some(np.random.default_rng(seed))[kind]) for seed in range(5)]
    name = some(np.random.default_rng(0))[kind][0]
    heard, publisher = listen(link, Topic(back, name, "state", 50.0)), link.advertise(Topic(there, name, "state", 50.0))
    until(
        lambda: (
            (link.endpoints(back), link.endpoints(there))
            == ([Endpoint(True, back, name)], [Endpoint(False, there, name)])
        )
    )
    while not heard:  # the way back may be ready later than the way there
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


def test_the_arm_follows_commands(link: RclpyTransport) -> None:
    heard, publisher = listen(link, STATES), link.advertise(COMMANDS)
    goal = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6])
    until(lambda: heard)

    def arrived() -> bool:
        publisher.publish(conform(FLOATS, {"data": goal}))
        return heard[-1][0]["name"] == JOINTS and np.allclose(heard[-1][0]["position"], goal, atol=1e-9)

    until(arrived)
    assert heard[-1][0]["position"].dtype == np.float64
    trajectory = link.advertise(
        Topic("/joint_trajectory_controller/joint_trajectory", "trajectory_msgs/msg/JointTrajectory", "state", 1.0)
    )
    until(lambda: link.endpoints("/joint_trajectory_controller/joint_trajectory"))
    time.sleep(0.3)
    point = {"positions": [1.0, 2.0], "time_from_start": stamp(0.1)}
    trajectory.publish(conform(trajectory.topic.type, {"joint_names": ["joint_6", "joint_1"], "points": [point]}))
    until(lambda: np.allclose(heard[-1][0]["position"], [2.0, *goal[1:5], 1.0], atol=1e-9))


def test_commands_offer_deadline_and_lifespan_and_readers_ask_for_none(link: RclpyTransport) -> None:
    link.advertise(COMMANDS)
    link.subscribe(STATES, lambda message, at_s: None)
    with joined() as witness:
        seen = until(lambda: witness._node.get_publishers_info_by_topic(COMMANDS.name))[0].qos_profile
        assert seen.deadline.nanoseconds == seen.lifespan.nanoseconds == 40_000_000
        assert seen.durability.name == "VOLATILE"
        assert seen.reliability.name == "RELIABLE"
        looked = witness._node.get_subscriptions_info_by_topic
        ours = until(lambda: [i for i in looked(STATES.name) if i.node_name == link.name])
        assert ours[0].qos_profile.deadline.nanoseconds > 1e15


@pytest.mark.expected
def test_a_best_effort_writer_for_a_reliable_reader_is_a_failure(link: RclpyTransport) -> None:
    heard = listen(link, Topic("/best_effort", FLOATS, "state", 10.0))
    failure = until(lambda: link.failure)
    assert (
        "incompatible QoS on /best_effort (reliability): arm publishes it as best effort, volatile; ours is reliable, volatile (state)"
        in failure
    )
    assert not heard


def test_a_best_effort_writer_suits_a_sensor(link: RclpyTransport) -> None:
    heard = listen(link, Topic("/best_effort", FLOATS, "sensor", 10.0))
    until(lambda: heard)


@pytest.mark.expected
def test_a_reader_of_latched_messages_alone_is_a_failure(link: RclpyTransport) -> None:
    link.advertise(Topic("/latched", FLOATS, "command", 10.0))
    failure = until(lambda: link.failure)
    assert "incompatible QoS on /latched (durability): arm subscribes to it as reliable, transient local; " in failure
    assert "ours is reliable, volatile, deadline 0.2 s (command)" in failure


@pytest.mark.expected
def test_a_topic_of_another_type_is_named(link: RclpyTransport) -> None:
    link.subscribe(Topic("/report", FLOATS, "state", 10.0), lambda message, at_s: None)
    assert until(lambda: link.endpoints("/report")) == [Endpoint(True, "/report", "std_msgs/msg/String")]
    failure = until(lambda: link.failure)
    assert failure == f"arm publishes /report as std_msgs/msg/String, ours is {FLOATS}"


def test_close_leaves_no_endpoint(link: RclpyTransport) -> None:
    seen = reports(link)
    with joined() as other:
        other.advertise(COMMANDS)
        other.subscribe(STATES, lambda message, at_s: None)
        publishers = lambda: [name for name, _ in seen()["graph"][COMMANDS.name]["publishers"]]  # noqa: E731
        subscribers = lambda: [name for name, _ in seen()["graph"][STATES.name]["subscribers"]]  # noqa: E731
        until(lambda: other.name in publishers() and other.name in subscribers())
        both = [Endpoint(True, *_of(COMMANDS)), Endpoint(False, *_of(COMMANDS))]
        until(lambda: link.endpoints(COMMANDS.name) == both)
    begun_s = time.monotonic()
    until(lambda: other.name not in publishers() and other.name not in subscribers())
    assert time.monotonic() - begun_s < 2.0
    until(lambda: link.endpoints(COMMANDS.name) == both[1:])
    other.close()
    with pytest.raises(TransportError, match="not open"):
        other.endpoints(COMMANDS.name)
    other.open()
    assert until(lambda: other.endpoints(STATES.name))
    other.close()


def _of(topic: Topic) -> tuple[str, str]:
    return topic.name, topic.type


def test_a_killed_peer_hangs_nothing(record: Record) -> None:
    with free_domain() as domain, joined(domain) as link, start_arm(DISTRO, domain) as doomed:
        heard = listen(link, Topic("/echo/image/out", "sensor_msgs/msg/Image", "state", 50.0))
        commands, pictures = (
            link.advertise(COMMANDS),
            link.advertise(Topic("/echo/image/in", "sensor_msgs/msg/Image", "state", 50.0)),
        )
        picture = conform("sensor_msgs/msg/Image", image_message(np.zeros((240, 320, 3), np.uint8), 1.0))

        def echoed() -> bool:
            pictures.publish(picture)
            return bool(heard)

        until(echoed)
        doomed.kill()
        slowest_s = 0.0
        for _ in range(80):
            begun_s = time.monotonic()
            commands.publish(conform(FLOATS, {"data": np.zeros(6)}))
            pictures.publish(picture)
            link.endpoints(COMMANDS.name)
            slowest_s = max(slowest_s, time.monotonic() - begun_s)
            time.sleep(0.01)
        with pytest.raises(TransportError, match=r"in time|nobody offers"):
            link.call_service("/trigger", "std_srvs/srv/Trigger", {}, 0.5)
        begun_s = time.monotonic()
        link.close()
        closed_s = time.monotonic() - begun_s
        record("slowest_publish_beside_a_dead_peer_ms", slowest_s * 1e3)
        record("close_beside_a_dead_peer_s", closed_s)
        assert slowest_s < 0.5
        assert closed_s < 5.0


def test_publishing_takes_bounded_time(link: RclpyTransport, record: Record) -> None:
    publisher = link.advertise(COMMANDS)
    seen, until_s, taken_s = reports(link), time.monotonic() + 1.0, []
    before = seen()["took"].get("commands", 0)
    until(lambda: link.endpoints(COMMANDS.name))
    while time.monotonic() < until_s:
        begun_s = time.monotonic()
        publisher.publish(conform(FLOATS, {"data": np.zeros(6)}))
        taken_s.append(time.monotonic() - begun_s)
        time.sleep(0.005)
    record("publish_median_us", np.median(taken_s) * 1e6)
    record("publish_most_us", max(taken_s) * 1e6)
    assert np.median(taken_s) < 0.005
    assert max(taken_s) < 0.2
    until(lambda: seen()["took"]["commands"] > before + 0.5 * len(taken_s))


def test_round_trips_are_quick(link: RclpyTransport, record: Record) -> None:
    kind = "joint_state"
    name, message = some(np.random.default_rng(0))[kind]
    came = threading.Event()
    link.subscribe(Topic(f"/echo/{kind}/out", name, "state", 50.0), lambda message, at_s: came.set())
    publisher = link.advertise(Topic(f"/echo/{kind}/in", name, "state", 50.0))
    sent = conform(name, message)
    taken_s = []
    for _ in range(150):
        came.clear()
        begun_s = time.monotonic()
        publisher.publish(sent)
        if came.wait(0.5):
            taken_s.append(time.monotonic() - begun_s)
        time.sleep(0.005)
    median_ms, late_ms = np.percentile(taken_s, [50, 99]) * 1e3
    record("round_trip_median_ms", median_ms)
    record("round_trip_p99_ms", late_ms)
    record("round_trip_lost", 150 - len(taken_s))
    assert len(taken_s) > 140
    assert median_ms < 50


def test_services_answer(link: RclpyTransport, record: Record) -> None:
    begun_s = time.monotonic()
    answer = link.call_service("/trigger", "std_srvs/srv/Trigger", {}, 5.0)
    record("first_call_s", time.monotonic() - begun_s)
    assert answer["success"] is True
    assert answer["message"].startswith("trigger ")
    begun_s = time.monotonic()
    for value, word in ((False, "disabled"), (True, "enabled")):
        assert link.call_service("/enable", "std_srvs/srv/SetBool", {"data": value}, 5.0) == {
            "success": True,
            "message": word,
        }
    record("two_calls_s", time.monotonic() - begun_s)
    with pytest.raises(TransportError, match="nobody offers /nothing as std_srvs/srv/Trigger"):
        link.call_service("/nothing", "std_srvs/srv/Trigger", {}, 0.3)
    with pytest.raises(MessageError, match="SetBool_Request has no field 'date'; it has data"):
        link.call_service("/enable", "std_srvs/srv/SetBool", {"date": True}, 1.0)
    for name in ("std_srvs/Trigger", "std_srvs/msg/Trigger", "no_such_srvs/srv/Trigger", "std_srvs/srv/Nothing"):
        with pytest.raises(UserError, match=name):
            link.call_service("/trigger", name, {}, 1.0)


@pytest.mark.expected
def test_a_callback_that_fails_is_reported_and_may_not_wait_for_itself(link: RclpyTransport) -> None:
    link.subscribe(STATES, lambda message, at_s: link.call_service("/trigger", "std_srvs/srv/Trigger", {}, 1.0))
    assert "called from a callback" in until(lambda: link.failure)


def trajectory(names: list[str], positions: list[float], after_s: float) -> Message:
    point = {"positions": positions, "time_from_start": stamp(after_s)}
    return {"trajectory": conform("trajectory_msgs/msg/JointTrajectory", {"joint_names": names, "points": [point]})}


@pytest.fixture
def acting() -> Iterator[RclpyTransport]:
    with free_domain() as domain, start_arm(DISTRO, domain, "--action"), joined(domain) as transport:
        yield transport


def test_actions_are_done_refused_and_cancelled(acting: RclpyTransport) -> None:
    seen, states = reports(acting), listen(acting, STATES)
    felt: list[Message] = []
    done = acting.send_goal("/move", MOVE, trajectory(["joint_1"], [0.5], 0.2), 10.0, felt.append)
    assert (done.status, done.result) == ("succeeded", {"error_code": 0, "error_string": "arrived"})
    assert len(felt) > 5
    assert felt[0]["actual"].shape == (6,)
    assert np.isclose(states[-1][0]["position"][0], 0.5)
    with pytest.raises(TransportError, match="action /move refuses the goal"):
        acting.send_goal("/move", MOVE, trajectory(["elbow"], [0.5], 0.2), 5.0)
    with pytest.raises(TransportError, match="action /move did not answer in time"):
        acting.send_goal("/move", MOVE, trajectory(["joint_1"], [1.0], 60.0), 1.0)
    until(lambda: seen()["took"].get("cancelled") == 1)
    with pytest.raises(TransportError, match=f"nobody offers /elsewhere as {MOVE}"):
        acting.send_goal("/elsewhere", MOVE, {}, 0.3)


def test_conversion_undoes_itself_and_copies_blocks(record: Record) -> None:
    for name, message in some(np.random.default_rng(1)).values():
        full = conform(name, message)
        assert same(to_plain(to_ros(interface(name, "msg"), full)), full)
        assert to_plain(interface(name, "msg")()).keys() == empty(name).keys()
    image = conform("sensor_msgs/msg/Image", image_message(np.zeros((480, 640, 3), np.uint8), 1.0))
    kind = interface("sensor_msgs/msg/Image", "msg")
    begun_s = time.perf_counter()
    for _ in range(20):
        to_plain(to_ros(kind, image))
    taken_s = (time.perf_counter() - begun_s) / 20
    record("picture_480x640x3_there_and_back_ms", taken_s * 1e3)
    assert taken_s < 0.02
    with pytest.raises(MessageError, match=r"JointState\.position wants sequence<double>"):
        to_ros(interface("sensor_msgs/msg/JointState", "msg"), {"position": ["a"]})
    # fixed arrays, and types that our table does not have
    fixed = to_ros(interface("geometry_msgs/msg/PoseWithCovariance", "msg"), {"covariance": np.arange(36)})
    assert np.array_equal(to_plain(fixed)["covariance"], np.arange(36.0))
    uuid = interface("unique_identifier_msgs/msg/UUID", "msg")
    assert to_plain(to_ros(uuid, {"uuid": bytes(range(16))})) == {"uuid": bytes(range(16))}
