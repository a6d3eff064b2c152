"""A person at the robot: what a device says, step by step, as inputs of the control loop and as actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from real_robot.limits import Rules
from real_robot.operators.config import COMMANDS, HOLDS, OperatorConfig
from real_robot.operators.teleop import Teleop
from real_robot.safety import FilterState

DEAD_BAND = 0.1  # of a stick that is let go of
Kind = Literal["keyboard", "gamepad"]
Phase = Literal["scene", "running", "held"]  # set the scene; the episode runs; a fault of before has to be resumed


@dataclass(frozen=True)
class Input:
    """What a person does in one step.

    takeover_A: action in the policy's place, while the person holds on to it
    braking: they do, and the robot is to come to rest before it follows them
    success: the task is done; failure: it will not be
    rerecord: forget this episode and begin it again
    reset: end this episode, without a word on its success
    resume: a fault has been looked after
    ready: the scene is set, the episode may begin
    stop: end everything
    held_switch: the dead-man switch is held
    broken: the device is gone: why the robot has to be held
    """

    takeover_A: np.ndarray | None = None
    braking: bool = False
    success: bool = False
    failure: bool = False
    rerecord: bool = False
    reset: bool = False
    resume: bool = False
    ready: bool = False
    stop: bool = False
    held_switch: bool = False
    broken: str | None = None

    @property
    def takes_over(self) -> bool:
        """Whether the person is in command, not the policy."""
        return self.braking or self.takeover_A is not None


@dataclass(frozen=True)
class Situation:
    """What a person is told in one step.

    state: of the filter: what was sent last, and how fast
    phase: what the loop does
    seed: of the scene
    elapsed_s: of the episode
    fault: why the robot is held
    in_command: who moves the robot, for people
    notice: what was said to the person's last wish
    """

    state: FilterState
    phase: Phase
    seed: int
    elapsed_s: float = 0.0
    fault: str | None = None
    in_command: str = "nobody"
    notice: str = ""


@runtime_checkable
class Operator(Protocol):
    """A person at a keyboard or gamepad."""

    def poll(self, situation: Situation) -> Input:
        """Show how things stand; what has happened since the last call. Returns at once."""


class Nobody:
    """No person: episodes begin and end by themselves, and a fault ends the run."""

    def poll(self, situation: Situation) -> Input:
        """See ``Operator``."""
        del situation
        return Input(ready=True)


@dataclass(frozen=True)
class Look:
    """What a device says.

    down: names of keys or buttons that are held
    pressed: of those that went down since the last look
    sticks: deflection by name, -1 to 1
    closed: its window was closed
    gone: why it cannot be asked any more
    """

    down: frozenset[str] = frozenset()
    pressed: frozenset[str] = frozenset()
    sticks: Mapping[str, float] = field(default_factory=dict)
    closed: bool = False
    gone: str | None = None


@runtime_checkable
class Device(Protocol):
    """Something to hold in one's hands; one kind of it = one file."""

    kind: Kind

    def look(self) -> Look:
        """What has happened since the last look, at once."""

    def show(self, situation: Situation, help_lines: tuple[str, ...]) -> None:
        """Tell the person how things stand; must not hold the loop up."""

    def close(self) -> None:
        """Let go of it."""


class Person:
    """A device and what it means for a robot: an ``Operator``."""

    def __init__(self, device: Device, rules: Rules, config: OperatorConfig) -> None:
        """Set up; raises UserError where the config does not fit the robot."""
        self.device, self.teleop = device, Teleop(rules, config)
        column = 0 if device.kind == "keyboard" else 1
        self._holds = {meaning: names[column] for meaning, names in HOLDS.items()}
        self._commands = {meaning: names[column] for meaning, names in COMMANDS.items()}
        self._help = _help_lines(device.kind, self.teleop.config, self._holds | self._commands, rules)
        self._taken_over = False

    def poll(self, situation: Situation) -> Input:
        """See ``Operator``."""
        look = self.device.look()
        self.device.show(situation, self._help)
        said: dict[str, Any] = {meaning: name in look.pressed for meaning, name in self._commands.items()}
        said["success"] &= not said["failure"]  # of two at once the one that claims less
        said["stop"] |= look.closed
        if look.gone is not None:
            self._taken_over = False
            return Input(stop=said["stop"], broken=f"operator: {look.gone}")
        takes_over = self._holds["takeover"] in look.down
        action_A = self._action(look, situation) if takes_over else None
        self._taken_over = takes_over
        return Input(
            action_A, takes_over and action_A is None, held_switch=self._holds["held_switch"] in look.down, **said
        )

    def _action(self, look: Look, situation: Situation) -> np.ndarray | None:
        if not self._taken_over:
            self.teleop.begin(situation.state)
        config, keyboard = self.teleop.config, self.device.kind == "keyboard"
        deflections = {}
        for name, move in config.moves.items():
            if keyboard and move.keys:
                deflections[name] = float(move.keys[0] in look.down) - float(move.keys[1] in look.down)
            elif not keyboard and move.stick:
                sign = -1.0 if move.stick.startswith("-") else 1.0
                deflections[name] = sign * _beyond_band(look.sticks.get(move.stick.removeprefix("-"), 0.0))
        buttons = {name: s.key if keyboard else s.button for name, s in config.switches.items()}
        pressed = frozenset(name for name, button in buttons.items() if button in look.pressed)
        held = frozenset(name for name, button in buttons.items() if button in look.down)
        return self.teleop.action(deflections, pressed, held, situation.state)

    def close(self) -> None:
        """Let go of the device."""
        self.device.close()


def _beyond_band(deflection: float) -> float:
    """A stick's deflection without the dead band in its middle, which a worn one does not return from."""
    size = min((abs(deflection) - DEAD_BAND) / (1 - DEAD_BAND), 1.0)
    return float(np.copysign(max(size, 0.0), deflection))


def _help_lines(kind: Kind, config: OperatorConfig, meanings: Mapping[str, str], rules: Rules) -> tuple[str, ...]:
    """What each key or button does, for people."""
    words = {
        "takeover": "hold to take over",
        "held_switch": "hold, or the robot does not move"
        if rules.config.dead_man
        else "(dead-man switch, not used here)",
        "success": "success, next",
        "failure": "failure, next",
        "rerecord": "forget and record again",
        "reset": "end it unjudged, next",
        "ready": "the scene is set: begin",
        "resume": "the fault is looked after",
        "stop": "stop everything",
    }
    lines = [f"{name:<14} {words[meaning]}" for meaning, name in meanings.items()]
    for name, move in config.moves.items():
        control = " / ".join(move.keys) if kind == "keyboard" else move.stick
        lines += [f"{control:<14} {name} +/-, {move.speed:g} per s"] if control else []
    for name, switch in config.switches.items():
        control = switch.key if kind == "keyboard" else switch.button
        how = "while held" if switch.held else "each press"
        lines += [f"{control:<14} {name}: {switch.values[0]:g} or {switch.values[1]:g}, {how}"] if control else []
    return tuple(lines)
