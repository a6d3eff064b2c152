"""Turn bags of ROS (rosbag2 in MCAP or sqlite3, ROS 1) into a data set by a robot's map, on the policy's clock.

Everything that does not fit is refused before anything is written. Killed, the same command goes on.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from real_robot.bags import BagImport
from real_robot.resample import Clock, ImportOptions, Split, Success
from real_robot.robot import load_robot
from real_robot.robots.ros import RosRobotConfig
from vla_rl.cli.common import CommandConfig
from vla_rl.data.info import describe
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import exclusive, sha256_text

EXAMPLE = "vla-rl bag import runs/bags/* --robot position_group_arm --out runs/imported --instruction 'open the drawer' --split gap"
POSITIONALS = ("bags*",)


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bag import``.

    bags: folders of rosbag2, files .mcap, .db3 or .bag, or folders of several bags
    robot: YAML file of the robot, or its name in configs/robot
    out: folder of the data set
    features: to import (none: all of the robot's)
    task: name of the task (empty: the robot's name)
    instruction: the task in words (empty: the bag's own)
    clock: received (when messages arrived) or header (their stamps; clocks have to be synchronised)
    split: bag (each is an episode), gap (between commands ends one) or status (the robot's, by scene and end)
    gap_s: between commands that ends an episode
    success: status (the robot's; without one it is unknown and recorded as none), or all or none of the episodes
    """

    bags: tuple[Path, ...]
    robot: str
    out: Path
    features: tuple[str, ...] = ()
    task: str = ""
    instruction: str = ""
    clock: Clock = "received"
    split: Split = "bag"
    gap_s: float = 1.0
    success: Success = "status"

    def __post_init__(self) -> None:
        if not self.gap_s > 0:
            raise ValueError(f"gap_s wants a time > 0, got {self.gap_s}")


def open_robot_map(reference: str, features: tuple[str, ...] = ()) -> RosRobotConfig:
    """A robot with topics, and with these of its features only.

    Raises:
        UserError: it has no topics, or not these features.
    """
    config = load_robot(reference)
    if not isinstance(config, RosRobotConfig):
        raise UserError(f"robot {reference!r} has no topics; bags want a robot of type ros")
    seen = config.map.observations
    for name in features:
        if name not in seen:
            raise UserError(f"robot {reference!r} has no feature {name!r}; there are {', '.join(seen)}")
    kept = {name: parts for name, parts in seen.items() if name in features or not features}
    return replace(config, map=replace(config.map, observations=kept))


def find_bags(paths: tuple[Path, ...]) -> list[Path]:
    """The bags given, and those in folders that are none themselves, by name."""
    found = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() and not (path / "metadata.yaml").exists() else []
        own = any(p.suffix in (".mcap", ".db3") for p in inside)
        bags = [p for p in inside if p.suffix == ".bag" or (p.is_dir() and not p.name.endswith(".tmp"))]
        found += [path] if own or not bags else bags
    if not found:
        raise UserError("no bag was given; see --help")
    return found


def run(config: Config) -> dict[str, Any]:
    """Import what is missing; return counts."""
    robot = open_robot_map(config.robot, config.features)
    options = ImportOptions(config.clock, config.split, config.gap_s, config.success, config.instruction)
    bags = [BagImport(path, robot, options) for path in _progress(find_bags(config.bags), "read")]
    notes = sum((bag.notes for bag in bags), Counter())
    count = sum(len(bag.pieces) for bag in bags)
    if not count:
        raise UserError(f"there is no episode in {', '.join(map(str, config.bags))} ({_counted(notes)})")
    recipe = {
        "source": "bags",
        "robot": robot.name,
        "map": sha256_text(str(encode(robot.map))),
        "bags": [str(bag.bag.path) for bag in bags],
        "options": encode(options),
    }
    with exclusive(config.out):
        writer = EpisodeWriter.open_or_create(
            config.out,
            action_spec=robot.action,
            observation_spec=robot.observation_spec,
            task=config.task or robot.name,
            recipe=recipe,
        )
        there = writer.total_episodes
        for episode in _progress(_episodes(bags, there), "import", count, there):
            writer.add(episode)
    summary = describe(config.out)
    unknown = sum(len(bag.pieces) for bag in bags if bag.judged_by == "unknown")
    print(f"{summary['episodes']} episodes, {summary['frames']} frames in {config.out}")
    if unknown:
        print(
            f"whether {unknown} of them succeeded is not known: recorded as no success; --success all or none says so"
        )
    if +notes:
        print(_counted(notes))
    return {k: summary[k] for k in ("episodes", "frames", "success", "mean_length")} | {
        "success_unknown": unknown,
        "notes": dict(+notes),
    }


def _episodes(bags: list[BagImport], start: int) -> Iterator[Any]:
    for bag in bags:
        yield from bag.episodes(min(start, len(bag.pieces)))
        start = max(start - len(bag.pieces), 0)


def _counted(notes: Counter[str]) -> str:
    return "; ".join(f"{what}: {number}" for what, number in sorted((+notes).items())) or "nothing was left out"


def _progress(items: Any, what: str, total: int | None = None, done: int = 0) -> Any:
    unit = "episode" if what == "import" else "bag"
    return tqdm(items, total=total, initial=done, desc=what, unit=unit, disable=not sys.stderr.isatty())
