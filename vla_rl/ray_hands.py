"""Many hands through Ray, inside one trusted cluster: Ray's own protocol runs what it is sent, so it is not for machines of others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from vla_rl.actors import MOST_LOSSES, Desk, Hand, from_message
from vla_rl.data.steps import StepEpisode
from vla_rl.inference.steps import Order
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.platform import set_offline, set_single_thread


class RayHand:
    """A ``Desk`` in a Ray actor; Ray starts it anew where it was killed, and the order is done again."""

    def __init__(self, ray: Any, make_desk: Callable[[], Desk], setting: Mapping[str, Any]) -> None:
        self._ray = ray
        self._actor = ray.remote(num_cpus=0, max_restarts=-1)(_Seat).remote(make_desk, dict(setting))
        self._request: dict[str, Any] = {}
        self._ticket: Any = None

    def submit(self, order: Order, weights: bytes) -> None:
        """See ``Hand``."""
        self._request = {"call": "collect", "order": asdict(order), "weights": weights}
        self._ticket = self._actor.answer.remote(self._request)

    def result(self) -> list[StepEpisode]:
        """See ``Hand``; raises UserError for what is wrong there, and where it dies again and again."""
        losses = 0
        while True:
            try:
                return [from_message(m) for m in self._ray.get(self._ticket)["episodes"]]
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):  # the error's own text is a traceback
                    raise UserError(str(error.cause)) from error
                raise
            except self._ray.exceptions.RayActorError as error:
                losses += 1
                if losses > MOST_LOSSES:
                    raise UserError(f"an actor of the Ray cluster died {losses} times over one order") from error
                # the one that takes its place has not heard the order
                self._ticket = self._actor.answer.remote(self._request)

    @property
    def pid(self) -> int:
        """Process that works for it."""
        return int(self._ray.get(self._actor.pid.remote()))

    def close(self) -> None:
        """See ``Hand``."""
        self._ray.kill(self._actor)


class _Seat:
    """What runs in the Ray actor."""

    def __init__(self, make_desk: Callable[[], Desk], setting: Mapping[str, Any]) -> None:
        set_single_thread()
        set_offline()
        self._make_desk, self._setting = make_desk, setting
        self._desk: Desk | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._desk is None:
            # not as the actor begins: Ray takes what is raised there for a death, and begins it again
            desk = self._make_desk()
            desk.answer({"call": "open", **self._setting})
            self._desk = desk
        return self._desk.answer(request)

    def pid(self) -> int:
        return os.getpid()


def ray_hands(count: int, make_desk: Callable[[], Desk], setting: Mapping[str, Any], address: str = "") -> list[Hand]:
    """So many hands in a Ray cluster, or on this machine where no address is given.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError("actors through Ray want Ray: install vla-rl[ray]") from error
    if not ray.is_initialized():
        try:
            ray.init(
                address=address or "local", log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING
            )
        except (ConnectionError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address!r}: {error}") from error
    return [RayHand(ray, make_desk, setting) for _ in range(count)]
