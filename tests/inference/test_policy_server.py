"""A policy on a server is the same policy: chunks, noise by episode, several clients, errors that reach them, tokens."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_rl.evaluate import Arena
from vla_rl.inference.base_policy import BasePolicy
from vla_rl.inference.bases import BaseSource, own_base
from vla_rl.inference.policy_server import RemoteBase, remote_base, serve_policy
from vla_rl.runtime.wire import Connection, ConnectionLostError, WireError, connect, listen, parse_address
from vla_rl.types import STATE, Observation


@pytest.fixture(scope="module")
def base(policy: Path) -> BaseSource:
    return own_base(policy)


@pytest.fixture
def address(base: BaseSource) -> Iterator[str]:
    sock = listen("127.0.0.1", 0, "secret")
    host, port = sock.getsockname()[:2]
    threading.Thread(target=serve_policy, args=(sock, "secret", base), daemon=True).start()
    yield f"tcp://{host}:{port}"
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def seen(base: BaseSource, slots: int) -> Observation:
    g = torch.Generator().manual_seed(0)
    spec = base.spec
    features = {
        k: torch.randn(slots, spec.observation_steps, *f.shape, generator=g)
        for k, f in spec.policy.observation_spec.items()
    }
    return Observation.from_features(features)


def test_a_remote_policy_gives_the_chunks_of_the_same_policy_here(base: BaseSource, address: str) -> None:
    source = remote_base(address, "secret")
    assert source.spec == base.spec
    assert source.digest == base.digest
    observation = seen(base, 3)
    opened: list[BasePolicy] = [base.open(3, 7), source.open(3, 7), source.open(3, 7)]
    chunks = []
    for policy in opened:  # two clients at a time, each with episodes of its own
        policy.reset([0, 1, 2], [10, 11, 12])
    for policy in opened:
        chunks.append([policy.chunk(observation, [2, 0]), policy.chunk(observation, [1])])
    for first, second in chunks[1:]:
        np.testing.assert_array_equal(first, chunks[0][0])
        np.testing.assert_array_equal(second, chunks[0][1])


def test_errors_reach_the_client_and_the_server_goes_on(base: BaseSource, address: str) -> None:
    source = remote_base(address, "secret")
    remote = source.open(2, 0)
    assert isinstance(remote, RemoteBase)
    with pytest.raises(WireError, match="does not fit"):
        remote.chunk(Observation(torch.zeros(2, 1, 3), torch.zeros(2, 1, 1)), [0])
    with pytest.raises(WireError, match="lacks something"):
        remote._ask({"call": "chunk"})
    with pytest.raises(WireError, match=r"asked to describe, open, reset or chunk .*'fly'"):
        remote._ask({"call": "fly"})
    remote.reset([0], [1])
    assert remote.chunk(seen(base, 2), [0]).shape[0] == 1
    for request in ({"call": "chunk", "features": [], "env_ids": [0]}, {"call": "open", "num_envs": 10**9, "seed": 0}):
        with pytest.raises(WireError, match=r"does not fit|num_envs wants 1 to 4096"):
            remote._ask(request)
    with pytest.raises(WireError, match=r"after open"):
        connect(address, "secret").ask({"call": "reset", "env_ids": [0], "scene_seeds": [0]}, 10.0)


def test_a_stranger_is_refused_and_nobody_is_said(address: str) -> None:
    with pytest.raises(WireError, match="token is not the server's"):
        remote_base(address, "guess")
    host, port = parse_address(address)
    for strange in (np.zeros(2, np.int64), None, ["vla-rl"]):
        for _ in range(17):  # more than there are seats
            caller = Connection(socket.create_connection((host, port), 10.0))
            with pytest.raises(WireError, match="this server speaks version"):
                caller.ask({"protocol": "vla-rl", "version": strange}, 10.0)
            caller.close()
    assert remote_base(address, "secret").digest
    with pytest.raises(ConnectionLostError, match="nobody answers"):
        remote_base("tcp://127.0.0.1:1", "")


def test_roll_outs_on_a_remote_base_are_those_on_the_same_base_here(
    base: BaseSource, address: str, arena: Arena, tmp_path: Path
) -> None:
    from vla_rl.actors import Worker
    from vla_rl.inference.checkpoint import load_agent, save_residual
    from vla_rl.inference.residual_controller import NoiseConfig
    from vla_rl.inference.steps import Order, collect_steps
    from vla_rl.policies.residual import ResidualConfig

    source = remote_base(address, "secret")
    order = Order(0, "base", (3, 4), 5, NoiseConfig())
    episodes = []
    for its in (base, source):
        worker = Worker(arena, its, ResidualConfig(width=8))
        episodes.append(collect_steps(order, arena.env, arena.action_spec, "", its, worker._policy))
    for here, there in zip(*episodes, strict=True):
        np.testing.assert_array_equal(here.episode.action_TA, there.episode.action_TA)
    save_residual(worker._policy, source, tmp_path / "policy", {})
    agent = load_agent(tmp_path / "policy", lambda reference: remote_base(reference, "secret"))
    assert agent.spec.action_spec == base.spec.policy.action_spec
    assert STATE in agent.spec.observation_spec


def test_the_command_serves_until_its_clients_have_left(base: BaseSource, policy: Path) -> None:
    command = [sys.executable, "-m", "vla_rl.cli.main", "serve", str(policy), "--clients", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            source = remote_base(server.stdout.readline().split()[-1], "")
            remote = source.open(1, 3)
            here = base.open(1, 3)
            observation = seen(base, 1)
            for opened in (remote, here):
                opened.reset([0], [9])
            np.testing.assert_array_equal(remote.chunk(observation, [0]), here.chunk(observation, [0]))
            del remote, opened
            assert server.wait(30) == 0
        finally:
            server.kill()  # else a failure would wait for it
