"""What faults are tried on: a simulated arm in a process of its own, a policy's server, a bridge to topics with a camera beside it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from real_robot.fault_peers import FREEZE, THAW, Nursery, Peer, open_nursery
from real_robot.messages import Message
from real_robot.parts import PartConfig, TopicConfig
from real_robot.robot import Robot, RobotConfig
from real_robot.robot_map import CommandPartConfig, MapConfig
from real_robot.robots.fake import FakeRobotConfig
from real_robot.robots.ros import ResetConfig, RosDriver, RosRobotConfig
from real_robot.transports.base import OnMessage, Publisher, Topic, Transport
from real_robot.transports.dds import DdsConfig
from vla_rl.data.writer import EpisodeWriter
from vla_rl.inference.base_policy import PolicySpec
from vla_rl.inference.policy_server import remote_base
from vla_rl.inference.timeline import ExecutionConfig
from vla_rl.inference.worker import RealTimeController
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import Connection, connect
from vla_rl.types import STATE

# velocity (the reduced speed of ISO 10218-1), acceleration, jerk, distance from the command: so that a jump would be seen
CALM = {"m": (0.25, 2.0, 60.0, 0.1), "rad": (1.0, 8.0, 240.0, 0.5)}
RAMP_S = 0.5
PICTURE = (48, 64)
CAMERA = "observation.images.test"
NUMBERS = "std_msgs/msg/Float64MultiArray"
ASK_S = 10.0


class Link:
    """See ``Transport``: another one, whose messages can all be lost, both ways.

    Attributes:
        cut: they are.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport, self.cut = transport, False
        self.open, self.endpoints, self.close = transport.open, transport.endpoints, transport.close

    @property
    def failure(self) -> str | None:
        """See ``Transport``."""
        return self.transport.failure

    @failure.setter
    def failure(self, reason: str | None) -> None:
        self.transport.failure = reason

    def subscribe(self, topic: Topic, on_message: OnMessage) -> None:
        """See ``Transport``."""
        self.transport.subscribe(topic, lambda message, at_s: None if self.cut else on_message(message, at_s))

    def advertise(self, topic: Topic) -> Publisher:
        """See ``Transport``."""
        return _LossyPublisher(self, self.transport.advertise(topic))


@dataclass
class _LossyPublisher:
    link: Link
    publisher: Publisher

    def publish(self, message: Message) -> None:
        if not self.link.cut:
            self.publisher.publish(message)


def calm(config: FakeRobotConfig) -> FakeRobotConfig:
    """The robot with limits like a real one's, where its own are wider; how old what may be stays as it is."""
    safety = config.safety
    changes: dict[str, Any] = {}
    for i, name in enumerate(("max_velocity", "max_acceleration", "max_jerk", "max_tracking_error")):
        most = [CALM.get(unit.removesuffix("/s"), (np.inf,) * 4)[i] for unit in config.action.units]
        changes[name] = tuple(min(given, value) for given, value in zip(getattr(safety, name), most, strict=True))
    return replace(config, safety=replace(safety, ramp_s=RAMP_S, **changes))


def behind_topics(config: FakeRobotConfig, domain: int, camera: bool) -> RosRobotConfig:
    """The same arm behind topics over DDS, its state with stamps; with a camera that is none of the arm's.

    Raises:
        UserError: a feature is no list of numbers.
    """
    hz, spec = config.action.control_hz, config.action
    topics: dict[str, TopicConfig] = {
        "state": TopicConfig("/vla_rl/bench/state", "sensor_msgs/msg/JointState", hz, "state"),
        "status": TopicConfig("/vla_rl/bench/status", NUMBERS, hz, "state"),
        "command": TopicConfig("/vla_rl/bench/command", NUMBERS, hz, "command"),
    }
    observations: dict[str, tuple[PartConfig, ...]] = {}
    for name, shape in config.observations.items():
        if len(shape) != 1:
            raise UserError(f"faults are tried on features that are lists of numbers, got {name!r} of shape {shape}")
        if name == STATE:
            observations[name] = (PartConfig("state", "position", tuple(f"s{i}" for i in range(shape[0]))),)
            continue
        key = name.rsplit(".", 1)[-1]
        topics[key] = TopicConfig(f"/vla_rl/bench/{key}", NUMBERS, hz, "state")
        observations[name] = (PartConfig(key, "data", size=shape[0]),)
    if camera:
        topics["camera"] = TopicConfig("/vla_rl/bench/camera", "sensor_msgs/msg/Image", hz, "sensor")
        observations[CAMERA] = (PartConfig("camera", "picture", shape=PICTURE),)
    measured = {
        name: PartConfig("state", "position", (f"s{at}",), spec.units[spec.names.index(name)].removesuffix("/s"))
        for name, at in places_of(config).items()
    }
    commands = tuple(
        CommandPartConfig((name,), PartConfig("command", "data", unit=spec.units[i], size=1, first=i))
        for i, name in enumerate(spec.names)
    )
    return RosRobotConfig(
        name=f"{config.name}_topics",
        action=spec,
        safety=config.safety,
        transport=DdsConfig(domain=domain),
        map=MapConfig(topics, observations, commands, measured, PartConfig("status", "data", size=4)),
        reset=ResetConfig("topic", 30.0),
    )


