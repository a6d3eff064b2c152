"""Every robot of type ros, its own file, over DDS to a mirror of it and back: pictures, clouds and depth too."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from real_robot.bridge import serve_topics
from real_robot.mirror import MirrorArm
from real_robot.robot import Robot, load_robot
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.dds import DdsConfig
from vla_rl.cli.main import main
from vla_rl.runtime.pace import Pace

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import free_domain

ROBOTS = ("ros2_control_arm", "position_group_arm", "servo_twist", "mobile_base")


@pytest.fixture(params=ROBOTS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Robot, MirrorArm]]:
    """A robot, not yet connected, and its mirror."""
    config = load_robot(request.param)
    assert isinstance(config, RosRobotConfig)
    slow = replace(
        config.safety,
        joints_age_s=2.0, camera_age_s=2.0, other_age_s=2.0, clock_jump_s=2.0, heartbeat_s=2.0, dead_man=False,
    )  # fmt: skip
    with free_domain() as domain:
        made = replace(config, transport=DdsConfig(domain=domain), safety=slow)
        arm = MirrorArm(made)
        with serve_topics(arm, made):
            thread = threading.Thread(target=arm.run, daemon=True)
            thread.start()
            yield Robot(made), arm
            arm.close()
            thread.join()


def test_it_moves_where_it_is_sent_and_sees_what_is_shown(pair: tuple[Robot, MirrorArm]) -> None:
    robot, arm = pair
    robot.connect()
    spec, rules = robot.action_spec, robot.rules
    reading = robot.observe()
    for name, feature in robot.observation_spec.items():
        assert reading.features[name].shape == feature.shape
    begun_A, pace = robot.state.command_A.copy(), Pace(spec.control_hz)
    place_A = arm.place_A.copy()
    for k in range(30):
        pace.wait()
        robot.observe()
        wish_A = 0.3 * rules.v_max_A * rules.dt
        if spec.mode == "absolute":
            wish_A = begun_A + np.where(rules.moving_A, wish_A * (k + 1), 0)
        elif spec.mode == "velocity":
            wish_A = 0.3 * rules.v_max_A
        decision = robot.send(np.where(rules.moving_A, wish_A, begun_A))
        assert decision.fault is None
    moved_A = (arm.place_A - place_A)[rules.moving_A]
    assert (moved_A > 0).all()
    pictures = [k for k, v in robot.observe().features.items() if v.ndim > 1]
    assert (len(pictures) > 0) == any(t.ages_as == "camera" for t in robot.config.map.sensed().values())  # type: ignore[attr-defined]
    before = {k: robot.observe().features[k] for k in pictures}
    for _ in range(round(0.5 * spec.control_hz)):
        pace.wait()
        robot.observe()
        robot.send(None)
    for name in pictures:
        assert (robot.observe().features[name] != before[name]).any(), "the camera stands still"
    robot.stop()
    assert robot.state.at_rest


def test_what_has_no_topics_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["robot", "mirror", "lift_fake"]) == 2
    assert "topics are mirrored of robots of type ros; lift_fake is of another type" in capsys.readouterr().err
    assert main(["bench", "robot", "--robot", "servo_twist"]) == 2
    assert "sways a robot of type ros that takes places; servo_twist is another one" in capsys.readouterr().err
