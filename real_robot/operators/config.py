"""How a person's keys and sticks move a robot: part of the robot's own file, or a cautious default."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from real_robot.limits import Rules
from vla_rl.runtime.errors import UserError

# meaning: key, and button of a gamepad (as SDL names those of an Xbox pad, whatever is printed on it)
HOLDS = {"takeover": ("space", "right_shoulder"), "held_switch": ("left shift", "left_shoulder")}
COMMANDS = {
    "success": ("y", "y"),
    "failure": ("n", "b"),
    "rerecord": ("backspace", "x"),
    "reset": ("r", "pad_down"),
    "ready": ("return", "start"),
    "resume": ("p", "pad_up"),
    "stop": ("escape", "back"),
}
STICKS = ("left_x", "left_y", "right_x", "right_y", "triggers", "pad_x")
BUTTONS = ("a", "b", "x", "y", "back", "start", "left_stick", "right_stick", "left_shoulder", "right_shoulder")
USUAL_KEYS = (("w", "s"), ("a", "d"), ("q", "e"), ("i", "k"), ("j", "l"), ("u", "o"))
USUAL_STICKS = (
    "left_y",
    "-left_x",
    "right_y",
    "pad_x",
    "triggers",
    "-right_x",
)  # x ahead, y to the left, z up (REP 103)
USUAL_SWITCHES = (("g", "a"), ("h", "right_stick"))
# without a word in the robot's file: a quarter of what the limits allow, the reduced speed of ISO 10218 at most (along an axis), and no
# axis from one end of its range to the other in less than four seconds
USUAL_SHARE, USUAL_SPEED, USUAL_CROSSING_S = 0.25, {"m": 0.25, "rad": 0.5}, 4.0


@dataclass(frozen=True)
class MoveConfig:
    """How a person moves one action.

    speed: with a stick all the way, or a key held; in the action's unit per second (velocities: in its unit)
    keys: of the keyboard, for more and for less of it (none: not by keyboard)
    stick: of the gamepad: left_x, left_y, right_x, right_y (to the right, up), triggers (right less left) or pad_x; with - before it the
        other way round (none: not by gamepad)
    """

    speed: float
    keys: tuple[str, ...] = ()
    stick: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.speed < float("inf"):
            raise ValueError(f"speed wants a number > 0, got {self.speed}")
        if len(self.keys) not in (0, 2):
            raise ValueError(f"keys wants two, for more and for less, or none, got {list(self.keys)}")
        if self.stick and self.stick.removeprefix("-") not in STICKS:
            raise ValueError(f"stick wants one of {', '.join(STICKS)}, with - before it or not, got {self.stick!r}")


@dataclass(frozen=True)
class SwitchConfig:
    """An action with two places that a button changes: a gripper.

    values: the two places (none: the lowest and the highest)
    key: of the keyboard (none: not by keyboard)
    button: of the gamepad (none: not by gamepad)
    held: the second place as long as the button is held; else each press changes it
    """

    values: tuple[float, ...] = ()
    key: str = ""
    button: str = ""
    held: bool = False

    def __post_init__(self) -> None:
        if len(self.values) not in (0, 2):
            raise ValueError(f"values wants two places, or none, got {list(self.values)}")
        if self.button and self.button not in BUTTONS:
            raise ValueError(f"button wants one of {', '.join(BUTTONS)}, got {self.button!r}")


@dataclass(frozen=True)
class OperatorConfig:
    """What a person may move. Where neither is said: the first six moving actions slowly, and the first two of unit 1 by a button.

    moves: by action
    switches: by action
    """

    moves: dict[str, MoveConfig] = field(default_factory=dict)
    switches: dict[str, SwitchConfig] = field(default_factory=dict)

    def resolved(self, rules: Rules) -> OperatorConfig:
        """All of it said, and checked against a robot's actions and limits; raises UserError for what does not fit."""
        found = self if self.moves or self.switches else _usual(rules)
        spec = rules.spec
        for name in (*found.moves, *found.switches):
            if name not in spec.names:
                raise UserError(f"the operator is to move {name!r}; the robot's actions are {', '.join(spec.names)}")
        for name, move in found.moves.items():
            at = spec.names.index(name)
            if not rules.moving_A[at]:
                raise UserError(f"the operator's {name!r} has the unit 1, no motion: it belongs under switches")
            if move.speed > rules.v_max_A[at]:
                raise UserError(
                    f"the operator moves {name} at {move.speed:g} {spec.units[at]} (per s), and its limits allow {rules.v_max_A[at]:g}"
                )
        switches = {name: _placed(name, switch, rules) for name, switch in found.switches.items()}
        _require_once(found.moves, switches, rules)
        return OperatorConfig(dict(found.moves), switches)


def _placed(name: str, switch: SwitchConfig, rules: Rules) -> SwitchConfig:
    at = rules.spec.names.index(name)
    if rules.moving_A[at] and rules.spec.mode != "absolute":
        raise UserError(
            f"the operator's switch {name!r} wants an action of unit 1 or of a place, this one is a movement"
        )
    low, high = rules.spec.low[at], rules.spec.high[at]
    values = switch.values or (low, high)
    if not all(low <= value <= high for value in values):
        raise UserError(
            f"the operator's switch {name!r} has places {list(values)}, and the action goes from {low:g} to {high:g}"
        )
    return SwitchConfig(values, switch.key, switch.button, switch.held)


def _require_once(moves: dict[str, MoveConfig], switches: dict[str, SwitchConfig], rules: Rules) -> None:
    """Each key, button and stick has one meaning."""
    taken = {f"key {key}": meaning for meaning, (key, _) in (HOLDS | COMMANDS).items()}
    taken |= {f"button {button}": meaning for meaning, (_, button) in (HOLDS | COMMANDS).items()}
    wanted = [(f"key {key}", name) for name, move in moves.items() for key in move.keys]
    wanted += [(f"stick {move.stick.removeprefix('-')}", name) for name, move in moves.items() if move.stick]
    wanted += [(f"key {switch.key}", name) for name, switch in switches.items() if switch.key]
    wanted += [(f"button {switch.button}", name) for name, switch in switches.items() if switch.button]
    for what, name in wanted:
        if what in taken:
            raise UserError(f"the operator's {what} means {taken[what]} already, and {name} wants it too")
        taken[what] = name
    for name in set(moves) & set(switches):
        raise UserError(f"the operator's {name} stands under moves and under switches; it can be only one")


def _usual(rules: Rules) -> OperatorConfig:
    spec = rules.spec
    moving = np.flatnonzero(rules.moving_A)[: len(USUAL_KEYS)]
    free = np.flatnonzero(~rules.moving_A)[: len(USUAL_SWITCHES)]
    moves = {}
    for at, keys, stick in zip(moving, USUAL_KEYS, USUAL_STICKS, strict=False):
        speed = USUAL_SHARE * float(rules.v_max_A[at])
        speed = min(speed, USUAL_SPEED.get(spec.units[at].removesuffix("/s"), speed))
        if rules.follows_A[at]:
            speed = min(speed, (spec.high[at] - spec.low[at]) / USUAL_CROSSING_S)
        moves[spec.names[at]] = MoveConfig(speed, keys, stick)
    switches = {
        spec.names[at]: SwitchConfig((), key, button) for at, (key, button) in zip(free, USUAL_SWITCHES, strict=False)
    }
    return OperatorConfig(moves, switches)
