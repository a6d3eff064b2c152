"""Who collects for a residual learner: its own process, another one on this machine or elsewhere, or many through Ray.

A learner hands in order n + 1 with the weights that it has, learns from what it got up to order n, and then asks for the episodes. So
episodes are one order older than they could be, learning and simulation overlap where hands are other processes, updates keep their
ratio to environment steps, neither side can run ahead of the other, and what is learned does not depend on who collected it. An order
and its weights determine the episodes: what a hand that was killed had begun is done again by the one that takes its place.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
from safetensors import SafetensorError

from vla_rl.data.episode import Episode
from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import StepEpisode
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.residual_controller import NoiseConfig
from vla_rl.inference.steps import Order, collect_steps
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.runtime.config import decode, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import MOST_ENVS, Connection, ConnectionLostError, WireError, connect

PATIENCE_S = 120.0  # for a hand that was killed to come back
RETRY_S = 0.5
MOST_LOSSES = 5  # of one order: what dies each time it tries is not tried for ever
START_S = 300.0  # a first process compiles the simulation's steps


class Worker:
    """Carries out orders: an environment, a base, and a residual whose weights come with each order."""

    def __init__(self, arena: Arena, base: BaseSource, config: ResidualConfig) -> None:
        spec = base.spec.policy
        self._arena, self._base = arena.through(base.policy), base
        encoder = StepEncoder(spec.observation_spec, spec.action_spec, base.spec.execute_steps)
        self._policy = ResidualPolicy(config, encoder).eval()

    def collect(self, order: Order, weights: bytes) -> list[StepEpisode]:
        """Collect the order's episodes."""
        self._policy.load_state_dict(safetensors.torch.load(weights))
        arena = self._arena
        return collect_steps(order, arena.env, arena.action_spec, arena.instruction, self._base, self._policy)


@runtime_checkable
class Hand(Protocol):
    """Carries out one order at a time."""

    def submit(self, order: Order, weights: bytes) -> None:
        """Begin an order."""

    def result(self) -> list[StepEpisode]:
        """Wait for the episodes of the order that was begun."""

    def close(self) -> None:
        """Let go of all that is held."""


class OwnHand:
    """Collects in this process, when asked for the result."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._begun: tuple[Order, bytes] | None = None

    def submit(self, order: Order, weights: bytes) -> None:
        """See ``Hand``."""
        self._begun = order, weights

    def result(self) -> list[StepEpisode]:
        """See ``Hand``."""
        assert self._begun is not None, "an order comes before its result"
        return self._worker.collect(*self._begun)

    def close(self) -> None:
        """See ``Hand``."""


class RemoteHand:
    """Collects in another process, over the wire; when the connection is lost, it comes back and does the order again."""

    def __init__(self, reach: Callable[[], Connection]) -> None:
        """Set up.

        Args:
            reach: connects to the process, which it may have to start; raises ConnectionLostError while it is not there.
        """
        self._reach = reach
        self._connection: Connection | None = None
        self._request: dict[str, Any] = {}

    def submit(self, order: Order, weights: bytes) -> None:
        """See ``Hand``."""
        self._request = {"call": "collect", "order": asdict(order), "weights": weights}
        with contextlib.suppress(ConnectionLostError):  # ``result`` tries again
            self._send()

    def _send(self) -> Connection:
        if self._connection is None:
            self._connection = self._reach()
        try:
            self._connection.send(self._request)
        except ConnectionLostError:
            self.close()
            raise
        return self._connection

    def result(self) -> list[StepEpisode]:
        """See ``Hand``; raises ConnectionLostError where nobody comes back for long."""
        lost_at: float | None = None
        losses = 0
        while True:
            try:
                connection = self._connection or self._send()
                lost_at = None
                reply = connection.receive()
            except ConnectionLostError:
                self.close()
                now = time.monotonic()
                if lost_at is None:
                    lost_at, losses = now, losses + 1
                if now - lost_at > PATIENCE_S or losses > MOST_LOSSES:
                    raise
                time.sleep(RETRY_S)
            else:
                episodes = reply.get("episodes")
                if not isinstance(episodes, list):
                    raise WireError("what the actor sent holds no episodes")
                return [from_message(m) for m in episodes]

    def close(self) -> None:
        """See ``Hand``."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Team:
    """Several hands that share each order: the first scenes go to the first hand."""

    def __init__(self, hands: Sequence[Hand]) -> None:
        self.hands = list(hands)

    def submit(self, order: Order, policy: ResidualPolicy) -> None:
        """Begin an order with the weights as they are now."""
        weights = safetensors.torch.save({k: v.contiguous() for k, v in policy.state_dict().items()})
        for hand, scenes in zip(self.hands, np.array_split(order.scenes, len(self.hands)), strict=True):
            hand.submit(replace(order, scenes=tuple(int(s) for s in scenes)), weights)

    def result(self) -> list[StepEpisode]:
        """Wait for the episodes, in the order of their scenes."""
        return [steps for hand in self.hands for steps in hand.result()]

    def collect(self, order: Order, policy: ResidualPolicy) -> list[StepEpisode]:
        """Carry out an order and wait for it."""
        self.submit(order, policy)
        return self.result()

    def close(self) -> None:
        """Let go of all hands."""
        for hand in self.hands:
            hand.close()


