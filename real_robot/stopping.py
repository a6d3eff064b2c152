"""Ctrl-C and SIGTERM in a program that moves a robot: it comes to rest first."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType


class StopAsked(KeyboardInterrupt):
    """A signal came while something was waited for that looks at no flag."""


class StopRequest:
    """SIGINT and SIGTERM as a flag that the loop looks at in every step; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._breaks_off = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        del frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write(f"\nstopping ({signal.Signals(number).name}); again to interrupt at once\n")
        if self._breaks_off:
            raise StopAsked

    @contextlib.contextmanager
    def breaks_off(self) -> Iterator[None]:
        """For the time of the block, in which nothing is commanded, the first signal breaks off what is waited for; raises StopAsked."""
        if self.asked:
            raise StopAsked
        before, self._breaks_off = self._breaks_off, True
        try:
            yield
        finally:
            self._breaks_off = before


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM for the time of the block; outside the main thread, where Python knows no signals, do nothing."""
    request = StopRequest()
    try:
        before = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
