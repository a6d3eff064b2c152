"""Calibration of a camera: what a pixel means (intrinsics), and where the camera is on the tool or by the robot (hand-eye).

Hand-eye, in one line for both ways a camera can be mounted: T_camera_board = (M X)^-1 Y, where M is T_base_tool and X is T_tool_camera of a
camera on the tool that looks at a board which stands (Y is T_base_board), or M is T_tool_base and X is T_base_camera of a camera that
stands and looks at a board on the tool (Y is T_tool_board). Closed forms give X from the poses of the board alone; from the best of them,
X and Y are refined together on what was measured, the corners (Tabb and Ahmad Yousef, arXiv 1907.12425: reprojection error).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from real_robot.boards import BoardConfig, View, angle_deg, checked_pose, common_size, inverse, pose_of, usable
from real_robot.cameras import MOUNTS, CameraModel, Mode
from vla_rl.runtime.errors import UserError

Distortion = Literal["none", "k1k2p1p2", "k1k2p1p2k3"]
_FIX_K3 = cv2.CALIB_FIX_K3
_FLAGS = {
    "none": cv2.CALIB_ZERO_TANGENT_DIST | cv2.CALIB_FIX_K1 | cv2.CALIB_FIX_K2 | _FIX_K3,
    "k1k2p1p2": _FIX_K3,
    "k1k2p1p2k3": 0,
}
METHODS = {
    "tsai": cv2.CALIB_HAND_EYE_TSAI,
    "park": cv2.CALIB_HAND_EYE_PARK,
    "horaud": cv2.CALIB_HAND_EYE_HORAUD,
    "daniilidis": cv2.CALIB_HAND_EYE_DANIILIDIS,
}
MIN_VIEWS = 6
MIN_TILT_DEG = (
    10.0  # between two views of a board: parallel ones do not tell the focal length from the distance (Zhang, 2000)
)
MAX_FOCAL_STD = 0.02  # of the focal length, as a share of it
MIN_ROTATION_DEG = (
    5.0  # rms between views, about each of two axes: about one alone, the place along it is free (Tsai and Lenz, 1989)
)
MAX_ERROR_PX = 3.0  # rms; more means that images, poses and board do not belong together
# a view is left out if its error is so many times the median and so many pixels
OUTLIER_FACTOR, OUTLIER_PX = 4.0, 1.0
NEAR_M = 1e-3  # points nearer to the camera, or behind it, are taken to be here while a fit is on its way
COVERAGE_GRID = (8, 6)  # columns and rows of cells in which corners are looked for


@dataclass(frozen=True, eq=False)
class ViewError:
    """How far a view is from the result.

    name: of the image
    corners: that it shows
    error_px: rms distance of what was seen from what was predicted
    error_m: distance of the board's pose from the predicted one, m (hand-eye only)
    error_deg: angle between their orientations (hand-eye only)
    """

    name: str
    corners: int
    error_px: float
    error_m: float = 0.0
    error_deg: float = 0.0


@dataclass(frozen=True, eq=False)
class Intrinsics:
    """A model of a camera and how good it is.

    model: matrix and distortion
    rms_px: reprojection error of all corners
    views: that were used
    rejected: those that were not, and why
    coverage: share of the image's cells (8 x 6) with a corner in some view; the distortion elsewhere is a guess
    std_px: standard deviations of the focal length and of the centre's x and y, from the corners' scatter
    """

    model: CameraModel
    rms_px: float
    views: tuple[ViewError, ...]
    rejected: dict[str, str]
    coverage: float
    std_px: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class HandEye:
    """Where a camera is, and how sure that is.

    mode: eye_in_hand or eye_to_hand
    T_mount_camera: T_tool_camera or T_base_camera
    T_other_board: T_base_board or T_tool_board
    rms_px: reprojection error of all corners
    rms_m: of the board's poses in the views against the predicted ones, m
    rms_deg: the same of their orientations
    std_m: standard deviation of the camera's place, m: how much it moves as views are left out (jackknife) and the model is varied
    std_deg: the same of its orientation
    rotation_deg: how far the tool turned between views, rms about the two most used axes
    methods: reprojection error of each closed form before refinement, px
    views: that were used
    rejected: those that were not, and why
    """

    mode: str
    T_mount_camera: np.ndarray
    T_other_board: np.ndarray
    rms_px: float
    rms_m: float
    rms_deg: float
    std_m: float
    std_deg: float
    rotation_deg: tuple[float, float]
    methods: dict[str, float]
    views: tuple[ViewError, ...]
    rejected: dict[str, str]


def calibrate_intrinsics(
    views: Sequence[View], board: BoardConfig, distortion: Distortion = "k1k2p1p2", max_error_px: float = MAX_ERROR_PX
) -> Intrinsics:
    """Find matrix and distortion of a camera from views of a board; views that fit badly are left out, and said.

    Raises:
        UserError: too few views, images of different sizes, a board never tilted, or an error above ``max_error_px``.
    """
    good = usable(views, MIN_VIEWS)
    width, height = common_size(views)
    rejected = {view.name: view.problem for view in views if view.problem}
    corner_N3 = board.corners_m.astype(np.float32)
    while True:
        try:
            _, matrix, distorted, rvecs, _, std, _, error_V = cv2.calibrateCameraExtended(
                [corner_N3[v.ids_N] for v in good],
                [v.pixels_N2.astype(np.float32).reshape(-1, 1, 2) for v in good],
                (width, height),
                None,  # type: ignore[call-overload]
                None,
                flags=_FLAGS[distortion],
            )
        except cv2.error as error:
            raise UserError(
                f"no camera fits these views ({error.err}); wanted are tilted views of the board"
            ) from error
        error_V = error_V.ravel()
        bad = _outliers(good, error_V, "intrinsics")
        if not bad or len(good) - len(bad) < MIN_VIEWS:
            break
        rejected |= bad
        good = [view for view in good if view.name not in bad]
    corners_V = np.array([len(v.ids_N) for v in good])
    rms_px = _rms(error_V, corners_V)
    normal_V3 = np.array([cv2.Rodrigues(rvec)[0][:, 2] for rvec in rvecs])
    tilt_deg = float(np.degrees(np.arccos(np.clip(normal_V3 @ normal_V3.T, -1, 1))).max())
    if tilt_deg < MIN_TILT_DEG:
        raise UserError(
            f"the board is tilted by {tilt_deg:.1f} degrees at most between views, wanted are {MIN_TILT_DEG:g} at least: "
            "parallel views do not tell the focal length from the distance"
        )
    _check_error(rms_px, max_error_px, "the size and dictionary of --board, and that it is flat")
    share = float(max(std[0, 0] / matrix[0, 0], std[1, 0] / matrix[1, 1]))
    if not share <= MAX_FOCAL_STD:
        raise UserError(
            f"these views leave the focal length uncertain by {100 * share:.1f} %, allowed are {100 * MAX_FOCAL_STD:g}; "
            "take more views, tilted further, that fill the image"
        )
    model = CameraModel(width, height, matrix, np.ravel(distorted)[:5])
    seen = [ViewError(v.name, n, float(e)) for v, n, e in zip(good, corners_V.tolist(), error_V, strict=True)]
    std_px = (float(std[:2, 0].mean()), float(std[2, 0]), float(std[3, 0]))
    return Intrinsics(model, rms_px, tuple(seen), rejected, _coverage(good), std_px)


def _outliers(views: Sequence[View], error_V: np.ndarray, of: str) -> dict[str, str]:
    limit_px = max(OUTLIER_PX, OUTLIER_FACTOR * float(np.median(error_V)))
    return {
        view.name: f"its error of {error:.2f} px in the {of} is above {limit_px:.2f}"
        for view, error in zip(views, error_V, strict=True)
        if error > limit_px
    }


def _rms(error_V: np.ndarray, weight_V: np.ndarray | None = None) -> float:
    return float(np.sqrt(np.average(np.square(error_V), weights=weight_V)))


def _check_error(rms_px: float, max_error_px: float, what: str) -> None:
    if not rms_px <= max_error_px:
        raise UserError(f"the reprojection error is {rms_px:.2f} px, allowed are {max_error_px:g}: check {what}")


def _coverage(views: Sequence[View]) -> float:
    size = np.array(views[0].size)
    pixels_N2 = np.concatenate([v.pixels_N2 for v in views])
    cell_N2 = np.clip((pixels_N2 + 0.5) / size * COVERAGE_GRID, 0, np.array(COVERAGE_GRID) - 1).astype(int)
    return len(np.unique(cell_N2, axis=0)) / float(np.prod(COVERAGE_GRID))


def board_pose(view: View, board: BoardConfig, model: CameraModel) -> np.ndarray:
    """T_camera_board (4, 4) of one view; of the two poses that a plane may have, the one that fits better."""
    corners_N3, pixels_N12 = board.corners_m[view.ids_N], view.pixels_N2.reshape(-1, 1, 2)
    camera = (model.matrix_33, model.distortion_5)
    found = cv2.solvePnPGeneric(corners_N3, pixels_N12, *camera, flags=cv2.SOLVEPNP_IPPE)
    rvec, tvec = cv2.solvePnPRefineLM(corners_N3, pixels_N12, *camera, found[1][0], found[2][0])
    return pose_of(cv2.Rodrigues(rvec)[0], tvec)


def rotation_spread(T_base_tool_V44: np.ndarray) -> tuple[float, float]:
    """How far the tool turns between two views, degrees rms, about its most used axis and about the next."""
    first, second = np.triu_indices(len(T_base_tool_V44), 1)
    relative = np.swapaxes(T_base_tool_V44[first, :3, :3], 1, 2) @ T_base_tool_V44[second, :3, :3]
    turn_rad_N3 = Rotation.from_matrix(relative).as_rotvec()
    about_3 = np.sqrt(np.maximum(np.linalg.eigvalsh(turn_rad_N3.T @ turn_rad_N3 / len(turn_rad_N3)), 0.0))
    return float(np.degrees(about_3[2])), float(np.degrees(about_3[1]))


@dataclass(frozen=True, eq=False)
class _Problem:
    """Corners of all views in one array, and what is predicted of them. A state is X and Y and 12 numbers that turn and move them."""

    model: CameraModel
    T_unmount_V44: np.ndarray  # M^-1
    corner_N3: np.ndarray
    pixel_N2: np.ndarray
    view_N: np.ndarray

    def without(self, view: int) -> _Problem:
        keep = self.view_N != view
        return _Problem(self.model, self.T_unmount_V44, self.corner_N3[keep], self.pixel_N2[keep], self.view_N[keep])

    def boards(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        return inverse(X) @ self.T_unmount_V44 @ Y

    def residuals(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        T_N44 = self.boards(X, Y)[self.view_N]
        points_N3 = np.einsum("nij,nj->ni", T_N44[:, :3, :3], self.corner_N3) + T_N44[:, :3, 3]
        points_N3[:, 2] = np.maximum(points_N3[:, 2], NEAR_M)
        return self.model.project(points_N3) - self.pixel_N2

    def errors(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Rms distance of each view, px."""
        square_N = np.square(self.residuals(X, Y)).sum(axis=1)
        return np.sqrt(np.bincount(self.view_N, square_N) / np.bincount(self.view_N))

    def solve(self, X: np.ndarray, Y: np.ndarray, loss: str = "linear") -> tuple[np.ndarray, np.ndarray]:
        def moved(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            turn = Rotation.from_rotvec(step.reshape(2, 6)[:, :3]).as_matrix()
            return tuple(  # type: ignore[return-value]
                pose_of(turn[i] @ T[:3, :3], T[:3, 3] + step[6 * i + 3 : 6 * i + 6]) for i, T in enumerate((X, Y))
            )

        fit = least_squares(lambda s: self.residuals(*moved(s)).ravel(), np.zeros(12), loss=loss, xtol=1e-12)
        return moved(fit.x)


def calibrate_hand_eye(
    views: Sequence[View],
    poses: Mapping[str, np.ndarray],
    board: BoardConfig,
    model: CameraModel,
    mode: Mode,
    model_std_px: tuple[float, float, float] = (0.0, 0.0, 0.0),
    max_error_px: float = MAX_ERROR_PX,
) -> HandEye:
    """Find where a camera is from views of a board and the poses of the tool.

    Args:
        views: of the board.
        poses: T_base_tool (4, 4), m, by the names of the views.
        board: what was looked at.
        model: intrinsics of the camera.
        mode: whether camera or board is on the tool.
        model_std_px: standard deviations of the model's focal length and of its centre's x and y, for those of the result.
        max_error_px: largest reprojection error (rms) that is no mistake.

    Raises:
        UserError: too few views, a view without a pose or of another size than the model, a pose that is none, a tool that hardly
            turned or about one axis only, or an error above ``max_error_px``.
    """
    if mode not in MOUNTS:
        raise UserError(f"hand-eye calibration has the modes {', '.join(MOUNTS)}, got {mode!r}")
    missing = sorted({view.name for view in views} - set(poses))
    if missing:
        raise UserError(f"{len(missing)} of {len(views)} images have no pose of the tool, {missing[0]} for one")
    model.check_size(*common_size(views))
    good = usable(views, MIN_VIEWS)
    rejected = {view.name: view.problem for view in views if view.problem}
    T_base_tool_V44 = np.array([checked_pose(poses[view.name], view.name) for view in good])
    turned = rotation_spread(T_base_tool_V44)
    if turned[1] < MIN_ROTATION_DEG:
        raise UserError(
            f"between views the tool turns by {turned[0]:.1f} and {turned[1]:.1f} degrees about its two most used axes, "
            f"wanted are at least {MIN_ROTATION_DEG:g} (rms) about both: tilt it further, and not about one axis only"
        )
    T_mount_V44 = T_base_tool_V44 if mode == "eye_in_hand" else inverse(T_base_tool_V44)
    T_camera_board_V44 = np.array([board_pose(view, board, model) for view in good])
    problem = _problem(good, T_mount_V44, board, model)
    starts = _closed_forms(T_mount_V44, T_camera_board_V44)
    methods = {name: _rms(problem.residuals(*start)) * 2**0.5 for name, start in starts.items()}
    X, Y = problem.solve(*starts[min(methods, key=methods.__getitem__)], loss="soft_l1")
    bad = _outliers(good, problem.errors(X, Y), "hand-eye")
    if len(good) - len(bad) >= MIN_VIEWS:
        keep = [i for i, view in enumerate(good) if view.name not in bad]
        rejected |= bad
        good, T_mount_V44, T_camera_board_V44 = [good[i] for i in keep], T_mount_V44[keep], T_camera_board_V44[keep]
    problem = _problem(good, T_mount_V44, board, model)
    X, Y = problem.solve(X, Y)
    error_V, corners_V = problem.errors(X, Y), np.bincount(problem.view_N)
    rms_px = _rms(error_V, corners_V)
    _check_error(
        rms_px,
        max_error_px,
        "that poses are T_base_tool in metres, belong to the images, and that --mode and --board are right",
    )
    predicted_V44 = problem.boards(X, Y)
    off_m_V, off_deg_V = np.transpose(
        [_distance(*pair) for pair in zip(predicted_V44, T_camera_board_V44, strict=True)]
    )
    rows = zip(good, corners_V, error_V, off_m_V, off_deg_V, strict=True)
    seen = tuple(ViewError(v.name, int(n), float(px), float(m), float(deg)) for v, n, px, m, deg in rows)
    left_out = [problem.without(i).solve(X, Y)[0] for i in range(len(good))]
    moved = [replace(problem, model=other).solve(X, Y)[0] for other in _moved(model, model_std_px)]
    weight_N = np.array([(len(good) - 1.0) / len(good)] * len(good) + [1.0] * len(moved))
    off_m_N, off_deg_N = np.transpose([_distance(T, X) for T in left_out + moved])
    std_m, std_deg = (float(np.sqrt(weight_N @ np.square(off_N))) for off_N in (off_m_N, off_deg_N))
    return HandEye(mode, X, Y, rms_px, _rms(off_m_V), _rms(off_deg_V), std_m, std_deg, turned, methods, seen, rejected)


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Between two poses, m and degrees."""
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3])), angle_deg(a[:3, :3], b[:3, :3])


def _moved(model: CameraModel, std_px: tuple[float, float, float]) -> list[CameraModel]:
    """The model with its focal length and its centre off by a standard deviation, one after the other."""
    focal_px, x_px, y_px = std_px
    steps = [np.diag([focal_px, focal_px, 0.0]), np.zeros((3, 3)), np.zeros((3, 3))]
    steps[1][0, 2], steps[2][1, 2] = x_px, y_px
    return [replace(model, matrix_33=model.matrix_33 + step) for step in steps if step.any()]


def _problem(views: Sequence[View], T_mount_V44: np.ndarray, board: BoardConfig, model: CameraModel) -> _Problem:
    return _Problem(
        model,
        inverse(T_mount_V44),
        np.concatenate([board.corners_m[v.ids_N] for v in views]),
        np.concatenate([v.pixels_N2 for v in views]),
        np.repeat(np.arange(len(views)), [len(v.ids_N) for v in views]),
    )


def _closed_forms(T_mount_V44: np.ndarray, T_camera_board_V44: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """X by each of OpenCV's methods that finds one, and the mean Y that goes with it."""
    found = {}
    for name, method in METHODS.items():
        parts = (
            T_mount_V44[:, :3, :3],
            T_mount_V44[:, :3, 3],
            T_camera_board_V44[:, :3, :3],
            T_camera_board_V44[:, :3, 3],
        )
        try:
            rotation, place_m = cv2.calibrateHandEye(*(list(part) for part in parts), method=method)  # type: ignore[call-overload]
        except cv2.error:
            continue  # one method has no answer; whether any has is looked at below
        if np.isfinite(rotation).all() and np.isfinite(place_m).all() and np.linalg.det(rotation) > 0:
            X = pose_of(Rotation.from_matrix(rotation).as_matrix(), place_m)
            Y_V44 = T_mount_V44 @ X @ T_camera_board_V44
            found[name] = (
                X,
                pose_of(Rotation.from_matrix(Y_V44[:, :3, :3]).mean().as_matrix(), Y_V44[:, :3, 3].mean(axis=0)),
            )
    if not found:
        raise UserError(
            f"none of {', '.join(METHODS)} finds a camera pose: wanted are views that differ more in orientation"
        )
    return found