def places_of(config: FakeRobotConfig) -> dict[str, int]:
    """Where each measured action's place is in observation.state."""
    return {name: at for names, where in config.measured.items() for name, at in zip(names.split(), where, strict=True)}


@dataclass
class Driven:
    """A connected robot, and what decides beside it."""

    robot: Robot
    actor: RealTimeController
    writer: EpisodeWriter
    log: Path


class Stage:
    """All processes of a bench; use ``open_stage``.

    Attributes:
        driven: the robot that is connected, if any.
        clock_s: by which the arm's clock is off.
    """

    def __init__(
        self, config: FakeRobotConfig, folder: Path, domain: int, arm: Connection, address: str, nursery: Nursery
    ) -> None:
        self.config, self.folder, self.domain = calm(replace(config, address=address)), folder, domain
        self.driven: Driven | None = None
        self.clock_s = 0.0
        self._arm, self._address, self._nursery = arm, address, nursery
        self._spec = PolicySpec(config.observation_spec, config.action, config.task)
        self._stack = contextlib.ExitStack()
        self._over_topics: bool | None = None
        self._link: Link | None = None
        self._bridge: Peer | None = None
        self._camera: Peer | None = None
        self._policy = self._start_policy(0)
        self._port = int(self._policy.address.rsplit(":", 1)[1])

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask the arm's process; raises WireError where it is gone."""
        return self._arm.ask(request, ASK_S)

    def _start_policy(self, port: int) -> Peer:
        return self._nursery.start("policy", port=port, spec=self._spec.to_dict(), places=dict(places_of(self.config)))

    def _start_bridge(self) -> Peer:
        bare = behind_topics(self.config, self.domain, camera=False)
        raw = {"type": "ros", **encode(bare)}
        return self._nursery.start("bridge", arm=self._address, robot=raw)

    def _start_camera(self, config: RosRobotConfig) -> Peer:
        topic = config.map.topics["camera"]
        raw = {"type": "dds", **encode(config.transport)}
        return self._nursery.start("camera", transport=raw, topic=topic.topic, hz=topic.hz, shape=PICTURE)

    def drive(self, over_topics: bool) -> Driven:
        """Connect to the robot, by its own wire or over topics, unless that is so already."""
        if self.driven is not None and self._over_topics == over_topics:
            return self.driven
        self.leave()
        config: RobotConfig = self.config
        if over_topics:
            if self._bridge is None:
                self._bridge = self._start_bridge()
            with_camera = behind_topics(self.config, self.domain, camera=True)
            if self._camera is None:
                self._camera = self._start_camera(with_camera)
            config = with_camera
        log = self.folder / f"{config.name}.jsonl"
        robot = Robot(config, log)
        if isinstance(robot.driver, RosDriver):
            robot.driver.transport = self._link = Link(robot.driver.transport)
        robot.connect()
        self._stack.callback(robot.stop)
        base = remote_base(f"tcp://127.0.0.1:{self._port}", "").open(1, 0)
        controller = RealTimeController(base, ExecutionConfig("asynchronous"), 0, 0, robot.admit)
        actor = self._stack.enter_context(controller)
        self._stack.callback(robot.stop)  # before the policy's thread is waited for
        actor.warm_up(robot.observe().features)
        writer = EpisodeWriter.open_or_create(
            self.folder / config.name,
            action_spec=config.action,
            observation_spec=config.observation_spec,
            task=self.config.task,
            recipe={"source": "robot", "robot": config.name},
            watched=True,
        )
        self.driven, self._over_topics = Driven(robot, actor, writer, log), over_topics
        return self.driven

    def leave(self) -> None:
        """Disconnect."""
        self.driven = None
        self._stack.close()

    def mend(self) -> None:
        """Have all that was done to it be over, and disconnect: the next trial begins anew."""
        for peer in (self._policy, self._bridge, self._camera):
            if peer is not None:
                peer.send(signal.SIGCONT)
        self.set_faults(mute=False, nan=False)
        self.leave()
        for peer in (self._policy, self._bridge, self._camera):
            if peer is not None:
                peer.kill()
        self._bridge = self._camera = None
        self._policy = self._start_policy(self._port)

    def set_faults(self, **faults: bool | float) -> None:
        """Have something go wrong, or be over, in the arm's process; see ``sim.real_time.Faults``."""
        self.ask(call="faults", faults=faults)

    def cut_link(self, cut: bool) -> None:
        """Lose all messages between the robot's driver and its bridge, or no more."""
        assert self._link is not None
        self._link.cut = cut

    def signal_bridge(self, number: signal.Signals) -> None:
        """Stop, kill or continue the bridge."""
        assert self._bridge is not None
        self._bridge.send(number)

    def restart_bridge(self) -> None:
        """Have a bridge again."""
        self._bridge = self._start_bridge()

    def signal_policy(self, number: signal.Signals) -> None:
        """Stop, kill or continue the policy's server."""
        self._policy.send(number)

    def restart_policy(self) -> None:
        """Have a policy's server again, at the same address."""
        self._policy.kill()
        self._policy = self._start_policy(self._port)

    def signal_camera(self, number: signal.Signals) -> None:
        """Freeze or thaw the camera."""
        assert self._camera is not None
        self._camera.send(number)


