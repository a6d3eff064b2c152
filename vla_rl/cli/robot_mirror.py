"""Stand in for a robot of type ros on its topics, to try its file, and the way to it, without the robot.

It is an arm that is at once where it is told to be, in front of cameras that see noise.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from real_robot.bridge import serve_topics
from real_robot.mirror import MirrorArm
from real_robot.robot import load_robot
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.base import discover_transports
from vla_rl.cli.common import CommandConfig
from vla_rl.runtime.errors import UserError

EXAMPLE = "vla-rl robot mirror configs/robot/position_group_arm.yaml"
POSITIONALS = ("robot",)
prepare = discover_transports


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl robot mirror``.

    robot: YAML file of a robot of type ros, or its name in configs/robot
    seconds: end after so long (0: never)
    """

    robot: str
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise ValueError(f"seconds wants a number >= 0, got {self.seconds}")


def run(config: Config) -> dict[str, Any] | None:
    """Mirror until interrupted."""
    robot = load_robot(config.robot)
    if not isinstance(robot, RosRobotConfig):
        raise UserError(f"topics are mirrored of robots of type ros; {config.robot} is of another type")
    arm = MirrorArm(robot)
    with serve_topics(arm, robot):
        print(
            f"a mirror stands in for {robot.name} on {', '.join(t.topic for t in robot.map.sensed().values())}",
            flush=True,
        )
        thread = threading.Thread(target=arm.run, args=(config.seconds,), daemon=True)
        thread.start()
        try:
            thread.join()
        finally:
            arm.close()
    return None
