"""A policy on a server is the same policy: chunks, noise by episode, several clients, errors that reach them, tokens."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_rl.evaluate import Arena, evaluate
from vla_rl.inference.base_policy import BasePolicy, Leftover
from vla_rl.inference.bases import BaseSource, agent_base, own_base
from vla_rl.inference.checkpoint import load_agent
from vla_rl.inference.controller import ChunkController, PolicyAgent
from vla_rl.inference.delayed import execution_sampler
from vla_rl.inference.policy_server import RemoteBase, remote_base, serve_policy
from vla_rl.inference.timeline import ExecutionConfig
from vla_rl.inference.worker import RealTimeController
from vla_rl.policies.base import PolicyConfig, discover_policies
from vla_rl.policies.checkpoint import load_policy, save_policy
from vla_rl.runtime.config import decode, encode
from vla_rl.runtime.wire import Connection, ConnectionLostError, WireError, connect, listen, parse_address, serve_one
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
    for rows in (0, 1, 3, 4):  # the policy's noise is that of two
        none = {k: v.numpy() for k, v in seen(base, rows).features().items()}
        with pytest.raises(WireError, match="opened for 2 environments"):
            remote._ask({"call": "chunk", "features": none, "env_ids": [0]})
    with pytest.raises(WireError, match=r"after open"):
        connect(address, "secret").ask({"call": "reset", "env_ids": [0], "scene_seeds": [0]}, 10.0)


def test_whatever_a_policy_raises_reaches_the_client(base: BaseSource) -> None:
    class Broken:
        spec = base.spec

        def reset(self, env_ids: object, scene_seeds: object) -> None:
            raise ZeroDivisionError

        def chunk(self, *_: object) -> np.ndarray:
            raise NotImplementedError("of a plug-in")

    sock, address = serve(replace(base, open=lambda n, seed: Broken()))
    remote = remote_base(address, "").open(1, 0)
    for _ in range(17):  # more than there are seats
        with pytest.raises(WireError, match="ZeroDivisionError"):
            remote.reset([0], [0])
    with pytest.raises(WireError, match="of a plug-in"):
        remote.chunk(seen(base, 1), [0])
    sock.close()


def test_a_server_of_something_else_is_no_policy() -> None:
    sock = listen("127.0.0.1", 0, "")
    threading.Thread(target=serve_one, args=(sock, "", lambda request: {"digest": "x"}), daemon=True).start()
    host, port = sock.getsockname()[:2]
    with pytest.raises(WireError, match="offers no policy"):
        remote_base(f"tcp://{host}:{port}", "")
    sock.close()


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


class Sleepy:
    """A base that answers late."""

    def __init__(self, base: BasePolicy, seconds: float) -> None:
        self.spec, self.base, self.seconds = base.spec, base, seconds
        self.reset = base.reset

    def chunk(self, observation: Observation, env_ids: list[int], leftovers: None = None) -> np.ndarray:
        time.sleep(self.seconds)
        return self.base.chunk(observation, env_ids)


def serve(base: BaseSource, port: int = 0, clients: int = 0) -> tuple[socket.socket, str]:
    sock = listen("127.0.0.1", port, "")
    threading.Thread(target=serve_policy, args=(sock, "", base, clients), daemon=True).start()
    return sock, f"tcp://127.0.0.1:{sock.getsockname()[1]}"


def test_an_answer_that_comes_late_is_an_error_and_the_robot_stands_still(base: BaseSource) -> None:
    slow = replace(base, open=lambda n, seed: Sleepy(base.open(n, seed), 1.0))
    sock, address = serve(slow)
    remote = remote_base(address, "", timeout_s=0.2).open(1, 0)
    remote.reset([0], [3])
    with pytest.raises(ConnectionLostError, match="in time"):
        remote.chunk(seen(base, 1), [0])
    with RealTimeController(
        remote_base(address, "", timeout_s=0.2).open(1, 0), ExecutionConfig("asynchronous")
    ) as robot:
        robot.reset(3)
        row = {k: v[0, -1].numpy() for k, v in seen(base, 1).features().items()}
        end = time.monotonic() + 20.0
        while not robot.failures and time.monotonic() < end:
            robot.act(row)
            time.sleep(0.01)
        assert isinstance(robot.failure, ConnectionLostError)
        assert robot.tally.chunks == 0
        assert robot.tally.held == robot.tally.steps
    sock.close()


def test_a_server_that_was_away_is_found_again_when_the_episode_begins_anew(base: BaseSource) -> None:
    relay = socket.create_server(("127.0.0.1", 0))
    sock, address = serve(base)
    port = int(address.rsplit(":", 1)[1])
    links: list[socket.socket] = []

    def carry(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)

    def forward() -> None:
        with contextlib.suppress(OSError):
            while True:
                inside, _ = relay.accept()
                outside = socket.create_connection(("127.0.0.1", port))
                links.extend([inside, outside])
                for pair in ((inside, outside), (outside, inside)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=forward, daemon=True).start()
    remote = remote_base(f"tcp://127.0.0.1:{relay.getsockname()[1]}", "").open(1, 7)
    here = base.open(1, 7)
    for policy in (remote, here):
        policy.reset([0], [4])
    wanted = here.chunk(seen(base, 1), [0])
    np.testing.assert_array_equal(remote.chunk(seen(base, 1), [0]), wanted)
    for link in links:  # the wire is cut
        link.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionLostError):
        remote.chunk(seen(base, 1), [0])
    opening = remote._opening
    remote._opening = {**opening, "num_envs": 1, "seed": None}  # what is behind it is not up yet, and says so
    with pytest.raises(WireError):
        remote.reset([0], [4])
    remote._opening = opening
    remote.reset([0], [4])
    np.testing.assert_array_equal(remote.chunk(seen(base, 1), [0]), wanted)
    relay.close()
    sock.close()


def test_what_is_left_of_a_chunk_goes_over_the_wire(base: BaseSource, address: str) -> None:
    chunks = []
    for opened in (base.open(2, 7), remote_base(address, "secret").open(2, 7)):
        opened.reset([0, 1], [4, 5])
        first = opened.chunk(seen(base, 2), [0, 1])
        chunks.append(opened.chunk(seen(base, 2), [0, 1], {1: Leftover(first[1, 2:], 2)}))
    np.testing.assert_array_equal(chunks[0], chunks[1])
    assert remote_base(address, "secret").spec == base.spec


def test_a_guided_policy_says_so_and_goes_on_from_what_runs_over_the_wire(policy: Path, base: BaseSource) -> None:
    made = load_policy(policy)
    sampler = execution_sampler(made, ExecutionConfig("rtc"), None)
    source = agent_base(policy, PolicyAgent(made, sampler))
    sock, address = serve(source)
    remote = remote_base(address, "")
    assert (remote.spec.guided, base.spec.guided) == (True, False)
    chunks = []
    for opened in (source.open(1, 7), remote.open(1, 7)):
        opened.reset([0], [4])
        first = opened.chunk(seen(base, 1), [0])
        chunks.append(opened.chunk(seen(base, 1), [0], {0: Leftover(first[0, 1:], 1)}))
        np.testing.assert_allclose(chunks[-1][0, 0], first[0, 1], atol=1e-4)
    np.testing.assert_array_equal(chunks[0], chunks[1])
    sock.close()


def test_what_acts_step_by_step_is_served_as_chunks_of_one_action(policy: Path, arena: Arena) -> None:
    """As a residual is: its controller holds the queue, and the remote side sees one action at a time."""

    class StepByStep:
        """An agent that is no chunk policy."""

        def __init__(self) -> None:
            self.inner = PolicyAgent(load_policy(policy))
            self.spec = self.inner.spec
            self.controller = self.inner.controller
            self.instruct = self.inner.instruct

    source = agent_base(policy, StepByStep())
    assert source.spec.execute_steps == 1
    sock, address = serve(source)
    scenes = list(range(50_000, 50_004))
    here = evaluate(StepByStep(), arena, scenes, seed=0, name="here", bar=False)["scenes"]

    class Remote:
        spec = source.spec.policy

        def instruct(self, words: str) -> None:
            """It reads no language."""

        def controller(self, num_slots: int, seed: int) -> ChunkController:
            return ChunkController(remote_base(address, "").open(num_slots, seed), num_slots)

    there = evaluate(Remote(), arena, scenes, seed=0, name="there", bar=False)["scenes"]
    assert here == there
    sock.close()


def test_a_plug_in_is_a_policy_like_any_other(tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution brings a config and a policy by an entry point; it is saved, loaded and served."""
    (tmp_path / "my_plug_in.py").write_text(
        "from dataclasses import dataclass\n"
        "from vla_rl.policies.base import PolicyConfig\n"
        "from vla_rl.policies.flow import FlowConfig, FlowPolicy\n"
        "@PolicyConfig.register_subclass('mine')\n"
        "@dataclass(frozen=True)\n"
        "class MyConfig(FlowConfig):\n"
        "    def build(self, spec):\n"
        "        return MyPolicy(self, spec)\n"
        "class MyPolicy(FlowPolicy):\n"
        "    def generate(self, condition, noise, prefix):\n"
        "        made = super().generate(condition, noise, prefix)\n"
        "        return type(made)(0 * made.action_BHA, made.features_BF)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [EntryPoint("mine", "my_plug_in", "vla_rl.policies")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == "vla_rl.policies" else [])
    discover_policies()
    plain = load_policy(policy)
    mine = decode(PolicyConfig, {**encode(plain.config), "type": "mine"}).build(plain.spec)
    mine.load_state_dict(plain.state_dict())
    save_policy(mine, tmp_path / "saved", {})
    agent = load_agent(tmp_path / "saved", lambda reference: own_base(Path(reference)))
    sock, address = serve(agent_base(tmp_path / "saved", agent))
    remote = remote_base(address, "").open(1, 0)
    remote.reset([0], [1])
    chunk = remote.chunk(seen(own_base(policy), 1), [0])
    middle = plain.unnormalize_action(torch.zeros(1, *plain.chunk_shape), seen(own_base(policy), 1)).numpy()
    np.testing.assert_allclose(chunk, middle, atol=1e-5)
    sock.close()
