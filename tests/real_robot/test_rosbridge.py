"""The rosbridge transport against a small server of our own, and against the real one that ROSBRIDGE_URL (and ROSBRIDGE_ROS) name."""

from __future__ import annotations

import json
import math
import os
import secrets
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest

from real_robot.messages import Message, MessageError, conform
from real_robot.transports import _rosbridge_mail
from real_robot.transports._rosbridge_wire import Fragments, FrameError, from_wire, parse, to_wire
from real_robot.transports.base import Endpoint, Topic, Transport, TransportConfig, TransportError
from real_robot.transports.rosbridge import RosbridgeConfig, RosbridgeTransport
from vla_rl.runtime.config import decode
from vla_rl.runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parent / "ros"))
sys.path.insert(0, str(Path(__file__).parent))
from rosbridge_server import Proxy, Server
from samples import same, some, until

JOINTS, TWIST = "sensor_msgs/msg/JointState", "geometry_msgs/msg/Twist"
STATE = Topic("/joint_states", JOINTS, "state", 50.0)
COMMAND = Topic("/cmd", TWIST, "command", 20.0)
NUMBERS = Topic("/numbers", "std_msgs/msg/Float64MultiArray", "state", 50.0)
URL, ROS = os.environ.get("ROSBRIDGE_URL"), int(os.environ.get("ROSBRIDGE_ROS", "2"))
SAMPLES = some(np.random.default_rng(0))
SAMPLES["joint_state"][1]["velocity"] = [0.5]  # JSON has no infinity
needs_real = pytest.mark.skipif(URL is None, reason="ROSBRIDGE_URL names no rosbridge server")


class Opened:
    """Opens transports and closes them in the end."""

    def __init__(self) -> None:
        self.all: list[RosbridgeTransport] = []

    def __call__(self, url: str, **options: Any) -> RosbridgeTransport:
        options = {"link_timeout_s": 1.0, "reconnect_s": 0.3, "rosapi_s": 0.0} | options
        transport = RosbridgeConfig(url=url, **options).build()
        self.all.append(transport)
        transport.open()
        return transport


@pytest.fixture
def opened() -> Iterator[Opened]:
    made = Opened()
    yield made
    for transport in made.all:
        transport.close()
    names = [t.name for t in threading.enumerate()]
    assert not [name for name in names if name.startswith(("rosbridge-r", "rosbridge-d", "rosbridge-t"))]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


def listen(transport: RosbridgeTransport, topic: Topic) -> list[tuple[Message, float]]:
    got: list[tuple[Message, float]] = []
    transport.subscribe(topic, lambda message, at: got.append((message, at)))
    return got


# messages


@pytest.mark.parametrize("encoding", ["json", "cbor"])
@pytest.mark.parametrize("ros", [1, 2])
def test_every_kind_of_message_comes_back_as_it_went(opened: Opened, ros: int, encoding: str) -> None:
    with Server(ros) as server:
        transport = opened(server.url, ros=ros, encoding=encoding)
        for kind, (name, message) in SAMPLES.items():
            topic = Topic(f"/loop/{kind}", name, "state", 50.0)
            got, publisher = listen(transport, topic), transport.advertise(topic)
            before_s = time.monotonic()
            publisher.publish(message)
            until(lambda got=got: got)
            assert same(got[0][0], conform(name, message)), kind
            assert before_s < got[0][1] < time.monotonic()
            for field in message:
                assert type(got[0][0][field]) is type(conform(name, message)[field]), (kind, field)
        assert transport.failure is None
        assert isinstance(transport, Transport)


@pytest.mark.parametrize("ros", [1, 2])
def test_types_and_times_have_the_names_of_the_servers_ros(opened: Opened, ros: int) -> None:
    with Server(ros) as server:
        transport = opened(server.url, ros=ros)
        transport.advertise(STATE).publish(SAMPLES["joint_state"][1])
        sent = until(lambda: server.said("publish"))[0]
        names = ("secs", "nsecs") if ros == 1 else ("sec", "nanosec")
        assert sent["msg"]["header"]["stamp"] == dict(zip(names, (1234, 500_000_000), strict=True))
        assert server.said("advertise")[0]["type"] == JOINTS.replace("/msg/", "/" if ros == 1 else "/msg/")


def test_a_command_is_never_latched_and_of_depth_one(opened: Opened, server: Server) -> None:
    transport = opened(server.url, queue_length=2, throttle_ms=5)
    transport.advertise(COMMAND).publish({"linear": {"x": 1.0}})
    told = until(lambda: server.said("advertise") + server.said("publish"), 2.0)
    assert all(m["latch"] is False and m["queue_size"] == 1 for m in told)
    qos = server.said("advertise")[0]["qos"]
    assert qos == {
        "history": "keep_last",
        "depth": 1,
        "reliability": "reliable",
        "durability": "volatile",
        "deadline": 0.1,
        "lifespan": 0.1,
    }
    listen(transport, STATE)
    asked = until(lambda: server.said("subscribe", STATE.name))[0]
    assert (asked["queue_length"], asked["throttle_rate"], asked["compression"]) == (2, 5, "cbor")
    assert server.said("set_level")[0]["level"] == "warning"


