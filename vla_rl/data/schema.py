"""The columns of our data sets: LeRobotDataset v3 on disk, for simulation and robot alike.

Beside LeRobot's own files, ``meta/vla_rl.json`` holds what LeRobot has no place for: the action spec, the task and the
recipe that made the set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.pictures import as_rows, holds_pictures
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import read_json
from vla_rl.types import ACTION, ActionSpec, FeatureSpec, ObservationSpec

VERSION = "v3.0"
CHUNK_SIZE = 1000  # LeRobot's default: files per chunk folder
INTENDED_ACTION = (
    "intended_action"  # not "action.*": LeRobot takes every column of that prefix for an action to predict
)
IMAGE, VIDEO = "image", "video"  # dtypes of features that are stored as PNG, and as video
REWARD, DONE, SUCCESS = "next.reward", "next.done", "next.success"
TERMINATED, TRUNCATED = "next.terminated", "next.truncated"
INTERVENED = "intervened"  # a human acted in the policy's place; only in sets that were made under a human's eyes
FINAL_PREFIX = "final/"  # columns of meta/episodes that hold the true final observation
INFO_PATH = Path("meta/info.json")
STATS_PATH = Path("meta/stats.json")
TASKS_PATH = Path("meta/tasks.parquet")
EXTRA_PATH = Path("meta/vla_rl.json")

_INDEX_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


def file_path(kind: str, index: int) -> Path:
    """Path of the data ("data") or episode-table ("meta/episodes") file of an episode: one file each, so that a file is whole or absent."""
    return Path(kind) / f"chunk-{index // CHUNK_SIZE:03d}" / f"file-{index % CHUNK_SIZE:03d}.parquet"


def video_path(key: str, index: int) -> Path:
    """Path of the video of an episode's pictures: one file each."""
    return file_path(f"videos/{key}", index).with_suffix(".mp4")


def features(
    observation_spec: ObservationSpec, action_spec: ActionSpec, watched: bool = False
) -> dict[str, dict[str, Any]]:
    """LeRobot's feature table of a set with these observations and actions; ``watched`` by a human who may take over."""
    table: dict[str, dict[str, Any]] = {}
    for key, spec in observation_spec.items():
        names: list[str] | None = list(spec.names) or None
        if names is None and len(spec.shape) == 1:
            names = [f"{key.split('.')[-1]}_{i}" for i in range(spec.shape[0])]
        table[key] = {"dtype": "float32", "shape": list(spec.shape), "names": names}
    for key in (ACTION, INTENDED_ACTION):
        table[key] = {"dtype": "float32", "shape": [action_spec.dim], "names": list(action_spec.names)}
    table[REWARD] = {"dtype": "float32", "shape": [1], "names": None}
    for key in (DONE, TERMINATED, TRUNCATED, SUCCESS):
        table[key] = {"dtype": "bool", "shape": [1], "names": None}
    if watched:
        table[INTERVENED] = {"dtype": "bool", "shape": [1], "names": None}
    return table | _INDEX_FEATURES


def feature_of(array: np.ndarray, as_floats: dict[str, Any], video: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """LeRobot's table entry of an observation as its first episode has it: pictures are images there, (H, W, 3) whatever they are here.

    Args:
        array: (T + 1, ...) of the episode.
        as_floats: the entry of a feature that is float32.
        video: what LeRobot says of the video that pictures are stored as (None: they are stored as PNG).
    """
    if holds_pictures(array):
        shape, names = list(as_rows(array[0]).shape), ["height", "width", "channels"]
        stored = {"dtype": IMAGE} if video is None else {"dtype": VIDEO, "info": dict(video)}
        return {**stored, "shape": shape, "names": names}
    return {**as_floats, "dtype": "uint8" if array.dtype == np.uint8 and array.ndim > 2 else "float32"}


def read_info(root: Path) -> dict[str, Any]:
    """Read ``meta/info.json`` and refuse what is no LeRobotDataset v3.

    Raises:
        UserError: nothing there, or another version; the sentence says what to do.
    """
    if not (root / INFO_PATH).exists():
        raise UserError(
            f"no LeRobotDataset in {str(root)!r} ({INFO_PATH} is missing); make one with 'vla-rl collect' or 'vla-rl data import'"
        )
    info = read_json(root / INFO_PATH)
    if not isinstance(info, dict):
        raise UserError(f"{root} is damaged: {INFO_PATH} holds no table")
    version = info.get("codebase_version")
    if version != VERSION:
        hint = (
            "convert it with 'python -m lerobot.datasets.v30.convert_dataset_v21_to_v30'"
            if str(version).startswith("v2")
            else "install the vla-rl that wrote it"
        )
        raise UserError(
            f"{root} is a LeRobotDataset of version {version!r}, and this program reads {VERSION!r}; {hint}"
        )
    for key in ("total_frames", "total_episodes", "features", "fps"):
        if key not in info:
            raise UserError(f"{root} is damaged: {INFO_PATH} lacks {key!r}")
    return info


@dataclass(frozen=True)
class Extra:
    """Content of ``meta/vla_rl.json``."""

    action_spec: ActionSpec
    observation_spec: ObservationSpec
    task: str
    recipe: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "action_spec": self.action_spec.to_dict(),
            "observation_spec": {k: v.to_dict() for k, v in self.observation_spec.items()},
            "task": self.task,
            "recipe": self.recipe,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Extra:
        """Undo ``to_dict``."""
        return cls(
            action_spec=ActionSpec.from_dict(raw["action_spec"]),
            observation_spec={k: FeatureSpec.from_dict(v) for k, v in raw["observation_spec"].items()},
            task=raw["task"],
            recipe=raw["recipe"],
        )


def read_extra(root: Path) -> Extra:
    """Read ``meta/vla_rl.json``; raise UserError if it is damaged."""
    try:
        return Extra.from_dict(read_json(root / EXTRA_PATH))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{root} is damaged: {EXTRA_PATH} does not hold what it should ({error})") from error
