"""Pictures of observations: PNG bytes on disk, (N, 3, H, W) or (N, H, W, 3) uint8 RGB in memory, decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import disk_errors

CHANNELS = 3
COMPRESSION = 1  # of PNG, 0 to 9: above, it takes twice as long and saves 3 %
ARROW_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # of Hugging Face's Image
IN_MEMORY = 0.4  # share of the free memory that decoded pictures of a feature may take
LOOKS_PER_EPISODE = 8  # pictures by which it is judged whether a camera shows anything
PART = 256  # rows of a chunk of an arrow column, whose bytes are counted in 32 bits


def holds_pictures(value: np.ndarray) -> bool:
    """Whether an array is (N, 3, H, W) or (N, H, W, 3) uint8."""
    return value.dtype == np.uint8 and value.ndim == 4 and CHANNELS in (value.shape[1], value.shape[3])


def channels_first(shape: Sequence[int]) -> bool:
    """Whether a feature's shape is (3, H, W), as policies see pictures, and not (H, W, 3)."""
    return shape[0] == CHANNELS


def as_rows(picture: np.ndarray) -> np.ndarray:
    """A picture of either layout as (H, W, 3)."""
    return np.moveaxis(picture, 0, 2) if channels_first(picture.shape) else picture


def encode_png(picture: np.ndarray) -> bytes:
    """PNG of a picture of either layout."""
    bgr = np.ascontiguousarray(as_rows(picture)[..., ::-1])
    done, encoded = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, COMPRESSION])
    if not done:
        raise UserError(f"OpenCV could not encode a picture of shape {picture.shape}")
    return encoded.tobytes()


def decode_png(raw: bytes, shape: Sequence[int], where: str) -> np.ndarray:
    """Undo ``encode_png``: a picture of this shape; raises UserError, which says where it was, if it is none."""
    bgr = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR) if raw else None
    if bgr is None:
        raise UserError(f"{where} is no picture")
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    found = np.ascontiguousarray(np.moveaxis(rgb, 2, 0)) if channels_first(shape) else rgb
    if found.shape != tuple(shape):
        raise UserError(f"{where} has shape {found.shape}, wanted is {tuple(shape)}")
    return found


def picture_column(encoded: Sequence[bytes]) -> pa.ChunkedArray:
    """PNGs as LeRobot keeps them: structs of bytes and a name."""
    named = [{"bytes": png, "path": f"frame-{i:06d}.png"} for i, png in enumerate(encoded)]
    chunks = [pa.array(named[i : i + PART], ARROW_TYPE) for i in range(0, len(named), PART)]
    return pa.chunked_array(chunks, ARROW_TYPE)