def test_ros_1_sends_strings_as_json_since_its_cbor_cannot(opened: Opened) -> None:
    with Server(1) as server:
        transport = opened(server.url, ros=1, encoding="cbor")
        for topic in (STATE, COMMAND, NUMBERS):
            listen(transport, topic)
        until(lambda: len(server.said("subscribe")) == 4)
        said = {m["topic"]: m["compression"] for m in server.said("subscribe") if m["topic"] != "/rosout"}
        assert said == {STATE.name: "none", COMMAND.name: "cbor", NUMBERS.name: "cbor"}


@pytest.mark.parametrize("encoding", ["json", "cbor"])
def test_what_is_not_finite_comes_as_nan_from_json_and_as_itself_from_cbor(
    opened: Opened, server: Server, encoding: str
) -> None:
    transport = opened(server.url, encoding=encoding)
    got, twists = listen(transport, NUMBERS), listen(transport, COMMAND)
    until(lambda: server.said("subscribe", COMMAND.name))
    server.send(NUMBERS.name, {"data": [1.0, math.nan, math.inf]})
    server.send(COMMAND.name, {"linear": {"x": math.nan}})
    until(lambda: got and twists)
    expected = [1.0, math.nan, math.nan if encoding == "json" else math.inf]
    np.testing.assert_array_equal(got[0][0]["data"], expected)
    assert math.isnan(twists[0][0]["linear"]["x"])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"linear": {"x": math.nan}}, r"/cmd: linear\.x is nan, and rosbridge carries finite numbers only"),
        ({"linear": {"x": "fast"}}, r"/cmd: .*x wants float64, got 'fast'"),
        ({"speed": 1.0}, "/cmd: .* has no field 'speed'"),
    ],
)
def test_a_message_that_does_not_fit_is_not_sent(opened: Opened, server: Server, message: Message, said: str) -> None:
    publisher = opened(server.url).advertise(COMMAND)
    with pytest.raises(MessageError, match=said):
        publisher.publish(message)
    publisher.publish({})
    assert len(until(lambda: server.said("publish"))) == 1


@pytest.mark.parametrize("tag", [69, 77, 82, 85])
def test_arrays_of_rfc_8746_come_in_their_order_of_bytes(tag: int) -> None:
    values = [1, 2, 258]
    kind = {69: "<u2", 77: "<i2", 82: ">f8", 85: "<f4"}[tag]
    made = parse(cbor2.dumps({"op": "x", "v": cbor2.CBORTag(tag, np.array(values, kind).tobytes())}), cbor2)["v"]
    assert made.tolist() == values
    assert made.dtype.isnative


def test_both_names_of_times_and_lists_of_bytes_are_taken() -> None:
    stamps = [{"secs": 3, "nsecs": 4}, {"sec": 3, "nanosec": 4}]
    for stamp in stamps:
        image = {"header": {"seq": 1, "stamp": stamp, "frame_id": "a"}, "format": "jpeg", "data": [1, 2, 255]}
        made = from_wire("sensor_msgs/msg/CompressedImage", image)
        assert made["header"] == {"stamp": {"sec": 3, "nanosec": 4}, "frame_id": "a"}
        assert made["data"] == b"\x01\x02\xff"
    assert to_wire("builtin_interfaces/msg/Time", {"sec": 3}, 1) == {"secs": 3, "nsecs": 0}


# callbacks


def test_a_slow_consumer_gets_the_newest(opened: Opened, server: Server) -> None:
    transport = opened(server.url)
    go, got = threading.Event(), []

    def slow(message: Message, at: float) -> None:
        got.append(int(message["data"][0]))
        go.wait(5.0)

    transport.subscribe(NUMBERS, slow)
    quick = listen(transport, COMMAND)
    until(lambda: server.said("subscribe", COMMAND.name))
    for i in range(100):
        server.send(NUMBERS.name, {"data": [float(i)]})
        until(lambda: got)
    server.send(COMMAND.name, {})
    time.sleep(0.2)
    go.set()
    until(lambda: quick)
    assert got == [0, 99]


