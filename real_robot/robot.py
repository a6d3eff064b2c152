"""A robot: a driver that reads and writes, behind the safety filter. Nothing reaches a driver but through ``Robot.send``."""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import draccus
import numpy as np

from real_robot.audit import AuditLog, Tally
from real_robot.kinematics import ModelConfig
from real_robot.limiter import stop_steps
from real_robot.limits import Kind, Rules, SafetyConfig, make_rules
from real_robot.motion import FilterState
from real_robot.operators.config import OperatorConfig
from real_robot.safety import Decision, View, chunk_fault, filter_step, following, resume, start, warm_up
from real_robot.transports.base import discover_transports
from vla_rl.runtime.config import CONFIG_ROOT, decode, load_named, read_yaml
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec, ObservationSpec, require_same_observation

FIRST_MESSAGE_S = 20.0  # for the first message of every stream
FRESH_S = 0.3  # in which a message of every stream has to come when a fault is let go of
LOST = ("link", "stale", "heartbeat")  # faults in which commands may not have arrived
NEXT_COMMAND = 0.75  # of a control step that has to pass between two commands: limits of rates count by steps


class RobotError(UserError):
    """The robot cannot be reached, does not fit its description, or has to be looked after before it may move."""


@dataclass(frozen=True)
class Reading:
    """What is known of the robot at one time.

    features: newest observation by feature, without batch
    measured_A: place of each axis in the action's unit, or of the workspace point that a movement moves; NaN where it is not measured
    ages_s: time since what is newest of each stream happened, as far as that is known, with the stream's kind
    broken: what is wrong with the streams: jumped clocks, frozen cameras, a lost link, a second publisher of commands
    success: whether the task is done (None: the robot does not know)
    ended: the episode cannot go on
    reward: of the last step (None: the robot does not know)
    """

    features: Mapping[str, np.ndarray]
    measured_A: np.ndarray
    ages_s: Mapping[str, tuple[Kind, float]]
    broken: tuple[str, ...] = ()
    success: bool | None = None
    ended: bool = False
    reward: float | None = None


@runtime_checkable
class Driver(Protocol):
    """What a kind of robot has to offer. It does no checks of its own: those are ``Robot``'s."""

    def open(self, silent: bool) -> None:
        """Connect; raises RobotError or TransportError where that fails or what is there does not fit the description.

        Args:
            silent: nothing will be written, so that others may command the robot meanwhile.
        """

    def read(self) -> Reading | None:
        """The newest of everything, at once; None as long as some stream has not begun."""

    def missing(self) -> str:
        """What has not begun as long as there is nothing to ``read``, for people."""

    def write(self, action_A: np.ndarray) -> None:
        """Send a command; what it raises, such as TransportError where the link is known to be lost, latches a fault."""

    def reset(self, seed: int) -> None:
        """Bring the robot to where an episode begins; returns when it is there."""

    def acknowledge(self) -> None:
        """A person has looked after a fault: forget what was wrong with the streams, as far as it is over."""

    def close(self) -> None:
        """Leave; may be called again."""


@dataclass(frozen=True, kw_only=True)
class RobotConfig(draccus.ChoiceRegistry):
    """Base of all robots' configs: one file in ``configs/robot`` each.

    name: how the robot is called in data sets
    action: names, units, limits, mode and rate of its commands
    safety: limits that the filter holds
    model: URDF or MJCF that the limits have to lie within
    operator: how a person's keys and sticks move it
    """

    name: str
    action: ActionSpec
    safety: SafetyConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    operator: OperatorConfig = field(default_factory=OperatorConfig)

    @property
    def observation_spec(self) -> ObservationSpec:
        """Shape of each feature."""
        raise TypeError(f"{type(self).__name__} observes nothing")

    @property
    def set_by_person(self) -> bool:
        """Whether a person brings robot and scene to where an episode begins."""
        return False

    def rules(self) -> Rules:
        """Limits as arrays; raises UserError where one is missing or beyond what the model says."""
        self.model.require_within(self.action, self.safety)
        return make_rules(self.action, self.safety, self.model.forward_kinematics(self.action))

    def driver(self) -> Driver:
        """Make the driver, not yet open."""
        raise TypeError(f"{type(self).__name__} has no driver")


def discover_robots() -> None:
    """Import every module of ``real_robot.robots`` so that its config is registered."""
    import real_robot.robots

    for module in pkgutil.iter_modules(real_robot.robots.__path__):
        importlib.import_module(f"real_robot.robots.{module.name}")


