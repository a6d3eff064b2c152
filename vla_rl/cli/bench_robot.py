"""Run the control loop on a robot's topics, with a policy in its thread and a mirror in another process, and count missed deadlines.

What is measured is the way from the robot to the robot: transport, map, filter, loop and inference. The policy is an untrained flow net
whose chunks are computed in full and replaced by a slow sway within the robot's limits.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from real_robot.loop import Timing, run_episode
from real_robot.robot import Robot, load_robot
from real_robot.robots.ros import RosRobotConfig
from real_robot.stopping import stop_on_signals
from real_robot.transports.base import discover_transports
from vla_rl.cli.bench_loop import stolen_s
from vla_rl.cli.common import CommandConfig, RobotExecutionConfig
from vla_rl.inference.base_policy import BasePolicy, BaseSpec, Leftover, OwnBase
from vla_rl.inference.worker import RealTimeController
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.base import discover_policies
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import fixed_priority, without_pauses
from vla_rl.runtime.stalls import STALL_S, meanwhile, watched
from vla_rl.types import Observation

EXAMPLE = "vla-rl bench robot --robot position_group_arm --seconds 600 --priority 10 --watch true --json results/robot_loop.json"
SWAY_HZ = 0.1
SHARE = 0.2  # of the velocity that is allowed


def prepare() -> None:
    """Register policies and transports."""
    discover_policies()
    discover_transports()


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench robot``.

    robot: YAML file of a robot of type ros that takes places, or its name in configs/robot
    seconds: how long
    width: of the policy's net
    sample_steps: of the policy's flow
    priority: 2 to 98: the loop's thread runs before all that has no such priority (Linux, SCHED_FIFO; 0: as any other)
    watch: whether a thread with the highest priority on each processor says when the machine itself stood still (wants a priority)
    execution: how chunks become actions
    """

    robot: str = "position_group_arm"
    seconds: float = 600.0
    width: int = 256
    sample_steps: int = 10
    priority: int = 0
    watch: bool = False
    execution: RobotExecutionConfig = field(default_factory=RobotExecutionConfig)

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds wants a positive number, got {self.seconds}")
        if self.priority and not 2 <= self.priority <= 98:  # the thread that computes has one less, and the watch 99
            raise ValueError(f"priority wants 2 to 98, or 0 for none, got {self.priority}")
        if self.watch and not self.priority:
            raise ValueError(
                "watch wants a priority of the loop from 2 to 98: without one other programs hold it up too, got 0"
            )


class Swaying:
    """A base whose chunks cost what the inner one's cost, and sway about where the robot stood, by the number of the step."""

    def __init__(self, inner: BasePolicy, robot: Robot) -> None:
        """Begin where the robot is, which is connected."""
        self.spec: BaseSpec = inner.spec
        self._inner, self._robot = inner, robot
        self._centre_A = robot.state.command_A.copy()
        self._begun_s: float | None = None

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``."""
        self._inner.reset(env_ids, scene_seeds)

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``: (1, H, A)."""
        made_BHA = self._inner.chunk(observation, env_ids, leftovers)
        rules, last_s = self._robot.rules, self._robot.state.last_s
        if self._begun_s is None and np.isfinite(last_s):
            self._begun_s = last_s
        since_s = 0.0 if self._begun_s is None else last_s - self._begun_s
        at_H1 = since_s + (1 + np.arange(made_BHA.shape[1])[:, None]) * rules.dt
        omega = 2 * np.pi * SWAY_HZ
        reach_A = np.where(rules.moving_A, SHARE * rules.v_max_A / omega, 0.0)
        return (self._centre_A + reach_A * (1 - np.cos(omega * at_H1)) / 2)[None].astype(np.float32)