def picture_stats(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics as LeRobot has them: of pixels in [0, 1], (3, 1, 1), of a sample of frames, coarser where they are large.

    In float32: LeRobot 0.4.4 squares bytes, which overflows, so that its deviations are too small (its pull request 3697).
    """
    from lerobot.datasets.compute_stats import auto_downsample_height_width, get_feature_stats, sample_indices

    sampled = [
        auto_downsample_height_width(np.moveaxis(as_rows(pictures[i]), 2, 0)) for i in sample_indices(len(pictures))
    ]
    stats = get_feature_stats(np.stack(sampled).astype(np.float32), axis=(0, 2, 3), keepdims=True)
    return {k: v if k == "count" else np.squeeze(v / 255, axis=0) for k, v in stats.items()}


@dataclass(frozen=True)
class _File:
    """Rows of one file: the first ``count``."""

    path: Path
    count: int

    def read(self, key: str) -> list[bytes]:
        """The encoded pictures of a column."""
        try:
            column = pq.read_table(self.path, columns=[key]).column(key)
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise UserError(f"{self.path} lacks the pictures {key!r}, or is cut short: {error}") from error
        return [b"" if row is None else row["bytes"] for row in column.slice(0, self.count).to_pylist()]


def room(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, in memory unless they take a large share of it."""
    size = int(np.prod(shape))
    if size <= IN_MEMORY * psutil.virtual_memory().available:
        return np.zeros(shape, np.uint8)
    file = tempfile.TemporaryFile(dir=os.environ.get("TMPDIR"))  # noqa: SIM115  it lives as long as the map
    with disk_errors(Path(tempfile.gettempdir())):
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(file, np.uint8, "r+", shape=shape)


class Pictures:
    """The pictures of a feature over all N frames of a set. They stay on disk, where they take less space."""

    def __init__(self, key: str, shape: Sequence[int], files: Sequence[tuple[Path, int]]) -> None:
        """Set up; nothing is read.

        Args:
            key: name of the feature.
            shape: of a picture, (3, H, W) or (H, W, 3).
            files: in order, with how many of their first rows count.
        """
        self.key, self.shape = key, tuple(shape)
        self._files = [_File(path, count) for path, count in files]
        self._first_F = np.cumsum([0] + [count for _, count in files])
        self._kept: tuple[int, list[bytes]] | None = None

    def __len__(self) -> int:
        return int(self._first_F[-1])

    def digest(self) -> str:
        """Hash of all of them as they are on disk, in order."""
        found = hashlib.sha256()
        for number in range(len(self._files)):
            for png in self._read(number):
                found.update(hashlib.sha256(png).digest())
        return found.hexdigest()

    def _read(self, number: int) -> list[bytes]:
        if self._kept is None or self._kept[0] != number:
            self._kept = number, self._files[number].read(self.key)
        return self._kept[1]

    def __getitem__(self, frame_B: slice | Int[Tensor, "*B"]) -> UInt8[Tensor, "*B h w c"]:
        """Decode frames, given as a slice or as numbers of any shape."""
        index = torch.arange(len(self))[frame_B] if isinstance(frame_B, slice) else frame_B
        flat = index.flatten().numpy()
        made = np.empty((len(flat), *self.shape), np.uint8)
        file_B = np.searchsorted(self._first_F, flat, side="right") - 1
        for number in np.unique(file_B).tolist():
            rows, path = self._read(number), self._files[number].path
            for at in np.flatnonzero(file_B == number):
                row = int(flat[at] - self._first_F[number])
                made[at] = decode_png(rows[row], self.shape, f"{self.key!r} in row {row} of {path}")
        return torch.from_numpy(made).reshape(*index.shape, *self.shape)

    def decoded(self) -> UInt8[Tensor, "N h w c"]:
        """All of them, decoded once by all cores: in memory, or in a temporary file mapped into it where they take much of it."""
        made = room((len(self), *self.shape))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV decodes without the GIL
            for number, file in enumerate(self._files):
                rows, first = self._read(number), int(self._first_F[number])

                def decode(row: int, rows: list[bytes] = rows, first: int = first, path: Path = file.path) -> None:
                    made[first + row] = decode_png(rows[row], self.shape, f"{self.key!r} in row {row} of {path}")

                for _ in pool.map(decode, range(len(rows))):
                    pass
        return torch.from_numpy(made)

    @classmethod
    def joined(cls, parts: Sequence[Pictures]) -> Pictures:
        """Those of several sets, one after the other."""
        files = [(file.path, file.count) for part in parts for file in part._files]
        return cls(parts[0].key, parts[0].shape, files)


def require_sight(
    key: str, frames_N: UInt8[Tensor, "N h w c"], from_E: Int[Tensor, " E"], to_E: Int[Tensor, " E"]
) -> None:
    """Refuse a camera that showed nothing: in an episode all its pictures are of one colour, or one and the same.

    Raises:
        UserError: which camera, and in which episode.
    """
    for episode, (first, last) in enumerate(zip(from_E.tolist(), to_E.tolist(), strict=True)):
        start = frames_N[first]
        some = torch.linspace(first, last - 1, min(last - first, LOOKS_PER_EPISODE)).long()
        if bool((frames_N[some] == frames_N[some].amax((1, 2, 3), keepdim=True)).all()):
            value = int(start.flatten()[0])
            raise UserError(
                f"{key!r} shows nothing in episode {episode}: its pictures are of one colour ({value}); pictures of a scene are expected"
            )
        if last - first >= LOOKS_PER_EPISODE and bool((frames_N[some] == start).all()):
            raise UserError(f"{key!r} is frozen in episode {episode}: its {last - first} pictures are the same")
