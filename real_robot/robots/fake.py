"""A simulated arm in a process of its own, with a clock of its own: what every path to a robot is tried against."""

from __future__ import annotations

import contextlib
import math
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from real_robot.messages import stamp
from real_robot.parts import TopicConfig
from real_robot.robot import Reading, RobotConfig, RobotError
from real_robot.streams import Streams
from real_robot.transports.base import TransportError
from vla_rl.runtime.pace import usual_priority
from vla_rl.runtime.wire import Connection, WireError, connect
from vla_rl.types import STATE, ActionSpec, FeatureSpec, ObservationSpec

START_S = 120.0  # in which the process listens; numba may have to compile
NEXT_S = 0.5  # that one question for the next observation waits
RESET_S = 30.0
STREAM = "robot"


@RobotConfig.register_subclass("fake")
@dataclass(frozen=True, kw_only=True)
class FakeRobotConfig(RobotConfig):
    """A task in MuJoCo, moving in real time in another process.

    task: name of the task
    observations: shape of each feature
    measured: actions whose place is measured, separated by spaces, and where in observation.state
    address: of a simulated arm that runs already (none: one is started, and ends with the connection)
    watchdog_s: age of a command at which the arm holds by itself
    speed: of its time
    answer_s: longest time in which it answers a command; then the link counts as lost
    """

    task: str
    observations: dict[str, tuple[int, ...]]
    measured: dict[str, tuple[int, ...]]
    address: str | None = None
    watchdog_s: float = 0.1
    speed: float = 1.0
    answer_s: float = 1.0

    def __post_init__(self) -> None:
        wanted = {"watchdog_s": self.watchdog_s, "speed": self.speed, "answer_s": self.answer_s}
        if not all(0 < number < math.inf for number in wanted.values()):
            raise ValueError(f"{', '.join(wanted)} want numbers > 0, got {wanted}")

    @property
    def observation_spec(self) -> ObservationSpec:
        """See ``RobotConfig``."""
        return {name: FeatureSpec(shape) for name, shape in self.observations.items()}

    def driver(self) -> FakeDriver:
        """See ``RobotConfig``."""
        return FakeDriver(self)


