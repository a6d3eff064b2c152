"""What ``Robot`` adds to the filter: nothing goes out unasked, too soon, unrecorded, or on what cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from robot_toys import ToyDriver, ToyRobotConfig, arm_spec, limits, toy_robot

from real_robot.audit import AuditLog
from real_robot.robot import Robot, RobotError
from vla_rl.types import STATE

WISH_A = np.array([0.01, 0.0, 0.0, 0.2])


def step(robot, wish_A=WISH_A):
    robot.observe()
    return robot.send(wish_A)


def test_nothing_goes_out_before_the_first_action() -> None:
    robot, driver = toy_robot()
    for _ in range(3):
        assert step(robot, None).holding
    assert driver.written == []
    step(robot)
    step(robot, None)
    assert len(driver.written) == 2
    robot.stop()


def test_commands_keep_their_distance_however_fast_they_are_asked_for() -> None:
    robot, driver = toy_robot(hz=50.0)
    for _ in range(10):
        step(robot)
    robot.stop()
    assert np.diff([at_s for at_s, _ in driver.written]).min() >= 0.6 / 50  # 0.75, and what writing takes


@pytest.mark.parametrize("refusal", [ValueError("bad"), OSError("gone"), KeyError("x")])
def test_whatever_keeps_a_command_from_going_out_is_latched(refusal: Exception) -> None:
    robot, driver = toy_robot()
    step(robot)
    driver.refuses = refusal
    decision = step(robot)
    assert decision.new_fault
    assert str(decision.fault).startswith("link: ")
    driver.refuses = None
    before_A = driver.written[-1][1]
    for _ in range(10):
        decision = step(robot, np.array([1.0, 1.0, 1.0, 1.0]))
    assert decision.fault == robot.fault
    assert abs(decision.sent_A - before_A).max() < 0.02, "held, not moved"
    robot.resume()
    assert step(robot).fault is None
    robot.stop()


def test_a_disk_that_is_full_holds_the_robot_until_it_has_room(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    robot, _ = toy_robot(log)
    step(robot)
    good, full = robot._log._file, AuditLog(Path("/dev/full"))
    robot._log._file = full._file
    step(robot)
    decision = step(robot)
    assert decision.holding
    assert "record: /dev/full cannot be written (No space left" in str(decision.fault)
    for _ in range(5):
        step(robot, None)
    with pytest.raises(RobotError, match="cannot resume: record"):
        robot.resume()
    robot._log._file = good
    robot.resume()
    assert step(robot).fault is None
    robot.stop()
    assert "stopped" in [json.loads(line).get("event") for line in log.read_text().splitlines()]


def test_observations_that_are_no_numbers_are_a_fault_of_any_robot() -> None:
    robot, driver = toy_robot()
    driver.says = {"features": {STATE: np.array([0.0, np.nan, 0, 0], np.float32)}}
    assert "observation: 'observation.state' is not finite" in str(step(robot).fault)
    assert np.isfinite(robot.observe().features[STATE]).all(), "what is recorded of it has to be finite"
    robot.stop()


def test_a_link_that_comes_back_moves_nothing_until_a_person_resumes() -> None:
    """Its last commands were lost: the arm stands behind them, and is told nothing while the fault is latched."""
    robot, driver = toy_robot(max_velocity=(0.5,) * 4)
    for k in range(20):
        step(robot, np.array([0.005 * k, 0, 0, 0]))
    behind_A = driver.place_A.copy()
    driver.refuses = OSError("gone")
    for _ in range(30):
        step(robot, np.array([0.3, 0, 0, 0]))
    ahead_A = robot.state.command_A
    assert ahead_A[0] - behind_A[0] > 0.011, "the test loses no commands"
    driver.refuses = None
    sent = len(driver.written)
    for _ in range(5):
        step(robot, np.array([0.3, 0, 0, 0]))
    assert len(driver.written) == sent
    robot.resume()
    decision = step(robot, behind_A)
    assert driver.written[-1][1][:3] == pytest.approx(behind_A[:3], abs=1e-9)
    assert decision.fault is None
    robot.stop()


def test_a_robot_whose_observations_are_stale_is_not_connected_to() -> None:
    spec = arm_spec("absolute")
    robot = Robot(ToyRobotConfig(name="toy", action=spec, safety=limits(spec.dim)))
    assert isinstance(robot.driver, ToyDriver)
    robot.driver.says = {"ages_s": {"arm": ("joints", 3.0)}}
    with pytest.raises(RobotError, match="robot 'toy': 'arm' is stale"):
        robot.connect()


def test_shadow_mode_bears_a_robot_that_leaves_its_limits() -> None:
    robot, driver = toy_robot(silent=True)
    assert driver.silent
    assert step(robot).fault is None
    driver.place_A = np.array([2.5, 0, 0, 0])
    assert "a0 is at 2.5" in str(step(robot).fault)
    driver.place_A = np.zeros(4)
    while not robot.state.at_rest:
        step(robot, None)
    robot.resume()
    assert step(robot).fault is None
    assert driver.written == []
    robot.stop()
