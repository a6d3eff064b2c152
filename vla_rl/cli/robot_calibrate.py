"""Calibrate a camera from images of a ChArUco board: what its pixels mean, and where it is on the tool or by the robot.

FOLDER holds the images (.png, .jpg) and, but for mode intrinsics, the poses of the tool: poses.json or poses.yaml with T_base_tool
(4 x 4, m) by image name. In mode eye_in_hand the camera is on the tool and the board stands, in mode eye_to_hand it is the other way round.
docs/calibration.md says how to take the images and how to read the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from real_robot.boards import BoardConfig, detect_folder, draw_board, read_poses
from real_robot.calibration import (
    MAX_ERROR_PX,
    Distortion,
    HandEye,
    Intrinsics,
    ViewError,
    calibrate_hand_eye,
    calibrate_intrinsics,
)
from real_robot.cameras import MOUNTS, Calibration, CameraModel, Mode, load_calibration
from vla_rl.cli.common import CommandConfig
from vla_rl.runtime.errors import UserError

EXAMPLE = "vla-rl robot calibrate images/wrist --mode eye_in_hand --board.square-m 0.0321 --out calibration/wrist.yaml"
POSITIONALS = ("folder",)
STORED_STD = ("focal_std_px", "centre_x_std_px", "centre_y_std_px")
LITTLE_COVERAGE = 0.5  # of the image; what is said below it is advice


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl robot calibrate``.

    folder: of the images and of poses.json or poses.yaml
    mode: intrinsics, eye_in_hand (the camera is on the tool) or eye_to_hand (the board is)
    board: what was looked at
    out: file to write, such as calibration/wrist.yaml
    camera: its name (none: the name of the file)
    intrinsics: file of an earlier calibration whose intrinsics are used (none: they are found from the same images)
    distortion: which of OpenCV's coefficients are found: none, k1k2p1p2 or k1k2p1p2k3 (wide lenses)
    max_error_px: largest reprojection error (rms) that is not refused
    draw_board: write the board as a .png to print, and do nothing else
    """

    folder: Path | None = None
    mode: Mode = "intrinsics"
    board: BoardConfig = field(default_factory=BoardConfig)
    out: Path | None = None
    camera: str | None = None
    intrinsics: Path | None = None
    distortion: Distortion = "k1k2p1p2"
    max_error_px: float = MAX_ERROR_PX
    draw_board: Path | None = None

    def __post_init__(self) -> None:
        if not self.max_error_px > 0:
            raise ValueError(f"max_error_px wants a number above 0, got {self.max_error_px}")
        if self.mode == "intrinsics" and self.intrinsics is not None:
            raise ValueError("mode intrinsics finds them; intrinsics is for eye_in_hand and eye_to_hand")


def run(config: Config) -> dict[str, Any]:
    """Calibrate, print the report and store the result; return what the report holds."""
    if config.draw_board is not None:
        draw_board(config.board, config.draw_board)
        squares = f"{config.board.columns} x {config.board.rows} squares of {1000 * config.board.square_m:g} mm"
        print(f"{config.draw_board}: {squares}; print it at 100 %, glue it to something flat and measure a square")
        return {"drawn": str(config.draw_board), "board": asdict(config.board)}
    for name, value in (("FOLDER", config.folder), ("--out", config.out)):
        if value is None:
            raise UserError(f"{name} is missing; see --help")
    assert config.folder is not None
    assert config.out is not None
    if config.out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out wants a .yaml file, got {config.out}")
    given = None if config.intrinsics is None else load_calibration(config.intrinsics)
    poses = {} if config.mode == "intrinsics" else read_poses(config.folder)
    views = detect_folder(config.folder, config.board)
    console, results = Console(), {"mode": config.mode, "board": asdict(config.board)}
    errors: dict[str, float] = {}
    rejected: dict[str, str] = {}
    if given is None:
        found = calibrate_intrinsics(views, config.board, config.distortion, config.max_error_px)
        model, used = found.model, len(found.views)
        errors |= {"intrinsics_rms_px": found.rms_px, **dict(zip(STORED_STD, found.std_px, strict=True))}
        rejected |= found.rejected
        results["intrinsics"] = _report_intrinsics(found, console)
    else:
        model, used = given.model, given.views
        errors = {name: error for name, error in given.errors.items() if not name.startswith("hand_eye_")}
        if not set(STORED_STD) <= set(errors):
            raise UserError(f"{config.intrinsics} wants {', '.join(STORED_STD)} among its errors, got {list(errors)}")
    T_mount_camera: np.ndarray | None = None
    if config.mode != "intrinsics":
        std_px = (errors[STORED_STD[0]], errors[STORED_STD[1]], errors[STORED_STD[2]])
        hand_eye = calibrate_hand_eye(views, poses, config.board, model, config.mode, std_px, config.max_error_px)
        T_mount_camera, used = hand_eye.T_mount_camera, len(hand_eye.views)
        errors |= {
            f"hand_eye_{name}": getattr(hand_eye, name) for name in ("rms_px", "rms_m", "rms_deg", "std_m", "std_deg")
        }
        rejected |= hand_eye.rejected
        results["hand_eye"] = _report_hand_eye(hand_eye, console)
        _print_views(hand_eye.views, console, poses=True)
    elif given is None:
        _print_views(found.views, console, poses=False)
    for name, why in rejected.items():
        console.print(f"[yellow]left out: {escape(name)}[/]: {escape(why)}")
    camera = config.camera or config.out.stem
    date = datetime.now(UTC).isoformat(timespec="seconds")
    Calibration(camera, date, config.mode, model, T_mount_camera, used, errors).save(config.out)
    console.print(f"[bold]{escape(str(config.out))}[/]: camera {escape(repr(camera))}, {config.mode}, {used} views")
    return results


