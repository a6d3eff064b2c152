"""Bags into data sets and back: nothing is lost on the way, nothing is from the future, what does not fit is refused in one line."""

from __future__ import annotations

import ast
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from robot_toys import arm_spec, limits
from scipy.spatial.transform import Rotation

from real_robot import messages, recorder
from real_robot.bags import BagFile, BagImport
from real_robot.messages import Message
from real_robot.parts import PartConfig, TopicConfig
from real_robot.recorder import BagWriter, Storage, write_episode
from real_robot.resample import (
    EXPIRES_S,
    ImportOptions,
    Span,
    Track,
    check_stamps,
    clock_rate,
    combine,
    command_phase,
    first_time,
    grid_times,
    newest,
    on_clock,
    runs,
    spans_by_gap,
    spans_by_status,
)
from real_robot.robot import load_robot
from real_robot.robot_map import CommandPartConfig, MapConfig
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.dds import DdsConfig
from vla_rl.cli.main import main
from vla_rl.data.episode import Episode
from vla_rl.data.reader import load_dataset
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.config import encode, names_in
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_tree
from vla_rl.types import STATE, ActionMode

STORAGES: tuple[Storage, ...] = ("mcap", "sqlite3", "ros1")
ROBOTS = [name for name in names_in("robot") if isinstance(load_robot(name), RosRobotConfig)]
JOINTS = ("j0", "j1")
BEGUN_S = 1000.0


def ros_robot(name: str) -> RosRobotConfig:
    robot = load_robot(name)
    assert isinstance(robot, RosRobotConfig)
    return robot


def toy_robot(
    mode: ActionMode = "absolute", *, twist: bool = False, status: bool = False, hz: float = 20.0
) -> RosRobotConfig:
    """Two joints that are seen, two axes and a gripper that are commanded."""
    spec = arm_spec(mode, hz, joints=2)
    arm = "geometry_msgs/msg/TwistStamped" if twist else "std_msgs/msg/Float64MultiArray"
    part = (
        PartConfig("arm", "linear", ("x", "y"), "m/s")
        if twist
        else PartConfig("arm", "data", unit=spec.units[0], size=2)
    )
    topics = {
        "joints": TopicConfig("/joint_states", "sensor_msgs/msg/JointState", 50.0, "state"),
        "arm": TopicConfig("/arm", arm, hz, "command"),
        "hand": TopicConfig("/hand", "std_msgs/msg/Float64", hz, "command"),
    }
    if status:
        topics["status"] = TopicConfig("/status", "std_msgs/msg/Float64MultiArray", 20.0, "state")
    place = PartConfig("joints", "position", JOINTS, "rad" if mode == "absolute" else "m")
    robot_map = MapConfig(
        topics,
        {STATE: (place,)},
        (CommandPartConfig(("a0", "a1"), part), CommandPartConfig(("gripper",), PartConfig("hand", "data", size=1))),
        {"a0 a1": place},
        PartConfig("status", "data", size=4) if status else None,
    )
    return RosRobotConfig(name="toy", action=spec, safety=limits(3), transport=DdsConfig(), map=robot_map)


Row = tuple[float, str, Message]  # time of receipt, key, message


def joints(at_s: float, places: Sequence[float], stamp_s: float | None = None, names: Sequence[str] = JOINTS) -> Row:
    header = {"stamp": messages.stamp(at_s if stamp_s is None else stamp_s), "frame_id": ""}
    return at_s, "joints", {"header": header, "name": list(names), "position": list(places)}


def arm(at_s: float, values: Sequence[float]) -> Row:
    return at_s, "arm", {"data": list(values)}


def hand(at_s: float, value: float = 0.0) -> Row:
    return at_s, "hand", {"data": value}


def told(at_s: float, success: float = 0.0, reward: float = 0.0, ended: float = 0.0, scene: float = 1.0) -> Row:
    return at_s, "status", {"data": [success, reward, ended, scene]}


def moving(seconds: float, begin_s: float = BEGUN_S, *, hz: float = 50.0, scale: float = 1.0) -> list[Row]:
    """Joints that say how long they have moved, and commands 20 times a second that count from 0."""
    rows = [joints(begin_s + i / hz, [scale * i / hz, -scale * i / hz]) for i in range(round(seconds * hz) + 1)]
    for i in range(round(20 * seconds)):
        rows += [arm(begin_s + 0.03 + i / 20, [0.01 * i, 0.0]), hand(begin_s + 0.03 + i / 20, 1.0)]
    return rows


def write_bag(path: Path, robot: RosRobotConfig, rows: Sequence[Row], storage: Storage = "mcap", **types: str) -> Path:
    used = {key: robot.map.topics[key] for _, key, _ in rows}
    writer = BagWriter(path, storage, {topic.topic: types.get(key, topic.type) for key, topic in used.items()})
    for at_s, key, message in rows:
        writer.write(used[key].topic, message, round(1e9 * at_s))
    writer.close()
    return path


