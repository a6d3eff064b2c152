"""The recorder: nothing is lost without being counted, nobody waits for the disk, and a kill costs no more than the last moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from real_robot import messages, recorder
from real_robot.bags import BagFile, BagImport, is_cut
from real_robot.loop import StopRequest, Timing, run_episode
from real_robot.messages import Message, conform, message_types
from real_robot.recorded import recorded
from real_robot.recorder import BagRecorder, BagWriter, from_bytes, to_bytes
from real_robot.resample import ImportOptions
from real_robot.robot import Robot, load_robot
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.base import Topic
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace
from vla_rl.types import STATE

JOINTS = ("finger_joint1", "finger_joint2")
JOINT_STATES, SERVO = "/joint_states", "/servo/delta_twist_cmds"
ROS1_LACKS = "tf2_msgs/msg/TFMessage"  # among rosbags' types of Noetic; no part of a map reads it


def lift() -> RosRobotConfig:
    robot = load_robot("lift_dds")
    assert isinstance(robot, RosRobotConfig)
    return robot


def joints(number: int) -> Message:
    header = {"stamp": messages.stamp(1.0 + number), "frame_id": "base"}
    return conform("sensor_msgs/msg/JointState", {"header": header, "name": JOINTS, "position": [number, -number]})


def servo(number: int) -> Message:
    made = messages.empty("geometry_msgs/msg/TwistStamped")
    made["twist"]["linear"]["x"] = float(number)
    return made


def read(path: Path) -> dict[str, list[tuple[int, Message]]]:
    found: dict[str, list[tuple[int, Message]]] = {}
    bag = BagFile(path)
    for topic, at_ns, message in bag.messages({topic: next(iter(kinds)) for topic, kinds in bag.types.items()}):
        found.setdefault(topic, []).append((at_ns, message))
    return found


def random_message(name: str, rng: np.random.Generator) -> Message:
    draw = {
        "bool": lambda: bool(rng.integers(2)),
        "string": lambda: "".join(rng.choice(list("abc_ äß"), rng.integers(0, 9))),
        "uint8": lambda: int(rng.integers(256)),
        "int32": lambda: int(rng.integers(0, 2**31)),  # times of ROS 1 have no sign
        "uint32": lambda: int(rng.integers(2**32)),
        "float64": lambda: float(rng.normal() * 10.0 ** rng.integers(-5, 6)),
    }
    made: Message = {}
    for field in message_types()[name]:
        one = draw.get(field.kind, lambda kind=field.kind: random_message(kind, rng))
        made[field.name] = [one() for _ in range(rng.integers(0, 5))] if field.many else one()
    return conform(name, made)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | np.ndarray) or isinstance(other, np.ndarray):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other if isinstance(one, bytes | str) else one == other


@pytest.mark.parametrize("ros", [1, 2])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_every_type_comes_back_from_its_bytes(ros: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in message_types():
        if ros == 2 or name != ROS1_LACKS:
            message = random_message(name, rng)
            assert same(from_bytes(ros, name, to_bytes(ros, name, message)), message), name


def test_everything_seen_and_sent_is_in_the_bag_in_time(tmp_path: Path) -> None:
    robot, count = lift(), 400
    begun_ns = time.time_ns()
    with BagRecorder(tmp_path / "run", robot, {"instruction": "lift it"}) as bag:

        def feed(key: str, make: Any) -> None:
            for number in range(count):
                bag.record(key, make(number), time.monotonic())
                time.sleep(0.0002)

        threads = [threading.Thread(target=feed, args=(k, m)) for k, m in ((JOINT_STATES, joints), (SERVO, servo))]
        for thread in threads:
            thread.start()
        bag.record("/elsewhere", {"data": []}, time.monotonic())  # no topic of the map
        for thread in threads:
            thread.join()
    result = bag.close()
    assert result.summary() == {
        "written": {JOINT_STATES: count, SERVO: count}, "dropped": {}, "refused": {"/elsewhere": 1}, "failure": None,
    }  # fmt: skip
    found = read(tmp_path / "run")
    for topic, make in ((JOINT_STATES, joints), (SERVO, servo)):
        times_ns = [at_ns for at_ns, _ in found[topic]]
        assert begun_ns <= times_ns[0] <= times_ns[-1] <= time.time_ns()
        assert all(same(message, make(i)) for i, (_, message) in enumerate(found[topic]))
    whole = BagFile(tmp_path / "run")
    assert not whole.cut
    assert whole.about == {"robot": "panda_lift", "instruction": "lift it"}
    bag.record(JOINT_STATES, joints(0), time.monotonic())
    assert bag.close().dropped == {JOINT_STATES: 1}, "what comes after the end is counted"
    with pytest.raises(UserError, match="run exists already"):
        BagRecorder(tmp_path / "run", robot)


def test_under_load_what_is_not_written_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "QUEUE", 50)
    offered, took_s = Counter[str](), []
    with BagRecorder(tmp_path / "run", lift()) as bag:
        made = joints(0), servo(0)
        for i in range(3000):
            begun = time.perf_counter()
            bag.record(JOINT_STATES if i % 3 else SERVO, made[not i % 3], time.monotonic())
            took_s.append(time.perf_counter() - begun)
            offered[JOINT_STATES if i % 3 else SERVO] += 1
    result = bag.close()
    assert result.dropped
    assert result.written + result.dropped == offered
    assert {topic: len(rows) for topic, rows in read(tmp_path / "run").items()} == dict(result.written)
    assert np.median(took_s) < 1e-3, "who records does not wait"


def test_pictures_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "QUEUE_BYTES", 10_000)
    robot = load_robot("mobile_base")
    assert isinstance(robot, RosRobotConfig)
    picture = {"header": messages.empty("std_msgs/msg/Header"), "format": "jpeg", "data": bytes(4000)}
    with BagRecorder(tmp_path / "run", robot) as bag:
        for _ in range(10):
            bag.record("/front_camera/image_raw/compressed", picture, time.monotonic())
    assert bag.close().written["/front_camera/image_raw/compressed"] <= 4
    assert sum((bag.result.written + bag.result.dropped).values()) == 10


def test_a_message_that_is_none_is_counted_and_the_others_are_written(tmp_path: Path) -> None:
    with BagRecorder(tmp_path / "run", lift()) as bag:
        bag.record(JOINT_STATES, {"name": ["a"], "position": ["far"]}, time.monotonic())
        bag.record(JOINT_STATES, {"seq": 3}, time.monotonic())
        bag.record(JOINT_STATES, joints(1), time.monotonic())
    assert bag.result.written == {JOINT_STATES: 1}
    assert bag.result.refused == {JOINT_STATES: 2}
    assert "a message on /joint_states is none of its type" in str(bag.result.failure)
    assert len(read(tmp_path / "run")[JOINT_STATES]) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_a_disk_that_fails_stops_the_recording_and_not_the_robot(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FLUSH_S", 0.05)
    bag = BagRecorder(tmp_path / "run", lift())

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(bag._writer, "write", full)
    for number in range(20):
        bag.record(JOINT_STATES, joints(number), time.monotonic())
        time.sleep(0.01)
    result = bag.close()
    assert "nothing more is recorded in" in str(result.failure)
    assert ("No space left" in str(result.failure)) == isinstance(error, OSError)
    assert result.dropped == {JOINT_STATES: 20}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting wants root")
def test_a_disk_that_really_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "FLUSH_S", 0.02)
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("no permission to mount here")
    try:
        bag = BagRecorder(mount / "run", lift())
        for number in range(6000):
            bag.record(JOINT_STATES, joints(number), time.monotonic())
            if number % 1000 == 999:
                time.sleep(0.1)
        result = bag.close()
        assert "No space left" in str(result.failure)
        assert sum((result.written + result.dropped).values()) == 6000
        rows = read(mount / "run")[JOINT_STATES]
        assert [m["position"][0] for _, m in rows] == list(range(len(rows)))
        assert 1000 <= len(rows) <= 6000
    finally:
        subprocess.run(["umount", str(mount)], check=True)


RECORDS = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from real_robot.recorder import BagRecorder
from real_robot.robot import Robot, load_robot
bag = BagRecorder(Path(sys.argv[1]), load_robot("lift_dds"))
for number in range(10**6):
    bag.record("/joint_states", {{"name": ["a"], "position": [number]}}, time.monotonic())
    bag.record("/servo/delta_twist_cmds", {{"twist": {{"linear": {{"x": number}}}}}}, time.monotonic())
    print(number, flush=True)
    time.sleep(0.005)
"""


