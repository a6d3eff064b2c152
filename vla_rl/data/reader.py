"""Read a LeRobotDataset v3 once into tensors; everything after that is slicing.

LeRobot's DataLoader gives about 130 samples/s for state chunks (design.md) since it goes through Arrow row by row. A set
of states fits in memory many times over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vla_rl.data import schema
from vla_rl.data.episode import Episode
from vla_rl.data.pictures import Pictures, decode_png, require_sight
from vla_rl.data.videos import Clip, Videos
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_text
from vla_rl.types import ACTION, IMAGE_PREFIX, ActionSpec, FeatureSpec, ObservationSpec

OBSERVATION_PREFIX = "observation."
PROVENANCE_PREFIX = "provenance/"


@dataclass(frozen=True)
class EpisodeData:
    """All frames of one or more data sets, in order.

    columns: by feature name, (N, ...) tensors over all N frames
    episode_from_E, episode_to_E: first frame of each episode, and one past its last
    episodes: one row per episode (length, success, provenance/..., final/...)
    tasks: instruction of each task_index
    digest: hash of the sets' contents
    pictures: by feature name, those features that stay on disk as PNG or video until they are asked for; they are in no column
    """

    columns: dict[str, Tensor]
    episode_from_E: Tensor
    episode_to_E: Tensor
    episodes: pd.DataFrame
    tasks: tuple[str, ...]
    action_spec: ActionSpec
    observation_spec: ObservationSpec
    task: str
    digest: str
    pictures: Mapping[str, Pictures | Videos] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        """Frames N."""
        return len(self.columns[ACTION])

    @property
    def num_episodes(self) -> int:
        """Episodes E."""
        return len(self.episode_from_E)

    def seen(self, keys: Collection[str]) -> EpisodeData:
        """These data with some of their observations only, the pictures among them decoded: what a policy that reads them learns from.

        Raises:
            UserError: a picture cannot be read, or a camera showed nothing: all its pictures are of one colour, or the same.
        """
        spec = {k: f for k, f in self.observation_spec.items() if k in keys}
        decoded = {k: pictures.decoded() for k, pictures in self.pictures.items() if k in spec}
        for key, frames_N in decoded.items():
            require_sight(key, frames_N, self.episode_from_E, self.episode_to_E)
        left = {k: p for k, p in self.pictures.items() if k not in decoded}
        return replace(self, columns={**self.columns, **decoded}, observation_spec=spec, pictures=left)

    def episode(self, index: int) -> Episode:
        """One episode as it was recorded; raises UserError where the data lack what an episode has."""
        row, rows = self.episodes.iloc[index], slice(int(self.episode_from_E[index]), int(self.episode_to_E[index]))
        finals = [schema.FINAL_PREFIX + k for k in self.observation_spec]
        wanted = [schema.REWARD, schema.SUCCESS, "terminated", "truncated", *finals]
        missing = [k for k in wanted if k not in self.columns and (k not in row or _is_missing(row[k]))]
        if missing:
            raise UserError(f"an episode of these data lacks {missing[0]!r}; data sets of 'vla-rl collect' have it")
        action_TA = self.columns[ACTION][rows].numpy()
        return Episode(
            {
                k: np.concatenate([self.rows(k, rows).numpy(), self.final(k, slice(index, index + 1))])
                for k in self.observation_spec
            },
            action_TA,
            self.columns.get(schema.INTENDED_ACTION, self.columns[ACTION])[rows].numpy(),
            self.columns[schema.REWARD][rows].float().flatten().numpy(),
            self.columns[schema.SUCCESS][rows].bool().flatten().numpy(),
            bool(row["terminated"]),
            bool(row["truncated"]),
            self.tasks[int(self.columns["task_index"][rows][0])],
            {
                k.removeprefix(PROVENANCE_PREFIX): row[k]
                for k in self.episodes.columns
                if k.startswith(PROVENANCE_PREFIX) and not _is_missing(row[k])
            },
            self.columns[schema.INTERVENED][rows].flatten().numpy() if schema.INTERVENED in self.columns else None,
        )

    def instructions(self, frame_B: Tensor) -> tuple[str, ...]:
        """What was to be done in each of some frames."""
        return tuple(self.tasks[i] for i in self.columns["task_index"][frame_B].tolist())

    def rows(self, key: str, frame_B: slice | Tensor) -> Tensor:
        """Frames of a column, or of pictures, which are decoded: (*B, ...)."""
        return self.pictures[key][frame_B] if key in self.pictures else self.columns[key][frame_B]

    def final(self, key: str, episodes: slice = slice(None)) -> np.ndarray:
        """True final observation of some episodes, which have one: (E, ...) float32, or uint8 where the frames are."""
        values = self.episodes[schema.FINAL_PREFIX + key].iloc[episodes].to_list()
        shape = self.observation_spec[key].shape
        if isinstance(values[0], bytes):
            return np.stack([decode_png(raw, shape, f"{schema.FINAL_PREFIX}{key}") for raw in values])
        kind = np.uint8 if self.columns[key].dtype == torch.uint8 else np.float32
        return np.stack([_dense(value).astype(kind).reshape(shape) for value in values])

    def frame_episode(self) -> Tensor:
        """Episode number of each frame: (N,)."""
        lengths_E = self.episode_to_E - self.episode_from_E
        return torch.repeat_interleave(torch.arange(self.num_episodes), lengths_E)


def _dense(value: Any) -> np.ndarray:
    """Lists of lists, which pandas gives as arrays of arrays, as one array."""
    array = np.asarray(value)
    return np.stack([_dense(row) for row in array]) if array.dtype == object else array


def _is_missing(value: Any) -> bool:
    return np.ndim(value) == 0 and bool(pd.isna(value))


def load_dataset(root: Path) -> EpisodeData:
    """Load one set.

    Raises:
        UserError: it is of another version, lacks a column, has ragged episodes or numbers that are not finite.
    """
    info = schema.read_info(root)
    total_frames, total_episodes = int(info["total_frames"]), int(info["total_episodes"])
    if total_episodes == 0:
        raise UserError(f"{root} has no episodes")
    hidden = [k for k, v in info["features"].items() if v["dtype"] in (schema.IMAGE, schema.VIDEO)]
    table = _read_tables(root, "data", hidden)
    wanted = [k for k in info["features"] if info["features"][k]["dtype"] not in ("video", "image", "string")]
    missing = [k for k in (ACTION, "episode_index", "index", *wanted) if k not in table.column_names]
    if missing:
        raise UserError(f"{root} lacks the column {missing[0]!r}; it has {table.column_names}")
    columns = {k: _to_tensor(table.column(k), root, k)[:total_frames] for k in wanted}
    if len(columns[ACTION]) < total_frames:
        raise UserError(
            f"{root} has {len(columns[ACTION])} frames where its info.json says {total_frames}; a data file is missing"
        )
    for key, value in columns.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            frame = int(torch.nonzero(~torch.isfinite(value))[0][0])
            episode = int(columns["episode_index"][frame])
            raise UserError(
                f"{root}: {key!r} is not finite at frame {frame} (episode {episode}); remove that episode or mend the data"
            )
    rows = _read_tables(root, "meta/episodes").to_pandas()
    for key in ("episode_index", "dataset_from_index", "dataset_to_index", "length"):
        if key not in rows:
            raise UserError(f"{root} is damaged: its episode table lacks {key!r}")
    episodes = rows.sort_values("episode_index").head(total_episodes)
    if len(episodes) < total_episodes:
        raise UserError(f"{root} is damaged: {len(episodes)} rows of episodes where info.json says {total_episodes}")
    if not (root / schema.TASKS_PATH).exists():
        raise UserError(f"{root} is damaged: {schema.TASKS_PATH} is missing")
    episodes = episodes[[c for c in episodes.columns if not c.startswith("stats/")]].reset_index(drop=True)
    start_E = torch.tensor(episodes["dataset_from_index"].to_numpy(), dtype=torch.long)
    stop_E = torch.tensor(episodes["dataset_to_index"].to_numpy(), dtype=torch.long)
    _check_episodes(root, columns["episode_index"], start_E, stop_E, total_frames)
    tasks = tuple(str(t) for t in pd.read_parquet(root / schema.TASKS_PATH).sort_values("task_index").index)
    extra = _read_extra(root, info, columns, tasks)
    shapes = {key: feature.shape for key, feature in extra.observation_spec.items()}
    shapes |= dict.fromkeys((ACTION, schema.INTENDED_ACTION), (extra.action_spec.dim,))
    for key in shapes.keys() & columns.keys():  # LeRobot keeps lists of one as numbers
        columns[key] = columns[key].reshape(-1, *shapes[key])
    pictures = _find_pictures(root, info, hidden, extra.observation_spec, episodes)
    hashes = {k: sha256_text(str(v.numpy().tobytes())) for k, v in columns.items()}
    hashes |= {k: v.digest() for k, v in pictures.items()}
    hashed = sha256_text("".join(f"{k} {digest}" for k, digest in sorted(hashes.items())))
    return EpisodeData(
        columns,
        start_E,
        stop_E,
        episodes,
        tasks,
        extra.action_spec,
        extra.observation_spec,
        extra.task,
        hashed,
        pictures,
    )


def _find_pictures(
    root: Path, info: dict[str, Any], hidden: list[str], observation_spec: ObservationSpec, episodes: pd.DataFrame
) -> dict[str, Pictures | Videos]:
    """Pictures among the observations: PNG in the data files, or videos beside them."""
    wanted = [k for k in hidden if k in observation_spec]
    files, left = [], int(info["total_frames"])
    for path in _data_files(root, "data") if wanted else ():
        count = min(pq.read_metadata(path).num_rows, left)
        files.append((path, count))
        left -= count
    found: dict[str, Pictures | Videos] = {}
    for key in wanted:
        shape = observation_spec[key].shape
        if info["features"][key]["dtype"] == schema.IMAGE:
            found[key] = Pictures(key, shape, files)
        else:
            found[key] = Videos(key, shape, _clips(root, info, key, episodes))
    return found


def _clips(root: Path, info: dict[str, Any], key: str, episodes: pd.DataFrame) -> list[Clip]:
    """Where the frames of each episode are; several may share a file."""
    names = [f"videos/{key}/{n}" for n in ("chunk_index", "file_index", "from_timestamp")]
    missing = [n for n in names if n not in episodes]
    if missing or not info.get("video_path"):
        raise UserError(f"{root} is damaged: its episode table lacks {(missing or ['video_path'])[0]!r}")
    clips = []
    for chunk, file, start_s, length in episodes[[*names, "length"]].itertuples(index=False):
        path = root / info["video_path"].format(video_key=key, chunk_index=int(chunk), file_index=int(file))
        clips.append(Clip(path, round(float(start_s) * float(info["fps"])), int(length)))
    return clips


def _joined(parts: Sequence[Pictures | Videos]) -> Pictures | Videos:
    """Pictures of several sets, one after the other; raises UserError where one has PNG and another video."""
    pictures, videos = ([p for p in parts if isinstance(p, kind)] for kind in (Pictures, Videos))
    if pictures and videos:
        raise UserError(f"some of the sets have {parts[0].key!r} as PNG and some as video; convert one of them")
    return Videos.joined(videos) if videos else Pictures.joined(pictures)  # type: ignore[arg-type]


def _sides(feature: Mapping[str, Any]) -> tuple[int, int, int]:
    """Height, width and channels of a picture, whichever order LeRobot's table has them in."""
    shape = [int(n) for n in feature["shape"]]
    first = "channel" in str((feature.get("names") or ["height"])[0])
    return (shape[1], shape[2], shape[0]) if first else (shape[0], shape[1], shape[2])


