from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.spatial.transform import Rotation

from real_robot.boards import (
    BoardConfig,
    View,
    angle_deg,
    board_image,
    checked_pose,
    detect,
    detect_folder,
    draw_board,
    inverse,
    pose_of,
    read_poses,
)
from real_robot.calibration import board_pose, calibrate_hand_eye, calibrate_intrinsics, rotation_spread
from real_robot.cameras import MOUNTS, Calibration, CameraModel, Mode, load_calibration
from tests.real_robot.board_scene import (
    HEIGHT,
    TRUTH,
    WIDTH,
    BoardScene,
    as_by_a_sensor,
    camera_board_poses,
    tool_poses,
    true_model,
)
from vla_rl.cli.main import main
from vla_rl.runtime.config import decode
from vla_rl.runtime.errors import UserError

BOARD = BoardConfig()
MODES: tuple[Mode, ...] = ("eye_in_hand", "eye_to_hand")
ALLOWED_M, ALLOWED_DEG = 1e-3, 0.2
VIEWS = 20
DISTORTION = np.array([-0.25, 0.08, 1e-3, -5e-4, 0.0])

Poses = dict[str, np.ndarray]


def distorted_model() -> CameraModel:
    return CameraModel(WIDTH, HEIGHT, true_model().matrix_33, DISTORTION)


def seen(T_camera_board_V44: np.ndarray, model: CameraModel, noise_px: float = 0.0, seed: int = 0) -> list[View]:
    """Views without an image: the corners are put where they belong, and off by noise."""
    rng, corners = np.random.default_rng(seed), BOARD.corners_m
    views = []
    for i, T in enumerate(T_camera_board_V44):
        pixels = model.project(corners @ T[:3, :3].T + T[:3, 3])
        pixels += rng.normal(0.0, noise_px, pixels.shape)
        views.append(View(f"{i:02d}.png", (WIDTH, HEIGHT), np.arange(len(corners)), pixels))
    return views


def named(views: list[View], T_base_tool_V44: np.ndarray) -> Poses:
    return {view.name: T for view, T in zip(views, T_base_tool_V44, strict=True)}


def exact(mode: Mode, count: int = 12, noise_px: float = 0.0, seed: int = 0) -> tuple[list[View], Poses]:
    T = camera_board_poses(BOARD, count, seed)
    views = seen(T, true_model(), noise_px, seed)
    return views, named(views, tool_poses(T, mode))


def turned(degrees: list[tuple[float, float, float]]) -> tuple[list[View], Poses]:
    """Views of a camera on a tool that turns by these rotation vectors."""
    T0 = pose_of(np.eye(3), np.array([-0.12, -0.09, 0.5]))
    T = np.array([T0 @ pose_of(Rotation.from_rotvec(d, degrees=True).as_matrix(), np.zeros(3)) for d in degrees])
    views = seen(T, true_model())
    return views, named(views, tool_poses(T, "eye_in_hand"))


# ---- poses, pixels and files


def test_the_inverse_undoes() -> None:
    T = camera_board_poses(BOARD, 5, 0)
    np.testing.assert_allclose(inverse(T) @ T, np.broadcast_to(np.eye(4), (5, 4, 4)), atol=1e-14)
    np.testing.assert_allclose(inverse(inverse(T)), T, atol=1e-15)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-3, 0.2, 90.0, 179.9, 180.0])