class FakeDriver:
    """See ``Driver``. Two connections with a thread each, so that a robot that does not answer holds nobody up."""

    def __init__(self, config: FakeRobotConfig) -> None:
        self.config = config
        self._process: subprocess.Popen[str] | None = None
        self._address = config.address
        self._streams = self._fresh_streams()
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._outbox = threading.Condition()
        self._command_A: np.ndarray | None = None
        self._failure: str | None = None
        self._ends = False

    def open(self, silent: bool) -> None:
        """See ``Driver``; an arm that was started for it is nobody else's."""
        del silent
        self._ends, self._failure, self._streams = False, None, self._fresh_streams()
        if self.config.address is None:
            self._start()
        assert self._address is not None
        described = self._connect().ask({"call": "describe"}, START_S)
        theirs = ActionSpec.from_dict(described["action"])
        self.config.action.require_equal(
            theirs, mine=f"robot {self.config.name!r}", theirs=f"task {described['task']!r}"
        )
        shapes = {k: tuple(v) for k, v in described["observations"].items()}
        for name, shape in self.config.observations.items():
            if shapes.get(name) != tuple(shape):
                raise RobotError(
                    f"robot {self.config.name!r} says {name!r} has shape {tuple(shape)}, task {described['task']!r} has {shapes.get(name)}"
                )
        self._threads = [
            threading.Thread(target=self._listen, args=(self._connect(),), name="fake-observations", daemon=True),
            threading.Thread(target=self._speak, args=(self._connect(),), name="fake-commands", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _start(self) -> None:
        words = [
            "robot",
            "simulate",
            self.config.task,
            "--watchdog-s",
            str(self.config.watchdog_s),
            "--speed",
            str(self.config.speed),
        ]
        with usual_priority():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vla_rl.cli.main", *words, "--follow"],
                stdout=subprocess.PIPE,
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for this program; --follow ends that one
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "tcp://" in line:
                self._address = "tcp://" + line.split("tcp://")[1].split()[0]
                return
        raise RobotError(
            f"the simulated arm of task {self.config.task!r} did not start (exit code {self._process.wait()})"
        )

    def _connect(self) -> Connection:
        assert self._address is not None
        connection = connect(self._address, "")
        self._connections.append(connection)
        return connection

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask the process something that is no command, such as for a fault."""
        connection = connect(self._address or "", "")
        with contextlib.closing(connection):
            return connection.ask(request, RESET_S)

    def _listen(self, connection: Connection) -> None:
        number = -1
        while not self._ends:
            try:
                answer = connection.ask({"call": "next", "after": number, "timeout_s": NEXT_S}, NEXT_S + 1.0)
            except WireError as error:
                self._fail(error)
                return
            received_s = time.monotonic()
            if answer.get("features") is not None:
                number = answer["number"]
                message = {"header": {"stamp": stamp(answer["stamp_s"])}, **answer}
                self._streams.take(STREAM, message, received_s)

    def _speak(self, connection: Connection) -> None:
        while True:
            with self._outbox:
                self._outbox.wait_for(lambda: self._ends or self._command_A is not None)
                action_A, self._command_A = self._command_A, None
            if action_A is None:
                return
            try:
                connection.ask({"call": "command", "action": action_A}, self.config.answer_s)
            except WireError as error:
                self._fail(error)
                return

    def _fail(self, error: WireError) -> None:
        if not self._ends:
            self._failure = f"link: {error}"

    def read(self) -> Reading | None:
        """See ``Driver``."""
        newest = self._streams.newest()
        if newest is None:
            if self._failure is not None:
                raise TransportError(self._failure)
            return None
        message, now_s = newest[STREAM], time.monotonic()
        broken = self._streams.broken(now_s) + (() if self._failure is None else (self._failure,))
        features = message["features"]
        place_A = np.full(self.config.action.dim, np.nan)
        for names, where in self.config.measured.items():
            for name, index in zip(names.split(), where, strict=True):
                place_A[self.config.action.names.index(name)] = features[STATE][index]
        return Reading(
            features,
            place_A,
            self._streams.ages_s(now_s),
            broken,
            message["success"],
            message["ended"],
            message["reward"],
        )

    def missing(self) -> str:
        """See ``Driver``."""
        return "no observation"

    def write(self, action_A: np.ndarray) -> None:
        """See ``Driver``; the newest command replaces one that has not gone out."""
        if self._failure is not None:
            raise TransportError(self._failure)
        with self._outbox:
            self._command_A = np.array(action_A, float)
            self._outbox.notify()

    def reset(self, seed: int) -> None:
        """See ``Driver``."""
        token = secrets.randbelow(2**31)
        self.ask({"call": "reset", "scene": seed, "token": token})
        deadline = time.monotonic() + RESET_S
        while time.monotonic() < deadline:
            newest = self._streams.newest()
            if newest is not None and newest[STREAM]["token"] == token:
                return
            if self._failure is not None:
                raise TransportError(self._failure)
            time.sleep(0.002)
        raise RobotError(f"the simulated arm is not in scene {seed} within {RESET_S:g} s")

    def acknowledge(self) -> None:
        """See ``Driver``."""
        self._streams.forget_clock()

    def close(self) -> None:
        """See ``Driver``."""
        with self._outbox:
            self._ends = True
            self._outbox.notify()
        for thread in self._threads:
            thread.join(timeout=self.config.answer_s + 1.0)
        for connection in self._connections:
            connection.close()
        self._connections, self._threads = [], []
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._process.kill()
            self._process.wait()
            self._process = None

    def _fresh_streams(self) -> Streams:
        hz = self.config.action.control_hz
        topic = TopicConfig("/fake/robot", "std_msgs/msg/Float64MultiArray", hz, "state", "joints")
        return Streams({STREAM: topic}, self.config.safety.clock_jump_s)