def test_a_kill_costs_no_more_than_the_last_moment(tmp_path: Path) -> None:
    script = RECORDS.format(path=sys.path)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        while int(process.stdout.readline()) < 200:
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
    last = int(rest[-1]) if rest else 200
    (file,) = (tmp_path / "run").iterdir()
    assert is_cut(file)
    assert BagFile(tmp_path / "run").cut
    found = read(tmp_path / "run")
    for topic, value in (
        (JOINT_STATES, lambda m: m["position"][0]),
        (SERVO, lambda m: m["twist"]["linear"]["x"]),
    ):
        numbers = [value(message) for _, message in found[topic]]
        assert numbers == list(range(len(numbers))), "without a hole"
        assert last - len(numbers) < 150, "up to the last second"
    torn = tmp_path / "torn"
    torn.mkdir()
    raw = file.read_bytes()
    for size in (len(raw) - 1, len(raw) // 2, 30, 5):  # wherever the disk stopped
        (torn / "run.mcap").write_bytes(raw[:size])
        numbers = [message["position"][0] for _, message in read(torn).get(JOINT_STATES, [])]
        assert numbers == list(range(len(numbers)))


def test_what_a_kill_left_becomes_episodes_whatever_its_order(tmp_path: Path) -> None:
    robot, rng = lift(), np.random.default_rng(0)
    topics = robot.map.topics
    state = np.concatenate([rng.normal(size=3), [1, 0, 0, 0, 1, 0], rng.normal(size=2)])
    writer = BagWriter(tmp_path / "run", "mcap", {t.topic: t.type for t in topics.values()})
    for step in [i ^ 1 for i in range(40)]:  # threads take turns as they like
        at_s = 100 + step / 20
        made = robot.map.feature_messages({STATE: state, "observation.environment_state": np.full(12, step)}, at_s)
        for key, message in made.items():
            writer.write(topics[key].topic, message, round(1e9 * at_s))
        for key, message in robot.map.command_messages(np.full(7, 0.001 * step), robot.action, at_s).items():
            writer.write(topics[key].topic, message, round(1e9 * (at_s + 0.01)))
        if step == 30:  # the 32nd that is written
            writer.flush()
    shutil.copytree(tmp_path / "run", tmp_path / "left")
    writer.close()
    bag = BagImport(tmp_path / "left", robot, ImportOptions())
    (episode,) = bag.episodes()
    assert bag.notes["cut short by a kill"] == 1
    assert episode.length == 31
    np.testing.assert_allclose(episode.action_TA[:, 0], 0.001 * np.arange(31), atol=1e-9)
    np.testing.assert_array_equal(episode.observations["observation.environment_state"][:, 0], np.arange(32))


def test_what_was_flushed_is_there_for_others(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "run", "mcap", {JOINT_STATES: "sensor_msgs/msg/JointState"})
    writer.flush()
    for number in range(4):
        writer.write(JOINT_STATES, joints(number), number)
        writer.flush()
        assert [at_ns for at_ns, _ in read(tmp_path / "run")[JOINT_STATES]] == list(range(number + 1))
    writer.abort()


class Twin:
    """A robot in memory behind a transport: what it is told moves it, and it says where it is 20 times a second."""

    def __init__(self, robot: RosRobotConfig) -> None:
        self.robot, self.failure = robot, None
        self.listeners: dict[str, Any] = {}
        self.state = np.array([0.0, 0.0, 1.0, 1, 0, 0, 0, 1, 0, 0.01, 0.01])
        self.token, self.steps = 0.0, 0
        self._told: dict[str, Message] = {}
        self._ends = threading.Event()

    def open(self) -> None:
        threading.Thread(target=self._live, daemon=True).start()

    def subscribe(self, topic: Topic, on_message: Any) -> None:
        self.listeners[topic.name] = on_message

    def advertise(self, topic: Topic) -> Any:
        return type("End", (), {"publish": lambda _, message: self._take(topic.name, message)})()

    def endpoints(self, topic: str) -> None:
        del topic

    def close(self) -> None:
        self._ends.set()

    def _take(self, topic: str, message: Message) -> None:
        if topic == "/vla_rl/reset":
            self.token, self.steps = message["data"][1], 0
            return
        keys = {t.topic: key for key, t in self.robot.map.commanded().items()}
        self._told[keys[topic]] = message
        if len(self._told) == len(keys):
            self.state[:3] += self.robot.map.action_of(self._told, self.robot.action)[:3]
            self._told.clear()

    def _live(self) -> None:
        pace, robot_map = Pace(20.0, spin_s=0.0), self.robot.map
        assert robot_map.status is not None
        while not self._ends.is_set():
            pace.wait()
            self.steps += 1
            features = {STATE: self.state.copy(), "observation.environment_state": np.full(12, self.steps)}
            made = robot_map.feature_messages(features, time.time())
            made["status"] = messages.empty("std_msgs/msg/Float64MultiArray")
            status = np.array([self.steps > 25, 0.1 * self.steps, 0.0, self.token])
            robot_map.status.write(made["status"], status, "std_msgs/msg/Float64MultiArray", time.time())
            for key, message in made.items():
                topic = robot_map.topics[key]
                if topic.topic in self.listeners:
                    self.listeners[topic.topic](conform(topic.type, message), time.monotonic())


class Waves:
    """Decides without looking."""

    failure: Exception | None = None
    standing = False

    def reset(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def drop(self) -> None:
        pass

    def act(self, features: Any) -> np.ndarray:
        del features
        return np.append(self.rng.uniform(-0.001, 0.001, 6), 1.0)


def test_what_a_run_records_and_what_its_bag_holds_are_the_same_episodes(tmp_path: Path) -> None:
    loaded = lift()
    calm = replace(loaded.safety, joints_age_s=2.0, other_age_s=2.0, heartbeat_s=2.0, clock_jump_s=5.0)
    config = replace(loaded, safety=calm)
    robot, live = Robot(config), []
    robot.driver.transport = Twin(config)
    with recorded(robot, tmp_path / "run", {}) as bag:
        robot.connect()
        try:
            for seed in range(2):
                outcome = run_episode(
                    robot, Waves(), seed=seed, steps=100, instruction="", timing=Timing(), stop=StopRequest()
                )
                assert outcome.ended_by == "success"
                live.append(outcome.episode)
        finally:
            robot.stop()
    assert not bag.result.dropped
    assert bag.result.written["/vla_rl/reset"] >= 2
    *_, first, second = BagImport(tmp_path / "run", config, ImportOptions(split="status")).episodes()
    for one, other in zip(live, (first, second), strict=True):
        assert abs(one.length - other.length) <= 1
        assert (other.success, other.terminated) == (True, True)
        steps = min(one.length, other.length)
        # the bag's steps may begin one earlier or later than the loop's; a late one takes two commands or none
        shifts = [(one.action_TA[a : steps - b], other.action_TA[b : steps - a]) for a, b in ((0, 0), (1, 0), (0, 1))]
        alike = max(np.isclose(x, y, atol=1e-7).all(axis=1).mean() for x, y in shifts)
        assert alike > 0.6