def test_rotations_differ_by_the_angle_of_the_relative_one(angle: float) -> None:
    start = Rotation.from_rotvec([0.4, -2.0, 1.0])
    end = Rotation.from_rotvec(np.deg2rad(angle) * np.array([0.6, 0.0, 0.8])) * start
    assert angle_deg(start.as_matrix(), end.as_matrix()) == pytest.approx(angle, abs=1e-9, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_board_is_where_the_mounting_has_it(mode: Mode) -> None:
    """The equation in the docstring of calibration.py, against the chain written out."""
    X, Y = TRUTH[mode]
    T_camera_board = camera_board_poses(BOARD, 3, 0)
    for T_base_tool, T in zip(tool_poses(T_camera_board, mode), T_camera_board, strict=True):
        if mode == "eye_in_hand":
            T_tool_camera, T_base_board = X, Y
            np.testing.assert_allclose(T_base_tool @ T_tool_camera @ T, T_base_board, atol=1e-12)
        else:
            T_base_camera, T_tool_board = X, Y
            np.testing.assert_allclose(T_base_camera @ T, T_base_tool @ T_tool_board, atol=1e-12)


def test_a_ray_times_its_depth_is_the_point_that_was_projected() -> None:
    model, rng = distorted_model(), np.random.default_rng(0)
    points = rng.uniform([-0.2, -0.15, 0.5], [0.2, 0.15, 1.0], (50, 3))
    np.testing.assert_allclose(model.rays(model.project(points)) * points[:, 2:], points, atol=1e-8)


def test_whole_numbers_are_centres_of_pixels() -> None:
    model = true_model()
    np.testing.assert_allclose(model.project(np.array([[0.0, 0.0, 1.0]])), [[319.5, 239.5]])
    edge = np.tan(
        np.deg2rad(45.0) / 2
    )  # the upper edge of the image is half a pixel above the centres of its first row
    np.testing.assert_allclose(model.project(np.array([[0.0, -edge, 1.0]])), [[319.5, -0.5]])


def test_a_depth_image_becomes_points_in_the_base() -> None:
    model, T_base_camera = distorted_model(), TRUTH["eye_to_hand"][0]
    depth = np.full((HEIGHT, WIDTH), 0.7, np.float32)
    depth[3, 4], depth[5, 6] = 0.0, np.inf
    points = model.lift(depth, T_base_camera)
    assert points.shape == (HEIGHT, WIDTH, 3)
    assert np.isnan(points[3, 4]).all()
    assert np.isnan(points[5, 6]).all()
    in_camera = (points[100, 200] - T_base_camera[:3, 3]) @ T_base_camera[:3, :3]
    assert in_camera[2] == pytest.approx(0.7)
    np.testing.assert_allclose(model.project(in_camera[None]), [[200, 100]], atol=1e-6)
    with pytest.raises(UserError, match=r"640 x 480.*320 x 240"):
        model.lift(depth[::2, ::2], T_base_camera)


def test_an_undistorted_line_is_straight() -> None:
    model = distorted_model()
    row = model.project(np.stack([np.linspace(-0.5, 0.5, 4000), np.full(4000, -0.35), np.ones(4000)], axis=1))
    image = np.zeros((HEIGHT, WIDTH), np.uint8)
    column, line = np.rint(row).astype(int).T
    inside = (column >= 0) & (column < WIDTH)
    image[line[inside], column[inside]] = 255
    assert np.ptp(line[inside]) > 10
    straight = model.undistort(image)
    assert np.ptp(np.nonzero(straight > 60)[0]) <= 2
    with pytest.raises(UserError, match="320 x 240"):
        model.undistort(image[::2, ::2])


@pytest.mark.parametrize("shrink", [1, 2, 4])
def test_corners_are_where_they_were_drawn(shrink: int) -> None:
    """To a hundredth of a pixel; CharucoDetector of OpenCV 4.11 alone is off by half a pixel."""
    margin, square = 48, 128
    drawn = np.pad(board_image(BOARD, square), margin, constant_values=255)
    image = cv2.resize(drawn, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    view = detect(image, BOARD)
    assert not view.problem
    assert len(view.ids_N) == len(BOARD.corners_m)
    edges = BOARD.corners_m[view.ids_N, :2] / BOARD.square_m * square + margin
    np.testing.assert_allclose(view.pixels_N2, edges / shrink - 0.5, atol=0.01)


def test_a_drawn_board_prints_at_its_size_and_is_found(tmp_path: Path) -> None:
    board = BoardConfig(columns=5, rows=4, square_m=0.02, marker_m=0.014, dictionary="DICT_4X4_50")
    draw_board(board, tmp_path / "board.png")
    with Image.open(tmp_path / "board.png") as image:
        pixels_per_m = image.info["dpi"][0] / 0.0254
        assert image.width / pixels_per_m == pytest.approx(5.5 * 0.02, rel=1e-3)
        view = detect(np.asarray(image), board)
    assert len(view.ids_N) == 12
    assert detect(np.asarray(Image.open(tmp_path / "board.png")), BOARD).problem == "the board is not seen"


@pytest.mark.parametrize("mode", MODES)
def test_what_is_stored_is_read_back(mode: Mode, tmp_path: Path) -> None:
    X = TRUTH[mode][0]
    stored = Calibration("wrist", "2025-01-01", mode, distorted_model(), X, 20, {"hand_eye_rms_px": 0.1})
    path = tmp_path / "calibration" / "wrist.yaml"
    stored.save(path)
    read = load_calibration(path)
    np.testing.assert_array_equal(read.model.matrix_33, stored.model.matrix_33)
    np.testing.assert_array_equal(read.model.distortion_5, DISTORTION)
    assert read.T_mount_camera is not None
    np.testing.assert_allclose(read.T_mount_camera, X, atol=1e-15)
    assert (read.camera, read.date, read.mode, read.views, read.errors) == (
        "wrist",
        "2025-01-01",
        mode,
        20,
        {"hand_eye_rms_px": 0.1},
    )
    assert MOUNTS[mode][0] in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["wrist.yaml"]
    T_base_tool = TRUTH["eye_to_hand"][0]
    if mode == "eye_in_hand":
        np.testing.assert_allclose(read.pose_in_base(T_base_tool), T_base_tool @ X)
        with pytest.raises(UserError, match="T_base_tool"):
            read.pose_in_base()
    else:
        np.testing.assert_allclose(read.pose_in_base(), X)


def test_intrinsics_alone_do_not_say_where_the_camera_is(tmp_path: Path) -> None:
    Calibration("top", "2025-01-01", "intrinsics", distorted_model(), None, 20, {}).save(tmp_path / "top.yaml")
    with pytest.raises(UserError, match=r"not known where camera 'top' is.*eye_in_hand"):
        load_calibration(tmp_path / "top.yaml").pose_in_base()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "eye_on_toe"}, "eye_on_toe"),
        ({"matrix": None}, "matrix"),
        ({"matrix": [[1, 2], [3, 4]]}, r"3 x 3.*\(2, 2\)"),
        ({"distortion": [0, 0, 0, 0, float("nan")]}, "finite"),
        ({"image_size": 640}, "no calibration"),
        ({"T_tool_camera": np.diag([2.0, 1, 1, 1]).tolist()}, "no rotation"),
        ({"T_base_camera": np.eye(4).tolist()}, "T_base_camera"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_broken_file_is_one_line(change: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrist.yaml"
    Calibration("wrist", "2025-01-01", "eye_in_hand", true_model(), np.eye(4), 20, {}).save(path)
    raw = {k: v for k, v in (yaml.safe_load(path.read_text()) | change).items() if v is not None}
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=words):
        load_calibration(path)


# ---- intrinsics


def test_exact_corners_give_the_true_camera() -> None:
    found = calibrate_intrinsics(seen(camera_board_poses(BOARD, 12, 0), distorted_model()), BOARD)
    np.testing.assert_allclose(
        found.model.matrix_33, true_model().matrix_33, atol=0.01
    )  # OpenCV takes corners as float32
    np.testing.assert_allclose(found.model.distortion_5, DISTORTION, atol=2e-3)
    assert found.rms_px < 1e-3
    assert not found.rejected


def test_the_reported_error_and_deviation_are_those_of_the_noise() -> None:
    noise_px, off = 0.1, []
    for seed in range(6):
        found = calibrate_intrinsics(seen(camera_board_poses(BOARD, 15, seed), true_model(), noise_px, seed), BOARD)
        assert found.rms_px == pytest.approx(noise_px * 2**0.5, rel=0.1)
        error = (found.model.matrix_33 - true_model().matrix_33)[[0, 0, 1], [0, 2, 2]]
        off.append(error / found.std_px)
    assert 0.4 < np.sqrt(np.mean(np.square(off))) < 2.0


@pytest.mark.parametrize(("distortion", "free"), [("none", 0), ("k1k2p1p2", 4), ("k1k2p1p2k3", 5)])
def test_only_the_chosen_coefficients_are_found(distortion: str, free: int) -> None:
    views = seen(camera_board_poses(BOARD, 12, 0), true_model(), 0.1)
    found = calibrate_intrinsics(views, BOARD, distortion)  # type: ignore[arg-type]
    assert found.model.distortion_5.shape == (5,)
    assert np.count_nonzero(found.model.distortion_5) == free


def test_a_view_that_fits_badly_is_left_out_and_named() -> None:
    views = seen(camera_board_poses(BOARD, 12, 0), true_model(), 0.05)
    bad = views[4]
    views[4] = View(
        bad.name, bad.size, bad.ids_N, bad.pixels_N2 + np.random.default_rng(0).normal(0, 5, bad.pixels_N2.shape)
    )
    found = calibrate_intrinsics(views, BOARD)
    assert list(found.rejected) == ["04.png"]
    assert len(found.views) == 11
    assert found.rms_px < 0.1


def test_coverage_is_the_share_of_cells_with_a_corner() -> None:
    few, many = (calibrate_intrinsics(seen(camera_board_poses(BOARD, n, 0), true_model()), BOARD) for n in (6, 40))
    assert 0 < few.coverage < many.coverage <= 1


def test_parallel_views_are_refused() -> None:
    rng = np.random.default_rng(0)
    T = [
        pose_of(Rotation.from_euler("z", rng.uniform(-60, 60), degrees=True).as_matrix(), rng.uniform(-0.1, 0.1, 3))
        for _ in range(10)
    ]
    views = seen(np.array([pose_of(np.eye(3), np.array([-0.1, -0.1, 0.6])) @ t for t in T]), true_model(), 0.02)
    with pytest.raises(UserError, match=r"tilted by .* degrees at most.*10"):
        calibrate_intrinsics(views, BOARD)


# ---- hand-eye


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_exact_corners_give_the_true_poses(mode: Mode, seed: int) -> None:
    views, poses = exact(mode, seed=seed)
    found = calibrate_hand_eye(views, poses, BOARD, true_model(), mode)
    for got, truth in zip((found.T_mount_camera, found.T_other_board), TRUTH[mode], strict=True):
        assert np.abs(got - truth).max() < 1e-6
    assert found.rms_px < 1e-4
    assert found.std_m < 1e-6
    assert set(found.methods) >= {"park", "daniilidis"}
    assert max(found.methods.values()) < 0.01


@pytest.mark.parametrize("mode", MODES)
def test_noise_in_the_corners_is_averaged_out_and_reported(mode: Mode) -> None:
    off = []
    for seed in range(4):
        views, poses = exact(mode, count=15, noise_px=0.2, seed=seed)
        found = calibrate_hand_eye(views, poses, BOARD, true_model(), mode)
        X = TRUTH[mode][0]
        error_m = float(np.linalg.norm(found.T_mount_camera[:3, 3] - X[:3, 3]))
        error_deg = angle_deg(found.T_mount_camera[:3, :3], X[:3, :3])
        assert error_m < ALLOWED_M
        assert error_deg < ALLOWED_DEG
        assert found.rms_px == pytest.approx(0.2 * 2**0.5, rel=0.15)
        assert found.rms_px <= min(found.methods.values())  # what refinement is for
        off.append((error_m / found.std_m, error_deg / found.std_deg))
    assert 0.3 < np.sqrt(np.mean(np.square(off))) < 2.0  # the deviations reported are those there are


def test_errors_of_the_tool_show_in_the_deviations_and_in_millimetres() -> None:
    views, poses = exact("eye_in_hand", count=20, noise_px=0.05)
    rng = np.random.default_rng(0)
    shaken = {
        name: T @ pose_of(Rotation.from_rotvec(rng.normal(0, 2e-3, 3)).as_matrix(), rng.normal(0, 5e-4, 3))
        for name, T in poses.items()
    }
    good, bad = (calibrate_hand_eye(views, p, BOARD, true_model(), "eye_in_hand") for p in (poses, shaken))
    assert bad.std_m > 3 * good.std_m
    assert bad.rms_m > 3 * good.rms_m
    error_m = np.linalg.norm(bad.T_mount_camera[:3, 3] - TRUTH["eye_in_hand"][0][:3, 3])
    assert error_m < 3 * bad.std_m


def test_an_uncertain_model_makes_the_result_uncertain() -> None:
    views, poses = exact("eye_in_hand", noise_px=0.05)
    sure, unsure = (
        calibrate_hand_eye(views, poses, BOARD, true_model(), "eye_in_hand", std) for std in ((0, 0, 0), (1, 1, 1))
    )
    np.testing.assert_array_equal(sure.T_mount_camera, unsure.T_mount_camera)
    one_pixel_deg = np.degrees(1 / true_model().matrix_33[0, 0])
    assert unsure.std_deg == pytest.approx(one_pixel_deg * 2**0.5, rel=0.2)  # in x and in y
    assert unsure.std_m > sure.std_m


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_views_changes_nothing(mode: Mode) -> None:
    views, poses = exact(mode, noise_px=0.1)
    one = calibrate_hand_eye(views, poses, BOARD, true_model(), mode)
    other = calibrate_hand_eye(views[::-1], poses, BOARD, true_model(), mode)
    np.testing.assert_allclose(one.T_mount_camera, other.T_mount_camera, atol=1e-6)


def test_another_base_does_not_move_a_camera_on_the_tool() -> None:
    views, poses = exact("eye_in_hand", noise_px=0.1)
    T_new_old = TRUTH["eye_to_hand"][0]
    moved = {name: T_new_old @ T for name, T in poses.items()}
    one, other = (calibrate_hand_eye(views, p, BOARD, true_model(), "eye_in_hand") for p in (poses, moved))
    np.testing.assert_allclose(one.T_mount_camera, other.T_mount_camera, atol=1e-6)
    np.testing.assert_allclose(T_new_old @ one.T_other_board, other.T_other_board, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_pose_is_left_out_and_named(mode: Mode) -> None:
    views, poses = exact(mode, count=14, noise_px=0.1)
    wrong = dict(poses)
    wrong["05.png"] = poses["05.png"] @ pose_of(Rotation.from_rotvec([0.1, 0, 0]).as_matrix(), np.array([0.02, 0, 0]))
    found = calibrate_hand_eye(views, wrong, BOARD, true_model(), mode)
    assert list(found.rejected) == ["05.png"]
    assert np.linalg.norm(found.T_mount_camera[:3, 3] - TRUTH[mode][0][:3, 3]) < ALLOWED_M


def test_the_spread_of_rotations_is_about_the_two_most_used_axes() -> None:
    turns = Rotation.from_rotvec([(a, b, 0) for a in (-20, 20) for b in (-10, 10)], degrees=True).as_matrix()
    poses = np.array([pose_of(turn, np.zeros(3)) for turn in turns])
    most, next_most = rotation_spread(poses)
    assert 20 < next_most * 2 < most * 1.3 < 60
    base = pose_of(Rotation.from_rotvec([1.0, 2.0, -0.5]).as_matrix(), np.ones(3))
    np.testing.assert_allclose(rotation_spread(base @ poses), (most, next_most))


# ---- what is refused


def refuse(views: list[View], poses: Poses, words: str, mode: Mode = "eye_in_hand", board: BoardConfig = BOARD) -> None:
    with pytest.raises(UserError, match=words) as caught:
        calibrate_hand_eye(views, poses, board, true_model(), mode)
    assert "\n" not in str(caught.value)


AXIS_OF_30 = [(30.0 * np.cos(a), 0.0, 0.0) for a in np.linspace(0, 3, 10)]
OBLIQUE = [(0.6 * a, -0.3 * a, 0.8 * a) for a in range(-30, 31, 6)]
HARDLY = [(1.0 * np.cos(a), 1.0 * np.sin(a), 0.5 * np.sin(2 * a)) for a in np.linspace(0, 6, 10)]


@pytest.mark.parametrize("motion", [AXIS_OF_30, OBLIQUE, HARDLY], ids=["one axis", "an oblique axis", "hardly any"])
def test_a_tool_that_does_not_turn_about_two_axes_is_refused(motion: list[tuple[float, float, float]]) -> None:
    refuse(*turned(motion), r"turns by \d+\.\d and [01]\.\d degrees.*at least 5.*not about one axis only")


def test_too_few_views_are_refused_and_the_others_explained() -> None:
    views, poses = exact("eye_in_hand", count=8)
    refuse(views[:5], poses, "at least 6 images.*got 5 of 5")
    blind = [View(v.name, v.size, v.ids_N[:0], v.pixels_N2[:0], "the board is not seen") for v in views[:4]]
    refuse(blind + views[4:], poses, "got 4 of 8; 4 x the board is not seen")
    with pytest.raises(UserError, match="got 4 of 8; 4 x the board is not seen"):
        calibrate_intrinsics(blind + views[4:], BOARD)


def test_images_of_different_sizes_are_refused() -> None:
    views, poses = exact("eye_in_hand")
    other = View(views[3].name, (320, 240), views[3].ids_N, views[3].pixels_N2)
    mixed = [*views[:3], other, *views[4:]]
    words = r"00\.png of 640 x 480 and 03\.png of 320 x 240"
    refuse(mixed, poses, words)
    with pytest.raises(UserError, match=words):
        calibrate_intrinsics(mixed, BOARD)
    small = [View(v.name, (320, 240), v.ids_N, v.pixels_N2 / 2) for v in views]
    refuse(small, poses, r"640 x 480 pixels, got 320 x 240")


@pytest.mark.parametrize(
    ("pose", "words"),
    [
        (np.diag([1.0, 1.0, -1.0, 1.0]), "no rotation.*determinant is -1"),
        (np.diag([2.0, 1.0, 1.0, 1.0]), "no rotation"),
        (np.eye(3), "4 x 4"),
        (np.full((4, 4), np.nan), "finite"),
        (pose_of(np.eye(3), np.array([420.0, 100.0, 300.0])), "metres, not millimetres"),
        (np.eye(4) + np.eye(4)[::-1] * np.array([0, 0, 0, 0.5]) + np.diag([0, 0, 0, 1.0]), "last row"),
        ("home", "4 x 4 finite numbers, got home"),
    ],
)
def test_a_pose_that_is_none_is_refused(pose: np.ndarray, words: str) -> None:
    views, poses = exact("eye_in_hand")
    refuse(views, poses | {"02.png": pose}, rf"02\.png.*{words}")


def test_digits_that_a_file_cuts_off_are_made_good() -> None:
    T = TRUTH["eye_to_hand"][0]
    rounded = checked_pose(np.round(T, 4).tolist(), "it")
    np.testing.assert_allclose(rounded[:3, :3] @ rounded[:3, :3].T, np.eye(3), atol=1e-15)
    np.testing.assert_allclose(rounded, T, atol=1e-4)


def test_a_view_without_a_pose_and_an_unknown_mode_are_refused() -> None:
    views, poses = exact("eye_in_hand")
    refuse(views, {k: v for k, v in poses.items() if k != "07.png"}, r"1 of 12 images have no pose.*07\.png")
    refuse(views, poses, "eye_in_hand, eye_to_hand, got 'intrinsics'", mode="intrinsics")


@pytest.mark.parametrize("mistake", ["inverse poses", "other mode", "shuffled poses", "square of another size"])
def test_what_does_not_belong_together_is_refused(mistake: str) -> None:
    views, poses = exact("eye_in_hand", noise_px=0.1)
    mode: Mode = "eye_to_hand" if mistake == "other mode" else "eye_in_hand"
    board = BoardConfig(square_m=0.05, marker_m=0.037) if mistake == "square of another size" else BOARD
    if mistake == "inverse poses":
        poses = {name: inverse(T) for name, T in poses.items()}
    if mistake == "shuffled poses":
        poses = dict(zip(poses, [*list(poses.values())[3:], *list(poses.values())[:3]], strict=True))
    refuse(views, poses, r"reprojection error is .* px, allowed are 3.*--mode and --board", mode, board)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": 2}, "2 x 6"),
        ({"square_m": 35.0, "marker_m": 26.0}, "metres"),
        ({"marker_m": 0.04}, "0.04"),
        ({"dictionary": "DICT_9X9"}, "DICT_9X9.*DICT_4X4_50"),
        ({"dictionary": "DICT_4X4_50", "columns": 12, "rows": 9}, "54 markers.*50"),
    ],
)
def test_a_board_that_cannot_be_is_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        decode(BoardConfig, options)