def imported(path: Path, robot: RosRobotConfig, **options: Any) -> list[Episode]:
    return list(BagImport(path, robot, ImportOptions(**options)).episodes())


def features_of(robot: RosRobotConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Numbers that the robot could observe."""
    made = {}
    for name, parts in robot.map.observations.items():
        values = []
        for part in parts:
            value = rng.uniform(0, 1, part.feature_shape)
            if part.source == "rotation6":
                value = Rotation.random(rng=rng).as_matrix()[:, :2].T.ravel()
            elif part.source == "picture":  # smooth, as JPEG keeps it
                down, across = np.meshgrid(*(np.linspace(0, 200, n) for n in part.shape), indexing="ij")
                value = (rng.uniform(0.5, 1) * np.stack([down, across, 255 - down])).astype(np.uint8)
            values.append(value)
        joined = values[0] if len(values) == 1 else np.concatenate([v.ravel() for v in values])
        made[name] = joined if joined.dtype == np.uint8 else joined.astype(np.float32)
    return made


def episode_of(robot: RosRobotConfig, rng: np.random.Generator, steps: int, *, success: bool = True) -> Episode:
    rows = [features_of(robot, rng) for _ in range(steps + 1)]
    action_TA = rng.uniform(robot.action.low, robot.action.high, (steps, robot.action.dim)).astype(np.float32)
    success_T = (np.arange(steps) == steps - 1) & success
    return Episode(
        {name: np.stack([row[name] for row in rows]) for name in rows[0]}, action_TA, action_TA, success_T.astype(np.float32),
        success_T, success, not success, "do it", {"source": "expert"},
    )  # fmt: skip


# there and back


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ROBOTS)
def test_every_robot_finds_its_episode_again(name: str, storage: Storage, tmp_path: Path) -> None:
    robot = ros_robot(name)
    episode = episode_of(robot, np.random.default_rng(4), 7)
    path = tmp_path / ("bag.bag" if storage == "ros1" else "bag")
    write_episode(path, episode, robot, storage, 1)
    (back,) = imported(path, robot)
    np.testing.assert_array_equal(back.action_TA, episode.action_TA)
    for key, parts in robot.map.observations.items():
        compressed = any(robot.map.topics[p.topic].type.endswith("CompressedImage") for p in parts)
        turned = any(p.source == "rotation6" for p in parts)
        difference = np.abs(back.observations[key].astype(float) - episode.observations[key].astype(float))
        assert back.observations[key].dtype == episode.observations[key].dtype
        assert difference.max() <= (12 if compressed else 1e-6 if turned else 0), key
    if robot.map.status is not None:
        assert back.terminated
        np.testing.assert_array_equal(back.success_T, episode.success_T)
        np.testing.assert_array_equal(back.reward_T, episode.reward_T)
    else:
        assert not back.success
        assert back.truncated
        assert back.provenance["success_from"] == "unknown"


def test_raw_pictures_come_back_to_the_bit(tmp_path: Path) -> None:
    robot = ros_robot("ros2_control_arm")
    wrist = replace(robot.map.topics["wrist"], type="sensor_msgs/msg/Image")
    robot = replace(robot, map=replace(robot.map, topics={**robot.map.topics, "wrist": wrist}))
    episode = episode_of(robot, np.random.default_rng(0), 5)
    noise = np.random.default_rng(1).integers(0, 256, (6, 3, 84, 84)).astype(np.uint8)
    episode = replace(episode, observations={**episode.observations, "observation.images.wrist": noise})
    write_episode(tmp_path / "bag", episode, robot, "mcap", 1)
    (back,) = imported(tmp_path / "bag", robot)
    np.testing.assert_array_equal(back.observations["observation.images.wrist"], noise)


@pytest.fixture(scope="module")
def lift_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    robot, rng = ros_robot("lift_dds"), np.random.default_rng(7)
    root = tmp_path_factory.mktemp("lift") / "set"
    writer = EpisodeWriter.open_or_create(
        root, action_spec=robot.action, observation_spec=robot.observation_spec, task="lift", recipe={"seed": 7}
    )
    for steps, success in ((9, True), (14, False), (6, True)):
        writer.add(episode_of(robot, rng, steps, success=success))
    return root


@pytest.mark.parametrize("storage", STORAGES)
def test_a_data_set_comes_back_from_bags(storage: Storage, lift_set: Path, tmp_path: Path) -> None:
    bags, back = tmp_path / "bags", tmp_path / "back"
    assert main(f"bag export {lift_set} --robot lift_dds --out {bags} --storage {storage}".split()) == 0
    numbers = tmp_path / "numbers.json"
    words = f"bag import {bags} --robot lift_dds --out {back} --instruction task --json {numbers}"
    assert main(words.split()) == 0
    assert json.loads(numbers.read_text())["episodes"] == 3
    there, here = load_dataset(lift_set), load_dataset(back)
    for key, column in there.columns.items():
        if key == STATE:  # through a quaternion
            np.testing.assert_allclose(here.columns[key], column, atol=1e-6)
        else:
            np.testing.assert_array_equal(here.columns[key], column, err_msg=key)
    assert here.episodes["terminated"].tolist() == there.episodes["terminated"].tolist()
    assert here.tasks == ("task",)
    assert {here.episode(i).provenance["success_from"] for i in range(3)} == {"status"}
    for kind in ("data", "meta/episodes"):  # as a kill would leave it
        (back / kind / "chunk-000" / "file-002.parquet").unlink()
    info = json.loads((back / "meta/info.json").read_text())
    cut = {"total_episodes": 2, "total_frames": 23, "splits": {"train": "0:2"}}
    (back / "meta/info.json").write_text(json.dumps({**info, **cut}, indent=2) + "\n")
    assert main(words.split()) == 0
    assert load_dataset(back).digest == here.digest
    assert main(words.split()) == 0
    assert load_dataset(back).digest == here.digest, "it was whole, and is as it was"


def raw_cameras(robot: RosRobotConfig) -> RosRobotConfig:
    """The robot with pictures as they are, and not as JPEG."""
    topics = {
        key: replace(topic, type="sensor_msgs/msg/Image") if topic.type.endswith("CompressedImage") else topic
        for key, topic in robot.map.topics.items()
    }
    return replace(robot, map=replace(robot.map, topics=topics))


@pytest.mark.parametrize("name", ["ros2_control_arm", "servo_twist", "mobile_base"])
def test_pictures_clouds_and_depth_go_from_bags_to_a_data_set_and_back(name: str, tmp_path: Path) -> None:
    robot, rng = raw_cameras(ros_robot(name)), np.random.default_rng(5)
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump({**encode(robot), "type": "ros"}))
    episodes = [episode_of(robot, rng, steps) for steps in (6, 9)]
    for number, episode in enumerate(episodes):
        write_episode(tmp_path / "bags" / str(number), episode, robot, "mcap", number + 1)
    there, again, back = tmp_path / "set", tmp_path / "again", tmp_path / "back"
    for words in (
        f"bag import {tmp_path}/bags --robot {path} --out {there} --success all",
        f"bag export {there} --robot {path} --out {again}",
        f"bag import {again} --robot {path} --out {back} --success all",
    ):
        assert main(words.split()) == 0
    first, second = load_dataset(there), load_dataset(back)
    seen = robot.observation_spec
    cameras = [k for k, f in seen.items() if len(f.shape) > 1]
    assert cameras
    for number, episode in enumerate(episodes):
        for key in cameras:
            for data in (first, second):
                found = data.episode(number).observations[key]
                assert found.dtype == (np.uint8 if seen[key].shape[0] == 3 else np.float32)
                np.testing.assert_array_equal(found, episode.observations[key])


def test_compressed_pictures_become_a_data_set(tmp_path: Path) -> None:
    robot = ros_robot("ros2_control_arm")
    episode = episode_of(robot, np.random.default_rng(6), 6)
    write_episode(tmp_path / "bag", episode, robot, "mcap", 1)
    assert main(f"bag import {tmp_path}/bag --robot ros2_control_arm --out {tmp_path}/set".split()) == 0
    found = load_dataset(tmp_path / "set").episode(0).observations["observation.images.wrist"]
    (decoded,) = imported(tmp_path / "bag", robot)
    np.testing.assert_array_equal(found, decoded.observations["observation.images.wrist"])


def test_export_goes_on_and_refuses_what_is_another(
    lift_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bags = tmp_path / "bags"
    words = f"bag export {lift_set} --robot lift_dds --out {bags}".split()
    assert main(words) == 0
    assert sorted(p.name for p in bags.iterdir()) == [*(f"episode_{i:06d}" for i in range(3)), "export.json"]
    whole = sha256_tree(bags)
    shutil.rmtree(bags / "episode_000001")
    (bags / "episode_000001.tmp" / "rest").mkdir(parents=True)
    assert main(words) == 0
    assert sha256_tree(bags) == whole, "the same command makes the same bags"
    assert main([*words, "--storage", "sqlite3"]) == 2
    assert "holds bags of another data set, map or storage" in one_line(capsys)
    assert main(f"bag export {lift_set} --robot mobile_base --out {tmp_path / 'base'}".split()) == 2
    assert "action spec of robot 'mobile_base' and of" in one_line(capsys)
    assert not (tmp_path / "base").exists()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vla-rl:")]
    return line


# what does not fit


def without(key: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row for row in rows if row[1] != key]


def degrees(rows: list[Row]) -> list[Row]:
    return [joints(at_s, [57.0, -57.0]) if key == "joints" else (at_s, key, m) for at_s, key, m in rows]


def other_joints(rows: list[Row]) -> list[Row]:
    return [*rows, joints(rows[-1][0], [0.0, 0.0], names=("left", "right"))]


def commands_in_degrees(rows: list[Row]) -> list[Row]:
    return [arm(at_s, [90.0, 0.0]) if key == "arm" else (at_s, key, m) for at_s, key, m in rows]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("joints"), r"has no topic /joint_states, which the map of 'toy' wants; it has /arm, /hand"),
        (without("hand"), r"has no topic /hand, which the map of 'toy' wants; it has /arm, /joint_states"),
        (other_joints, r"joints has the joints left, right; the map wants j0, j1"),
        (degrees, r"a0 is at 57 on /joint_states, outside -2 to 2 rad; it seems to be in degrees"),
        (commands_in_degrees, r"a0 is at 90 on /arm, outside -2 to 2 rad; it seems to be in degrees"),
    ],
)
def test_a_bag_that_does_not_fit_is_refused(
    change: Callable[[list[Row]], list[Row]], says: str, tmp_path: Path
) -> None:
    robot = toy_robot()
    path = write_bag(tmp_path / "bag", robot, change(moving(1.0)))
    with pytest.raises(UserError, match=says) as caught:
        BagImport(path, robot, ImportOptions())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_type_on_a_topic_is_refused(tmp_path: Path) -> None:
    robot = toy_robot()
    rows = [(at_s, "arm", {"data": 0.0}) if key == "arm" else (at_s, key, m) for at_s, key, m in moving(1.0)]
    path = write_bag(tmp_path / "bag", robot, rows, arm="std_msgs/msg/Float64")
    with pytest.raises(
        UserError, match=r"/arm is of type std_msgs/msg/Float64, the map of 'toy' says std_msgs/msg/Float64MultiArray"
    ):
        BagImport(path, robot, ImportOptions())


def test_the_command_refuses_in_one_line_before_anything_is_written(
    lift_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bags, out = tmp_path / "bags", tmp_path / "out"
    assert main(f"bag export {lift_set} --robot lift_dds --out {bags}".split()) == 0
    for words, says in [
        (
            f"{bags} --robot servo_twist --features observation.state",
            "has no topic /servo_node/delta_twist_cmds, which the map",
        ),
        (f"{bags} --robot lift_fake", "'lift_fake' has no topics; bags want a robot of type ros"),
        (
            f"{bags} --robot lift_dds --features observation.images.eye",
            "has no feature 'observation.images.eye'; there are",
        ),
        (f"{bags} --robot ros2_control_arm", "which the map of 'six_axis_arm' wants; it has /gripper/command"),
        (f"{bags} --robot lift_dds --clock wall", "clock: wants one of received, header, got 'wall'"),
        (f"{bags} --robot lift_dds --gap-s 0", "gap_s wants a time > 0, got 0"),
        (f"{bags}/export.json --robot lift_dds", "export.json is no bag; there are folders of rosbag2"),
        (f"{tmp_path}/nothing --robot lift_dds", "nothing is no bag"),
        ("--robot lift_dds", "BAGS is missing"),
    ]:
        assert main(f"bag import {words} --out {out}".split()) == 2
        assert says in one_line(capsys)
        assert not out.exists()
    assert main(f"bag import {bags} --robot lift_dds --out {out}".split()) == 0
    assert main(f"bag import {bags} --robot lift_dds --out {out} --success none".split()) == 2
    assert "holds a set made with options" in one_line(capsys)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_damaged_bag_is_refused(storage: Storage, tmp_path: Path) -> None:
    robot = toy_robot()
    path = write_bag(tmp_path / ("bag.bag" if storage == "ros1" else "bag"), robot, moving(1.0), storage)
    file = path if storage == "ros1" else next(p for p in path.iterdir() if p.suffix in (".mcap", ".db3"))
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 3] + bytes(len(raw) - len(raw) // 3 - 8) + raw[-8:])
    with pytest.raises(UserError, match=r"no bag that can be read|holds no|has no"):
        BagImport(path, robot, ImportOptions())
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"no bag that can be read|has no topic"):
        BagImport(path, robot, ImportOptions())


def test_rosbags_is_imported_on_use_only_and_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bags", "recorder", "resample"):
        source = Path(recorder.__file__).with_name(f"{name}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            assert not any(n.split(".")[0] == "rosbags" for n in names)
    for module in [m for m in sys.modules if m.split(".")[0] == "rosbags"]:
        monkeypatch.setitem(sys.modules, module, None)
    recorder.bag_package.cache_clear()
    try:
        with pytest.raises(UserError, match=r"bags want the package rosbags: pip install 'vla-rl\[bags\]'"):
            write_episode(
                tmp_path / "bag", episode_of(toy_robot(), np.random.default_rng(0), 3), toy_robot(), "mcap", 1
            )
    finally:
        recorder.bag_package.cache_clear()


# the clock


def test_actions_by_hand() -> None:
    times_N = np.array([0.01, 0.02, 0.03, 0.11, 0.31])
    values_NA = np.arange(1.0, 6.0)[:, None].repeat(3, axis=1)
    grid_T = np.array([0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35])
    made_TA = combine(times_N, values_NA, grid_T, ("last", "sum", "mean"))
    assert made_TA[:, 0].tolist() == [3, 3, 4, 4, 4, 4, 5], "the last place stays in force"
    assert made_TA[:, 1].tolist() == [6, 0, 4, 0, 0, 0, 5], "movements are added up, and none is invented"
    assert made_TA[:, 2].tolist() == [2, 3, 4, 4, 4, 4, 5], "velocities are averaged, and go on for a while"
    late_T = np.array([0.30, 0.35, 0.35 + EXPIRES_S, 0.40 + EXPIRES_S])
    assert combine(times_N, values_NA, late_T, ("last", "sum", "mean"))[-1].tolist() == [5, 0, 0], "but not for ever"


def test_the_border_of_a_step_belongs_to_the_step_after_it() -> None:
    made_TA = combine(np.array([0.0, 1.0]), np.array([[1.0], [2.0]]), np.array([0.0, 1.0, 2.0]), ("sum",))
    assert made_TA[:, 0].tolist() == [1, 2]
    assert newest(np.array([0.0, 1.0]), np.array([-0.1, 0.0, 0.99, 1.0])).tolist() == [-1, 0, 0, 1]


increasing = st.lists(st.integers(0, 4000), min_size=1, max_size=60, unique=True).map(
    lambda t: np.sort(np.array(t)) / 1000
)


@given(times_N=increasing, grid_T=increasing)
@settings(max_examples=200, deadline=None)
def test_no_observation_is_from_the_future_and_none_is_newer(times_N: np.ndarray, grid_T: np.ndarray) -> None:
    for t, index in zip(grid_T, newest(times_N, grid_T), strict=True):
        assert index == -1 or times_N[index] <= t
        assert index == len(times_N) - 1 or times_N[index + 1] > t


@given(times_N=increasing, begin=st.floats(0, 1), dt=st.sampled_from([0.01, 0.05, 1 / 30]))
@settings(max_examples=200, deadline=None)
def test_movements_are_neither_lost_nor_invented(times_N: np.ndarray, begin: float, dt: float) -> None:
    grid_T = begin + dt * np.arange(40)
    values_NA = np.random.default_rng(0).normal(size=(len(times_N), 1))
    if times_N[0] >= grid_T[1]:
        return
    inside_N = (times_N >= grid_T[0]) & (times_N < grid_T[-1])
    made_TA = combine(times_N, values_NA, grid_T, ("sum",))
    assert math.isclose(made_TA.sum(), values_NA[inside_N].sum(), abs_tol=1e-9)
    held_TA = combine(times_N, values_NA, grid_T, ("last",))
    assert set(held_TA[:, 0]) <= set(values_NA[:, 0])


@given(
    commands_N=increasing, seen=st.floats(0, 2), end=st.floats(0.5, 4), dt=st.sampled_from([0.01, 0.05, 1 / 30]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_grid_has_the_rate_and_begins_when_all_has_begun(
    commands_N: np.ndarray, seen: float, end: float, dt: float
) -> None:
    span = Span(-math.inf, end)
    phase_s = command_phase(commands_N, dt)
    lower_s = first_time(span, [seen], [commands_N], dt, phase_s)
    assert lower_s is not None
    grid_T = grid_times(lower_s, span, dt, phase_s)
    if not len(grid_T):
        return
    np.testing.assert_allclose(np.diff(grid_T), dt, atol=1e-9)
    assert grid_T[0] >= seen - 1e-6 * dt
    assert commands_N[0] < grid_T[1], "something is commanded in the first step"
    assert grid_T[-2] < end <= grid_T[-1] + 1e-5 * dt
    if phase_s is not None:
        assert math.isclose(math.remainder(grid_T[0] - phase_s, dt), 0, abs_tol=1e-9)


def test_commands_with_jitter_stay_one_a_step() -> None:
    rng, dt = np.random.default_rng(2), 0.05
    sent_N = 0.037 + dt * np.arange(200) + rng.exponential(0.002, 200)
    phase_s = command_phase(sent_N, dt)
    assert phase_s is not None
    span = Span(-math.inf, float(sent_N[-1]))
    grid_T = grid_times(first_time(span, [0.0], [sent_N], dt, phase_s) or 0.0, span, dt, phase_s)
    counts = np.histogram(sent_N, grid_T)[0]
    assert (counts == 1).mean() > 0.98
    assert command_phase(0.011 * np.arange(400), dt) is None, "other rates have no phase"


def test_reordered_and_repeated_messages_are_dropped_and_jumps_end_the_episode() -> None:
    received_N = np.arange(20) / 20
    stamp_N = received_N + 5
    stamp_N[[4, 9]] = stamp_N[[3, 7]]  # repeated, reordered
    clocked = check_stamps(received_N, stamp_N, 0.2)
    assert np.flatnonzero(~clocked.keep_N).tolist() == [4, 9]
    assert not clocked.breaks_s
    for jump_s in (-3.0, 3.0):
        jumped_N = received_N + 5 + jump_s * (np.arange(20) >= 12)
        clocked = check_stamps(received_N, jumped_N, 0.2)
        assert clocked.breaks_s == (12 / 20,)
        assert clocked.keep_N.all()
    late_N = received_N + 1.5 * np.exp(-((np.arange(20) - 10) ** 2))  # a link that stalls and catches up
    assert not check_stamps(np.maximum.accumulate(late_N), received_N, 0.2).breaks_s


def test_rates_of_clocks_are_seen_whatever_jumps() -> None:
    received_N = np.arange(100) / 20
    assert clock_rate(received_N, 0.5 * received_N + 100 * (received_N > 2)) == pytest.approx(0.5)
    assert clock_rate(received_N[:30], received_N[:30]) is None, "too short to tell"


def track(received_N: np.ndarray, stamp_N: np.ndarray | None = None) -> Track:
    stamps = np.full(len(received_N), np.nan) if stamp_N is None else stamp_N
    return Track(received_N, received_N, stamps, np.arange(len(received_N)), np.zeros((len(received_N), 0)))


def test_clocks_that_do_not_go_together_are_refused() -> None:
    received_N = np.arange(100) / 20
    slow, same, away = (
        track(received_N, 0.5 * received_N),
        track(received_N, received_N - 0.01),
        track(received_N, received_N - 40),
    )
    notes: Counter[str] = Counter()
    with pytest.raises(UserError, match=r"a has stamps that advance by 0.5 s per second.*take clock header"):
        on_clock({"a": slow}, "received", 0.2, str, notes)
    with pytest.raises(
        UserError, match=r"b and a have stamps of different clocks: they advance by 1 and 0.5 s.*take clock received"
    ):
        on_clock({"a": slow, "b": same}, "header", 0.2, str, notes)
    with pytest.raises(
        UserError, match=r"b and a have stamps of clocks that are not synchronised.*received 40 and 0.01 s after"
    ):
        on_clock({"a": same, "b": away}, "header", 0.2, str, notes)
    with pytest.raises(UserError, match=r"clock header wants stamps: no topic has"):
        on_clock({"a": track(received_N)}, "header", 0.2, str, notes)
    with pytest.raises(UserError, match=r"clock header wants stamps: b has none, and the others' clock is another"):
        on_clock({"a": slow, "b": track(received_N)}, "header", 0.2, str, notes)
    (part,) = on_clock({"a": slow}, "header", 0.2, str, notes)
    np.testing.assert_array_equal(part["a"].time_N, slow.stamp_N)
    (part,) = on_clock({"a": same, "b": track(received_N)}, "header", 0.2, str, notes)
    np.testing.assert_allclose(part["b"].time_N, received_N - 0.01, atol=1e-9)
    assert not +notes


def test_the_stamps_put_a_late_picture_where_it_belongs(tmp_path: Path) -> None:
    robot = toy_robot()
    delay_s = 0.06  # at which its joints reach the bag
    rows = [joints(row[0] + delay_s, row[2]["position"], row[0]) if row[1] == "joints" else row for row in moving(2.0)]
    path = write_bag(tmp_path / "bag", robot, rows)
    (seen,) = imported(path, robot)
    (happened,) = imported(path, robot, clock="header")
    behind_s = seen.observations[STATE][10, 0] - happened.observations[STATE][10, 0]
    # the commands have no stamps, and are put where the joints' delay says
    assert abs(behind_s) <= 0.0201
    shifted = [row if row[1] == "joints" else (row[0] + delay_s, *row[1:]) for row in rows]
    (moved,) = imported(write_bag(tmp_path / "moved", robot, shifted), robot, clock="header")
    (plain,) = imported(write_bag(tmp_path / "plain", robot, moving(2.0)), robot)
    np.testing.assert_array_equal(moved.observations[STATE], plain.observations[STATE])
    np.testing.assert_array_equal(moved.action_TA, plain.action_TA)


def test_runs() -> None:
    assert runs(np.array([True, True, False, True])) == [(0, 2), (3, 4)]
    assert runs(np.array([False])) == []


# whole bags


def test_a_bag_by_hand(tmp_path: Path) -> None:
    """Joints at 50 Hz count their own time, commands come at 20 Hz from 0.03 s on."""
    robot = toy_robot()
    (episode,) = imported(write_bag(tmp_path / "bag", robot, moving(2.0)), robot)
    assert episode.action_TA[:, 0].tolist() == pytest.approx([0.01 * i for i in range(episode.length)])
    assert set(episode.action_TA[:, 2]) == {1.0}
    grid_T = 0.03 - 0.01 * 0.05 + 0.05 * np.arange(episode.length + 1)
    np.testing.assert_allclose(episode.observations[STATE][:, 0], np.floor(grid_T * 50 + 1e-9) / 50, atol=1e-6)
    assert episode.length == 39, "the last step ends nearest to the bag's end"


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=6, deadline=None)
def test_the_order_of_messages_in_the_bag_does_not_matter(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    robot, rows = toy_robot(), moving(1.0)
    mixed = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    folder = tmp_path_factory.mktemp("mixed")
    (one,) = imported(write_bag(folder / "one", robot, rows), robot)
    for storage in STORAGES[:2]:
        (other,) = imported(write_bag(folder / storage, robot, mixed, storage), robot)
        np.testing.assert_array_equal(one.observations[STATE], other.observations[STATE])
        np.testing.assert_array_equal(one.action_TA, other.action_TA)


@pytest.mark.parametrize(
    ("mode", "twist"), [("delta", False), ("delta", True), ("velocity", True), ("absolute", False)]
)
def test_commands_at_another_rate_move_the_robot_as_far(mode: ActionMode, twist: bool, tmp_path: Path) -> None:
    """100 commands a second for a policy of 20: what the robot did in a step is what the step says."""
    robot, rows = toy_robot(mode, twist=twist), [row for row in moving(2.0) if row[1] == "joints"]
    for i in range(200):
        at_s, value = BEGUN_S + 0.01 * i, 0.001 * i
        sent = {"twist": {"linear": {"x": value, "y": 0.0}}} if twist else {"data": [value, 0.0]}
        rows += [(at_s, "arm", sent), hand(at_s, float(i % 2))]
    (episode,) = imported(write_bag(tmp_path / "bag", robot, rows), robot)
    first_T = 5 * np.arange(episode.length)
    wanted = {
        ("delta", False): 0.001 * (5 * first_T + 10),  # five movements
        ("delta", True): 0.001 * (first_T + 2) / 20,  # a velocity's mean, over a step
        ("velocity", True): 0.001 * (first_T + 2),
        ("absolute", False): 0.001 * (first_T + 4),
    }[mode, twist]
    np.testing.assert_allclose(episode.action_TA[:, 0], wanted, atol=1e-6)
    np.testing.assert_array_equal(episode.action_TA[:, 2], (first_T + 4) % 2, err_msg="a gripper's last")


def test_old_observations_cut_the_episode(tmp_path: Path) -> None:
    robot = toy_robot()
    rows = [row for row in moving(5.0) if row[1] != "joints" or not 2.0 < row[0] - BEGUN_S < 2.5]
    bag = BagImport(write_bag(tmp_path / "bag", robot, rows), robot, ImportOptions(success="all"))
    first, second = bag.episodes()
    assert first.observations[STATE][-1, 0] == pytest.approx(2.0)
    assert first.length == pytest.approx(2.1 * 20, abs=1), "up to the age limit of 0.1 s"
    assert second.observations[STATE][0, 0] == pytest.approx(2.5, abs=0.05)
    assert first.provenance["cut"] == "/joint_states was too old"
    assert (first.success, first.terminated) == (False, False), "its end is not the episode's"
    assert (second.success, second.terminated) == (True, True)
    assert bag.notes["episodes that were cut"] == 2


def test_a_clock_that_jumps_splits_the_bag(tmp_path: Path) -> None:
    robot = toy_robot()
    for jump_s in (-30.0, 30.0):
        rows = []
        for at_s, key, message in moving(4.0):
            stamp_s = at_s + jump_s * (at_s > BEGUN_S + 2)
            rows.append(joints(at_s, message["position"], stamp_s) if key == "joints" else (at_s, key, message))
        bag = BagImport(write_bag(tmp_path / f"bag{jump_s}", robot, rows), robot, ImportOptions())
        assert bag.notes["jumps of a clock"] == 1
        assert [len(p.action_TA) for p in bag.pieces] == [pytest.approx(39, abs=1)] * 2


def test_numbers_that_are_none_are_as_good_as_no_message(tmp_path: Path) -> None:
    robot = toy_robot()
    rows = [joints(r[0], [math.nan, 0.0]) if r[1] == "joints" and r[0] == BEGUN_S + 1.0 else r for r in moving(2.0)]
    bag = BagImport(write_bag(tmp_path / "bag", robot, rows), robot, ImportOptions())
    (episode,) = bag.episodes()
    assert np.isfinite(episode.observations[STATE]).all()
    assert bag.notes["messages that hold no numbers"] == 1


def test_gaps_between_commands_are_ends_of_episodes(tmp_path: Path) -> None:
    robot = toy_robot()
    rows = moving(8.0, scale=0.1)
    rows = [r for r in rows if r[1] == "joints" or not (2.0 < r[0] - BEGUN_S < 4.0 or 6.0 < r[0] - BEGUN_S < 6.5)]
    path = write_bag(tmp_path / "bag", robot, rows)
    first, second = imported(path, robot, split="gap", success="all")
    assert first.length == 40
    assert first.action_TA[-1, 0] == pytest.approx(0.01 * 39), "ends with its last command"
    assert second.action_TA[0, 0] == pytest.approx(0.01 * 80), "begins with its first"
    assert len(imported(path, robot, split="gap", gap_s=0.4)) == 3
    assert [e.success for e in (first, second)] == [True, True]
    assert len(imported(path, robot)) == 1


def test_scenes_and_ends_of_the_status_are_episodes(tmp_path: Path) -> None:
    robot = toy_robot(status=True)
    rows = moving(6.0)
    for i in range(121):
        at_s, t = BEGUN_S + 0.05 * i, 0.05 * i
        scene = 1.0 + (t >= 3.0)
        done = 1.0 <= t < 3.0  # and stays so until the next scene
        rows.append(told(at_s, float(done), 0.5 if done else 0.1, float(done), scene))
    bag = BagImport(write_bag(tmp_path / "bag", robot, rows), robot, ImportOptions(split="status"))
    first, second = bag.episodes()
    assert (first.success, first.terminated, first.truncated) == (True, True, False)
    assert first.success_T.tolist() == [False] * (first.length - 1) + [True]
    assert first.length == 20
    assert first.reward_T[-1] == np.float32(0.5)
    assert (second.success, second.terminated, second.truncated) == (False, False, True)
    assert second.length == pytest.approx(60, abs=1)
    with pytest.raises(UserError, match=r"cannot be split by status: nothing is on /status"):
        BagImport(write_bag(tmp_path / "bare", robot, moving(1.0)), robot, ImportOptions(split="status"))
    with pytest.raises(UserError, match=r"cannot be split by status: the map of 'toy' has none"):
        BagImport(tmp_path / "bare", toy_robot(), ImportOptions(split="status"))


def test_spans() -> None:
    gap, again = spans_by_gap(np.array([0.0, 0.1, 5.0, 5.1]), 1.0, 0.1, 6.0)
    assert (gap.begin_s, gap.before_s) == (-math.inf, 5.0)
    assert 0.1 < gap.end_s < 0.1001
    assert again.begin_s > 0.1
    assert spans_by_gap(np.zeros(0), 1.0, 0.1, 6.0) == []
    done_N = np.array([False, True, True, False, False])
    spans = spans_by_status(np.arange(5.0), done_N, np.zeros(5), np.arange(5.0), 0.1, 4.0)
    assert [round(s.begin_s) for s in spans] == [0, 3], "without scenes, one begins when the last is no longer done"
    assert [round(s.end_s) for s in spans] == [1, 4]


def test_what_is_not_known_is_recorded_as_no_success_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robot = toy_robot()
    path = write_bag(tmp_path / "bag", robot, moving(1.0))
    for success, ended in (("status", "unknown"), ("none", "option"), ("all", "option")):
        (episode,) = imported(path, robot, success=success)
        assert episode.provenance["success_from"] == ended
        assert episode.success == episode.terminated == (success == "all")
        assert episode.truncated == (success != "all")


def test_several_bags_are_one_data_set(lift_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bags, out = tmp_path / "bags", tmp_path / "set"
    assert main(f"bag export {lift_set} --robot lift_dds --out {bags} --storage ros1".split()) == 0
    few = f"{bags}/episode_000002.bag {bags}/episode_000000.bag"
    assert main(f"bag import {few} --robot lift_dds --out {out} --features {STATE} --clock header".split()) == 0
    data = load_dataset(out)
    assert [data.episode(i).provenance["bag"] for i in range(2)] == ["episode_000002.bag", "episode_000000.bag"]
    assert set(data.observation_spec) == {STATE}
    np.testing.assert_array_equal(data.episode(1).action_TA, load_dataset(lift_set).episode(0).action_TA)


def test_sqlite_without_its_metadata_is_read_too(tmp_path: Path) -> None:
    robot = toy_robot()
    for storage in STORAGES[:2]:
        path = write_bag(tmp_path / storage, robot, moving(1.0), storage)
        (whole,) = imported(path, robot)
        (path / "metadata.yaml").unlink()
        (alone,) = imported(path, robot)
        np.testing.assert_array_equal(whole.action_TA, alone.action_TA)
        (file,) = path.iterdir()
        assert not BagFile(file).cut
        np.testing.assert_array_equal(imported(file, robot)[0].action_TA, whole.action_TA)
