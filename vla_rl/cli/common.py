"""What several commands share: options common to all, and tasks turned into arenas."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from real_robot.robot import load_robot
from real_robot.simulated import SimulatedGuard
from sim.expert_base import ExpertBase
from sim.experts.base import ExpertConfig
from sim.randomization import Randomization
from sim.task import TaskConfig, load_task
from sim.vector import make_vector_env
from vla_rl.evaluate import Arena
from vla_rl.inference.base_policy import BaseSpec, NoBase
from vla_rl.inference.bases import BaseSource, FindBase, own_base
from vla_rl.inference.checkpoint import spec_of
from vla_rl.inference.lerobot_base import lerobot_base, lerobot_folder
from vla_rl.inference.policy_server import remote_base
from vla_rl.inference.timeline import ExecutionConfig, Method
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.config import decode, encode, load_named, names_in
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_text
from vla_rl.runtime.wire import read_token

T = TypeVar("T")
TOKEN_FILE = "VLA_RL_TOKEN_FILE"  # environment variable: file with the token of the policy servers that are asked


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Options of every command.

    json: file for the numbers
    """

    json: Path | None = None


@dataclass(frozen=True)
class Simulation:
    """How a task is simulated; what is not set is as the task's file says.

    physics: exact, or fast for training only (robosuite tasks)
    stepping: compiled, or robosuite for its own step (robosuite tasks)
    randomization: how model, sensing and actuation vary from episode to episode
    """

    physics: Literal["exact", "fast"] | None = None
    stepping: Literal["compiled", "robosuite"] | None = None
    randomization: Randomization = field(default_factory=Randomization)


@dataclass(frozen=True, kw_only=True)
class TaskOptions(CommandConfig):
    """Where a policy acts.

    task: name of the task (none: the one the policy was trained on)
    max_episode_steps: overrides the task's own limit
    simulation: how the task is simulated
    """

    task: str | None = None
    max_episode_steps: int | None = None
    simulation: Simulation = field(default_factory=Simulation)


def open_arena_of(options: TaskOptions, policy: Path, num_envs: int) -> Arena:
    """Build the vector environment in which a policy acts; raises UserError as ``open_task`` and ``open_arena``."""
    name = options.task or spec_of(policy).task
    return open_arena(open_task(name, options.simulation, options.max_episode_steps), num_envs)


@dataclass(frozen=True)
class RobotExecutionConfig(ExecutionConfig):
    """As elsewhere, but the robot goes on while a chunk is computed."""

    method: Method = "asynchronous"


def settings_of(cls: type[T], config: Any) -> T:
    """The settings of a stage out of the options of its command."""
    return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})  # type: ignore[attr-defined]


def open_task(name: str, simulation: Simulation, max_episode_steps: int | None = None) -> TaskConfig:
    """Read a task, with a run's own settings laid over it."""
    overrides: dict[str, Any] = {
        "max_episode_steps": max_episode_steps,
        "physics": simulation.physics,
        "stepping": simulation.stepping,
        "randomization": encode(simulation.randomization) if simulation.randomization.enabled else None,
    }
    return load_task(name, **{k: v for k, v in overrides.items() if v is not None})


def open_arena(task: TaskConfig, num_envs: int) -> Arena:
    """Build the vector environment in which policies are judged (0 environments: as many as suit the task).

    Raises:
        UserError: its physics are not exact, or the number is negative.
    """
    if num_envs < 0:
        raise UserError(f"num_envs wants a number >= 0 (0: as many as suit the task), got {num_envs}")
    if not task.exact_physics:
        raise UserError(f"policies are judged in exact physics, got physics 'fast' for task {task.name!r}")
    env = make_vector_env(task, num_envs or task.batch)
    return Arena(env, env.action_spec, env.observation_spec, task.name, task.instruction, encode(task))


def guarded(arena: Arena, robot: str | None) -> Arena:
    """The arena with a robot's safety filter before its environments.

    Args:
        arena: where policies are judged.
        robot: file or name of the robot whose limits hold (none: the task's simulated one, ``configs/robot/TASK_fake.yaml``, if any).

    Raises:
        SpecMismatchError: the robot takes other actions.
    """
    reference = robot or f"{arena.task}_fake"
    if robot is None and reference not in names_in("robot"):
        return arena
    config = load_robot(reference)
    arena.action_spec.require_equal(config.action, mine=f"task {arena.task!r}", theirs=f"robot {config.name!r}")
    return replace(arena, guard=SimulatedGuard(config, arena.env.num_envs), guarded_by=config.name)


def server_token() -> str:
    """The token of the policy servers that are asked; none where no file is named."""
    token_file = os.environ.get(TOKEN_FILE)
    return read_token(Path(token_file) if token_file else None)


def find_lone_base(reference: str) -> BaseSource:
    """The base of a residual that acts where its simulation is not: on a robot, or behind a server."""
    if reference == "none" or reference.partition(":")[0] == "expert":
        raise UserError(
            f"a residual on the base {reference!r} acts in its own environments; it cannot be served or deployed"
        )
    if reference.startswith("tcp:"):
        return remote_base(reference, server_token())
    if lerobot_folder(Path(reference)) is not None:
        raise UserError(
            f"a residual on the LeRobot policy {reference} cannot be served or deployed; serve the policy, and correct it here"
        )
    return own_base(Path(reference))


def base_finder(arena: Arena) -> FindBase:
    """How this program finds the base of a residual by what a user calls it.

    A folder holds a policy of this project or of LeRobot's; ``tcp://host:port`` is a policy server (``vla-rl serve``), whose token is in
    the file that the environment variable ``VLA_RL_TOKEN_FILE`` names; ``none`` is no base at all; ``expert`` or ``expert:NAME`` is the
    scripted demonstrator with the knobs of ``configs/expert/NAME``.
    """
    spec = PolicySpec(dict(arena.observation_spec), arena.action_spec, arena.task)

    def find(reference: str) -> BaseSource:
        kind, _, name = reference.partition(":")
        if reference == "none":
            nothing = NoBase(spec)
            return BaseSource(reference, sha256_text(reference), nothing.spec, lambda *_: nothing)
        if kind == "tcp":
            return remote_base(reference, server_token())
        if kind != "expert":
            folder = lerobot_folder(Path(reference))
            return own_base(Path(reference)) if folder is None else lerobot_base(folder, spec, arena.instruction)
        knobs = load_named("expert", name or "clean")
        config = decode(ExpertConfig, knobs)
        envs = getattr(arena.env.unwrapped, "envs", None)
        if envs is None or not arena.recipe or "robot" in arena.recipe:
            raise UserError("an expert looks at its environments, which have to be simulated in this process")
        task = decode(TaskConfig, arena.recipe)
        its = BaseSpec(spec, observation_steps=1, execute_steps=1)

        def open_base(num_envs: int, seed: int) -> ExpertBase:
            if num_envs != len(envs):
                raise UserError(f"an expert acts in all {len(envs)} environments, got {num_envs}")
            return ExpertBase(task, envs, its, config, seed)

        return BaseSource(reference, sha256_text(f"{reference} {knobs}"), its, open_base, labels=False)

    return find