def test_part_of_a_board_is_enough_but_not_a_line_of_it() -> None:
    image = np.pad(board_image(BOARD, 64), 32, constant_values=255)
    half = image.copy()
    half[:, 32 + 4 * 64 + 10 :] = 255
    assert not detect(half, BOARD).problem
    row = image.copy()
    row[32 + 2 * 64 - 12 :] = 255
    assert detect(row, BOARD).problem
    colour = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    np.testing.assert_array_equal(detect(colour, BOARD).pixels_N2, detect(image, BOARD).pixels_N2)


# ---- boards rendered in MuJoCo


@pytest.fixture(scope="module")
def scene() -> Iterator[BoardScene]:
    made = BoardScene(BOARD)
    yield made
    made.close()


@pytest.fixture(scope="module", params=MODES)
def rendered(request: pytest.FixtureRequest, scene: BoardScene) -> tuple[Mode, list[np.ndarray], np.ndarray]:
    """The mode, images, and the poses of the tool at which they were taken."""
    mode: Mode = request.param
    T_base_tool_V44 = tool_poses(camera_board_poses(BOARD, VIEWS, MODES.index(mode)), mode)
    return mode, scene.images(T_base_tool_V44, mode), T_base_tool_V44


def test_rendered_corners_are_where_the_true_camera_has_them(rendered: tuple) -> None:
    """Neither detection nor rendering nor the two together are off by a part of a pixel: no bias, little scatter."""
    mode, images, T_base_tool_V44 = rendered
    X, Y = TRUTH[mode]
    off = []
    for image, T_base_tool in zip(images, T_base_tool_V44, strict=True):
        view = detect(image, BOARD)
        mount = T_base_tool if mode == "eye_in_hand" else inverse(T_base_tool)
        T = inverse(mount @ X) @ Y
        off.append(view.pixels_N2 - true_model().project(BOARD.corners_m[view.ids_N] @ T[:3, :3].T + T[:3, 3]))
        assert angle_deg(board_pose(view, BOARD, true_model())[:3, :3], T[:3, :3]) < 0.5
    error = np.concatenate(off)
    assert len(error) > 0.95 * VIEWS * len(BOARD.corners_m)
    assert np.abs(error.mean(axis=0)).max() < 0.02
    assert np.sqrt(np.square(error).sum(axis=1).mean()) < 0.1