class Robot:
    """A driver behind the filter; the only way to move one. Use ``open_robot``."""

    def __init__(self, config: RobotConfig, log: Path | None = None, silent: bool = False) -> None:
        """Set up; nothing is connected.

        Args:
            config: of the robot.
            log: JSONL file that every step is written to.
            silent: nothing is sent (shadow mode); the filter then judges every action from where the robot is.
        """
        self.config, self.silent = config, silent
        self.rules = config.rules()
        self.action_spec: ActionSpec = config.action
        self.observation_spec = config.observation_spec
        self.log_path, self._log = log, AuditLog(None)
        self.driver = config.driver()
        self.tally = Tally()
        self._state: FilterState | None = None
        self._reading: Reading | None = None
        self._finite: Mapping[str, np.ndarray] = {}
        self._connected = self._moved = False
        self._sent_s = -math.inf

    @property
    def fault(self) -> str | None:
        """Why the robot is held; None if it is not."""
        return None if self._state is None else self._state.fault

    @property
    def state(self) -> FilterState:
        """Of the filter."""
        if self._state is None:
            raise RobotError(f"robot {self.config.name!r} is not connected")
        return self._state

    def require_fit(self, action_spec: ActionSpec, observation_spec: ObservationSpec, name: str) -> None:
        """Raise SpecMismatchError, naming both sides, unless a policy was made for this robot."""
        where = f"robot {self.config.name!r}"
        action_spec.require_equal(self.action_spec, mine=name, theirs=where)
        require_same_observation(observation_spec, self.observation_spec, me=name, them=where)

    def connect(self) -> None:
        """Connect, wait for the first message of every stream, and take the robot's place as the first command.

        Raises:
            RobotError: a stream does not begin in time, or the robot is outside its limits.
            TransportError: nobody can be reached, or what is there does not fit.
        """
        if self._connected:
            return
        self._log = AuditLog(self.log_path)
        self._connected, self._moved = True, False
        try:
            self.driver.open(self.silent)
            deadline = time.monotonic() + FIRST_MESSAGE_S
            while (reading := self.driver.read()) is None:
                if time.monotonic() > deadline:
                    raise RobotError(
                        f"robot {self.config.name!r}: {self.driver.missing()} within {FIRST_MESSAGE_S:g} s"
                    )
                time.sleep(0.005)
            warm_up(self.rules, reading.measured_A)
            reading, amiss = self._settled()
            if amiss:
                raise RobotError(f"robot {self.config.name!r}: {amiss[0]}")
            self._state = start(self.rules, reading.measured_A)
        except BaseException:
            self._leave()
            raise
        self._log.event(time.monotonic(), "connected")

    def observe(self) -> Reading:
        """The newest of everything; in place of what is not finite, which is a fault, what was before it.

        Raises:
            RobotError: the robot is not connected.
        """
        reading = self.driver.read() if self._connected else None
        if reading is None:
            raise RobotError(f"robot {self.config.name!r} is not connected")
        bad = [k for k, v in reading.features.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
        if bad:
            kept = {k: self._finite.get(k, v) if k in bad else v for k, v in reading.features.items()}
            words = tuple(f"observation: {name!r} is not finite" for name in bad)
            reading = replace(reading, features=kept, broken=(*reading.broken, *words))
        self._reading, self._finite = reading, reading.features
        return reading

    def admit(self, chunk_HA: np.ndarray) -> str | None:
        """Why a chunk must not be queued; None where it may."""
        reason = chunk_fault(self.rules, self.state, chunk_HA)
        if reason is not None:
            self.tally.refused += 1
            self._log.event(time.monotonic(), reason)
        return reason

    def send(
        self,
        wanted_A: np.ndarray | None,
        *,
        without_s: float = 0.0,
        held_switch: bool = False,
        broken: tuple[str, ...] = (),
    ) -> Decision:
        """Send what the filter leaves of an action, and return that; without an action, come to rest.

        Nothing goes to the robot before the first action: until then it stands as it was found; nor while a fault is latched and the
        commands are at rest: a link that comes back must move nothing. A call that comes too soon after the last one waits.

        Args:
            wanted_A: in the units of the action spec (None: there is none).
            without_s: for how long there has been none.
            held_switch: whether the dead-man switch is held.
            broken: what else is wrong, which latches a fault.
        """
        reading = self._reading
        if reading is None or not self._connected:
            raise RobotError(f"robot {self.config.name!r} is not connected")
        time.sleep(max(self._sent_s + NEXT_COMMAND * self.rules.dt - time.monotonic(), 0.0))
        now_s = self._sent_s = time.monotonic()
        state, broken = self.state, (*reading.broken, *broken)
        if self._log.failure is not None:
            broken = (*broken, self._log.failure)
        if self.silent and state.fault is None:
            try:
                state = following(self.rules, state, reading.measured_A)
            except UserError as error:
                broken = (*broken, str(error))
        view = View(now_s, reading.measured_A, reading.ages_s, broken, without_s, held_switch)
        self._state, decision = filter_step(self.rules, state, wanted_A, view)
        self._moved |= not decision.holding
        stands = state.fault is not None and state.at_rest
        if self._moved and not stands and not self.silent:
            decision = self._write(decision)
        self.tally.steps += 1
        self.tally.clipped += bool(decision.reasons)
        self.tally.faults += decision.new_fault
        self.tally.held += decision.holding
        self._log.step(now_s, decision, reading.measured_A, time.time())
        return decision

    def _write(self, decision: Decision) -> Decision:
        """Hand a command to the driver; a link that is lost is a fault like any other."""
        try:
            self.driver.write(decision.sent_A)
        except Exception as error:  # noqa: BLE001 - whatever it was, the command did not go out
            fault = decision.fault or f"link: {error}"
            self._state = replace(self.state, fault=fault)
            return replace(decision, fault=fault, new_fault=decision.fault is None, holding=True)
        return decision

    def resume(self) -> None:
        """Let go of a latched fault.

        Raises:
            RobotError: what caused it is still there.
            UserError: the commands have not come to rest.
        """
        reading, still = self._fresh()
        if still:
            raise RobotError(f"robot {self.config.name!r} cannot resume: {still[0]}")
        astray = str(self.fault).startswith(LOST)
        self._state = resume(self.rules, self.state, reading.measured_A, astray)
        self._log.event(time.monotonic(), "resumed")

    def _fresh(self) -> tuple[Reading, list[str]]:
        """Forget what was wrong with the streams while nothing moved, and wait a moment for new ones; what is still wrong."""
        self.driver.acknowledge()
        if self._log.failure is not None:
            self._log.failure = None
            self._log.event(time.monotonic(), "recorded again")
        return self._settled()

    def _settled(self) -> tuple[Reading, list[str]]:
        """Wait a moment for fresh observations; the newest ones, and what is wrong with them."""
        deadline = time.monotonic() + FRESH_S
        while (still := self._amiss(reading := self.observe())) and time.monotonic() < deadline:
            time.sleep(0.005)
        return reading, still

    def _amiss(self, reading: Reading) -> list[str]:
        stale = [
            f"{name!r} is stale"
            for name, (kind, age_s) in reading.ages_s.items()
            if not age_s <= self.config.safety.max_age_s(kind)
        ]
        return [*reading.broken, *stale, *([] if self._log.failure is None else [self._log.failure])]

    def reset(self, seed: int) -> None:
        """Bring the robot to where an episode begins, by the driver's own procedure, and begin anew from there."""
        if self.fault is not None:
            raise RobotError(f"robot {self.config.name!r} is held: {self.fault}; resume first")
        if not self.state.at_rest:
            raise RobotError(f"robot {self.config.name!r} is still coming to rest; reset when it has")
        if not self.silent:
            self.driver.reset(seed)
        reading, _ = self._fresh()
        self._state = resume(self.rules, self.state, reading.measured_A, astray=not self.silent)
        self._log.event(time.monotonic(), f"reset {seed}")

    def stop(self) -> None:
        """Bring the commands to rest within the limits and disconnect. Runs on every way out; may be called again."""
        if not self._connected:
            return
        try:
            if self._state is not None and not self.silent:
                self._come_to_rest()
        finally:
            try:
                self._log.event(time.monotonic(), "stopped")
            finally:
                self._leave()

    def _come_to_rest(self) -> None:
        stops_s = [self.rules.dt * stop_steps(v, a, j, self.rules.dt) for v, a, j in self._rates()]
        deadline = time.monotonic() + 1.0 + 1.5 * max(stops_s, default=0.0)
        with contextlib.suppress(UserError):  # a lost link: then the robot's own watchdog has to hold it
            while not self.state.at_rest and time.monotonic() < deadline:
                self.send(None)  # waits by itself
                with contextlib.suppress(UserError):  # the brake needs no observation
                    self._reading = self.driver.read() or self._reading

    def _rates(self) -> list[tuple[float, float, float]]:
        rates_A3 = np.stack([self.rules.v_max_A, self.rules.a_max_A, self.rules.j_max_A], axis=1)[self.rules.moving_A]
        return [(float(v), float(a), float(j)) for v, a, j in rates_A3]

    def _leave(self) -> None:
        self._connected = False
        try:
            self.driver.close()
        finally:
            self._log.close()


@contextlib.contextmanager
def open_robot(config: RobotConfig, log: Path | None = None, silent: bool = False) -> Iterator[Robot]:
    """Connect to a robot, and bring it to rest however the block ends."""
    robot = Robot(config, log, silent)
    robot.connect()
    try:
        yield robot
    finally:
        robot.stop()


def load_robot(reference: str) -> RobotConfig:
    """Read a robot from a YAML file, or by its name from ``configs/robot``; files that it names are looked for beside it.

    Raises:
        UserError: there is none, or the first thing in it that does not fit.
    """
    discover_transports()
    discover_robots()
    path = Path(reference) if reference.endswith((".yaml", ".yml")) else CONFIG_ROOT / "robot" / f"{reference}.yaml"
    raw = read_yaml(path) if path.suffix and path.exists() else load_named("robot", reference)
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("file"), str) and not Path(model["file"]).is_absolute():
        raw = {**raw, "model": {**model, "file": str(path.parent / model["file"])}}
    return decode(RobotConfig, raw)