def own_team(arena: Arena, base: BaseSource, config: ResidualConfig) -> Team:
    """One hand in this process."""
    return Team([OwnHand(Worker(arena, base, config))])


def remote_hand(address: str, token: str, setting: Mapping[str, Any]) -> RemoteHand:
    """A hand that ``vla-rl actor`` offers at an address; ``setting`` is what it has to set up (see ``setting_of``)."""
    return RemoteHand(lambda: _open(connect(address, token), setting))


class ChildHand(RemoteHand):
    """A hand in a process of its own on this machine, started anew where it was killed."""

    def __init__(self, setting: Mapping[str, Any]) -> None:
        self._setting = setting
        self._process: subprocess.Popen[str] | None = None
        super().__init__(self._start)

    @property
    def pid(self) -> int | None:
        """Process that works for it, if there is one."""
        return None if self._process is None else self._process.pid

    def _start(self) -> Connection:
        self._stop()
        command = [sys.executable, "-m", "vla_rl.cli.main", "actor", "--once"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # "actor listens on tcp://127.0.0.1:PORT"
        if not line.startswith("actor listens on "):
            raise UserError("the actor's process ended as it began; its words stand above")
        return _open(connect(line.split()[-1], ""), self._setting)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """See ``Hand``."""
        super().close()
        self._stop()


def _open(connection: Connection, setting: Mapping[str, Any]) -> Connection:
    connection.ask({"call": "open", **setting}, START_S)
    return connection


def setting_of(arena: Arena, base: BaseSource, config: ResidualConfig) -> dict[str, Any]:
    """What another process has to set up to be a hand of this learner."""
    return {
        "task": dict(arena.recipe),
        "num_envs": arena.env.num_envs,
        "base": base.reference,
        "digest": base.digest,
        "residual": encode(config),
    }


class Desk:
    """The other end of a ``RemoteHand``: sets up what a learner asks for and carries out its orders."""

    def __init__(self, make: Callable[[Mapping[str, Any], int, str], tuple[Arena, BaseSource]]) -> None:
        """Set up.

        Args:
            make: opens a task (its recipe, the number of environments) and finds the base.
        """
        self._make = make
        self._worker: Worker | None = None
        self._close: Callable[[], None] = lambda: None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a request; raises UserError for one that is none, and for a base that gives what is no action."""
        try:
            return self._answer(request)
        except (LookupError, TypeError, AttributeError, OverflowError, SafetensorError) as error:
            raise UserError(f"a request that lacks something or holds what does not fit: {error!r}") from error
        except RuntimeError as error:  # weights of another shape; PolicyOutputError
            raise UserError(str(error)) from error

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("call") == "open":
            num_envs = int(request["num_envs"])
            if not 1 <= num_envs <= MOST_ENVS:
                raise UserError(f"num_envs wants 1 to {MOST_ENVS}, got {num_envs}")
            arena, base = self._make(request["task"], num_envs, str(request["base"]))
            if base.digest != request["digest"]:
                raise UserError(
                    f"the learner's base has the hash {str(request['digest'])[:12]}, {base.reference} here has {base.digest[:12]}"
                )
            self._close()
            self._close = arena.env.close
            self._worker = Worker(arena, base, decode(ResidualConfig, request["residual"]))
            return {"opened": True}
        if request.get("call") != "collect" or self._worker is None:
            raise UserError(f"an actor is asked to open and then to collect, got {request.get('call')!r}")
        raw = dict(request["order"])
        order = Order(**{**raw, "scenes": tuple(raw["scenes"]), "noise": NoiseConfig(**raw["noise"])})
        return {"episodes": [to_message(steps) for steps in self._worker.collect(order, request["weights"])]}


def to_message(steps: StepEpisode) -> dict[str, Any]:
    """An episode as plain data and arrays."""
    return {**vars(steps), "episode": {**vars(steps.episode), "observations": dict(steps.episode.observations)}}


def from_message(message: Mapping[str, Any]) -> StepEpisode:
    """Undo ``to_message``; raises WireError for what is no episode."""
    try:
        return StepEpisode(**{**message, "episode": Episode(**message["episode"])})
    except (LookupError, TypeError) as error:
        raise WireError(f"what the actor sent is no episode: {error!r}") from error