@pytest.mark.parametrize(("blur_px", "noise"), [(0.0, 0.0), (0.8, 4.0), (1.2, 8.0)], ids=["clean", "sensor", "bad"])
def test_rendered_boards_give_the_camera_to_a_millimetre(rendered: tuple, blur_px: float, noise: float) -> None:
    """Nothing but images and poses goes in: the intrinsics come from the same images."""
    mode, images, T_base_tool_V44 = rendered
    rng = np.random.default_rng(0)
    if blur_px:
        images = [as_by_a_sensor(image, blur_px, noise, rng) for image in images]
    views = [detect(image, BOARD, f"{i:02d}.png") for i, image in enumerate(images)]
    camera = calibrate_intrinsics(views, BOARD)
    assert camera.rms_px < 0.2
    np.testing.assert_allclose(camera.model.matrix_33, true_model().matrix_33, atol=1.5)
    np.testing.assert_allclose(np.diag(camera.model.matrix_33), np.diag(true_model().matrix_33), rtol=2e-3)
    found = calibrate_hand_eye(views, named(views, T_base_tool_V44), BOARD, camera.model, mode, camera.std_px)
    X = TRUTH[mode][0]
    error_m = float(np.linalg.norm(found.T_mount_camera[:3, 3] - X[:3, 3]))
    error_deg = angle_deg(found.T_mount_camera[:3, :3], X[:3, :3])
    print(f"{mode}: {1000 * error_m:.3f} mm, {error_deg:.3f} degrees, {found.rms_px:.3f} px")  # noqa: T201
    assert error_m < ALLOWED_M
    assert error_deg < ALLOWED_DEG
    assert found.rms_px < 0.2
    assert error_m < 4 * found.std_m
    assert error_deg < 4 * found.std_deg
    assert not found.rejected


