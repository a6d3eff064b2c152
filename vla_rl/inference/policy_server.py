"""A policy behind an address: the server's desk, and the base that asks it.

A client opens the policy for a number of environments with the seed of its noise, says which episodes begin, and asks for chunks; so a
remote base gives the same chunks as the same policy in this process.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vla_rl.inference.base_policy import BasePolicy, BaseSpec, Leftover
from vla_rl.inference.bases import BaseSource
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import MOST_ENVS, Connection, ConnectionLostError, OversizeError, WireError, connect, serve_one
from vla_rl.types import Observation

MOST_CLIENTS = 16  # at a time; further ones wait, for as long as their greeting has patience
RETRY_S = 0.1
TIMEOUT_S = 300.0  # for an answer, which others may be served before


class PolicyDesk:
    """The other end of a ``RemoteBase``: answers one client."""

    def __init__(self, base: BaseSource, lock: threading.Lock) -> None:
        """Set up.

        Args:
            base: what is served.
            lock: held while the policy works, which other clients have too.
        """
        self._base, self._lock = base, lock
        self._opened: BasePolicy | None = None
        self._rows = 0

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a request; raises UserError for one that is none or that the policy cannot serve."""
        try:
            with self._lock:
                return self._answer(request)
        except (UserError, ValueError):
            raise
        except Exception as error:  # of a plug-in's policy it can be any
            raise UserError(f"a request that lacks something or holds what does not fit: {error!r}") from error

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        call, base = request.get("call"), self._base
        if call == "describe":
            spec = base.spec
            return {
                "spec": spec.policy.to_dict(),
                "observation_steps": spec.observation_steps,
                "execute_steps": spec.execute_steps,
                "chunk_steps": spec.chunk_steps,
                "guided": spec.guided,
                "prefix_steps": spec.prefix_steps,
                "digest": base.digest,
            }
        if call == "open":
            num_envs = int(request["num_envs"])
            if not 1 <= num_envs <= MOST_ENVS:
                raise UserError(f"num_envs wants 1 to {MOST_ENVS}, got {num_envs}")
            self._opened, self._rows = base.open(num_envs, int(request["seed"])), num_envs
            return {"opened": True}
        if self._opened is None or call not in ("reset", "chunk"):
            raise UserError(f"a policy server is asked to describe, open, reset or chunk (after open), got {call!r}")
        if call == "reset":
            self._opened.reset(request["env_ids"], request["scene_seeds"])
            return {"reset": True}
        tensors = {k: torch.from_numpy(v) for k, v in request["features"].items()}
        wrong = {k: len(v) for k, v in tensors.items() if len(v) != self._rows}
        if wrong:
            raise UserError(f"the policy was opened for {self._rows} environments, got observations of {wrong}")
        left = {row["env_id"]: Leftover(row["action"], row["fixed"]) for row in request.get("leftovers", [])}
        return {"chunk": self._opened.chunk(Observation.from_features(tensors), request["env_ids"], left or None)}


def serve_policy(sock: socket.socket, token: str, base: BaseSource, clients: int = 0) -> None:
    """Serve a policy to several clients at a time.

    Args:
        sock: from ``vla_rl.runtime.wire.listen``.
        token: that clients have to know.
        base: what is served.
        clients: end after so many connections have ended (0: never).
    """
    lock = threading.Lock()
    left = threading.Semaphore(0)

    def serve() -> None:
        while True:
            try:
                serve_one(sock, token, PolicyDesk(base, lock).answer)
            except OSError:
                if sock.fileno() < 0:  # closed: the server ends
                    return
                time.sleep(RETRY_S)  # no place for another connection just now
            else:
                left.release()

    for _ in range(MOST_CLIENTS):
        threading.Thread(target=serve, daemon=True).start()
    served = 0
    while not clients or served < clients:
        left.acquire()
        served += 1


class RemoteBase:
    """See ``BasePolicy``: a policy on a server, over a connection of its own."""

    def __init__(
        self, reach: Callable[[], Connection], spec: BaseSpec, num_envs: int, seed: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Open the policy.

        Args:
            reach: connects to the server.
            spec: what it was made for.
            num_envs: N.
            seed: of the noise.
            timeout_s: how long an answer may take; one that is later counts as none, and the connection as lost.
        """
        self.spec = spec
        self._reach, self._timeout_s = reach, timeout_s
        self._opening = {"call": "open", "num_envs": num_envs, "seed": seed}
        self._lost = False
        self._connection = reach()
        weakref.finalize(self, self._connection.close)
        self._ask(self._opening)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._connection.ask(request, self._timeout_s)
        except (ConnectionLostError, OversizeError):
            self._lost = True
            self._connection.close()  # an answer that came late would be taken for the next one's
            raise

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``; where the connection was lost, and all episodes begin anew, it is made again.

        Raises:
            WireError: the server is gone.
        """
        if self._lost and len(env_ids) == self._opening["num_envs"]:
            self._connection = self._reach()
            weakref.finalize(self, self._connection.close)
            self._ask(self._opening)
            self._lost = False
        self._ask({"call": "reset", "env_ids": [int(i) for i in env_ids], "scene_seeds": [int(s) for s in scene_seeds]})

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``; raises WireError where the server is gone or its policy fails."""
        features = {k: v.numpy() for k, v in observation.features().items()}
        request = {"call": "chunk", "features": features, "env_ids": [int(i) for i in env_ids]}
        if leftovers:
            request["leftovers"] = [
                {"env_id": int(i), "action": np.asarray(left.action_LA, np.float32), "fixed": int(left.fixed)}
                for i, left in leftovers.items()
            ]
        answer = self._ask(request)
        if not isinstance(answer.get("chunk"), np.ndarray) or answer["chunk"].ndim != 3:
            raise WireError("the policy server's answer holds no chunk of three dimensions")
        return answer["chunk"]


def remote_base(address: str, token: str, timeout_s: float = TIMEOUT_S) -> BaseSource:
    """The policy that a server at an address offers; raises WireError where nobody answers (in time) or it is none."""
    described = _described(address, token)
    try:
        digest = str(described["digest"])
        spec = BaseSpec(
            PolicySpec.from_dict(described["spec"]),
            int(described["observation_steps"]),
            int(described["execute_steps"]),
            int(described["chunk_steps"]),
            bool(described["guided"]),
            int(described["prefix_steps"]),
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise WireError(f"the server at {address} offers no policy: {error!r}") from error

    def reach() -> Connection:
        connection = connect(address, token)
        if connection.ask({"call": "describe"}, timeout_s).get("digest") != digest:
            connection.close()
            raise WireError(f"the policy at {address} is another one than before")
        return connection

    def open_base(num_envs: int, seed: int) -> RemoteBase:
        return RemoteBase(reach, spec, num_envs, seed, timeout_s)

    return BaseSource(address, digest, spec, open_base)


def _described(address: str, token: str) -> dict[str, Any]:
    connection = connect(address, token)
    try:
        return connection.ask({"call": "describe"}, TIMEOUT_S)
    finally:
        connection.close()
