"""Learn a residual on a frozen base, off-policy from sparse success, and keep the best on selection scenes.

Killed at any time, the same command goes on from its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.actors import ChildHand, Desk, Hand, Team, own_team, remote_hand, setting_of
from vla_rl.cli.actor import open_setting
from vla_rl.cli.common import Simulation, TaskOptions, base_finder, open_arena, open_task, settings_of
from vla_rl.cli.on_robot import RobotOptions, arena_elsewhere, robot_arena
from vla_rl.data.reader import load_datasets
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.checkpoint import spec_of
from vla_rl.inference.lerobot_base import lerobot_folder
from vla_rl.policies.base import discover_policies
from vla_rl.residual import train_residual
from vla_rl.residual_settings import ResidualSettings
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import parse_address, read_token

EXAMPLE = "vla-rl residual --policy runs/can/pretrain --data runs/can/demos --out runs/can/residual --env-steps 60000"
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, RobotOptions, ResidualSettings):
    """Options of ``vla-rl residual``.

    policy: the base: a policy folder (LeRobot's too), tcp://host:port, expert, expert:NAME (knobs of configs/expert/NAME), or none
    data: demonstrations that half of each batch comes from (none: learn from roll-outs alone)
    out: run folder, in the end with the best residual and the last one
    num_envs: environments in parallel, of each actor (a robot is one)
    actors: who collects: own (this process), process (another one on this machine), ray:N, or addresses of 'vla-rl actor'
    token_file: file with the token of actors at addresses
    ray_address: of a Ray cluster (none: one of its own on this machine)
    """

    policy: str
    data: tuple[Path, ...] = ()
    out: Path
    num_envs: int = 8
    actors: tuple[str, ...] = ("own",)
    token_file: Path | None = None
    ray_address: str = ""

    def __post_init__(self) -> None:
        RobotOptions.__post_init__(self)
        ResidualSettings.__post_init__(self)
        for name in self.actors:
            kind, _, count = name.partition(":")
            if kind == "ray":
                if not count.isdigit() or int(count) < 1:
                    raise ValueError(f"actors through Ray look like ray:2, got {name!r}")
            elif name not in ("own", "process"):
                parse_address(name)
        if "own" in self.actors and len(self.actors) > 1:
            raise ValueError(f"actors wants own alone, got {', '.join(self.actors)}")
        if self.robot is not None:
            if len(self.actors) > 1 or self.actors[0].startswith(("process", "ray")):
                raise ValueError(
                    f"a robot wants actors own, or the one address of 'vla-rl actor --robot', got {', '.join(self.actors)}"
                )
            if self.simulation != Simulation():
                raise ValueError("simulation is how a task is simulated; it is not for a robot")


def stage_options(folder: Path, task: str, run: Path) -> dict[str, Any]:
    """Where a pipeline wants the residual."""
    return {"task": task, "out": str(folder)}


def seed_options(seed: int) -> dict[str, Any]:
    """What a pipeline's seed changes."""
    return {"seed": seed}


def run(config: Config) -> dict[str, Any]:
    """Train; return what was done."""
    settings = settings_of(ResidualSettings, config)
    data = load_datasets(list(config.data)) if config.data else None
    task = config.task or (data.task if data is not None else _task_of(config.policy))
    with _arena(config, task) as arena:
        base = base_finder(arena)(config.policy)
        results = train_residual(data, base, config.out, settings, arena, lambda: _team(config, arena, base))
    print(
        f"{config.out}: success {results['base_selection_success']:.3f} -> {results['selection_success']:.3f} on "
        f"{results['selection_scenes']} selection scenes after {results['env_steps']} steps; evaluate on others with 'vla-rl eval'"
    )
    if not results["best_env_steps"]:
        print(
            f"no residual was surely better than the base, which is what {config.out}/policy is; the last one is in {config.out}/last"
        )
    return results


@contextmanager
def _arena(config: Config, task: str) -> Iterator[Arena]:
    """Where the residual is judged, and collected by this process."""
    if config.robot is None:
        arena = open_arena(open_task(task, config.simulation, config.max_episode_steps), config.num_envs)
        with closing(arena.env):
            yield arena
    elif config.actors == ("own",):
        with robot_arena(config, task, config.max_episode_steps) as arena:
            yield arena
    else:
        yield arena_elsewhere(config.robot, task, config.max_episode_steps)


def _team(config: Config, arena: Arena, base: BaseSource) -> Team:
    """The hands that the options name."""
    if config.actors == ("own",):
        return own_team(arena, base, config.residual)
    setting = setting_of(arena, base, config.residual)
    hands: list[Hand] = []
    for name in config.actors:
        if name == "process":
            hands.append(ChildHand(setting))
        elif name.startswith("ray:"):
            from vla_rl.ray_hands import ray_hands

            hands += ray_hands(int(name.partition(":")[2]), _desk, setting, config.ray_address)
        else:
            hands.append(remote_hand(name, read_token(config.token_file), setting))
    return Team(hands)


def _task_of(policy: str) -> str:
    """Name of the task that a base was made for."""
    if policy == "none" or policy.partition(":")[0] == "expert":
        raise UserError(
            f"the base {policy!r} is for any task; say which with --task, or give demonstrations with --data"
        )
    if policy.startswith("tcp:") or lerobot_folder(Path(policy)) is not None:
        raise UserError(f"say with --task what the base {policy!r} is for, or give demonstrations with --data")
    return spec_of(Path(policy)).task


def _desk() -> Desk:
    return Desk(open_setting)
