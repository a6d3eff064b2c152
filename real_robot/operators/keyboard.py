"""A keyboard, through a window of its own: only a window is told when a key is let go of, which ends a take-over."""

from __future__ import annotations

import os
from collections.abc import Iterable

from real_robot.operators.base import Kind, Look, Situation
from real_robot.operators.screen import Window, load_pygame, status_lines
from vla_rl.runtime.errors import UserError

NO_SCREEN = ("offscreen", "dummy", "evdev")  # SDL's choices where there is no display


class Keyboard:
    """See ``Device``. Keys are let go of when the window is no longer in front: it would not be told when they are."""

    kind: Kind = "keyboard"

    def __init__(self, title: str, keys: Iterable[str]) -> None:
        """Open the window; raises UserError where there is no display, no pygame, or no key of a name.

        Args:
            title: of the window.
            keys: names of the keys that mean something, as pygame calls them.
        """
        self._pygame = pygame = load_pygame()
        chosen = "SDL_VIDEODRIVER" in os.environ
        try:
            pygame.display.init()
            there = chosen or pygame.display.get_driver() not in NO_SCREEN
            self._window = Window(pygame, title) if there else None
        except pygame.error as error:
            raise UserError(
                f"the keyboard wants a window, and there is no display ({error}); take a gamepad"
            ) from error
        if self._window is None:
            pygame.display.quit()
            raise UserError(
                "the keyboard wants a window, and there is no display (DISPLAY, WAYLAND_DISPLAY); take --operator gamepad"
            )
        self._names = {}
        for name in keys:
            try:
                self._names[pygame.key.key_code(name)] = name
            except ValueError as error:
                raise UserError(
                    f"no key is called {name!r}; pygame's names are such as a, left shift, f5, [4]"
                ) from error
        self._down: set[str] = set()

    def look(self) -> Look:
        """See ``Device``."""
        pygame, pressed, closed = self._pygame, set(), False
        for event in pygame.event.get():
            if event.type in (pygame.KEYDOWN, pygame.KEYUP) and event.key in self._names:
                name = self._names[event.key]
                if event.type == pygame.KEYDOWN:
                    pressed.add(name)
                    self._down.add(name)
                else:
                    self._down.discard(name)
            elif event.type == pygame.WINDOWFOCUSLOST:
                self._down.clear()
            closed |= event.type == pygame.QUIT
        return Look(frozenset(self._down), frozenset(pressed), closed=closed)

    def show(self, situation: Situation, help_lines: tuple[str, ...]) -> None:
        """See ``Device``."""
        assert self._window is not None
        lines = status_lines(situation)
        if not self._pygame.key.get_focused():
            lines.append(("keys go to another window: click into this one", True))
        self._window.show(lines, help_lines)

    def close(self) -> None:
        """See ``Device``."""
        self._pygame.display.quit()
