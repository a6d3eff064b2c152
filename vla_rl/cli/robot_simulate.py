"""Run a task in MuJoCo as a robot that moves by the clock: for ``type: fake`` robots, or behind the ROS topics of a robot's map.

It holds by itself where commands stop. Fed through ROS, it takes /vla_rl/reset (the scene's seed) in place of an operator.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from real_robot.bridge import serve_topics
from real_robot.robot import load_robot
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.base import discover_transports
from sim.real_time import RealTimeArm, as_message
from sim.task import load_task
from vla_rl.cli.common import CommandConfig
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import listen, serve_one
from vla_rl.types import require_same_observation

EXAMPLE = "vla-rl robot simulate lift --robot configs/robot/lift_dds.yaml"
POSITIONALS = ("task",)
CLIENTS = 8
prepare = discover_transports


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl robot simulate``.

    task: name of the task
    robot: file or name of a robot of type ros, whose topics it serves (none: only those who connect to its port)
    port: to listen on, on this machine only (0: any that is free)
    watchdog_s: age of a command at which the arm holds by itself
    speed: of its time
    follow: end when standard input does
    seconds: end after so long (0: never)
    """

    task: str
    robot: str | None = None
    port: int = 0
    watchdog_s: float = 0.1
    speed: float = 1.0
    follow: bool = False
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.watchdog_s > 0 and self.speed > 0 and self.seconds >= 0):
            raise ValueError(
                f"watchdog_s and speed want numbers > 0, seconds one >= 0, got {self.watchdog_s}, {self.speed}, {self.seconds}"
            )


class Desk:
    """Answers what a fake robot's driver asks."""

    def __init__(self, arm: RealTimeArm, task: str) -> None:
        self.arm, self.task = arm, task

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One answer; raises UserError for a request that makes no sense."""
        call = request.get("call")
        if call == "next":
            snapshot = self.arm.newest(int(request["after"]), min(float(request["timeout_s"]), 5.0))
            return {"features": None} if snapshot is None else as_message(snapshot)
        if call == "command":
            self.arm.command(np.asarray(request["action"], float))
            return {"taken": True}
        if call == "describe":
            shapes = {k: list(f.shape) for k, f in self.arm.env.observation_spec.items()}
            return {"task": self.task, "action": self.arm.env.action_spec.to_dict(), "observations": shapes}
        if call == "reset":
            self.arm.reset(int(request["scene"]), int(request.get("token", 0)))
            return {"reset": True}
        if call == "faults":
            try:
                self.arm.faults = replace(self.arm.faults, **request["faults"])
            except TypeError as error:
                raise UserError(f"no such fault: {error}") from error
            return {"set": True}
        if call == "record":  # what was executed when, for tests; asking starts it anew
            executed, self.arm.executed = self.arm.executed, []
            self.arm.keeps_record = True
            return {"executed": [{"t": t, "action": action_A, "holding": held} for t, action_A, held in executed]}
        raise UserError(f"a simulated arm is asked next, command, describe, reset, faults or record, got {call!r}")


def require_served(arm: RealTimeArm, config: RosRobotConfig) -> None:
    """Raise SpecMismatchError where a robot's topics are not those of the task."""
    where = f"task {arm.env.config.name!r}"
    config.action.require_equal(arm.env.action_spec, mine=f"robot {config.name!r}", theirs=where)
    require_same_observation(config.observation_spec, arm.env.observation_spec, me=f"robot {config.name!r}", them=where)


def run(config: Config) -> dict[str, Any] | None:
    """Move until interrupted."""
    env = load_task(config.task).make_env()
    arm = RealTimeArm(env, config.watchdog_s, config.speed)
    env.reset(seed=0)
    env.step(
        np.clip(np.zeros(env.action_spec.dim), env.action_spec.low_array(), env.action_spec.high_array())
    )  # compiles
    sock = listen("127.0.0.1", config.port, "")
    host, port = sock.getsockname()[:2]
    desk = Desk(arm, config.task)
    with contextlib.ExitStack() as stack:
        stack.callback(env.close)
        stack.callback(sock.close)
        if config.robot is not None:
            robot = load_robot(config.robot)
            if not isinstance(robot, RosRobotConfig):
                raise UserError(f"topics are served for robots of type ros; {config.robot} is of another type")
            require_served(arm, robot)
            stack.enter_context(serve_topics(arm, robot))
        for _ in range(CLIENTS):
            threading.Thread(target=_serve, args=(sock, desk), daemon=True).start()
        if config.follow:
            threading.Thread(target=_follow, args=(arm,), daemon=True).start()
        if config.seconds:
            threading.Timer(config.seconds, arm.close).start()
        print(f"a simulated arm does {config.task} on tcp://{host}:{port}", flush=True)
        arm.run()
    return None


def _serve(sock: Any, desk: Desk) -> None:
    while True:
        try:
            serve_one(sock, "", desk.answer)
        except OSError:
            if sock.fileno() < 0:
                return
            time.sleep(0.1)


def _follow(arm: RealTimeArm) -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the other side is gone
    arm.close()