# ---- the command


@pytest.fixture(scope="module")
def folder(rendered: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mode, Path]:
    """Images and poses as a user has them: one image does not show the board."""
    mode, images, T_base_tool_V44 = rendered
    path = tmp_path_factory.mktemp(mode)
    for i, image in enumerate(images):
        cv2.imwrite(str(path / f"{i:02d}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    cv2.imwrite(str(path / "floor.jpg"), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    poses = {f"{i:02d}.png": T.round(7).tolist() for i, T in enumerate(T_base_tool_V44)} | {
        "floor.jpg": np.eye(4).tolist()
    }
    (path / "poses.json").write_text(json.dumps(poses))
    return mode, path


def test_the_command_reports_and_stores(
    folder: tuple[Mode, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mode, images = folder
    out, numbers = tmp_path / "calibration" / "wrist.yaml", tmp_path / "numbers.json"
    assert main(["robot", "calibrate", str(images), "--mode", mode, "--out", str(out), "--json", str(numbers)]) == 0
    said = capsys.readouterr().out
    for words in (MOUNTS[mode][0], "reprojection error", "park", "left out: floor.jpg", "the board is not seen"):
        assert words in " ".join(said.split())
    stored, X = load_calibration(out), TRUTH[mode][0]
    assert (stored.camera, stored.mode, stored.views) == ("wrist", mode, VIEWS)
    assert stored.T_mount_camera is not None
    assert np.linalg.norm(stored.T_mount_camera[:3, 3] - X[:3, 3]) < ALLOWED_M
    assert angle_deg(stored.T_mount_camera[:3, :3], X[:3, :3]) < ALLOWED_DEG
    results = json.loads(numbers.read_text())
    assert results["hand_eye"]["rms_px"] == stored.errors["hand_eye_rms_px"] < 0.2
    assert len(results["hand_eye"]["views"]) == len(results["intrinsics"]["views"]) == VIEWS
    np.testing.assert_allclose(results["hand_eye"][MOUNTS[mode][0]], stored.T_mount_camera, atol=1e-12)


def test_intrinsics_found_before_are_used(folder: tuple[Mode, Path], tmp_path: Path) -> None:
    mode, images = folder
    first, second = tmp_path / "intrinsics.yaml", tmp_path / "wrist.yaml"
    assert main(["robot", "calibrate", str(images), "--out", str(first)]) == 0
    assert load_calibration(first).mode == "intrinsics"
    words = ["robot", "calibrate", str(images), "--mode", mode, "--out", str(second), "--intrinsics", str(first)]
    assert main([*words, "--camera", "left wrist"]) == 0
    stored = load_calibration(second)
    np.testing.assert_array_equal(stored.model.matrix_33, load_calibration(first).model.matrix_33)
    assert stored.camera == "left wrist"
    assert stored.errors["hand_eye_std_m"] > 1e-5  # that of the intrinsics is in it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["FOLDER is missing"]),
        ("{tmp}", ["--out is missing"]),
        ("{tmp} --out {tmp}/x.yaml", ["no image in"]),
        ("{tmp}/nothing --out {tmp}/x.yaml", ["no folder"]),
        ("{tmp} --out {tmp}/x.txt", [".yaml", "x.txt"]),
        ("{tmp} --out {tmp}/x.yaml --mode eye_in_hand", ["poses.json", "got none"]),
        ("{tmp} --out {tmp}/x.yaml --mode foot", ["mode", "foot", "eye_in_hand"]),
        ("{tmp} --out {tmp}/x.yaml --board.square-m 35", ["metres", "35"]),
        ("{tmp} --out {tmp}/x.yaml --max-error-px 0", ["max_error_px", "0"]),
        ("{tmp} --out {tmp}/x.yaml --intrinsics {tmp}/y.yaml", ["intrinsics"]),
        ("{tmp} --out {tmp}/x.yaml --mode eye_in_hand --intrinsics {tmp}/y.yaml", ["no file", "y.yaml"]),
        ("{images} --out {tmp}/x.yaml --board.dictionary DICT_6X6_50", ["got 0 of 21", "the board is not seen"]),
        ("{images} --out {tmp}/x.yaml --max-error-px 0.001", ["reprojection error", "0.001"]),
        ("--draw-board {tmp}/board.jpg", [".png", "board.jpg"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: str, words: list[str], folder: tuple[Mode, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = arguments.format(tmp=tmp_path, images=folder[1]).split()
    assert main(["robot", "calibrate", *filled]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vla-rl:")]
    assert len(said) == 1
    for word in words:
        assert word in said[0]
    assert not list(tmp_path.iterdir())


def test_the_command_draws_a_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "board.png"
    assert main(["robot", "calibrate", "--draw-board", str(path), "--board.columns", "9", "--board.rows", "6"]) == 0
    assert "9 x 6 squares of 32 mm" in capsys.readouterr().out
    assert not detect(cv2.imread(str(path)), BoardConfig(columns=9, rows=6)).problem


def test_files_of_poses_and_images_are_checked(tmp_path: Path) -> None:
    (tmp_path / "poses.json").write_text(json.dumps({"a.png": np.eye(4).tolist()}))
    np.testing.assert_array_equal(read_poses(tmp_path)["a.png"], np.eye(4))
    (tmp_path / "poses.json").write_text(json.dumps([np.eye(4).tolist()]))
    with pytest.raises(UserError, match=r"mapping of image names.*got list"):
        read_poses(tmp_path)
    (tmp_path / "poses.yaml").write_text(yaml.safe_dump({"a.png": np.eye(4).tolist()}))
    with pytest.raises(UserError, match=r"poses\.json and poses\.yaml"):
        read_poses(tmp_path)
    (tmp_path / "poses.json").unlink()
    np.testing.assert_array_equal(read_poses(tmp_path)["a.png"], np.eye(4))
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(UserError, match=r"b\.png is not an image"):
        detect_folder(tmp_path, BOARD)
