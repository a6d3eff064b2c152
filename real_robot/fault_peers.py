"""Programs to be stopped and killed: a policy's server, a bridge to topics, a camera (``vla-rl bench faults``).

A nursery imports what they want once and forks them, so that what was killed is there again at once. It reads a JSON line for each from
its standard input, and ends, and they with it, when that does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from real_robot.bridge import RemoteArm, serve_topics
from real_robot.messages import image_message
from real_robot.robot import RobotConfig, discover_robots
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.base import Topic, TransportConfig, discover_transports
from vla_rl.inference.base_policy import BaseSpec, Leftover, PolicySpec
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.policy_server import serve_policy
from vla_rl.runtime.config import decode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace
from vla_rl.runtime.wire import listen
from vla_rl.types import STATE, Observation

CHUNK_STEPS = 8
EXECUTE_STEPS = 4
SWAY = {"m": 0.04, "rad": 0.0}  # amplitude
SWAY_RAD_S = 2.5
START_S = 60.0
END_S = 5.0
FREEZE, THAW = signal.SIGUSR1, signal.SIGUSR2  # what a camera is told


class Swaying:
    """See ``BasePolicy``: sways about where the arm was first seen, by the clock, so that chunks join."""

    def __init__(self, spec: PolicySpec, places: Mapping[str, int]) -> None:
        """Begin.

        Args:
            spec: observations and actions.
            places: index of each absolute action's place in observation.state.
        """
        self.spec = BaseSpec(spec, observation_steps=1, execute_steps=EXECUTE_STEPS, chunk_steps=CHUNK_STEPS)
        self._places = places
        self._begun: tuple[float, np.ndarray] | None = None

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``."""
        self._begun = None

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``: (1, H, A)."""
        spec, now_s = self.spec.policy.action_spec, time.monotonic()
        if self._begun is None:
            state_S = observation.features()[STATE][0, -1].numpy()
            self._begun = now_s, np.array([state_S[self._places[n]] if n in self._places else 0.0 for n in spec.names])
        begun_s, centre_A = self._begun
        at_H1 = (now_s - begun_s + np.arange(CHUNK_STEPS) / spec.control_hz)[:, None]
        reach_A = np.array([SWAY.get(unit.removesuffix("/s"), 0.0) for unit in spec.units])
        phase_A = np.arange(spec.dim) * math.pi / 3  # so that the arm as a whole never stands still
        if spec.mode == "absolute":
            sway_HA = np.sin(SWAY_RAD_S * at_H1 + phase_A) - np.sin(phase_A)
            return (centre_A + reach_A * sway_HA)[None].astype(np.float32)
        scale = 1 / spec.control_hz if spec.mode == "delta" else 1.0
        return (reach_A * SWAY_RAD_S * np.cos(SWAY_RAD_S * at_H1 + phase_A) * scale)[None].astype(np.float32)


def sway_source(spec: PolicySpec, places: Mapping[str, int]) -> BaseSource:
    """The swaying policy, to be served."""
    made = Swaying(spec, places)
    return BaseSource("swaying", "swaying", made.spec, lambda *_: Swaying(spec, places))


def run_policy(request: Mapping[str, Any], ready: Callable[[str], None]) -> None:
    """Serve the swaying policy until killed; on the port of an earlier one, where there was one."""
    sock = listen("127.0.0.1", request["port"], "")
    ready("tcp://{}:{}".format(*sock.getsockname()[:2]))
    serve_policy(sock, "", sway_source(PolicySpec.from_dict(request["spec"]), request["places"]))


def run_bridge(request: Mapping[str, Any], ready: Callable[[str], None]) -> None:
    """Carry an arm's topics until killed."""
    discover_transports()
    discover_robots()
    config = decode(RobotConfig, request["robot"])
    assert isinstance(config, RosRobotConfig)
    with serve_topics(RemoteArm(request["arm"]), config):
        ready("")
        signal.pause()


def run_camera(request: Mapping[str, Any], ready: Callable[[str], None]) -> None:
    """Publish a picture that moves, or, frozen, the same one with new stamps."""
    frozen = threading.Event()
    signal.signal(FREEZE, lambda *_: frozen.set())
    signal.signal(THAW, lambda *_: frozen.clear())
    discover_transports()
    transport = decode(TransportConfig, request["transport"]).build()
    transport.open()
    topic = Topic(request["topic"], "sensor_msgs/msg/Image", "sensor", request["hz"])
    publisher, pace = transport.advertise(topic), Pace(topic.hz, spin_s=0.0)
    height, width = request["shape"]
    picture = np.arange(height * width * 3, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3)
    ready("")
    while True:
        pace.wait()
        if not frozen.is_set():
            picture = np.roll(picture, 1, axis=1)
        publisher.publish(image_message(picture, time.monotonic()))


ROLES: dict[str, Callable[[Mapping[str, Any], Callable[[str], None]], None]] = {
    "policy": run_policy,
    "bridge": run_bridge,
    "camera": run_camera,
}


@dataclass
class Peer:
    """A forked program."""

    pid: int
    address: str

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a program that is gone already hears none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and return when it is gone and its port is free; one that is gone already is none the worse."""
        deadline = time.monotonic() + END_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.005)


class Nursery:
    """The other end of ``main``. Use ``open_nursery``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, role: str, **request: Any) -> Peer:
        """Fork a program and wait until it is ready; raises UserError where it is not in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"role": role, **request}) + "\n")
        stdin.flush()
        with selectors.DefaultSelector() as selector:  # a line at a time: nothing waits in the reader's buffer
            selector.register(stdout, selectors.EVENT_READ)
            line = stdout.readline() if selector.select(START_S) else ""
        if not line:
            raise UserError(f"the {role} that faults are tried on did not start within {START_S:g} s")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"the {role} that faults are tried on did not start: {answer['error']}")
        return Peer(**answer)


@contextlib.contextmanager
def open_nursery() -> Iterator[Nursery]:
    """A nursery, which ends with the block, as do its programs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "real_robot.fault_peers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the program that drives
    )
    try:
        yield Nursery(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it is killed, with its programs
            process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Fork programs as they are asked for; kill them all at the end of the input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that are killed
    pids = []
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            try:
                sys.stdin.close()
                ROLES[request["role"]](request, _ready)
            except UserError as error:
                _say({"error": str(error)})
            finally:
                os._exit(1)
        pids.append(pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # stopped ones too


def _ready(address: str) -> None:
    _say({"pid": os.getpid(), "address": address})


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
