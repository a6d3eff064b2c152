"""What a calibration is made of: a ChArUco board, its corners in images, and the poses of the tool that go with them.

The frame of a board is OpenCV's: the origin in the outer corner of the first square, x along the columns, y along the rows, z into the
board, away from who looks at it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from vla_rl.runtime.config import read_yaml
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import read_json, write_atomically

MIN_CORNERS = 6  # of a view; a homography has 8 unknowns, two to each corner, and something should be left over
WINDOWS_PX = (2, 10)  # least and largest half width of the window in which a corner is refined
CLEAR_PX = 1.0  # between that window and the nearest marker: gradients reach one pixel out
REFINE_UNTIL = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-3)
DRAWN_DPI = 600.0
METRES_PER_INCH = 0.0254
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
POSE_FILES = ("poses.json", "poses.yaml", "poses.yml")
ROTATION_TOLERANCE = 1e-3  # of R^T R - 1: what a file with four digits leaves
FARTHEST_M = 20.0  # of a tool from its base; more are millimetres
DICTIONARIES = tuple(sorted(name for name in dir(cv2.aruco) if name.startswith("DICT_")))


@dataclass(frozen=True)
class BoardConfig:
    """A ChArUco board.

    columns: squares along the longer side, say
    rows: squares along the other side
    square_m: side of a square as printed, m; measure it
    marker_m: side of a marker as printed, m
    dictionary: of the markers, as OpenCV calls it
    legacy_pattern: of OpenCV before 4.6: the first square of a board with an even number of rows is white
    """

    columns: int = 8
    rows: int = 6
    square_m: float = 0.032
    marker_m: float = 0.023
    dictionary: str = "DICT_4X4_50"
    legacy_pattern: bool = False

    def __post_init__(self) -> None:
        if self.columns < 3 or self.rows < 3:
            raise ValueError(f"a board wants at least 3 x 3 squares, got {self.columns} x {self.rows}")
        if not 0 < self.marker_m < self.square_m <= 1.0:
            raise ValueError(f"wanted 0 < marker_m < square_m <= 1, in metres, got {self.marker_m} and {self.square_m}")
        if self.dictionary not in DICTIONARIES:
            raise ValueError(f"no dictionary {self.dictionary!r}; there are {', '.join(DICTIONARIES)}")
        has, wants = len(_dictionary(self.dictionary).bytesList), self.columns * self.rows // 2
        if wants > has:
            raise ValueError(f"{self.columns} x {self.rows} squares want {wants} markers, {self.dictionary} has {has}")

    @property
    def corners_m(self) -> np.ndarray:
        """Inner corners, row by row, in the frame of the board: ((columns - 1) (rows - 1), 3)."""
        return np.asarray(_detector(self).getBoard().getChessboardCorners(), np.float64)


@dataclass(frozen=True, eq=False)
class View:
    """What an image shows of the board.

    name: of the image
    size: its width and height, pixels
    ids_N: which corners are seen
    pixels_N2: where; whole numbers are the centres of pixels
    problem: why it cannot be used; empty if it can
    """

    name: str
    size: tuple[int, int]
    ids_N: np.ndarray
    pixels_N2: np.ndarray
    problem: str = ""


def _dictionary(name: str) -> cv2.aruco.Dictionary:
    return cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, name))


@functools.lru_cache(maxsize=8)
def _detector(board: BoardConfig) -> cv2.aruco.CharucoDetector:
    made = cv2.aruco.CharucoBoard(
        (board.columns, board.rows), board.square_m, board.marker_m, _dictionary(board.dictionary)
    )
    made.setLegacyPattern(board.legacy_pattern)
    return cv2.aruco.CharucoDetector(made)


def board_image(board: BoardConfig, square_px: int) -> np.ndarray:
    """Draw the squares of a board, without a margin: (rows square_px, columns square_px) uint8."""
    size = (board.columns * square_px, board.rows * square_px)
    return _detector(board).getBoard().generateImage(size, None, 0, 1)


def draw_board(board: BoardConfig, path: Path) -> None:
    """Write a board as a PNG that prints at its true size (it carries its resolution), with a white margin of a quarter of a square."""
    if path.suffix.lower() != ".png":
        raise UserError(f"a board is drawn as a .png, got {path}")
    square_px = max(1, round(board.square_m / METRES_PER_INCH * DRAWN_DPI))
    image = np.pad(board_image(board, square_px), square_px // 4, constant_values=255)
    dpi = square_px / board.square_m * METRES_PER_INCH
    write_atomically(path, lambda p: Image.fromarray(image).save(p, format="PNG", dpi=(dpi, dpi)))


def detect(image: np.ndarray, board: BoardConfig, name: str = "image") -> View:
    """Find the corners of a board in an image: (height, width) or (height, width, 3) RGB, uint8."""
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    size = (grey.shape[1], grey.shape[0])
    corners, ids, _, _ = _detector(board).detectBoard(grey)
    if ids is None or not len(ids):
        return View(name, size, np.zeros(0, np.int64), np.zeros((0, 2)), "the board is not seen")
    ids_N, pixels_N2 = ids.ravel().astype(np.int64), corners.reshape(-1, 2).astype(np.float64)
    if len(ids_N) < MIN_CORNERS:
        return View(name, size, ids_N, pixels_N2, f"{len(ids_N)} corners are seen, at least {MIN_CORNERS} wanted")
    if _detector(board).getBoard().checkCharucoCornersCollinear(ids.astype(np.int32)):
        return View(name, size, ids_N, pixels_N2, "all corners that are seen lie on one line")
    return View(name, size, ids_N, _refined(grey, ids_N, pixels_N2, board))


def _refined(grey: np.ndarray, ids_N: np.ndarray, pixels_N2: np.ndarray, board: BoardConfig) -> np.ndarray:
    """Corners to a fraction of a pixel, each in the largest window that no marker reaches into.

    CharucoDetector of OpenCV 4.7 to 4.12 adds half a pixel to what its own refinement finds (opencv issue 25539), which moves the principal
    point by as much. Refining once more, in the coordinates of the image, is right with any version.
    """
    flat_N2 = board.corners_m[ids_N, :2]
    homography, _ = cv2.findHomography(flat_N2, pixels_N2)
    if homography is None:
        return pixels_N2
    gap_m = 0.5 * (board.square_m - board.marker_m)
    near_4N2 = np.stack([flat_N2 + gap_m * np.array(to) for to in itertools.product((-1, 1), repeat=2)])
    both_5N2 = cv2.perspectiveTransform(np.concatenate([near_4N2, flat_N2[None]]).reshape(1, -1, 2), homography)
    both_5N2 = both_5N2.reshape(5, -1, 2)
    room_N = np.abs(both_5N2[:4] - both_5N2[4]).max(axis=2).min(axis=0)
    refined_N2 = pixels_N2.astype(np.float32)
    for i, room in enumerate(np.clip(room_N - CLEAR_PX, *WINDOWS_PX).astype(int)):
        window = (int(room), int(room))
        refined_N2[i] = cv2.cornerSubPix(grey, refined_N2[i].reshape(1, 1, 2), window, (-1, -1), REFINE_UNTIL).ravel()
    return refined_N2.astype(np.float64)


def detect_folder(folder: Path, board: BoardConfig) -> list[View]:
    """Find the corners in every image of a folder, in the order of their names.

    Raises:
        UserError: there is no folder or no image in it, one cannot be read, or they are of different sizes.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}")
    views: list[View] = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
        # a picture must stay as the sensor delivered it, whatever a tag says of how it was held
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise UserError(f"{path} is not an image that can be read")
        views.append(detect(image, board, path.name))
    if not views:
        raise UserError(f"no image in {folder}; wanted are {', '.join(IMAGE_SUFFIXES)}")
    common_size(views)
    return views