@contextlib.contextmanager
def open_stage(config: FakeRobotConfig, folder: Path, domain: int, watchdog_s: float) -> Iterator[Stage]:
    """Start an arm and what drives it; all of it is gone after the block.

    Args:
        config: of the arm.
        folder: for logs and episodes.
        domain: of DDS, on loopback.
        watchdog_s: age of a command at which the arm holds by itself.

    Raises:
        UserError: something does not start.
    """
    words = ["robot", "simulate", config.task, "--watchdog-s", str(watchdog_s), "--follow"]
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-m", "vla_rl.cli.main", *words],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the program that drives
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        nursery = stack.enter_context(open_nursery())
        assert process.stdout is not None
        line = next((line for line in process.stdout if "tcp://" in line), None)
        if line is None:
            raise UserError(f"the simulated arm of task {config.task!r} did not start (exit code {process.wait()})")
        address = "tcp://" + line.split("tcp://")[1].split()[0]
        arm = stack.enter_context(contextlib.closing(connect(address, "")))
        stage = Stage(config, folder, domain, arm, address, nursery)
        stack.callback(stage.leave)
        yield stage


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    says: how the robot's word for it begins
    over_topics: with the arm behind topics, instead of by its own wire
    begin: has it happen
    end: has it be over
    lasts: the robot cannot be resumed before it is over
    cuts: commands do not reach the arm, which has to hold by itself
    """

    says: str
    over_topics: bool
    begin: Callable[[Stage, np.random.Generator], None]
    end: Callable[[Stage], None]
    lasts: bool = False
    cuts: bool = False


def _jump_clock(stage: Stage, rng: np.random.Generator) -> None:
    """Ahead or back; it stays there, for the next jump to begin from."""
    stage.clock_s += float(rng.choice([-1, 1]) * rng.uniform(0.5, 10.0))
    stage.set_faults(clock_offset_s=stage.clock_s)


FAULTS = {
    "link_cut": Fault(
        "stale observation",
        True,
        lambda stage, _: stage.cut_link(True),
        lambda stage: stage.cut_link(False),
        lasts=True,
        cuts=True,
    ),
    "bridge_hangs": Fault(
        "stale observation",
        True,
        lambda stage, _: stage.signal_bridge(signal.SIGSTOP),
        lambda stage: stage.signal_bridge(signal.SIGCONT),
        lasts=True,
        cuts=True,
    ),
    "bridge_killed": Fault(
        "stale observation",
        True,
        lambda stage, _: stage.signal_bridge(signal.SIGKILL),
        Stage.restart_bridge,
        lasts=True,
        cuts=True,
    ),
    "frozen_camera": Fault(
        "frozen camera",
        True,
        lambda stage, _: stage.signal_camera(FREEZE),
        lambda stage: stage.signal_camera(THAW),
        lasts=True,
    ),
    "policy_killed": Fault(
        "inference deadline", False, lambda stage, _: stage.signal_policy(signal.SIGKILL), Stage.restart_policy
    ),
    "inference_hangs": Fault(
        "inference deadline",
        False,
        lambda stage, _: stage.signal_policy(signal.SIGSTOP),
        lambda stage: stage.signal_policy(signal.SIGCONT),
    ),
    "clock_jumps": Fault("clock", False, _jump_clock, lambda _: None),
    "robot_silent": Fault(
        "stale observation",
        False,
        lambda stage, _: stage.set_faults(mute=True),
        lambda stage: stage.set_faults(mute=False),
        lasts=True,
    ),
    "not_finite": Fault(
        "observation",
        False,
        lambda stage, _: stage.set_faults(nan=True),
        lambda stage: stage.set_faults(nan=False),
        lasts=True,
    ),
}
