"""The rclpy transport on real ROS 2: ``ros/rclpy_checks.py`` runs in an environment that has rclpy, each check is a test here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from real_robot.transports.base import TransportConfig
from real_robot.transports.rclpy import RclpyConfig
from vla_rl.runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import HERE, Outcome, free_domain, loopback_environment, names_of, run_checks, with_action

CHECKS = HERE / "rclpy_checks.py"
# an action type has to be compiled first, and Jazzy's environment is one more to make
CASES = [
    pytest.param(distro, name, marks=[pytest.mark.slow] if distro == "jazzy" or "action" in name else [])
    for distro in ("kilted", "jazzy")
    for name in names_of(CHECKS)
]


@functools.cache
def outcomes(distro: str, which: str) -> dict[str, Outcome]:
    with free_domain() as domain:
        environment = loopback_environment(distro, domain)
        if which == "action":
            environment = with_action(distro, environment)
        return run_checks(CHECKS, distro, environment, which)


@pytest.mark.parametrize(("distro", "name"), CASES)
def test_on_real_ros(distro: str, name: str, record_property: Callable[[str, object], None]) -> None:
    wrong, numbers = outcomes(distro, "action" if "action" in name else "not action")[name]
    for number in numbers:
        record_property(*number)
    assert not wrong, "\n".join(wrong)


def test_a_missing_installation_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    wanted = r"wants a ROS 2 that was built for this Python \(3\.11\.\d+\): source its setup.bash"
    with pytest.raises(UserError, match=wanted):
        RclpyConfig().build()


def test_the_config_is_found_by_its_name_and_refuses_what_cannot_be() -> None:
    assert TransportConfig.get_choice_class("rclpy") is RclpyConfig
    with pytest.raises(ValueError, match="domain wants 0 to 232, got 233"):
        RclpyConfig(domain=233)
    with pytest.raises(ValueError, match="node wants letters"):
        RclpyConfig(node="my robot")
