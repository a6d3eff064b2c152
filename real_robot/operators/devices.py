"""Open what a person holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from real_robot.limits import Rules
from real_robot.operators.base import Device, Kind, Person
from real_robot.operators.config import COMMANDS, HOLDS, OperatorConfig
from real_robot.operators.gamepad import Gamepad
from real_robot.operators.keyboard import Keyboard


@contextlib.contextmanager
def open_person(kind: Kind, rules: Rules, config: OperatorConfig, robot: str) -> Iterator[Person]:
    """A person at a robot, for the time of the block.

    Args:
        kind: of the device.
        rules: of the robot.
        config: how it is moved.
        robot: its name, for people.

    Raises:
        UserError: the device is not there, pygame is not, or the config does not fit the robot.
    """
    resolved = config.resolved(rules)
    device: Device
    if kind == "keyboard":
        keys = {key for key, _ in (HOLDS | COMMANDS).values()}
        keys |= {key for move in resolved.moves.values() for key in move.keys}
        keys |= {switch.key for switch in resolved.switches.values() if switch.key}
        device = Keyboard(f"{robot}: a person may take over", sorted(keys))
    else:
        device = Gamepad()
    with contextlib.closing(Person(device, rules, resolved)) as person:
        yield person
