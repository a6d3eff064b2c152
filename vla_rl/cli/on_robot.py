"""Options and arenas of the stages that can learn on a robot in place of a simulation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym

from real_robot.loop import Judge
from real_robot.operators.devices import open_person
from real_robot.robot import Robot, RobotConfig, load_robot
from real_robot.robot_env import Habits, RobotEnv, vector_of_one
from real_robot.stopping import stop_on_signals
from vla_rl.evaluate import Arena
from vla_rl.inference.success import load_judge
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_text

OperatorKind = Literal["none", "keyboard", "gamepad"]
LONGEST_S = 60.0  # of an episode, where nobody says


@dataclass(frozen=True, kw_only=True)
class RobotOptions:
    """Where a stage learns on a robot.

    robot: YAML file of a robot, or its name in configs/robot (none: in simulation)
    operator: who stands beside the robot: none, keyboard or gamepad
    robot_log: file for the log of every step of the robot
    judge: folder of 'vla-rl robot judge', where robot and person do not say what succeeded (none: then nothing has)
    """

    robot: str | None = None
    operator: OperatorKind = "none"
    robot_log: Path | None = None
    judge: Path | None = None

    def __post_init__(self) -> None:
        if self.robot is None and (self.operator != "none" or self.robot_log is not None or self.judge is not None):
            raise ValueError("operator, robot_log and judge want a robot; say which with --robot")


def robot_recipe(config: RobotConfig, task: str, steps: int) -> dict[str, Any]:
    """What determines episodes on a robot, as far as a file can: another robot, or other limits, are another experiment."""
    return {
        "robot": config.name,
        "robot_digest": sha256_text(str(encode(config))),
        "name": task,
        "max_episode_steps": steps,
    }


def robot_steps(config: RobotConfig, max_episode_steps: int | None) -> int:
    """Steps after which an episode on a robot is truncated."""
    return max_episode_steps or round(LONGEST_S * config.action.control_hz)


def open_judge(path: Path | None, config: RobotConfig) -> Judge | None:
    """The learned judge of a robot's readings, if one is named."""
    if path is None:
        return None
    judge = load_judge(path, config.observation_spec, config.name)
    return lambda reading: judge(reading.features)


def say_unrated() -> None:
    """What everybody who lets a program move a robot has to know."""
    print(
        "the safety filter is software without a safety rating; keep a hardware emergency stop within reach",
        file=sys.stderr,
    )


@contextlib.contextmanager
def robot_arena(options: RobotOptions, task: str, max_episode_steps: int | None) -> Iterator[Arena]:
    """The robot as an arena of one environment; it is at rest and let go of however the block ends.

    Raises:
        UserError: nobody is there where the robot wants a person.
        RobotError: as ``Robot.connect``.
    """
    assert options.robot is not None
    config = load_robot(options.robot)
    if options.operator == "none" and (config.set_by_person or config.safety.dead_man):
        why = "its dead-man switch held" if config.safety.dead_man else "a person to set each scene"
        raise UserError(f"robot {config.name!r} wants {why}; say by what with --operator keyboard or gamepad")
    say_unrated()
    judge = open_judge(options.judge, config)
    robot = Robot(config, options.robot_log)
    steps = robot_steps(config, max_episode_steps)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        operator = None
        if options.operator != "none":
            operator = stack.enter_context(open_person(options.operator, robot.rules, config.operator, config.name))
        stack.callback(robot.stop)
        stack.enter_context(stop.breaks_off())  # a learner looks at no flag; the robot comes to rest on the way out
        robot.connect()
        habits = Habits(steps, task, operator, judge, waits_for_ready=config.set_by_person, stop=stop)
        env = vector_of_one(lambda: RobotEnv(robot, habits))
        stack.callback(env.close)
        recipe = robot_recipe(config, task, steps)
        if options.judge is not None:
            recipe["judge"] = folder_digest(options.judge)
        yield Arena(env, config.action, config.observation_spec, task, task, recipe)


class Elsewhere(gym.vector.VectorEnv):
    """Stands for a robot that only an actor at another address can reach."""

    num_envs = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def reset(self, **_: Any) -> Any:
        """It cannot be."""
        raise UserError(f"robot {self.name!r} is at an actor's; it is reached through orders only")

    def step(self, actions: Any) -> Any:
        """It cannot be."""
        raise UserError(f"robot {self.name!r} is at an actor's; it is reached through orders only, got {actions}")


def arena_elsewhere(reference: str, task: str, max_episode_steps: int | None) -> Arena:
    """The arena of a learner whose robot is at an actor's: it knows the robot's file, and judges through the actor."""
    config = load_robot(reference)
    recipe = robot_recipe(config, task, robot_steps(config, max_episode_steps))
    return Arena(Elsewhere(config.name), config.action, config.observation_spec, task, task, recipe, elsewhere=True)


class _Kept(gym.vector.VectorWrapper):
    """Stays open from one learner to the next."""

    def close(self, **_: Any) -> None:
        """The actor closes what is inside."""


def keep_open(arena: Arena) -> Arena:
    """The arena, which those who use it one after the other cannot close."""
    return replace(arena, env=_Kept(arena.env))


def require_same_robot(arena: Arena, recipe: Mapping[str, Any], num_envs: int) -> None:
    """Raise UserError unless a learner asks for the robot that is here, with the same limits."""
    if num_envs != 1:
        raise UserError(f"a robot is one environment, the learner wants {num_envs}")
    for key, words in (("robot", "robot"), ("robot_digest", "description of the robot"), ("name", "task")):
        if recipe.get(key) != arena.recipe[key]:
            raise UserError(f"the learner's {words} is {recipe.get(key)!r}, the actor's is {arena.recipe[key]!r}")
    if recipe.get("max_episode_steps") != arena.recipe["max_episode_steps"]:
        raise UserError(
            f"the learner's episodes have up to {recipe.get('max_episode_steps')} steps, the actor's {arena.recipe['max_episode_steps']}"
        )