def test_callbacks_come_one_after_the_other_in_one_thread(opened: Opened, server: Server) -> None:
    transport = opened(server.url, queue_length=1000)
    threads, got = set(), []

    def note(message: Message, at: float) -> None:
        threads.add(threading.current_thread().name)
        got.append(at)

    for topic in (NUMBERS, COMMAND):
        transport.subscribe(topic, note)
    until(lambda: server.said("subscribe", COMMAND.name))
    for _ in range(50):
        server.send(NUMBERS.name, {})
        server.send(COMMAND.name, {})
    until(lambda: len(got) == 100)
    assert threads == {"rosbridge-deliver"}
    assert got == sorted(got)


def fail(message: Message, at: float) -> None:
    raise ZeroDivisionError("no")


def test_a_callback_that_fails_is_told_and_the_others_go_on(opened: Opened, server: Server) -> None:
    transport = opened(server.url)
    transport.subscribe(NUMBERS, fail)
    got = listen(transport, COMMAND)
    until(lambda: server.said("subscribe", COMMAND.name))
    server.send(NUMBERS.name, {})
    server.send(COMMAND.name, {})
    until(lambda: got)
    assert transport.failure == "a callback of the transport failed: ZeroDivisionError('no')"


# what the server says


@pytest.mark.parametrize("says", ["status", "log"])
@pytest.mark.parametrize("ros", [1, 2])
def test_a_topic_of_another_type_is_told_with_both_types(opened: Opened, ros: int, says: Any) -> None:
    with Server(ros, says) as server:
        transport = opened(server.url, ros=ros)
        server.types["/cmd"] = "std_msgs/String" if ros == 1 else "std_msgs/msg/String"
        publisher = transport.advertise(COMMAND)
        said = until(lambda: transport.failure)
        assert f"refuses to advertise /cmd as {TWIST}: " in said
        assert f"already established with type {server.types['/cmd']}" in said
        with pytest.raises(TransportError, match=r"^/cmd: the server at .* refuses to advertise /cmd"):
            publisher.publish({})
        assert not server.said("publish")


@pytest.mark.parametrize("says", ["status", "log"])
def test_a_refused_subscription_is_told(opened: Opened, says: Any) -> None:
    with Server(2, says) as server:
        transport = opened(server.url)
        server.types[STATE.name] = "package/msg/Unknown"
        listen(transport, STATE)
        assert f"refuses to subscribe {STATE.name} as {JOINTS}" in until(lambda: transport.failure)


def test_a_line_of_the_log_counts_where_it_is_about_us(opened: Opened, server: Server) -> None:
    transport = opened(server.url)
    transport.advertise(COMMAND)
    until(lambda: server.said("advertise"))
    server.log("[Client 77] [id: x] advertise: Tried to register topic /cmd with type a")
    server.log("[Client 77] No match found for topic, cancelling advertisement of: /cmd", 30)
    server.log("[Client 0] Subscribed to /cmd", 20)
    server.log("the arm's topic [/cmd] is late", node="driver")
    server.log("New publisher for [/cmd/other], which is latched", 30)
    time.sleep(0.2)
    assert transport.failure is None
    server.log("[Client 0] No match found for topic, cancelling advertisement of: /cmd", 30)
    said = until(lambda: transport.failure)
    assert said.endswith("says: No match found for topic, cancelling advertisement of: /cmd")


def test_a_latched_publisher_of_somebody_else_is_told(opened: Opened, server: Server) -> None:
    transport = opened(server.url)
    publisher = transport.advertise(COMMAND)
    until(lambda: server.said("advertise"))
    server.log("New non-latched publisher registration for topic [/cmd] which is already registered as latched.", 30)
    assert "already registered as latched" in until(lambda: transport.failure)
    with pytest.raises(TransportError, match="already registered as latched"):
        publisher.publish({})  # it would move a robot that joins later


def test_the_other_ros_is_told(opened: Opened) -> None:
    with Server(1) as server, pytest.raises(TransportError, match="runs ROS 1, the option ros says 2"):
        opened(server.url, ros=2)


