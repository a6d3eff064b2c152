"""A gamepad, through SDL's table of them: its buttons and sticks have the same names whatever pad and system it is. It needs no display."""

from __future__ import annotations

import importlib
import os
from typing import Any

from real_robot.operators.base import Kind, Look, Situation
from real_robot.operators.screen import Terminal, load_pygame, status_lines
from vla_rl.runtime.errors import UserError

FULL = 32767.0  # what SDL calls all the way
BUTTONS = {
    "a": "A",
    "b": "B",
    "x": "X",
    "y": "Y",
    "back": "BACK",
    "start": "START",
    "left_stick": "LEFTSTICK",
    "right_stick": "RIGHTSTICK",
    "left_shoulder": "LEFTSHOULDER",
    "right_shoulder": "RIGHTSHOULDER",
    "pad_up": "DPAD_UP",
    "pad_down": "DPAD_DOWN",
    "pad_left": "DPAD_LEFT",
    "pad_right": "DPAD_RIGHT",
}


class Gamepad:
    """See ``Device``. Pulled out, it says so until the same or another one is there; what was held is let go of."""

    kind: Kind = "gamepad"

    def __init__(self) -> None:
        """Open the first one; raises UserError where there is none that SDL knows, or no pygame."""
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # events come through the video system
        self._pygame = pygame = load_pygame()
        self._controller: Any = importlib.import_module("pygame._sdl2.controller")
        pygame.display.init()
        self._controller.init()
        self._numbers = {getattr(pygame, f"CONTROLLER_BUTTON_{theirs}"): ours for ours, theirs in BUTTONS.items()}
        self._pad: Any = None
        self.name = "none"
        self._terminal: Terminal | None = None
        pygame.event.get()  # it finds pads by them
        if not self._find():
            strangers = [self._controller.name_forindex(i) or "unnamed" for i in range(self._controller.get_count())]
            self.close()
            why = (
                f"SDL has no table for {', '.join(strangers)} (SDL_GAMECONTROLLERCONFIG)"
                if strangers
                else "none is connected"
            )
            raise UserError(f"no gamepad: {why}")
        self._terminal = Terminal()

    def _find(self) -> bool:
        for index in range(self._controller.get_count()):
            if self._controller.is_controller(index):
                self._pad = self._controller.Controller(index)
                self.name = str(self._pad.name)
                return True
        return False

    def look(self) -> Look:
        """See ``Device``."""
        pygame, pressed = self._pygame, set()
        for event in pygame.event.get():
            if event.type == pygame.CONTROLLERBUTTONDOWN and event.button in self._numbers:
                pressed.add(self._numbers[event.button])
        if not self._pad.attached():
            if not self._find():
                return Look(gone=f"the gamepad {self.name!r} is gone")
            pressed.clear()  # of the moment in which it came back
        down = {ours for number, ours in self._numbers.items() if self._pad.get_button(number)}
        return Look(frozenset(down), frozenset(pressed), self._sticks(down))

    def _sticks(self, down: set[str]) -> dict[str, float]:
        def axis(name: str) -> float:
            return float(self._pad.get_axis(getattr(self._pygame, f"CONTROLLER_AXIS_{name}"))) / FULL

        return {
            "left_x": axis("LEFTX"),
            "left_y": -axis("LEFTY"),  # SDL's goes down
            "right_x": axis("RIGHTX"),
            "right_y": -axis("RIGHTY"),
            "triggers": axis("TRIGGERRIGHT") - axis("TRIGGERLEFT"),
            "pad_x": float("pad_right" in down) - float("pad_left" in down),
        }

    def show(self, situation: Situation, help_lines: tuple[str, ...]) -> None:
        """See ``Device``: on the terminal, what is new."""
        assert self._terminal is not None
        first, *others = status_lines(situation)
        shown = [] if situation.phase == "running" else [first[0]]  # seconds go by; they are nothing new
        self._terminal.show([*help_lines, *shown, *(text for text, _ in others)])

    def close(self) -> None:
        """See ``Device``."""
        if self._terminal is not None:
            self._terminal.close()
        self._controller.quit()
        self._pygame.display.quit()
