"""Collect episodes for a residual learner that asks for them, on this machine or another.

The learner says which task, base and residual; its base has to be here under the same path, with the same hash. With --robot it runs on
the robot's computer, and the robot holds by itself when the learner is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.task import TaskConfig, discover_tasks
from vla_rl.actors import Desk
from vla_rl.cli.common import CommandConfig, base_finder, open_arena
from vla_rl.cli.on_robot import RobotOptions, keep_open, require_same_robot, robot_arena
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.policies.base import discover_policies
from vla_rl.runtime.config import decode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import listen, read_token, serve_one

EXAMPLE = "vla-rl actor --host 0.0.0.0 --port 7001 --token-file token.txt"
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(RobotOptions, CommandConfig):
    """Options of ``vla-rl actor``.

    host: address to listen on; others than this machine's own want a token
    port: to listen on (0: any that is free)
    token_file: file with the token that a learner has to know
    once: end when the first learner leaves
    task: that the robot does (a robot alone)
    max_episode_steps: after which an episode on the robot is truncated (none: 60 s)
    """

    host: str = "127.0.0.1"
    port: int = 0
    token_file: Path | None = None
    once: bool = False
    task: str | None = None
    max_episode_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.robot is None) != (self.task is None) or (self.robot is None and self.max_episode_steps is not None):
            raise ValueError("task and max_episode_steps are for a robot, which wants a task: --robot NAME --task NAME")


def open_setting(recipe: Mapping[str, Any], num_envs: int, reference: str) -> tuple[Arena, BaseSource]:
    """Open a task by its recipe, and find a base for it."""
    if "robot" in recipe:
        raise UserError(f"the learner wants robot {recipe['robot']!r}; start its actor with --robot")
    discover_tasks()
    discover_policies()
    arena = open_arena(decode(TaskConfig, recipe), num_envs)
    return arena, base_finder(arena)(reference)


def run(config: Config) -> dict[str, Any]:
    """Serve learners, one after the other."""
    token = read_token(config.token_file)
    served = 0
    with ExitStack() as stack:
        sock = stack.enter_context(closing(listen(config.host, config.port, token)))
        make = _opener(config, stack)
        host, port = sock.getsockname()[:2]
        print(f"actor listens on tcp://{host}:{port}", flush=True)
        while True:
            if not serve_one(sock, token, Desk(make).answer):
                continue
            served += 1
            if config.once:
                return {"served": served}
            print("the learner has left; waiting for the next", file=sys.stderr)


def _opener(config: Config, stack: ExitStack) -> Callable[[Mapping[str, Any], int, str], tuple[Arena, BaseSource]]:
    """What sets up a learner's task: any simulation, or the robot that is here, which stays open until the stack is closed."""
    if config.robot is None or config.task is None:
        return open_setting
    arena = keep_open(stack.enter_context(robot_arena(config, config.task, config.max_episode_steps)))

    def make(recipe: Mapping[str, Any], num_envs: int, reference: str) -> tuple[Arena, BaseSource]:
        require_same_robot(arena, recipe, num_envs)
        return arena, base_finder(arena)(reference)

    return make