@contextlib.contextmanager
def mirror(robot: str, seconds: float) -> Iterator[None]:
    """A mirror of the robot in a process of its own."""
    words = [sys.executable, "-m", "vla_rl.cli.main", "robot", "mirror", robot, "--seconds", str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise UserError(f"the mirror of {robot} did not start (exit code {process.wait()})")
        yield
    finally:
        process.kill()
        process.wait()


def machine(stalls: Sequence[tuple[float, float]], timing: Timing, period_s: float) -> dict[str, Any]:
    """How often and how long the machine stood still, and how many of the late steps were late meanwhile."""
    late_N2 = np.asarray(timing.late_s, float).reshape(-1, 2)
    lasted_S = np.array([ended - begun for begun, ended in stalls])
    return {
        "stalls": len(stalls),
        "stall_max_ms": round(1e3 * float(lasted_S.max(initial=0.0)), 2),
        "late_steps": len(late_N2),
        "late_while_stalled": int(meanwhile(stalls, late_N2[:, 0] - period_s, late_N2[:, 1]).sum()),
    }


def run(config: Config) -> dict[str, Any]:
    """Run the loop; return lateness, and what the robot did."""
    robot_config = load_robot(config.robot)
    if not isinstance(robot_config, RosRobotConfig) or robot_config.action.mode != "absolute":
        raise UserError(f"the bench sways a robot of type ros that takes places; {config.robot} is another one")
    robot = Robot(robot_config)
    hz = robot.action_spec.control_hz
    net = FlowConfig(
        net=MLPConfig(width=config.width),
        observation_steps=1,
        chunk_steps=16,
        execute_steps=8,
        sample_steps=config.sample_steps,
    )
    policy = net.build(PolicySpec(robot.observation_spec, robot.action_spec, "sway")).eval()
    timing = Timing()
    print(f"the loop runs for {config.seconds:g} s at {hz:g} Hz; leave the machine alone meanwhile", flush=True)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(mirror(config.robot, config.seconds + 120.0))
        stack.callback(robot.stop)
        stalls = stack.enter_context(watched()) if config.watch else None
        # before the links' threads begin, which inherit it: one that waits for a processor may hold Python's lock, and so the loop
        stack.enter_context(fixed_priority(config.priority))
        robot.connect()
        base = Swaying(OwnBase(policy, 1, 0), robot)
        priority = config.priority and config.priority - 1
        controller = stack.enter_context(RealTimeController(base, config.execution, 0, priority, robot.admit))
        controller.warm_up(robot.observe().features)
        stack.enter_context(without_pauses())
        stolen = stolen_s()
        outcome = run_episode(
            robot,
            controller,
            seed=0,
            steps=round(config.seconds * hz),
            instruction="sway",
            timing=timing,
            stop=stop,
        )
        stolen, latency_ms = stolen_s() - stolen, 1e3 * np.asarray(controller.latencies_s)
    p50, p99, most = np.percentile(latency_ms, [50, 99, 100])
    tally = robot.tally
    results = {
        "robot": robot_config.name,
        "hz": hz,
        "steps": outcome.steps,
        "ended_by": outcome.ended_by,
        "fault": outcome.fault,
        "missed_deadlines": timing.missed,
        "held_steps": tally.held,
        "clipped_steps": tally.clipped,
        "refused_chunks": tally.refused,
        "chunks": controller.tally.chunks,
        "priority": config.priority,
        "stolen_s": round(stolen, 2),
        **({} if stalls is None else machine(stalls, timing, 1 / hz)),
        "timing": {**timing.summary(), "inference": {"p50_ms": p50, "p99_ms": p99, "max_ms": most}},
        "exit_code": int(outcome.fault is not None),
    }
    table = Table("", "p50, ms", "p99, ms", "max, ms")
    for name, shown in results["timing"].items():
        if isinstance(shown, dict):
            table.add_row(name, *(f"{shown[f'{p}_ms']:.3f}" for p in ("p50", "p99", "max")))
    Console().print(table)
    print(
        f"{timing.missed} of {outcome.steps} deadlines missed by more than 2 ms; {tally.held} steps held, {tally.clipped} clipped, "
        f"{tally.refused} chunks refused; {outcome.fault or 'no fault'}; {stolen:.2f} s of processor time went to other virtual machines"
    )
    if config.watch:
        print(
            f"of {results['late_steps']} late steps {results['late_while_stalled']} were late while a watch before every program was, "
            f"by more than {1e3 * STALL_S:g} ms, as it was {results['stalls']} times, by {results['stall_max_ms']:g} ms at most"
        )
    return results
