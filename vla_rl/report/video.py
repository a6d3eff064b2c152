"""Small H.264 files that a browser plays."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from vla_rl.runtime.files import write_atomically

CRF = "28"  # visually fine at these sizes, some 50 kB per episode
TEXT_HEIGHT_PX = 22


def caption(frame: np.ndarray, text: str) -> np.ndarray:
    """Return the frame with a line of text on a dark strip at its top."""
    marked = np.ascontiguousarray(frame.copy())
    marked[:TEXT_HEIGHT_PX] //= 3
    cv2.putText(marked, text, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return marked


def write_mp4(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Encode (height, width, 3) uint8 frames; height and width even."""

    def encode(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": CRF, "preset": "veryfast", "threads": "1"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())

    write_atomically(path, encode)
