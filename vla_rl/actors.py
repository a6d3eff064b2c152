"""Who collects for a residual learner: the learner's own process, or others. An order and weights in, episodes out.

A learner hands in order n + 1 with the weights that it has, learns from what it got up to order n, and then asks for the episodes. So
episodes are one order older than they could be, learning and simulation overlap where the actor is another process, and what is learned
does not depend on who collected it.
"""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

from vla_rl.data.steps import StepEpisode
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.steps import Order, collect_steps
from vla_rl.policies.residual import ResidualPolicy


@runtime_checkable
class Actor(Protocol):
    """Carries out one order at a time."""

    def submit(self, order: Order, policy: ResidualPolicy) -> None:
        """Begin an order with the weights as they are now."""

    def result(self) -> list[StepEpisode]:
        """Wait for the episodes of the order that was submitted."""

    def close(self) -> None:
        """Let go of all that is held."""


class OwnActor:
    """Collects in this process, when asked for the result."""

    def __init__(self, arena: Arena, base: BaseSource) -> None:
        self._arena, self._base = arena, base
        self._waiting: tuple[Order, ResidualPolicy] | None = None

    def submit(self, order: Order, policy: ResidualPolicy) -> None:
        """See ``Actor``."""
        self._waiting = order, copy.deepcopy(policy)

    def result(self) -> list[StepEpisode]:
        """See ``Actor``."""
        assert self._waiting is not None, "an order comes before its result"
        (order, policy), self._waiting = self._waiting, None
        arena = self._arena
        return collect_steps(order, arena.env, arena.action_spec, arena.instruction, self._base, policy)

    def close(self) -> None:
        """See ``Actor``."""
