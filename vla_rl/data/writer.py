"""Write episodes as a LeRobotDataset v3 that is whole after every episode, whenever the process is killed.

LeRobot's own writer keeps its parquet files open over many episodes, so that a kill leaves files without footers.
Here each episode is one data file and one row file, written aside and renamed, and ``meta/info.json`` is renamed last: it alone
says how many episodes there are. What a kill leaves behind it is removed when the set is opened again.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vla_rl.data import schema
from vla_rl.data.episode import Episode
from vla_rl.data.pictures import as_rows, encode_png, holds_pictures, picture_column, picture_stats
from vla_rl.data.videos import Codec, video_info, write_video
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import TEMPORARY_SUFFIX, read_json, write_atomically, write_json
from vla_rl.types import ACTION, ActionSpec, ObservationSpec

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_OUR_FILE = re.compile(rf"chunk-(\d{{3,}})/file-(\d{{3}})\.(?:parquet|mp4)({re.escape(TEMPORARY_SUFFIX)})?")


class EpisodeWriter:
    """Append episodes to a data set. Use ``open_or_create``."""

    def __init__(self, root: Path, extra: schema.Extra, info: dict[str, Any], tasks: list[str]) -> None:
        self.root = root
        self.extra = extra
        self._info = info
        self._tasks = tasks
        self._stats: dict[str, Any] | None = (
            read_json(root / schema.STATS_PATH) if (root / schema.STATS_PATH).exists() else None
        )
        self._remove_leftovers()

    @classmethod
    def open_or_create(
        cls,
        root: Path,
        *,
        action_spec: ActionSpec,
        observation_spec: ObservationSpec,
        task: str,
        recipe: dict[str, Any],
        watched: bool = False,
        video: Codec | None = None,
    ) -> EpisodeWriter:
        """Create a set, or go on with the one that the same recipe began.

        Args:
            root: folder of the set.
            action_spec: meaning and rate of the actions.
            observation_spec: features of the observations.
            task: name of the task.
            recipe: what determines the episodes (task, seeds, expert); plain data.
            watched: by a human who may take over, so that it is recorded in which steps one did.
            video: how pictures are encoded (None: each as PNG); the set remembers it.

        Raises:
            UserError: the folder holds a set of another recipe, or something else.
        """
        recipe = {**recipe, "video": video} if video is not None else recipe
        extra = schema.Extra(action_spec, observation_spec, task, recipe)
        if (root / schema.INFO_PATH).exists():
            info = schema.read_info(root)
            there = schema.read_extra(root)
            for key, value in recipe.items():
                if there.recipe.get(key) != value:
                    raise UserError(
                        f"{root} holds a set made with {key} = {there.recipe.get(key)!r}, not {value!r}; choose another --out, or remove it"
                    )
            action_spec.require_equal(there.action_spec, mine="this task", theirs=str(root))
            tasks = list(pd.read_parquet(root / schema.TASKS_PATH).index)
            return cls(root, there, info, tasks)
        strangers = (
            [p.name for p in root.iterdir()] if root.is_dir() and not (root / schema.EXTRA_PATH).exists() else []
        )
        if strangers or (root.exists() and not root.is_dir()):
            raise UserError(
                f"{root} is not empty and holds no data set ({', '.join(sorted(strangers)[:3]) or 'a file'}); choose another --out"
            )
        rate_hz = action_spec.control_hz
        info = {
            "codebase_version": schema.VERSION,
            "robot_type": None,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "chunks_size": schema.CHUNK_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": int(rate_hz) if rate_hz == int(rate_hz) else rate_hz,
            "splits": {},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": None if video is None else VIDEO_PATH,
            "features": schema.features(observation_spec, action_spec, watched),
        }
        write_json(root / schema.EXTRA_PATH, extra.to_dict())
        return cls(root, extra, info, [])

    @property
    def total_episodes(self) -> int:
        """Episodes that are safe on disk."""
        return int(self._info["total_episodes"])

    @property
    def last_scene(self) -> int | None:
        """Seed of the scene of the last episode, if there is one and it has a scene."""
        if not self.total_episodes:
            return None
        row = pq.read_table(self.root / schema.file_path("meta/episodes", self.total_episodes - 1)).to_pylist()[0]
        return row.get("provenance/scene_seed")

    def _remove_leftovers(self) -> None:
        folders = [self.root / "data", self.root / "meta/episodes", *(self.root / "videos").glob("*")]
        for folder in folders:
            for path in folder.glob("*/*"):
                match = _OUR_FILE.fullmatch(f"{path.parent.name}/{path.name}")
                if match is None:
                    continue  # not ours
                index = int(match.group(1)) * schema.CHUNK_SIZE + int(match.group(2))
                if match.group(3) or index >= self.total_episodes:
                    path.unlink()

    def add(self, episode: Episode) -> None:
        """Append one episode; when this returns, it is on disk.

        Raises:
            UserError: the episode is ragged, not finite, of another spec, or the disk is full; the set is as before.
        """
        episode.validate()
        if episode.action_TA.shape[1] != self.extra.action_spec.dim:
            raise UserError(
                f"{self.root} holds actions of {self.extra.action_spec.dim} dimensions, got {episode.action_TA.shape[1]}"
            )
        if set(episode.observations) != set(self.extra.observation_spec):
            raise UserError(
                f"{self.root} holds {sorted(self.extra.observation_spec)}, got {sorted(episode.observations)}"
            )
        features = self._observed_features(episode)
        if episode.instruction not in self._tasks:
            self._tasks = [*self._tasks, episode.instruction]
            frame = pd.DataFrame({"task_index": range(len(self._tasks))}, index=pd.Index(self._tasks, name="task"))
            write_atomically(self.root / schema.TASKS_PATH, lambda p: frame.to_parquet(p))
        self._info["features"] = features
        columns = self._columns(episode)
        stats = self._episode_stats(columns)
        row = self._episode_row(episode, stats)
        index = self.total_episodes
        for key in self._of_kind(schema.VIDEO):
            write_atomically(self.root / schema.video_path(key, index), functools.partial(self._encode, columns[key]))
        write_atomically(
            self.root / schema.file_path("data", index),
            lambda p: pq.write_table(_table(columns, self._info["features"]), p),
        )
        row_table = pa.Table.from_pylist([row])
        write_atomically(self.root / schema.file_path("meta/episodes", index), lambda p: pq.write_table(row_table, p))
        self._write_stats(stats)
        self._info |= {
            "total_episodes": index + 1,
            "total_frames": self._info["total_frames"] + episode.length,
            "total_tasks": len(self._tasks),
            "splits": {"train": f"0:{index + 1}"},
        }
        write_json(self.root / schema.INFO_PATH, self._info)

    def _observed_features(self, episode: Episode) -> dict[str, dict[str, Any]]:
        """The feature table, in which the first episode says what is pictures; raises UserError for one that differs from it."""
        table = dict(self._info["features"])
        for key, spec in self.extra.observation_spec.items():
            value = episode.observations[key]
            if value.shape[1:] != spec.shape:
                raise UserError(f"{self.root} holds {key!r} of shape {spec.shape}, got {value.shape[1:]}")
            video = self._video(value) if holds_pictures(value) else None
            found = schema.feature_of(value, table[key], video)
            if self.total_episodes and found["dtype"] != table[key]["dtype"]:
                raise UserError(f"{self.root} holds {key!r} as {table[key]['dtype']}, got {found['dtype']}")
            table[key] = found
        return table

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        length = episode.length
        last_T = np.arange(length) == length - 1
        columns: dict[str, np.ndarray] = {k: self._stored(k, v[:-1]) for k, v in episode.observations.items()}
        columns[ACTION] = np.asarray(episode.action_TA, np.float32)
        columns[schema.INTENDED_ACTION] = np.asarray(episode.intended_TA, np.float32)
        columns[schema.REWARD] = np.asarray(episode.reward_T, np.float32)
        columns[schema.DONE] = last_T
        columns[schema.TERMINATED] = last_T & episode.terminated
        columns[schema.TRUNCATED] = last_T & episode.truncated
        columns[schema.SUCCESS] = np.asarray(episode.success_T, bool)
        if schema.INTERVENED in self._info["features"]:
            nobody_T = np.zeros(length, bool)
            columns[schema.INTERVENED] = nobody_T if episode.intervened_T is None else episode.intervened_T
        columns["timestamp"] = (np.arange(length) / self.extra.action_spec.control_hz).astype(np.float32)
        columns["frame_index"] = np.arange(length)
        columns["episode_index"] = np.full(length, self.total_episodes)
        columns["index"] = self._info["total_frames"] + np.arange(length)
        columns["task_index"] = np.full(length, self._tasks.index(episode.instruction))
        return columns

    def _stored(self, key: str, value: np.ndarray) -> np.ndarray:
        """An observation as it is stored, but for pictures, which are encoded last."""
        kind = self._info["features"][key]["dtype"]
        return np.asarray(value, np.uint8 if kind in (schema.IMAGE, schema.VIDEO) else kind)

    def _video(self, pictures: np.ndarray) -> dict[str, Any] | None:
        """What LeRobot says of the video that pictures become, where the set has videos."""
        codec = self.extra.recipe.get("video")
        return codec and video_info(as_rows(pictures[0]).shape, codec, self.extra.action_spec.control_hz)

    def _of_kind(self, *kinds: str) -> list[str]:
        """Features that are stored so."""
        return [k for k, f in self._info["features"].items() if f["dtype"] in kinds]

    def _encode(self, pictures: np.ndarray, path: Path) -> None:
        write_video(path, pictures, self.extra.recipe["video"], self.extra.action_spec.control_hz)

    def _episode_stats(self, columns: dict[str, np.ndarray]) -> dict[str, Any]:
        """LeRobot's statistics; of arrays for each number of their last axis, or for each channel of those that have three axes."""
        from lerobot.datasets.compute_stats import compute_episode_stats, get_feature_stats

        table, stats, numbers = self._info["features"], {}, {}
        for key, value in columns.items():
            if table[key]["dtype"] in (schema.IMAGE, schema.VIDEO):
                stats[key] = picture_stats(value)
            elif value.ndim == 4:
                whole = get_feature_stats(value.astype(np.float32), axis=(0, 2, 3), keepdims=True)
                stats[key] = {k: v if k == "count" else v[0] for k, v in whole.items()}
            elif value.ndim > 2:
                flat = value.reshape(-1, value.shape[-1]).astype(np.float32)
                stats[key] = {**get_feature_stats(flat, axis=0, keepdims=False), "count": np.array([len(value)])}
            else:
                numbers[key] = value.astype(np.uint8) if value.dtype == bool else value
        return stats | compute_episode_stats(numbers, table)

    def _episode_row(self, episode: Episode, stats: dict[str, Any]) -> dict[str, Any]:
        index, start = self.total_episodes, self._info["total_frames"]
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [episode.instruction],
            "length": episode.length,
            "dataset_from_index": start,
            "dataset_to_index": start + episode.length,
            "success": episode.success,
            "terminated": episode.terminated,
            "truncated": episode.truncated,
            **{f"provenance/{k}": v for k, v in episode.provenance.items()},
            **{schema.FINAL_PREFIX + k: self._final(k, v[-1]) for k, v in episode.observations.items()},
        }
        for kind in ("data", "meta/episodes", *(f"videos/{key}" for key in self._of_kind(schema.VIDEO))):
            row[f"{kind}/chunk_index"], row[f"{kind}/file_index"] = divmod(index, schema.CHUNK_SIZE)
        for key in self._of_kind(schema.VIDEO):
            row[f"videos/{key}/from_timestamp"] = 0.0
            row[f"videos/{key}/to_timestamp"] = episode.length / self.extra.action_spec.control_hz
        for key, values in stats.items():
            for name, value in values.items():
                row[f"stats/{key}/{name}"] = np.asarray(value).tolist()
        return row

    def _final(self, key: str, value: np.ndarray) -> bytes | list[Any]:
        """The true final observation as the episode's row has it."""
        stored = self._stored(key, value)
        return encode_png(stored) if key in self._of_kind(schema.IMAGE, schema.VIDEO) else stored.tolist()

    def _write_stats(self, stats: dict[str, Any]) -> None:
        """Fold the episode's statistics in; always through what JSON keeps, so that a resumed run ends with the same file."""
        from lerobot.datasets.utils import serialize_dict

        plain = serialize_dict(stats)
        if self._stats is not None:
            counted = int(np.asarray(self._stats["index"]["count"]).reshape(-1)[0])
            if counted != self._info["total_frames"]:  # killed between the statistics and info.json
                self._stats = self._recounted_stats()
        folded = plain if self._stats is None else _fold(self._stats, plain)
        self._stats = {key: folded[key] for key in sorted(folded)}
        write_json(self.root / schema.STATS_PATH, self._stats)

    def _recounted_stats(self) -> dict[str, Any] | None:
        """Statistics of the episodes that count, from their own rows."""
        folded: dict[str, Any] | None = None
        for index in range(self.total_episodes):
            row = pq.read_table(self.root / schema.file_path("meta/episodes", index)).to_pylist()[0]
            stats: dict[str, Any] = {}
            for key, value in row.items():
                if key.startswith("stats/"):
                    feature, _, name = key.removeprefix("stats/").rpartition("/")
                    stats.setdefault(feature, {})[name] = value
            folded = stats if folded is None else _fold(folded, stats)
        return folded


