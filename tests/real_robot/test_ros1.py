"""The ros1 transport on Debian's ROS 1: ``ros/ros1_checks.py`` runs in an environment that has rospy, each check is a test here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from real_robot.transports.base import TransportConfig
from real_robot.transports.ros1 import Ros1Config
from vla_rl.runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import HERE, Outcome, names_of, ros1_environment, run_checks

CHECKS = HERE / "ros1_checks.py"


@functools.cache
def outcomes() -> dict[str, Outcome]:
    return run_checks(CHECKS, "ros1", ros1_environment())


@pytest.mark.slow  # Debian's packages have to be installed first
@pytest.mark.parametrize("name", names_of(CHECKS))
def test_on_real_ros(name: str, record_property: Callable[[str, object], None]) -> None:
    wrong, numbers = outcomes()[name]
    for number in numbers:
        record_property(*number)
    assert not wrong, "\n".join(wrong)


def test_a_missing_installation_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rospy", None)
    with pytest.raises(
        UserError, match=r"wants Debian's packages python3-rospy, .* a file NAME\.pth .* /usr/lib/python3/dist-packages"
    ):
        Ros1Config().build()


def test_the_config_is_found_by_its_name_and_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TransportConfig.get_choice_class("ros1") is Ros1Config
    monkeypatch.delenv("ROS_MASTER_URI", raising=False)
    assert Ros1Config().uri == "http://localhost:11311"
    monkeypatch.setenv("ROS_MASTER_URI", "http://robot:11311")
    assert Ros1Config().uri == "http://robot:11311"
    with pytest.raises(ValueError, match="master wants http://HOST:PORT, got 'robot'"):
        Ros1Config(master="robot")