def _report_intrinsics(found: Intrinsics, console: Console) -> dict[str, Any]:
    model, (focal_std_px, x_std_px, y_std_px) = found.model, found.std_px
    fx, fy, cx, cy = _pinhole(model)
    centre_deg = float(np.degrees(np.hypot(x_std_px, y_std_px) / fx))
    console.print(
        f"[bold]intrinsics[/]: fx {fx:.2f}, fy {fy:.2f} (± {focal_std_px:.2f}), centre {cx:.2f}, {cy:.2f} px "
        f"(± {x_std_px:.2f}, {y_std_px:.2f}: {centre_deg:.3f} degrees)"
    )
    console.print(f"distortion k1, k2, p1, p2, k3: {', '.join(f'{k:.4g}' for k in model.distortion_5)}")
    console.print(
        f"reprojection error [bold]{found.rms_px:.3f} px[/] rms; corners in {100 * found.coverage:.0f} % of the image"
    )
    if found.coverage < LITTLE_COVERAGE:
        console.print(
            "[yellow]large parts of the image hold no corner: what is said of the distortion there is a guess[/]"
        )
    named = {"fx": fx, "fy": fy, "cx": cx, "cy": cy, "distortion": model.distortion_5.tolist()}
    std = dict(zip(STORED_STD, found.std_px, strict=True))
    seen = {"rms_px": found.rms_px, "coverage": found.coverage, "rejected": found.rejected}
    return named | std | seen | {"views": [asdict(view) for view in found.views]}


def _report_hand_eye(found: HandEye, console: Console) -> dict[str, Any]:
    camera, board = MOUNTS[found.mode]
    place_mm = 1000 * found.T_mount_camera[:3, 3]
    console.print(
        f"[bold]{camera}[/]: {place_mm[0]:.2f}, {place_mm[1]:.2f}, {place_mm[2]:.2f} mm "
        f"(± {1000 * found.std_m:.2f} mm, {found.std_deg:.3f} degrees, poses of the tool taken as true)"
    )
    for row in found.T_mount_camera:
        console.print("  " + "  ".join(f"{x:9.6f}" for x in row))
    turned = " and ".join(f"{angle:.0f}" for angle in found.rotation_deg)
    console.print(
        f"reprojection error [bold]{found.rms_px:.3f} px[/] rms; the board in single views is off by {1000 * found.rms_m:.2f} mm and "
        f"{found.rms_deg:.3f} degrees rms; the tool turned by {turned} degrees rms"
    )
    closed = ", ".join(f"{name} {error:.3f}" for name, error in found.methods.items())
    console.print(f"before refinement: {closed} px")
    names = ("rms_px", "rms_m", "rms_deg", "std_m", "std_deg", "rotation_deg", "methods", "rejected")
    poses = {camera: found.T_mount_camera.tolist(), board: found.T_other_board.tolist()}
    return poses | {name: getattr(found, name) for name in names} | {"views": [asdict(view) for view in found.views]}


def _pinhole(model: CameraModel) -> tuple[float, float, float, float]:
    matrix = model.matrix_33
    return float(matrix[0, 0]), float(matrix[1, 1]), float(matrix[0, 2]), float(matrix[1, 2])


def _print_views(views: Sequence[ViewError], console: Console, poses: bool) -> None:
    table = Table("image", "corners", "error, px", *(("board off by, mm", "degrees") if poses else ()))
    for view in views:
        cells = [escape(view.name), str(view.corners), f"{view.error_px:.3f}"]
        table.add_row(*cells, *((f"{1000 * view.error_m:.2f}", f"{view.error_deg:.3f}") if poses else ()))
    console.print(table)