def _fold(stats: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Key by key: LeRobot's ``aggregate_stats`` takes whatever is called an image for a picture, and a depth image is none."""
    from lerobot.datasets.compute_stats import aggregate_feature_stats
    from lerobot.datasets.utils import cast_stats_to_numpy, serialize_dict

    one, other = cast_stats_to_numpy(stats), cast_stats_to_numpy(more)
    return serialize_dict({key: aggregate_feature_stats([one[key], other[key]]) for key in one})


def _table(columns: dict[str, np.ndarray], features: dict[str, dict[str, Any]]) -> pa.Table:
    from lerobot.datasets.utils import get_hf_features_from_features

    shaped = {k: {**v, "shape": tuple(v["shape"])} for k, v in features.items()}
    hf_schema = get_hf_features_from_features(shaped).arrow_schema
    return pa.Table.from_arrays(
        [_arrow(columns[name], hf_schema.field(name).type) for name in hf_schema.names], schema=hf_schema
    )


def _arrow(value: np.ndarray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """A column of this type: numbers, lists of a fixed or a free length, lists of lists, or pictures."""
    if pa.types.is_struct(kind):
        return picture_column([encode_png(picture) for picture in value])
    if isinstance(kind, pa.ExtensionType):
        return pa.ExtensionArray.from_storage(kind, _arrow(value, kind.storage_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1), type=kind.value_type), kind.list_size)
    if not pa.types.is_list(kind):
        return pa.array(value.reshape(-1), type=kind)
    rows, length = value.shape[:2]
    offsets = pa.array(np.arange(rows + 1) * length, type=pa.int32())
    return pa.ListArray.from_arrays(offsets, _arrow(value.reshape(rows * length, *value.shape[2:]), kind.value_type))
