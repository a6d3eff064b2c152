"""A ChArUco board, a tool and a camera in MuJoCo: images of which every pose and the camera's matrix are known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from real_robot.boards import BoardConfig, board_image, inverse, pose_of
from real_robot.cameras import CameraModel, Mode
from sim.rendering import OffscreenRenderer, mujoco

WIDTH, HEIGHT, FOVY_DEG = 640, 480, 45.0
SUPERSAMPLING = 4  # a sensor's pixel is the mean over its area, not one ray through its centre
SQUARE_TEXELS = 128
# MuJoCo's cameras look along -z with y up, OpenCV's along z with y down; a plane's y is up, a board's down
FLIPPED = np.diag([1.0, -1.0, -1.0])

T_TOOL_CAMERA = pose_of(
    Rotation.from_euler("xyz", [12, -8, 95], degrees=True).as_matrix(), np.array([0.05, -0.03, 0.06])
)
T_BASE_BOARD = pose_of(Rotation.from_euler("xyz", [178, 3, 40], degrees=True).as_matrix(), np.array([0.55, 0.1, 0.02]))
T_BASE_CAMERA = pose_of(Rotation.from_euler("xyz", [-115, 4, 80], degrees=True).as_matrix(), np.array([0.9, -0.3, 0.5]))
T_TOOL_BOARD = pose_of(
    Rotation.from_euler("xyz", [170, 15, -60], degrees=True).as_matrix(), np.array([-0.1, 0.07, 0.05])
)
TRUTH = {"eye_in_hand": (T_TOOL_CAMERA, T_BASE_BOARD), "eye_to_hand": (T_BASE_CAMERA, T_TOOL_BOARD)}

SCENE = """
<mujoco>
  <visual><headlight ambient="0.35 0.35 0.35" diffuse="0.4 0.4 0.4" specular="0 0 0"/><map znear="0.01" zfar="10"/></visual>
  <statistic extent="1" center="0 0 0"/>
  <asset>
    <texture name="board" type="2d" file="board.png"/>
    <material name="board" texture="board" specular="0"/>
  </asset>
  <worldbody>
    <light pos="0.3 -0.2 1.5" dir="0 0 -1" directional="true" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
    <geom type="plane" size="3 3 0.1" pos="0 0 -0.3" rgba="0.35 0.4 0.45 1"/>
    <body name="camera" mocap="true"><camera name="camera" fovy="{fovy}"/></body>
    <body name="board" mocap="true"><geom type="plane" size="{x} {y} 0.01" material="board"/></body>
  </worldbody>
</mujoco>
"""


def true_model() -> CameraModel:
    """The camera's model as MuJoCo draws: square pixels, the axis through the middle of the image, no distortion.

    The middle of an image lies between its pixels, at ((w - 1) / 2, (h - 1) / 2) where whole numbers are the centres of pixels.
    """
    focal_px = 0.5 * HEIGHT / np.tan(np.deg2rad(FOVY_DEG) / 2)
    matrix = np.array([[focal_px, 0, (WIDTH - 1) / 2], [0, focal_px, (HEIGHT - 1) / 2], [0, 0, 1]])
    return CameraModel(WIDTH, HEIGHT, matrix, np.zeros(5))


def camera_board_poses(board: BoardConfig, count: int, seed: int) -> np.ndarray:
    """T_camera_board (count, 4, 4) of a board that is turned and tilted, near and far, in all parts of the image."""
    rng = np.random.default_rng(seed)
    model = true_model()
    half_3 = 0.5 * board.square_m * np.array([board.columns, board.rows, 0])
    poses: list[np.ndarray] = []
    while len(poses) < count:
        tilt = rng.uniform(10, 40) * np.array([np.cos(a := rng.uniform(0, 2 * np.pi)), np.sin(a), 0])
        turn = Rotation.from_rotvec(tilt, degrees=True) * Rotation.from_euler("z", rng.uniform(-60, 60), degrees=True)
        centre_m = rng.uniform(0.38, 0.6) * np.array([rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2), 1.0])
        T = pose_of(turn.as_matrix(), centre_m - turn.as_matrix() @ half_3)
        pixels = model.project(board.corners_m @ T[:3, :3].T + T[:3, 3])
        if (pixels > 12).all() and (pixels < np.array([WIDTH, HEIGHT]) - 12).all():
            poses.append(T)
    return np.array(poses)


def tool_poses(T_camera_board_V44: np.ndarray, mode: Mode) -> np.ndarray:
    """T_base_tool (V, 4, 4) from which the camera sees the board so."""
    X, Y = TRUTH[mode]
    T_mount_V44 = Y @ inverse(T_camera_board_V44) @ inverse(X)
    return T_mount_V44 if mode == "eye_in_hand" else inverse(T_mount_V44)


@dataclass
class BoardScene:
    """The scene, drawn at 640 x 480 as a sensor would integrate it."""

    board: BoardConfig

    def __post_init__(self) -> None:
        margin = SQUARE_TEXELS // 2
        image = np.pad(board_image(self.board, SQUARE_TEXELS), margin, constant_values=255)
        half_m = 0.5 * self.board.square_m * (np.array([self.board.columns, self.board.rows]) + 1)
        xml = SCENE.format(fovy=FOVY_DEG, x=half_m[0], y=half_m[1])
        self.model = mujoco.MjModel.from_xml_string(xml, {"board.png": cv2.imencode(".png", image)[1].tobytes()})
        self.data = mujoco.MjData(self.model)
        self.renderer = OffscreenRenderer(self.model, SUPERSAMPLING * WIDTH, SUPERSAMPLING * HEIGHT)
        corner_m_3 = np.array([-0.5 * self.board.columns, 0.5 * self.board.rows, 0]) * self.board.square_m
        self.T_plane_board = pose_of(FLIPPED, corner_m_3)

    def image(self, T_base_camera: np.ndarray, T_base_board: np.ndarray) -> np.ndarray:
        """What the camera sees: (480, 640, 3) uint8 RGB."""
        poses = {
            "camera": T_base_camera @ pose_of(FLIPPED, np.zeros(3)),
            "board": T_base_board @ inverse(self.T_plane_board),
        }
        for name, T in poses.items():
            mocap = self.model.body(name).mocapid[0]
            self.data.mocap_pos[mocap] = T[:3, 3]
            self.data.mocap_quat[mocap] = Rotation.from_matrix(T[:3, :3]).as_quat(scalar_first=True)
        mujoco.mj_forward(self.model, self.data)
        drawn = self.renderer.rgb(self.data, "camera")
        return cv2.resize(drawn, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)

    def images(self, T_base_tool_V44: np.ndarray, mode: Mode) -> list[np.ndarray]:
        """What the camera sees at each pose of the tool."""
        X, Y = TRUTH[mode]
        if mode == "eye_in_hand":
            return [self.image(T @ X, Y) for T in T_base_tool_V44]
        return [self.image(X, T @ Y) for T in T_base_tool_V44]

    def close(self) -> None:
        """Free the renderer."""
        self.renderer.close()


def as_by_a_sensor(image: np.ndarray, blur_px: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Blur an image and add noise, in grey levels."""
    blurred = cv2.GaussianBlur(image, (0, 0), blur_px).astype(np.float64)
    return np.clip(np.rint(blurred + rng.normal(0.0, noise, image.shape)), 0, 255).astype(np.uint8)
