"""Pictures of observations as video, one file per episode, as LeRobot keeps them; read back to the bit, or within the codec's error."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from av.error import FFmpegError
from jaxtyping import Int, UInt8
from torch import Tensor

from vla_rl.data.pictures import as_rows, channels_first, room
from vla_rl.runtime.errors import UserError

Codec = Literal["lossless", "h264", "av1"]
GROUP = 2  # frames from which the others follow, as LeRobot has it: any frame is found fast


@dataclass(frozen=True)
class _Encoder:
    """An encoder of FFmpeg's: its name, format of the pixels, and options."""

    name: str
    pixels: str
    options: dict[str, str]


ENCODERS: dict[str, _Encoder] = {
    "lossless": _Encoder("libx264rgb", "rgb24", {"crf": "0", "preset": "veryfast"}),
    "h264": _Encoder("libx264", "yuv420p", {"crf": "18", "preset": "veryfast"}),
    "av1": _Encoder("libsvtav1", "yuv420p", {"crf": "30", "preset": "8"}),  # LeRobot's own choice
}


def write_video(path: Path, pictures: np.ndarray, codec: Codec, fps: float) -> None:
    """Encode pictures of either layout, (T, 3, H, W) or (T, H, W, 3) uint8 RGB.

    Raises:
        UserError: the codec wants even sides and the pictures' are not.
    """
    encoder, (height, width, _) = ENCODERS[codec], as_rows(pictures[0]).shape
    if encoder.pixels == "yuv420p" and (height % 2 or width % 2):
        raise UserError(f"codec {codec} wants pictures with even sides, got {width} x {height}; lossless takes any")
    with av.open(str(path), "w", format="mp4") as container:
        options = {**encoder.options, "g": str(GROUP)}
        stream: Any = container.add_stream(encoder.name, rate=round(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, encoder.pixels
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(as_rows(picture)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def video_info(shape: Sequence[int], codec: Codec, fps: float) -> dict[str, Any]:
    """What LeRobot's feature table says of a video."""
    height, width = shape[:2]
    names = {"lossless": "h264", "h264": "h264", "av1": "av1"}
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": names[codec],
        "video.pix_fmt": ENCODERS[codec].pixels,
        "video.is_depth_map": False,
        "video.fps": round(fps),
        "video.channels": 3,
        "has_audio": False,
    }


@dataclass(frozen=True)
class Clip:
    """Frames of a file: ``count`` of them from ``first`` on."""

    path: Path
    first: int
    count: int


class Videos:
    """The pictures of a feature over all N frames of a set, like ``Pictures``; a clip is decoded as a whole."""

    def __init__(self, key: str, shape: Sequence[int], clips: Sequence[Clip]) -> None:
        """Set up; nothing is read.

        Args:
            key: name of the feature.
            shape: of a picture, (3, H, W) or (H, W, 3).
            clips: of the episodes, in order.
        """
        self.key, self.shape, self.clips = key, tuple(shape), list(clips)
        self._first_C = np.cumsum([0] + [clip.count for clip in clips])
        self._kept: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._first_C[-1])

    def digest(self) -> str:
        """Hash of the files, and of which frames count."""
        found = hashlib.sha256()
        for clip in self.clips:
            try:
                found.update(hashlib.sha256(clip.path.read_bytes()).digest())
            except OSError as error:
                raise UserError(f"{clip.path}, with the pictures {self.key!r}, cannot be read: {error}") from error
            found.update(f"{clip.first} {clip.count}".encode())
        return found.hexdigest()

    def _read(self, number: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != number:
            self._kept = number, self._decode(self.clips[number])
        return self._kept[1]

    def _decode(self, clip: Clip) -> np.ndarray:
        frames: list[np.ndarray] = []
        try:
            with av.open(str(clip.path)) as container:
                for index, frame in enumerate(container.decode(video=0)):
                    if index >= clip.first + clip.count:
                        break
                    if index >= clip.first:
                        frames.append(frame.to_ndarray(format="rgb24"))
        except (FFmpegError, IndexError) as error:
            raise UserError(
                f"{clip.path} is no video, or is cut short: {' '.join(str(error).split())[:120]}"
            ) from error
        if len(frames) < clip.count:
            raise UserError(f"{clip.path} has {len(frames)} of the {clip.count} frames of an episode; it is cut short")
        rows = np.stack(frames)
        found = rows.transpose(0, 3, 1, 2) if channels_first(self.shape) else rows
        if found.shape[1:] != self.shape:
            raise UserError(f"{clip.path} has pictures of shape {found.shape[1:]}, wanted is {self.shape}")
        return found

    def __getitem__(self, frame_B: slice | Int[Tensor, "*B"]) -> UInt8[Tensor, "*B h w c"]:
        """Decode frames, given as a slice or as numbers of any shape."""
        index = torch.arange(len(self))[frame_B] if isinstance(frame_B, slice) else frame_B
        flat = index.flatten().numpy()
        made = np.empty((len(flat), *self.shape), np.uint8)
        clip_B = np.searchsorted(self._first_C, flat, side="right") - 1
        for number in np.unique(clip_B).tolist():
            rows = np.flatnonzero(clip_B == number)
            made[rows] = self._read(number)[flat[rows] - self._first_C[number]]
        return torch.from_numpy(made).reshape(*index.shape, *self.shape)

    def decoded(self) -> UInt8[Tensor, "N h w c"]:
        """All of them, decoded once; see ``Pictures.decoded``."""
        made = room((len(self), *self.shape))
        for number, clip in enumerate(self.clips):
            first = int(self._first_C[number])
            made[first : first + clip.count] = self._decode(clip)
        return torch.from_numpy(made)

    @classmethod
    def joined(cls, parts: Sequence[Videos]) -> Videos:
        """Those of several sets, one after the other."""
        return cls(parts[0].key, parts[0].shape, [clip for part in parts for clip in part.clips])
