"""Turn a data set into bags of ROS, one for each episode, as the messages that a robot with this map would have sent and got.

Bags that are there already are left as they are, so that the same command goes on after a kill.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from real_robot.recorder import Storage, write_episode
from vla_rl.cli.bag_import import open_robot_map
from vla_rl.cli.common import CommandConfig
from vla_rl.data.reader import load_dataset
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import exclusive, read_json, sha256_text, write_json
from vla_rl.types import require_same_observation

EXAMPLE = "vla-rl bag export runs/lift/demos --robot lift_dds --out runs/lift/bags"
POSITIONALS = ("data",)
RECIPE = "export.json"


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bag export``.

    data: folder of the data set
    robot: YAML file of the robot, or its name in configs/robot
    out: folder for the bags
    storage: mcap, sqlite3 or ros1
    """

    data: Path
    robot: str
    out: Path
    storage: Storage = "mcap"


def run(config: Config) -> dict[str, Any]:
    """Write what is missing; return counts."""
    robot, data = open_robot_map(config.robot), load_dataset(config.data)
    me, them = f"robot {robot.name!r}", str(config.data)
    robot.action.require_equal(data.action_spec, mine=me, theirs=them)
    require_same_observation(robot.observation_spec, data.observation_spec, me=me, them=them)
    recipe = {"data": data.digest, "map": sha256_text(str(encode(robot.map))), "storage": config.storage}
    with exclusive(config.out):
        _go_on(config.out, recipe)
        for number in tqdm(range(data.num_episodes), desc="export", unit="bag", disable=not sys.stderr.isatty()):
            name = f"episode_{number:06d}" + (".bag" if config.storage == "ros1" else "")
            if (config.out / name).exists():
                continue
            aside = config.out / f"{name}.tmp"  # a bag's files have its folder's name, so that it is renamed as a whole
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            write_episode(aside / name, data.episode(number), robot, config.storage, number + 1)
            _make_durable(aside)
            os.rename(aside / name, config.out / name)
            aside.rmdir()
    left = sorted(set(data.observation_spec) - set(robot.observation_spec))
    print(f"{data.num_episodes} bags in {config.out}")
    if left:
        print(f"not in the map of {robot.name!r}, so not in the bags: {', '.join(left)}")
    return {"bags": data.num_episodes, "left_out": left}


def _make_durable(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as data:
                os.fsync(data.fileno())


def _go_on(out: Path, recipe: dict[str, str]) -> None:
    if (out / RECIPE).exists():
        there = read_json(out / RECIPE)
        if there != recipe:
            raise UserError(f"{out} holds bags of another data set, map or storage; choose another --out, or remove it")
        return
    strangers = sorted(p.name for p in out.iterdir())
    if strangers:
        raise UserError(
            f"{out} is not empty and holds no bags of 'bag export' ({', '.join(strangers[:3])}); choose another --out"
        )
    write_json(out / RECIPE, recipe)