def common_size(views: Sequence[View]) -> tuple[int, int]:
    """Width and height of all images, pixels; raises UserError if they differ."""
    for view in views[1:]:
        if view.size != views[0].size:
            one, other = (f"{v.name} of {v.size[0]} x {v.size[1]}" for v in (views[0], view))
            raise UserError(f"images of one calibration want one size, got {one} and {other} pixels")
    return views[0].size


def usable(views: Iterable[View], at_least: int) -> list[View]:
    """Those views that can be used; raises UserError if there are too few, and says why the others cannot."""
    views = list(views)
    good = [view for view in views if not view.problem]
    if len(good) < at_least:
        reasons: dict[str, int] = {}
        for view in views:
            if view.problem:
                reasons[view.problem] = reasons.get(view.problem, 0) + 1
        why = "".join(f"; {count} x {reason}" for reason, count in reasons.items())
        raise UserError(
            f"wanted are at least {at_least} images that show the board, got {len(good)} of {len(views)}{why}"
        )
    return good


def checked_pose(raw: Any, name: str) -> np.ndarray:
    """A pose (4, 4), m, with its rotation made exact.

    Raises:
        UserError: it is no (4, 4) of finite numbers, no rotation, or not in metres.
    """
    try:
        pose = np.array(raw, np.float64)
    except (TypeError, ValueError):
        pose = np.zeros(0)
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise UserError(f"pose of {name}: wanted 4 x 4 finite numbers, got {' '.join(str(raw).split())[:80]}")
    rotation, last = pose[:3, :3], pose[3]
    off = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
    determinant = float(np.linalg.det(rotation))
    if off > ROTATION_TOLERANCE or determinant < 0:
        raise UserError(
            f"pose of {name}: its upper left 3 x 3 is no rotation (R^T R is off by {off:.3g}, the determinant is {determinant:.3g}; "
            f"allowed are {ROTATION_TOLERANCE} and 1)"
        )
    if np.abs(last - (0, 0, 0, 1)).max() > ROTATION_TOLERANCE:
        raise UserError(f"pose of {name}: wanted 0 0 0 1 in the last row, got {' '.join(f'{x:g}' for x in last)}")
    far_m = float(np.linalg.norm(pose[:3, 3]))
    if far_m > FARTHEST_M:
        raise UserError(
            f"pose of {name}: it lies {far_m:g} m away, allowed are {FARTHEST_M:g}; wanted are metres, not millimetres"
        )
    left, _, right = np.linalg.svd(rotation)
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = left @ right, pose[:3, 3]
    return exact