def _data_files(root: Path, kind: str) -> list[Path]:
    paths = sorted((root / kind).glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{root} has no parquet files in {kind}/")
    return paths


def _read_tables(root: Path, kind: str, left_out: Sequence[str] = ()) -> pa.Table:
    tables = []
    for path in _data_files(root, kind):
        try:
            file = pq.ParquetFile(path)
            tables.append(file.read([name for name in file.schema_arrow.names if name not in left_out]))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path} is no parquet file, or is cut short: {' '.join(str(error).split())[:120]}"
            ) from error
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise UserError(
            f"files of {root / kind} disagree in their columns: {' '.join(str(error).split())[:160]}"
        ) from error


def _to_tensor(column: pa.ChunkedArray, root: Path, key: str) -> Tensor:
    array = column.combine_chunks()
    if isinstance(array.type, pa.ExtensionType):  # of Hugging Face's arrays, where its library is loaded
        array = array.storage
    if array.null_count:
        raise UserError(f"{root}: column {key!r} has missing values")
    length = len(array)
    shape: list[int] = [length]
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
        rows = len(array)
        if not pa.types.is_fixed_size_list(array.type) and rows:
            sizes = np.unique(np.diff(array.offsets.to_numpy()))
            if len(sizes) != 1:
                raise UserError(f"{root}: column {key!r} is ragged, its rows have {sizes.tolist()} entries")
        array = array.flatten()
        shape.append(len(array) // max(rows, 1))
    return torch.from_numpy(np.array(array.to_numpy(zero_copy_only=False))).reshape(shape)


def _check_episodes(root: Path, episode_N: Tensor, start_E: Tensor, stop_E: Tensor, total: int) -> None:
    expected = torch.cat([torch.zeros(1, dtype=torch.long), stop_E[:-1]])
    if not torch.equal(start_E, expected) or int(stop_E[-1]) != total or not bool((stop_E > start_E).all()):
        raise UserError(f"{root}: the episode table does not tile the {total} frames; the set is damaged")
    counted = torch.bincount(episode_N.long(), minlength=len(start_E))[: len(start_E)]
    ragged = torch.nonzero(counted != stop_E - start_E)
    if len(ragged):
        episode = int(ragged[0])
        there, said = int(counted[episode]), int(stop_E[episode] - start_E[episode])
        raise UserError(f"{root}: ragged episode {episode}, {there} frames where its table says {said}")


def _read_extra(root: Path, info: dict[str, Any], columns: dict[str, Tensor], tasks: tuple[str, ...]) -> schema.Extra:
    """Read ``meta/vla_rl.json``; for a set that LeRobot recorded, take names and rate from its table and limits from its data."""
    if (root / schema.EXTRA_PATH).exists():
        return schema.read_extra(root)
    action_NA = columns[ACTION].reshape(len(columns[ACTION]), -1)
    dim = action_NA.shape[1]
    names = info["features"][ACTION].get("names")
    flat = [n for group in names.values() for n in group] if isinstance(names, dict) else list(names or [])
    margin_A = (action_NA.amax(0) - action_NA.amin(0)).clamp_min(1e-6) * 1e-3
    spec = ActionSpec(
        names=tuple(flat) if len(flat) == dim else tuple(f"action_{i}" for i in range(dim)),
        units=("1",) * dim,
        low=tuple((action_NA.amin(0) - margin_A).tolist()),
        high=tuple((action_NA.amax(0) + margin_A).tolist()),
        mode="absolute",
        control_hz=float(info["fps"]),
    )
    observations = {k: FeatureSpec(tuple(v.shape[1:])) for k, v in columns.items() if k.startswith(OBSERVATION_PREFIX)}
    for key, feature in info["features"].items():  # pictures, channels first as policies see them
        if key.startswith(IMAGE_PREFIX) and feature["dtype"] in (schema.IMAGE, schema.VIDEO):
            height, width, channels = _sides(feature)
            observations[key] = FeatureSpec((channels, height, width))
    return schema.Extra(spec, observations, tasks[0] if tasks else "", {"source": "lerobot"})


def load_datasets(roots: Sequence[Path]) -> EpisodeData:
    """Load several sets as one, in the order given.

    Raises:
        UserError: a set cannot be read, or two differ in their action spec or observations.
    """
    if not roots:
        raise UserError("no data set was given")
    parts = [load_dataset(root) for root in roots]
    first = parts[0]
    for root, part in zip(roots[1:], parts[1:], strict=True):
        first.action_spec.require_equal(part.action_spec, mine=str(roots[0]), theirs=str(root))
        if first.observation_spec != part.observation_spec:
            raise UserError(
                f"{roots[0]} and {root} differ in their observations: {first.observation_spec} and {part.observation_spec}"
            )
    if len(parts) == 1:
        return first
    if any(schema.INTERVENED in p.columns for p in parts):  # nobody took over where nobody watched
        for part in parts:
            part.columns.setdefault(schema.INTERVENED, torch.zeros(part.num_frames, dtype=torch.bool))
    shared = set.intersection(*(set(p.columns) for p in parts))
    tasks = tuple(dict.fromkeys(t for p in parts for t in p.tasks))
    frames = np.cumsum([0] + [p.num_frames for p in parts])
    counts = np.cumsum([0] + [p.num_episodes for p in parts])
    columns = {k: torch.cat([p.columns[k] for p in parts]) for k in shared}
    columns["index"] = torch.arange(int(frames[-1]))
    columns["episode_index"] = torch.cat(
        [p.columns["episode_index"] + int(n) for p, n in zip(parts, counts[:-1], strict=True)]
    )
    columns["task_index"] = torch.cat(
        [torch.tensor([tasks.index(t) for t in p.tasks])[p.columns["task_index"]] for p in parts]
    )
    return EpisodeData(
        columns,
        torch.cat([p.episode_from_E + int(n) for p, n in zip(parts, frames[:-1], strict=True)]),
        torch.cat([p.episode_to_E + int(n) for p, n in zip(parts, frames[:-1], strict=True)]),
        pd.concat([p.episodes for p in parts], ignore_index=True),
        tasks,
        first.action_spec,
        first.observation_spec,
        first.task,
        sha256_text("".join(p.digest for p in parts)),
        {k: _joined([p.pictures[k] for p in parts]) for k in first.pictures if all(k in p.pictures for p in parts)},
    )
