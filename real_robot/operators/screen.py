"""pygame, loaded when it is wanted; what a person is told, in a window or as lines on the terminal."""

from __future__ import annotations

import importlib
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from types import ModuleType

from real_robot.operators.base import Situation
from vla_rl.runtime.errors import UserError

WINDOW = (640, 560)
LINE, FONT = 20, 18  # pixels
REDRAW_S = 0.1
BACKGROUND, TEXT, DIM, ALARM = (24, 26, 30), (232, 232, 232), (150, 156, 166), (255, 82, 82)
SETTINGS = {
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    "SDL_JOYSTICK_ALLOW_BACKGROUND_EVENTS": "1",  # a gamepad works whatever window is in front
    "SDL_NO_SIGNAL_HANDLERS": "1",  # Ctrl-C is the control loop's
}


def load_pygame() -> ModuleType:
    """pygame; raises UserError where it is not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources, which complains
            return importlib.import_module("pygame")
    except ImportError as error:
        raise UserError(f"a keyboard or gamepad wants pygame ({error}): pip install 'vla-rl[teleop]'") from error


def status_lines(situation: Situation) -> list[tuple[str, bool]]:
    """How things stand, each line with whether it is an alarm."""
    phases = {
        "scene": "set the scene, then say that it is ready",
        "running": f"{situation.elapsed_s:.0f} s",
        "held": "held by a fault of before; look after it, then resume",
    }
    lines = [(f"episode {situation.seed}: {phases[situation.phase]}", False)]
    lines.append((f"in command: {situation.in_command}", False))
    if situation.fault is not None:
        lines.append((f"FAULT: {situation.fault}", True))
    if situation.notice:
        lines.append((situation.notice, True))
    return lines


class Window:
    """Shows lines; drawn only when they change, and ten times a second at most."""

    def __init__(self, pygame: ModuleType, title: str) -> None:
        self._pygame = pygame
        pygame.font.init()
        self._font = pygame.font.Font(None, FONT)
        self._surface = pygame.display.set_mode(WINDOW)
        pygame.display.set_caption(title)
        self._shown: list[tuple[str, tuple[int, int, int]]] = []
        self._drawn_s = 0.0

    def show(self, lines: Sequence[tuple[str, bool]], help_lines: Sequence[str]) -> None:
        """Draw what has changed; long lines are broken."""
        colored = [(part, ALARM if alarm else TEXT) for text, alarm in lines for part in self._broken(text)]
        colored += [("", DIM), *((text, DIM) for text in help_lines)]
        now_s = time.monotonic()
        if colored == self._shown or now_s - self._drawn_s < REDRAW_S:
            return
        self._shown, self._drawn_s = colored, now_s
        self._surface.fill(BACKGROUND)
        for row, (text, color) in enumerate(colored):
            for column, word in ((0, text[:14]), (120, text[14:])) if color == DIM else ((0, text),):
                self._surface.blit(self._font.render(word, True, color), (12 + column, 10 + LINE * row))
        self._pygame.display.flip()

    def _broken(self, text: str) -> list[str]:
        parts = [""]
        for word in text.split():
            if parts[-1] and self._font.size(f"{parts[-1]} {word}")[0] > WINDOW[0] - 24:
                parts.append("")
            parts[-1] = f"{parts[-1]} {word}".strip()
        return parts


class Terminal:
    """Writes what changes to the terminal, in a thread: a terminal that blocks holds no loop up."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._said: list[str] = []
        self._thread = threading.Thread(target=self._write, name="operator-terminal", daemon=True)
        self._thread.start()

    def show(self, lines: Sequence[str]) -> None:
        """Say the lines that were not said the last time."""
        for line in lines:
            if line not in self._said:
                self._waiting.put(line)
        self._said = list(lines)

    def _write(self) -> None:
        while (line := self._waiting.get()) is not None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Say what is left; not longer than a moment."""
        self._waiting.put(None)
        self._thread.join(1.0)
