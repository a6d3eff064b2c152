"""``vla-rl robot replay``: recorded motions at any speed, from the place where they begin, and how near the robot came to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from robot_toys import arm_spec, limits
from scipy.spatial.transform import Rotation

from real_robot.limits import make_rules
from real_robot.operators.base import Situation
from real_robot.playback import Playback, at_speed, deviation, require_at_start
from real_robot.robot import RobotError
from vla_rl.cli.main import main
from vla_rl.data.reader import load_dataset
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.config import CONFIG_ROOT
from vla_rl.types import ENVIRONMENT_STATE, STATE, ActionMode

SPEEDS = (0.3, 0.5, 1.0, 1.7, 3.0)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vla-rl:")]
    return line


# the motion at another speed


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("mode", ["delta", "velocity"])
def test_movements_at_any_speed_end_at_the_same_place(mode: ActionMode, speed: float) -> None:
    rules = make_rules(arm_spec(mode), limits(4))
    action_TA = np.random.default_rng(0).uniform(-0.01, 0.01, (37, 4)).astype(np.float32)
    action_TA[:, 3] = np.sign(action_TA[:, 3])
    made_KA = at_speed(action_TA, rules, speed)
    np.testing.assert_allclose(made_KA[:, :3].sum(axis=0), action_TA[:, :3].sum(axis=0), atol=1e-6)
    assert abs(len(made_KA) - 37 / speed) <= 1
    assert set(made_KA[:, 3]) <= {-1.0, 1.0}, "a gripper is never half open"
    if speed == 0.5:
        np.testing.assert_allclose(made_KA[::2, :3] + made_KA[1::2, :3], action_TA[:, :3], atol=1e-6)
        np.testing.assert_array_equal(made_KA[::2, 3], action_TA[:, 3])


@pytest.mark.parametrize("speed", SPEEDS)
def test_places_at_any_speed_lie_on_the_recorded_path(speed: float) -> None:
    rules = make_rules(arm_spec("absolute", joints=4, gripper=False), limits(4, rotations=("a1",)))
    turn_T = np.linspace(3.0, 3.5, 21)  # over pi, where the vector changes sides
    about_z = Rotation.from_rotvec(np.outer(turn_T, [0.0, 0.0, 1.0])).as_rotvec()
    action_TA = np.column_stack([np.linspace(0, 1, 21), about_z]).astype(np.float32)
    made_KA = at_speed(action_TA, rules, speed)
    np.testing.assert_array_equal(made_KA[[0, -1]], action_TA[[0, -1]])
    np.testing.assert_allclose(np.diff(made_KA[:-1, 0]), speed / 20, atol=1e-6)
    turned_K = np.mod(made_KA[:, 3], 2 * np.pi)
    np.testing.assert_allclose(turned_K, 3.0 + 0.5 * made_KA[:, 0], atol=1e-5)
    assert at_speed(action_TA, rules, 1.0) is action_TA


def test_a_robot_elsewhere_is_told_both_places() -> None:
    rules = make_rules(arm_spec("absolute", gripper=False), limits(3))
    require_at_start(rules, np.array([0.29, 0.0, 0.0]), np.zeros(3), "arm")
    with pytest.raises(RobotError, match=r"'arm' is at 0.31 rad in a1, and the episode begins at 0; 0.3 apart are all"):
        require_at_start(rules, np.array([0.0, 0.31, 0.0]), np.zeros(3), "arm")
    turning = make_rules(arm_spec("absolute", gripper=False), limits(3, rotations=("a0",)))
    upside_down = np.array([3.1, 0.0, 0.0])
    require_at_start(turning, upside_down, upside_down - [2 * np.pi, 0, 0], "arm")
    with pytest.raises(RobotError, match=r"a0 and the two after it at \[3.1, 0.0, 0.0\] rad, and the episode begins"):
        require_at_start(turning, upside_down, np.zeros(3), "arm")
    movements = make_rules(arm_spec("delta"), limits(4))
    require_at_start(movements, np.full(4, np.nan), np.zeros(4), "arm")


def test_the_second_action_waits_until_the_first_place_is_reached() -> None:
    rules = make_rules(arm_spec("absolute"), limits(4))
    at = SimpleNamespace(command_A=np.zeros(4), measured_A=np.zeros(4))
    robot: Any = SimpleNamespace(rules=rules, silent=False, state=at, observe=lambda: at, config=at)
    at.name = "arm"
    action_TA = np.array([[0.2, 0, 0, 1], [0.25, 0, 0, -1], [0.3, 0, 0, -1]], np.float32)
    playback = Playback(robot, action_TA)
    playback.reset(0)
    given = []
    for command in (0.1, 0.19, 0.2, 0.25, 0.3):
        given.append(float(playback.act({})[0]))
        assert playback.poll(Situation(np.zeros(4), "running", 0)).reset == (len(given) == 5)
        at.command_A = np.array([command, 0, 0, -1])  # grippers are not waited for
    np.testing.assert_allclose(given, [0.2, 0.2, 0.2, 0.25, 0.3])
    assert playback.waited == 2
    at.measured_A = np.array([0.6, 0, 0, 0])
    with pytest.raises(RobotError, match=r"begins at 0\.2"):
        playback.reset(0)


def test_paths_are_compared_at_the_same_time_of_the_motion() -> None:
    recorded_TS = np.linspace(0, 1, 11)[:, None] * [1.0, -2.0]
    slow_KS = np.linspace(0, 1, 21)[:, None] * [1.0, -2.0]
    waited_KS = np.concatenate([np.full((3, 2), 7.0), slow_KS])
    found = deviation(recorded_TS, waited_KS + np.array([0.0, 0.1]), 0.5, 3, ("x", "y"))
    np.testing.assert_allclose(found.most_S, [0, 0.1], atol=1e-9)
    np.testing.assert_allclose(found.rms_S, [0, 0.1], atol=1e-9)


# on the simulated pusher


def robot_file(folder: Path, **changes: Any) -> Path:
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / "push_t_fake.yaml").read_text())
    patience = {"joints_age_s": 3.0, "other_age_s": 3.0, "heartbeat_s": 3.0, "inference_s": 5.0, "clock_jump_s": 3.0}
    raw["safety"] |= {**patience, **changes}
    raw["answer_s"] = 10.0
    path = folder / "pusher.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def replayed(words: str, folder: Path) -> dict[str, Any]:
    numbers = folder / "numbers.json"
    assert main([*f"robot replay {words} --json {numbers}".split()]) == 0
    return json.loads(numbers.read_text())


@pytest.fixture(scope="module")
def success(demos: Path) -> int:
    """Number of the shortest success."""
    rows = load_dataset(demos).episodes
    return int(rows[rows["success"]]["length"].idxmin())


def test_a_replay_goes_the_recorded_way_and_is_recorded(demos: Path, success: int, tmp_path: Path) -> None:
    words = f"{demos} --robot {robot_file(tmp_path)} --episode {success} --out {tmp_path / 'run'}"
    found = replayed(words, tmp_path)
    recorded = load_dataset(demos).episode(success)
    assert found["fault"] is None
    assert found["clip_rate"] < 0.05
    assert set(found["path"]) == {"x", "y"}
    spread_S = np.ptp(recorded.observations[STATE], axis=0)
    for axis, spread in zip(found["path"].values(), spread_S, strict=True):
        assert axis["rms"] <= axis["max"]
        assert axis["rms"] < 0.2 * spread, (
            "an idle machine gives 0.02 of it; a late command leaves the pusher where it is"
        )
    again = load_dataset(tmp_path / "run" / "episodes").episode(0)
    assert again.provenance["source"] == "replay"
    assert again.provenance["scene_seed"] == recorded.provenance["scene_seed"]
    np.testing.assert_array_equal(again.observations[ENVIRONMENT_STATE][0], recorded.observations[ENVIRONMENT_STATE][0])
    skipped = found["waited_steps"]
    steps = min(again.length - skipped, recorded.length)
    np.testing.assert_allclose(again.action_TA[skipped : skipped + steps], recorded.action_TA[:steps], atol=1e-5)
    moved = np.abs(again.observations[STATE][-1] - again.observations[STATE][0]).max()
    assert moved > 0.05


def test_too_fast_a_replay_is_limited(demos: Path, success: int, tmp_path: Path) -> None:
    slow = robot_file(tmp_path, max_velocity=[0.3, 0.3], max_acceleration=[3.0, 3.0], max_step=[0.015, 0.015])
    found = replayed(f"{demos} --robot {slow} --episode {success} --speed 4 --out {tmp_path / 'run'}", tmp_path)
    assert found["clip_rate"] > 0.3
    assert found["fault"] is None
    sent_TA = load_dataset(tmp_path / "run" / "episodes").episode(0).action_TA
    assert np.abs(np.diff(sent_TA, axis=0)).max() <= 0.015 + 1e-6


def test_shadow_and_dry_send_nothing(demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robot = robot_file(tmp_path)
    found = replayed(f"{demos} --robot {robot} --episode 0 --mode dry", tmp_path)
    assert found["fits"]
    assert "nothing was sent" in capsys.readouterr().out
    replayed(f"{demos} --robot {robot} --episode 0 --mode shadow --speed 4 --out {tmp_path / 'run'}", tmp_path)
    state_TS = load_dataset(tmp_path / "run" / "episodes").episode(0).observations[STATE]
    assert np.abs(state_TS - state_TS[0]).max() < 1e-3


def test_what_does_not_fit_is_refused_in_one_line(
    demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far = load_dataset(demos).episode(0)
    spec = load_dataset(demos).action_spec
    shapes = load_dataset(demos).observation_spec
    writer = EpisodeWriter.open_or_create(
        tmp_path / "far", action_spec=spec, observation_spec=shapes, task="push_t", recipe={}
    )
    writer.add(replace(far, action_TA=np.full_like(far.action_TA, 0.34)))
    near = robot_file(tmp_path, max_tracking_error=[0.05, 0.05], max_step=[0.05, 0.05])
    out = tmp_path / "run"
    for words, says in [
        (f"{demos} --robot push_t_fake --episode 99", "has episodes 0 to 11, got --episode 99"),
        (f"{demos} --robot push_t_fake --episode -1", "episode wants a number >= 0"),
        (f"{demos} --robot push_t_fake --episode 0 --speed 0", "speed a number > 0, got 0 and 0"),
        (f"{demos} --robot lift_fake --episode 0", "action spec of robot 'panda_lift_fake' and of data set"),
        (f"{tmp_path}/far --robot {near} --episode 0", "and the episode begins at 0.34; 0.05 apart are allowed"),
    ]:
        assert main(f"robot replay {words} --out {out}".split()) == 2
        assert says in one_line(capsys)
    assert not load_steps(out), "nothing was sent"


def load_steps(out: Path) -> list[dict[str, Any]]:
    lines = (out / "steps.jsonl").read_text().splitlines() if (out / "steps.jsonl").exists() else []
    return [step for step in map(json.loads, lines) if "sent" in step]