def read_poses(folder: Path) -> dict[str, np.ndarray]:
    """Read T_base_tool of each image from ``poses.json`` or ``poses.yaml``: a mapping of image names to 4 x 4 matrices, m.

    Raises:
        UserError: there is none, or more than one; or a pose is none.
    """
    there = [folder / name for name in POSE_FILES if (folder / name).is_file()]
    if len(there) != 1:
        got = " and ".join(p.name for p in there) or "none"
        raise UserError(f"{folder} wants the poses of the tool in one of {', '.join(POSE_FILES)}, got {got}")
    raw = read_json(there[0]) if there[0].suffix == ".json" else read_yaml(there[0])
    if not isinstance(raw, Mapping):
        raise UserError(f"{there[0]} wants a mapping of image names to 4 x 4 matrices, got {type(raw).__name__}")
    return {str(name): checked_pose(pose, f"{name} in {there[0].name}") for name, pose in raw.items()}


def inverse(T: np.ndarray) -> np.ndarray:
    """Inverse of poses (..., 4, 4)."""
    rotation = np.swapaxes(T[..., :3, :3], -1, -2)
    out = np.zeros_like(T)
    out[..., :3, :3] = rotation
    out[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation, T[..., :3, 3])
    out[..., 3, 3] = 1.0
    return out


def pose_of(rotation_33: np.ndarray, translation_m_3: np.ndarray) -> np.ndarray:
    """A pose (4, 4) of a rotation and a translation, m."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = rotation_33, np.ravel(translation_m_3)
    return T


def angle_deg(rotation_a_33: np.ndarray, rotation_b_33: np.ndarray) -> float:
    """Angle of the rotation that leads from one to the other, degrees: the only difference of rotations there is."""
    relative = rotation_a_33.T @ rotation_b_33
    sine_3 = 0.5 * np.array(
        [relative[2, 1] - relative[1, 2], relative[0, 2] - relative[2, 0], relative[1, 0] - relative[0, 1]]
    )
    return math.degrees(math.atan2(float(np.linalg.norm(sine_3)), 0.5 * (float(np.trace(relative)) - 1.0)))