def test_a_server_that_says_nothing_is_refused_unless_allowed(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("real_robot.transports._rosbridge_voice.TRY_S", 0.05)
    with Server(2, "nothing") as server:
        with pytest.raises(TransportError, match="its /rosout does not reach us, so what it refuses would go unseen"):
            opened(server.url)
        transport = opened(server.url, allow_silent=True)
        assert transport.blind
        transport.advertise(COMMAND).publish({})
        assert until(lambda: server.said("publish"))


@pytest.mark.parametrize(
    "frame",
    [
        "{",
        "[1, 2]",
        '{"topic": "/cmd"}',
        '{"op": 3}',
        "[" * 100_000,
        b"\xff\x00",
        b"",
        cbor2.dumps([1]),
        cbor2.dumps({"op": "publish", "msg": cbor2.CBORTag(86, b"123")}),
        cbor2.dumps({"op": "publish", "msg": cbor2.CBORTag(35, "(a+)+")}),
        json.dumps({"op": "fragment", "id": "a", "num": 3, "total": 2, "data": "x"}),
        json.dumps({"op": "fragment", "id": "a", "num": 0, "total": 1, "data": "{"}),
        json.dumps({"op": "fragment", "id": "a"}),
    ],
    ids=lambda frame: repr(frame)[:30],
)
def test_a_malformed_frame_is_told_and_ends_nothing(opened: Opened, server: Server, frame: str | bytes) -> None:
    transport = opened(server.url)
    got = listen(transport, NUMBERS)
    until(lambda: server.said("subscribe", NUMBERS.name))
    server.raw(frame)
    server.send(NUMBERS.name, {})
    until(lambda: got)
    assert transport.failure is not None
    assert transport.failure.startswith(f"the server at {server.url} sent ")
    assert len(transport.failure) < 400
    assert transport.reconnects == 0


def test_what_the_receiving_thread_cannot_take_in_ends_the_link_not_the_thread(
    opened: Opened, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = opened(server.url)
    got = listen(transport, NUMBERS)
    until(lambda: server.said("subscribe", NUMBERS.name))
    monkeypatch.setattr(transport._mail, "put", fail)
    server.send(NUMBERS.name, {})
    until(lambda: "is lost: TypeError" in (transport.failure or "") or transport.reconnects)
    monkeypatch.undo()
    until(lambda: transport.failure is None and len(server.said("subscribe", NUMBERS.name)) == 2)
    server.send(NUMBERS.name, {})
    until(lambda: got)


@pytest.mark.parametrize(
    "message",
    [
        None,
        {"data": 3},
        {"data": "text"},
        {"data": ["a"]},
        {"data": [[1.0]], "layout": 3},
        {"other": 1},
    ],
    ids=repr,
)
def test_a_message_that_does_not_fit_its_type_is_told_by_its_topic(
    opened: Opened, server: Server, message: Any
) -> None:
    transport = opened(server.url)
    got = listen(transport, NUMBERS)
    until(lambda: server.said("subscribe", NUMBERS.name))
    server.raw(json.dumps({"op": "publish", "topic": NUMBERS.name, "msg": message}))
    server.raw(json.dumps({"op": "publish", "topic": ["no", "topic"], "msg": message}))
    assert "a message on /numbers: " in until(lambda: transport.failure)
    server.send(NUMBERS.name, {})
    until(lambda: got)


# sizes


def test_large_messages_go_in_fragments_both_ways(opened: Opened) -> None:
    with Server(fragment=300) as server:
        transport = opened(server.url, encoding="json", fragment_bytes=1000)
        name, image = SAMPLES["image"]
        topic = Topic("/image", name, "state", 50.0)
        got, publisher = listen(transport, topic), transport.advertise(topic)
        publisher.publish(image)
        until(lambda: got)
        assert same(got[0][0], conform(name, image))
        assert transport.failure is None


def gather(largest: int, frames: list[dict[str, Any]]) -> None:
    fragments = Fragments(largest)
    for frame in frames:
        fragments.add(frame)


def test_fragments_do_not_gather_without_end() -> None:
    of_one = [{"id": "a", "num": i, "total": 200, "data": ""} for i in range(100)]
    of_many = [{"id": i, "num": 0, "total": 2, "data": ""} for i in range(100)]
    with pytest.raises(FrameError, match="characters in fragments of 1 messages; the most is 1000"):
        gather(1000, of_one)
    with pytest.raises(FrameError, match="in fragments of 17 messages"):
        gather(10**6, of_many)


def test_a_message_that_is_too_large_is_told_for_good(opened: Opened, server: Server) -> None:
    transport = opened(server.url, max_message_bytes=5000)
    listen(transport, NUMBERS)
    until(lambda: server.said("subscribe", NUMBERS.name))
    server.send(NUMBERS.name, {"data": np.zeros(1000)})
    until(lambda: transport.reconnects)
    until(lambda: len(server.said("subscribe", NUMBERS.name)) == 2)
    time.sleep(0.1)
    assert transport.failure is not None
    assert "more than 5000 bytes; subscribe to compressed pictures, or raise max_message_bytes" in transport.failure


def test_a_message_that_the_server_finds_too_large_is_told(opened: Opened) -> None:
    with Server(largest=5000) as server:
        transport = opened(server.url)
        publisher = transport.advertise(NUMBERS)
        publisher.publish({"data": np.zeros(2000)})
        until(lambda: transport.reconnects)
        assert "lower fragment_bytes" in (transport.failure or "")


# the link


def test_after_a_restart_all_is_restored_and_nothing_is_sent_meanwhile(opened: Opened) -> None:
    with Server() as first:
        transport = opened(first.url)
        got, publisher = listen(transport, STATE), transport.advertise(COMMAND)
        publisher.publish({"linear": {"x": 1.0}})
        until(lambda: first.said("publish"))
        killed_s = time.monotonic()
    said = until(lambda: transport.failure)
    assert time.monotonic() - killed_s < 1.0
    assert f"the link to {first.url} is lost: " in said
    for _ in range(3):
        with pytest.raises(TransportError, match=r"^/cmd: the link to .* is lost: "):
            publisher.publish({"linear": {"x": 2.0}})
        time.sleep(0.1)
    late = listen(transport, NUMBERS)  # asked for while the link is lost
    with Server(port=first.port) as second:
        until(lambda: transport.failure is None)
        assert transport.reconnects == 1
        publisher.publish({"linear": {"x": 3.0}})
        until(lambda: second.said("publish"))
        assert [m["msg"]["linear"]["x"] for m in second.said("publish")] == [3.0]
        assert [m["topic"] for m in second.said("advertise")] == ["/cmd"]
        assert (
            second.said("advertise")[0]["id"] != first.said("advertise")[0]["id"]
        )  # ROS 2 repeats the last lines of its log
        second.send(STATE.name, {"position": [1.0]})
        second.send(NUMBERS.name, {"data": [1.0]})
        until(lambda: got and late)


def test_a_frozen_link_is_noticed_and_made_again(opened: Opened, server: Server) -> None:
    with Proxy(server.port) as proxy:
        transport = opened(proxy.url, link_timeout_s=1.0)
        got, publisher = listen(transport, NUMBERS), transport.advertise(COMMAND)
        time.sleep(1.5)  # an idle link is no dead one
        assert transport.failure is None
        proxy.freeze()
        frozen_s = time.monotonic()
        while transport.failure is None:
            assert time.monotonic() - frozen_s < 2.0
            time.sleep(0.01)
        assert 0.5 < time.monotonic() - frozen_s < 1.5
        assert "nothing has come from it for " in transport.failure
        with pytest.raises(TransportError, match="is lost: nothing has come"):
            publisher.publish({})
        proxy.thaw()
        until(lambda: transport.failure is None)
        until(lambda: server.said("subscribe", NUMBERS.name)[1:])
        server.send(NUMBERS.name, {})
        until(lambda: got)


def test_a_sender_is_not_held_up_for_longer_than_the_link_may_be_silent(opened: Opened, server: Server) -> None:
    with Proxy(server.port) as proxy:
        transport = opened(proxy.url, link_timeout_s=0.5)
        publisher = transport.advertise(NUMBERS)
        proxy.freeze()
        begun_s = time.monotonic()

        def flood() -> None:
            for _ in range(1000):
                publisher.publish({"data": np.ones(20_000)})

        with pytest.raises(TransportError):
            flood()
        assert time.monotonic() - begun_s < 3.0
        proxy.thaw()
        until(lambda: transport.failure is None)


def test_a_subscription_that_brings_nothing_is_made_anew(
    opened: Opened, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rosbridge_mail, "SILENT_S", 0.3)
    transport = opened(server.url)
    listen(transport, STATE)
    got = listen(transport, NUMBERS)
    until(lambda: server.said("subscribe", NUMBERS.name))
    server.send(NUMBERS.name, {})
    until(lambda: got)
    until(lambda: len(server.said("subscribe", STATE.name)) == 3)
    assert len(server.said("unsubscribe", STATE.name)) == 2
    assert len(server.said("subscribe", NUMBERS.name)) == 1


def test_nobody_there_is_told_in_one_line(opened: Opened) -> None:
    with Server() as server:
        pass
    with pytest.raises(TransportError, match=f"^no rosbridge server answers at {server.url}: .*refused"):
        opened(server.url)


def test_closing_takes_all_back_and_may_be_done_again(opened: Opened, server: Server) -> None:
    transport = opened(server.url)
    got, publisher = listen(transport, STATE), transport.advertise(COMMAND)
    transport.close()
    transport.close()
    until(lambda: not server.clients)
    assert [m["topic"] for m in server.said("unadvertise")] == ["/cmd"]
    assert {m["topic"] for m in server.said("unsubscribe")} == {STATE.name, "/rosout"}
    with pytest.raises(TransportError, match="the transport is not open"):
        publisher.publish({})
    with pytest.raises(TransportError, match="the transport is not open"):
        transport.advertise(COMMAND)
    assert not got
    assert transport.failure is None


def test_closing_a_lost_or_frozen_link_does_not_hang(opened: Opened, server: Server) -> None:
    with Proxy(server.port) as proxy:
        transport = opened(proxy.url, link_timeout_s=10.0)
        transport.advertise(COMMAND)
        proxy.freeze()
        begun_s = time.monotonic()
        transport.close()
        assert time.monotonic() - begun_s < 3.0


def test_one_that_was_never_opened_can_be_closed(server: Server) -> None:
    transport = RosbridgeConfig(url=server.url).build()
    with pytest.raises(TransportError, match="the transport is not open"):
        transport.subscribe(STATE, lambda message, at: None)
    transport.close()


def test_one_topic_has_one_type_and_any_number_of_listeners(opened: Opened, server: Server) -> None:
    transport = opened(server.url)
    one, two = listen(transport, NUMBERS), listen(transport, NUMBERS)
    until(lambda: server.said("subscribe", NUMBERS.name))
    server.send(NUMBERS.name, {})
    until(lambda: one and two)
    other = Topic(NUMBERS.name, TWIST, "state", 50.0)
    with pytest.raises(UserError, match="/numbers is subscribed to as std_msgs/msg/Float64MultiArray, got geometry"):
        listen(transport, other)
    transport.advertise(COMMAND)
    with pytest.raises(UserError, match="/cmd is advertised as geometry_msgs/msg/Twist, got std_msgs"):
        transport.advertise(Topic("/cmd", NUMBERS.type, "command", 20.0))


# services


def rosapi(
    publishers: dict[str, list[str]], subscribers: dict[str, list[str]], types: dict[str, str]
) -> dict[str, Any]:
    return {
        "/rosapi/topics": lambda _: {"topics": list(types), "types": list(types.values())},
        "/rosapi/publishers": lambda asked: {"publishers": publishers.get(asked["topic"], [])},
        "/rosapi/subscribers": lambda asked: {"subscribers": subscribers.get(asked["topic"], [])},
    }


def test_endpoints_are_those_of_others(opened: Opened) -> None:
    us = "/rosbridge_websocket"
    types = {"/cmd": TWIST, STATE.name: JOINTS}
    services = rosapi(
        {"/cmd": [us, "/joystick"], STATE.name: ["/driver"]}, {"/cmd": ["/driver"], STATE.name: [us]}, types
    )
    with Server(services=services) as server:
        transport = opened(server.url, rosapi_s=0.1)
        transport.advertise(COMMAND)
        listen(transport, STATE)
        until(lambda: (transport.endpoints(STATE.name) or ()) and transport.endpoints("/cmd"))
        assert transport.endpoints(STATE.name) == [Endpoint(True, STATE.name, JOINTS)]
        assert transport.endpoints("/cmd") == [Endpoint(True, "/cmd", TWIST), Endpoint(False, "/cmd", TWIST)]
        assert transport.endpoints("/unknown") is None
        assert transport.failure is None
        types["/cmd"] = "std_msgs/msg/String"
        assert until(lambda: transport.failure) == f"others have /cmd as std_msgs/msg/String, ours is {TWIST}"
        types["/cmd"] = TWIST
        until(lambda: transport.failure is None)


def test_a_rosapi_that_keeps_to_no_types_ends_nothing(opened: Opened) -> None:
    answers = iter([{"topics": None}, {"topics": 3, "types": 4}, {"topics": ["/cmd"], "types": [TWIST]}])
    services = rosapi({}, {"/cmd": ["/driver"]}, {}) | {"/rosapi/topics": lambda _: next(answers)}
    with Server(services=services) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("real_robot.transports.rosbridge.ABSENT_S", 0.1)
        transport = opened(server.url, rosapi_s=5.0)
        transport.advertise(COMMAND)
        assert until(lambda: transport.endpoints("/cmd")) == [Endpoint(False, "/cmd", TWIST)]


def test_without_rosapi_nothing_is_known_of_others(opened: Opened, server: Server) -> None:
    transport = opened(server.url, rosapi_s=0.1)
    transport.advertise(COMMAND)
    until(lambda: server.said("call_service"))
    time.sleep(0.3)
    assert transport.endpoints("/cmd") is None
    assert transport.failure is None
    assert len(server.said("call_service")) == 1  # each try is an error in the server's log


def test_services_answer_fail_and_hang_without_holding_up_commands(opened: Opened) -> None:
    def add(asked: dict[str, Any]) -> dict[str, Any]:
        return {"sum": asked["a"] + sum(asked["b"])}

    def hang(asked: dict[str, Any]) -> dict[str, Any]:
        time.sleep(1.0)
        return {}

    with Server(services={"/add": add, "/hang": hang}) as server:
        transport = opened(server.url)
        publisher = transport.advertise(COMMAND)
        assert transport.call_service("/add", {"a": 1, "b": np.array([2, 3])}) == {"sum": 6}
        with pytest.raises(TransportError, match="service /none failed: Service /none does not exist"):
            transport.call_service("/none", {})
        waiting = threading.Thread(target=lambda: transport.call_service("/hang", {}))
        waiting.start()
        publisher.publish({})
        until(lambda: server.said("publish"), 0.5)
        waiting.join()
        with pytest.raises(TransportError, match=r"service /hang did not answer within 0\.2 s"):
            transport.call_service("/hang", {}, timeout_s=0.2)
        with pytest.raises(UserError, match="plain data and finite numbers only"):
            transport.call_service("/add", {"a": math.nan})


# who may


def token_file(folder: Path, text: str = "secret-1\n") -> Path:
    path = folder / "token.txt"
    path.write_text(text)
    return path


def test_a_token_goes_in_the_header_and_a_wrong_one_is_told(opened: Opened, tmp_path: Path) -> None:
    with Server(token="secret-1") as server:
        transport = opened(server.url, token_file=token_file(tmp_path))
        transport.advertise(COMMAND).publish({})
        until(lambda: server.said("publish"))
        said = f"{server.url} refuses the websocket with HTTP status 401; does it want another token_file?"
        with pytest.raises(TransportError, match=f"^{said.replace('?', '.')}$"):
            opened(server.url)
        assert "secret" not in repr(transport.config)


def test_a_token_follows_no_redirect(opened: Opened, server: Server, tmp_path: Path) -> None:
    with Server(redirect=server.url) as away, pytest.raises(TransportError):
        opened(away.url, token_file=token_file(tmp_path))
    assert not server.headers


def test_a_token_in_the_clear_goes_to_this_machine_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"token_file wants wss:// to another machine, .* got 'ws://robot:9090'"):
        decode(
            TransportConfig,
            {"type": "rosbridge", "url": "ws://robot:9090", "token_file": str(token_file(tmp_path))},
        )
    RosbridgeConfig(url="wss://robot:9090", token_file=token_file(tmp_path)).build()


NOT_ASCII = "wants one token of printable ASCII"


@pytest.mark.parametrize(
    ("text", "says"), [("", "holds no token"), ("a b", NOT_ASCII), ("a\nHost: b", NOT_ASCII), ("schlüssel", NOT_ASCII)]
)
def test_what_is_no_token_is_told(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        RosbridgeConfig(token_file=token_file(tmp_path, text)).build()
    with pytest.raises(UserError, match=r"cannot read the token in .*: No such file"):
        RosbridgeConfig(token_file=tmp_path / "none").build()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "cert.pem", folder / "key.pem"
    asked = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    done = subprocess.run(
        ["openssl", *asked.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made, key)
    return made, context


def test_wss_with_the_certificate_that_ca_file_names(
    opened: Opened, certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    path, context = certificate
    with Server(context=context, token="secret-1") as server:
        transport = opened(server.url, ca_file=path, token_file=token_file(tmp_path))
        name, image = SAMPLES["image"]
        topic = Topic("/image", name, "state", 50.0)
        got, publisher = listen(transport, topic), transport.advertise(topic)
        for _ in range(50):
            publisher.publish(image)
        until(lambda: got)
        assert same(got[-1][0], conform(name, image))
        with pytest.raises(TransportError, match=r"^no rosbridge server answers at .*CERTIFICATE_VERIFY_FAILED"):
            opened(server.url, token_file=token_file(tmp_path))
        with pytest.raises(TransportError, match=r"CERTIFICATE_VERIFY_FAILED.* not valid for 'localhost'"):
            opened(server.url.replace("127.0.0.1", "localhost"), ca_file=path)
        assert transport.failure is None


def test_certificates_that_are_none_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pem", token_file(tmp_path)):
        with pytest.raises(UserError, match=f"cannot read certificates in {path}: "):
            RosbridgeConfig(url="wss://robot:9090", ca_file=path).build()


# config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "http://robot"}, "url wants ws://HOST:PORT or wss://HOST:PORT, got 'http://robot'"),
        ({"url": "ws://robot:port"}, "url wants ws://HOST:PORT"),
        ({"url": "ws://"}, "url wants ws://HOST:PORT"),
        ({"url": "ws://ro bot"}, "url wants ws://HOST:PORT"),
        ({"url": "ws://me:secret@robot"}, "url wants no name or password in it"),
        ({"ca_file": "a.pem"}, "ca_file is for wss://"),
        ({"ros": 3}, "ros: wants one of 1, 2, got 3"),
        ({"encoding": "png"}, "encoding: wants one of cbor, json, got 'png'"),
        ({"link_timeout_s": 0.0}, r"link_timeout_s wants 0\.05 to 3600 s, got 0"),
        ({"queue_length": 0}, "queue_length wants 1 or more, got 0"),
        ({"throttle_ms": -1}, "throttle_ms wants 0 or more, got -1"),
        ({"rosapi_s": -1.0}, "rosapi_s wants 0 to 3600 s, got -1"),
        ({"colour": 1}, "no option 'colour'"),
    ],
)
def test_a_config_out_of_range_is_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        decode(TransportConfig, {"type": "rosbridge", **options})


def test_a_config_is_read_by_its_name() -> None:
    options = {"type": "rosbridge", "url": "wss://robot:9090/path", "ros": 1, "ca_file": "a.pem"}
    assert decode(TransportConfig, options) == RosbridgeConfig("wss://robot:9090/path", 1, ca_file=Path("a.pem"))


@pytest.mark.parametrize("package", ["websockets.sync.client", "cbor2"])
def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'vla-rl\[rosbridge\]'"):
        RosbridgeConfig().build()


def test_the_module_imports_neither_package() -> None:
    code = "import sys, real_robot.transports.rosbridge; print({'websockets', 'cbor2'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "set()"


# a real server


def real(opened: Opened, **options: Any) -> RosbridgeTransport:
    assert URL is not None
    return opened(URL, ros=ROS, **options)


def own(kind: str, name: str) -> Topic:
    return Topic(f"/vla_rl_test_{secrets.token_hex(3)}/{kind}", name, "state", 50.0)


@needs_real
@pytest.mark.parametrize("encoding", ["json", "cbor"])
@pytest.mark.parametrize("kind", SAMPLES)
def test_real_round_trip(opened: Opened, kind: str, encoding: str) -> None:
    """Out through the bridge and back in; what is sent before the two ends have met is lost."""
    name, message = SAMPLES[kind]
    transport, topic = real(opened, encoding=encoding), own(kind, name)
    got, publisher = listen(transport, topic), transport.advertise(topic)

    def sent_and_back() -> bool:
        publisher.publish(message)
        time.sleep(0.05)
        return bool(got)

    until(sent_and_back)
    assert same(got[-1][0], conform(name, message))
    assert transport.failure is None


@needs_real
def test_real_server_tells_a_topic_of_another_type(opened: Opened) -> None:
    transport, topic = real(opened), own("x", TWIST)
    publisher = transport.advertise(topic)
    other = real(opened)
    wrong = other.advertise(Topic(topic.name, NUMBERS.type, "command", 20.0))
    said = until(lambda: other.failure)
    assert f"refuses to advertise {topic.name} as {NUMBERS.type}: " in said
    assert TWIST.replace("/msg/", "/" if ROS == 1 else "/msg/") in said
    with pytest.raises(TransportError, match="refuses to advertise"):
        wrong.publish({})
    publisher.publish({})
    assert transport.failure is None


@needs_real
def test_real_server_tells_an_unknown_type(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    from real_robot import messages

    transport = real(opened)
    table: Callable[[], dict[str, Any]] = messages.message_types
    known = {**table(), "vla_rl_msgs/msg/None": table()[TWIST]}
    monkeypatch.setattr(messages, "message_types", lambda: known)
    monkeypatch.setattr("real_robot.transports._rosbridge_wire.message_types", lambda: known)
    topic = own("x", "vla_rl_msgs/msg/None")
    listen(transport, topic)
    assert f"refuses to subscribe {topic.name} as vla_rl_msgs/msg/None: " in until(lambda: transport.failure)


@needs_real
def test_real_server_of_the_other_ros_is_told(opened: Opened) -> None:
    assert URL is not None
    with pytest.raises(TransportError, match=f"runs ROS {ROS}, the option ros says {3 - ROS}"):
        opened(URL, ros=3 - ROS)


@needs_real
def test_real_server_tells_a_service_that_is_not_there(opened: Opened) -> None:
    with pytest.raises(TransportError, match=r"service /vla_rl/none failed: .*does not exist"):
        real(opened).call_service("/vla_rl/none", {})


@needs_real
def test_real_server_keeps_up_with_commands(opened: Opened, record_property: Callable[[str, object], None]) -> None:
    """50 Hz for 4 s there and back; the numbers go into the report."""
    transport, topic = real(opened), own("numbers", NUMBERS.type)
    got, publisher = listen(transport, topic), transport.advertise(topic)
    time.sleep(1.5)
    sent_s = {}
    for i in range(200):
        sent_s[i] = time.monotonic()
        publisher.publish({"data": [float(i)]})
        time.sleep(0.02)
    time.sleep(0.3)
    delays_s = [at - sent_s[int(m["data"][0])] for m, at in got]
    for name, value in (
        ("came", len(got)),
        ("median_ms", 1e3 * np.median(delays_s)),
        ("p99_ms", 1e3 * np.quantile(delays_s, 0.99)),
    ):
        record_property(name, float(value))
    assert len(got) > 190
    assert transport.failure is None
