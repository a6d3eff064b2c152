"""Cameras: a thread per camera that keeps the newest frame only, and where its pixels look, as stored with the robot.

A queue of frames would make a slow reader act on the past. Here a reader gets the frame that came last, or is told that none comes. The
thread alone touches the device, so neither a read that blocks nor a device that hangs ever holds up the control loop.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np

from real_robot.boards import checked_pose
from vla_rl.runtime.config import read_yaml, write_yaml
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import write_text

Mode = Literal["intrinsics", "eye_in_hand", "eye_to_hand"]
# what hand-eye calibration finds: where the camera is, and where the board was
MOUNTS = {"eye_in_hand": ("T_tool_camera", "T_base_board"), "eye_to_hand": ("T_base_camera", "T_tool_board")}
WAIT_S = 0.2  # how long close() and wait() sleep at most before they look again


class CameraError(UserError):
    """A camera cannot be opened, is not as it was asked for, or delivers no frames; a robot that needs it has to stop."""


@dataclass(frozen=True)
class CameraConfig:
    """A camera.

    source: device index, device path, URL or video file
    width: of its images, pixels
    height: of its images, pixels
    fps: frames per second that a device is asked for (0: its own); a video file is played at its own
    open_timeout_s: time to open it and to deliver the first frame
    stale_s: a camera that has delivered nothing for so long has failed
    frozen_s: a camera whose images have been equal to the last bit for so long has failed (0: is not looked at)
    close_timeout_s: how long closing waits for a read that blocks
    """

    source: int | str
    width: int = 640
    height: int = 480
    fps: float = 0.0
    open_timeout_s: float = 10.0
    stale_s: float = 0.5
    frozen_s: float = 0.0
    close_timeout_s: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a camera wants images of at least 1 x 1 pixels, got {self.width} x {self.height}")
        for name in ("open_timeout_s", "stale_s", "close_timeout_s", "fps", "frozen_s"):
            value, may_be_0 = getattr(self, name), name in ("fps", "frozen_s")
            if not (math.isfinite(value) and (value > 0 or (value == 0 and may_be_0))):
                raise ValueError(f"{name} wants a finite number {'>= 0' if may_be_0 else 'above 0'}, got {value}")


@dataclass(frozen=True, eq=False)
class Frame:
    """One image.

    rgb_HW3: (height, width, 3) uint8, read-only
    received_s: when it was received, on the clock of ``time.monotonic``; it was exposed some time before
    number: 1 for the first frame of the camera; a reader that skips some has missed them
    """

    rgb_HW3: np.ndarray
    received_s: float
    number: int


class FrameSource(Protocol):
    """Where frames come from; used by one thread only."""

    def read(self) -> np.ndarray | None:
        """Wait for the next image and return it: (height, width, 3) uint8 RGB in memory of its own; None at the end."""

    def release(self) -> None:
        """Let go of the device."""


class OpenCVSource:
    """Frames of cv2.VideoCapture; a video file is played at its own pace, as a camera would deliver it."""

    def __init__(self, config: CameraConfig) -> None:
        """Open it, which may block; raises CameraError if that fails."""
        self._capture = cv2.VideoCapture(config.source)
        if not self._capture.isOpened():
            self._capture.release()
            raise CameraError(f"cannot open camera {config.source!r}: no such device, address or video file, or in use")
        is_file = isinstance(config.source, str) and Path(config.source).is_file()
        self._period_s = 1.0 / max(self._capture.get(cv2.CAP_PROP_FPS), 1.0) if is_file else 0.0
        self._due_s = time.monotonic()
        if not is_file:
            self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, config.width)
            self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, config.height)
            self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the driver's own queue is one of old frames, too
            if config.fps:
                self._capture.set(cv2.CAP_PROP_FPS, config.fps)

    def read(self) -> np.ndarray | None:
        """Wait for the next image; None at the end of the file or when the device is gone."""
        if self._period_s:
            self._due_s += self._period_s
            time.sleep(max(0.0, self._due_s - time.monotonic()))
        good, bgr = self._capture.read()
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB) if good else None

    def release(self) -> None:
        """Close the device."""
        self._capture.release()


class Camera:
    """Capture in a thread of its own; ``newest`` is what came last. Opened when made; close it, or use it in a ``with``."""

    def __init__(self, config: CameraConfig, open_source: Callable[[CameraConfig], FrameSource] = OpenCVSource) -> None:
        """Begin to open the camera and return at once.

        Args:
            config: which camera.
            open_source: opens it, in the capture thread; may block, and may raise CameraError, OSError or cv2.error.
        """
        self.config = config
        self._open_source = open_source
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._failure = ""
        self._stop = threading.Event()
        self._began_s = time.monotonic()
        self._moved_s = self._began_s
        # a daemon: a device that hangs for good must not keep the program from ending
        self._thread = threading.Thread(target=self._run, name=f"camera {config.source}", daemon=True)
        self._thread.start()

    def newest(self) -> Frame | None:
        """Return the newest frame at once, None before the first one.

        Raises:
            CameraError: the camera could not be opened, has failed, delivers nothing any more, or is closed.
        """
        with self._changed:
            return self._newest(time.monotonic())

    def wait(self, after: int = 0, timeout_s: float | None = None) -> Frame:
        """Wait for a frame with a number above ``after`` and return the newest.

        Args:
            after: number of the last frame that is no news.
            timeout_s: of the wait (None: until the camera itself counts as failed).

        Raises:
            CameraError: as ``newest``, and if there is none in time.
        """
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                now_s = time.monotonic()
                frame = self._newest(now_s)
                if frame is not None and frame.number > after:
                    return frame
                if now_s >= until_s:
                    raise CameraError(f"camera {self.config.source!r} has delivered no new frame in {timeout_s:g} s")
                self._changed.wait(min(WAIT_S, until_s - now_s))

    def _newest(self, now_s: float) -> Frame | None:
        config, frame = self.config, self._frame
        name = f"camera {config.source!r}"
        if self._failure:
            raise CameraError(self._failure)
        if frame is None:
            if now_s - self._began_s > config.open_timeout_s:
                raise CameraError(
                    f"{name} has delivered no frame in the {config.open_timeout_s:g} s that it has to open"
                )
            return None
        if now_s - frame.received_s > config.stale_s:
            age_s = now_s - frame.received_s
            raise CameraError(f"{name} has delivered no frame for {age_s:.2f} s; allowed are {config.stale_s:g} s")
        if config.frozen_s and now_s - self._moved_s > config.frozen_s:
            raise CameraError(f"{name} is frozen: its images have been the same for {now_s - self._moved_s:.2f} s")
        return frame

    def _run(self) -> None:
        source: FrameSource | None = None
        failure = f"the thread of camera {self.config.source!r} broke off"
        try:
            source = self._open_source(self.config)
            while not self._stop.is_set():
                image = source.read()
                received_s = time.monotonic()
                if image is None:
                    raise CameraError(f"camera {self.config.source!r} has stopped delivering frames")
                self._keep(image, received_s)
        except (CameraError, OSError, cv2.error) as error:
            failure = str(error) if isinstance(error, CameraError) else f"camera {self.config.source!r}: {error}"
        finally:  # whatever ends this thread, its readers are told
            self._fail(" ".join(failure.split()))
            if source is not None:
                source.release()

    def _keep(self, image: np.ndarray, received_s: float) -> None:
        config = self.config
        if image.shape != (config.height, config.width, 3) or image.dtype != np.uint8:
            got = " x ".join(map(str, (*image.shape[1::-1], *image.shape[2:])))
            raise CameraError(
                f"camera {config.source!r} delivers images of {got} {image.dtype}, "
                f"asked for are {config.width} x {config.height} x 3 uint8"
            )
        kept = image.view()
        kept.flags.writeable = False  # it has several readers
        before = self._frame
        moved = before is None or not config.frozen_s or not np.array_equal(before.rgb_HW3, kept)
        with self._changed:
            self._frame = Frame(kept, received_s, 1 if before is None else before.number + 1)
            if moved:
                self._moved_s = received_s
            self._changed.notify_all()

    def _fail(self, failure: str) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def close(self) -> None:
        """Stop capturing; waits ``close_timeout_s`` at most for a read that blocks. A second call does nothing."""
        self._stop.set()
        self._fail(f"camera {self.config.source!r} is closed")
        if self._thread is not threading.current_thread():
            self._thread.join(self.config.close_timeout_s)

    def __enter__(self) -> Camera:
        """Wait for the first frame; raises CameraError if there is none in ``open_timeout_s``."""
        try:
            self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class CameraModel:
    """Where a pixel looks: a pinhole with OpenCV's distortion. Its frame: x right, y down, z forward, the origin in the pinhole.

    Whole numbers are the centres of pixels, as everywhere in OpenCV: (0, 0) is the centre of the first pixel, and an image reaches from
    -0.5 to width - 0.5.

    width: of the images, pixels
    height: of the images, pixels
    matrix_33: fx, fy, cx, cy in pixels
    distortion_5: k1, k2, p1, p2, k3
    """

    width: int
    height: int
    matrix_33: np.ndarray
    distortion_5: np.ndarray

    def check_size(self, width: int, height: int) -> None:
        """Raise UserError unless the model is one of images of this size."""
        if (width, height) != (self.width, self.height):
            raise UserError(
                f"the calibration is for images of {self.width} x {self.height} pixels, got {width} x {height}; calibrate at that size"
            )

    def project(self, points_m_N3: np.ndarray) -> np.ndarray:
        """Pixels (N, 2) of points (N, 3), m, in the frame of the camera. Those behind it have no meaningful pixel."""
        points_N3 = np.asarray(points_m_N3, np.float64).reshape(-1, 1, 3)
        zero_3 = np.zeros(3)
        return cv2.projectPoints(points_N3, zero_3, zero_3, self.matrix_33, self.distortion_5)[0].reshape(-1, 2)

    def rays(self, pixels_N2: np.ndarray) -> np.ndarray:
        """Directions (N, 3) with z = 1 in which pixels (N, 2) look: times the depth, they are points in the frame of the camera."""
        pixels = np.asarray(pixels_N2, np.float64).reshape(-1, 1, 2)
        same, exactly = np.eye(3), (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-12)
        flat = cv2.undistortPointsIter(pixels, self.matrix_33, self.distortion_5, same, same, exactly).reshape(-1, 2)
        return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)

    def undistort(self, image: np.ndarray) -> np.ndarray:
        """The image that a camera with the same matrix and no distortion would see: same shape and type, black where nothing was seen.

        Raises:
            UserError: the image has another size than the model.
        """
        self.check_size(image.shape[1], image.shape[0])
        return cv2.undistort(image, self.matrix_33, self.distortion_5)

    def lift(self, depth_m_HW: np.ndarray, T_base_camera: np.ndarray) -> np.ndarray:
        """Points (height, width, 3), m, in the base frame of a depth image (m along the camera's axis); NaN where depth is 0 or none.

        Raises:
            UserError: the depth image has another size than the model.
        """
        self.check_size(depth_m_HW.shape[1], depth_m_HW.shape[0])
        column_HW, row_HW = np.meshgrid(np.arange(self.width), np.arange(self.height))
        rays_N3 = self.rays(np.stack([column_HW.ravel(), row_HW.ravel()], axis=1))
        depth_N1 = depth_m_HW.reshape(-1, 1).astype(np.float64)
        depth_N1[~(np.isfinite(depth_N1) & (depth_N1 > 0))] = np.nan
        points_N3 = rays_N3 * depth_N1 @ T_base_camera[:3, :3].T + T_base_camera[:3, 3]
        return points_N3.reshape(self.height, self.width, 3)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is stored with the robot for one camera.

    camera: its name
    date: when it was calibrated, ISO 8601
    mode: intrinsics, eye_in_hand or eye_to_hand
    model: matrix and distortion
    T_mount_camera: T_tool_camera or T_base_camera, None for intrinsics alone
    views: images that the last step used
    errors: by name, with their units
    """

    camera: str
    date: str
    mode: Mode
    model: CameraModel
    T_mount_camera: np.ndarray | None
    views: int
    errors: dict[str, float]

    def pose_in_base(self, T_base_tool: np.ndarray | None = None) -> np.ndarray:
        """T_base_camera (4, 4), for which one on the tool wants the pose of the tool.

        Raises:
            UserError: only the intrinsics are known, or the pose of the tool is missing.
        """
        if self.T_mount_camera is None:
            raise UserError(
                f"it is not known where camera {self.camera!r} is; calibrate it in mode {' or '.join(MOUNTS)}"
            )
        if self.mode == "eye_to_hand":
            return self.T_mount_camera
        if T_base_tool is None:
            raise UserError(f"camera {self.camera!r} is on the tool: where it is wants T_base_tool")
        return T_base_tool @ self.T_mount_camera

    def save(self, path: Path) -> None:
        """Write it as YAML, whole or not at all; ``load_calibration`` reads it back to the last bit."""
        model = self.model
        data: dict[str, Any] = {"camera": self.camera, "date": self.date, "mode": self.mode}
        data |= {"image_size": [model.width, model.height], "matrix": model.matrix_33.tolist()}
        data |= {"distortion": model.distortion_5.tolist()}
        if self.T_mount_camera is not None:
            data[MOUNTS[self.mode][0]] = self.T_mount_camera.tolist()
        write_text(path, write_yaml(data | {"views": self.views, "errors": dict(self.errors)}))


def load_calibration(path: Path) -> Calibration:
    """Read what ``Calibration.save`` wrote.

    Raises:
        UserError: there is no such file, or something in it is missing or is no calibration.
    """
    raw = read_yaml(path)
    mode = raw.get("mode")
    mount = MOUNTS[mode][0] if mode in MOUNTS else None
    wanted = [
        "camera",
        "date",
        "mode",
        "image_size",
        "matrix",
        "distortion",
        *([mount] if mount else []),
        "views",
        "errors",
    ]
    if sorted(map(str, raw)) != sorted(wanted) or mode not in ("intrinsics", *MOUNTS):
        raise UserError(
            f"{path} is no calibration of mode {mode!r}: wanted are {', '.join(wanted)}, got {', '.join(map(str, raw))}"
        )
    try:
        width, height = (int(n) for n in raw["image_size"])
        model = CameraModel(width, height, np.array(raw["matrix"], float), np.array(raw["distortion"], float))
        errors, views = {str(k): float(v) for k, v in raw["errors"].items()}, int(raw["views"])
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no calibration: {error}") from error
    shapes, finite = (model.matrix_33.shape, model.distortion_5.shape), np.isfinite(model.matrix_33).all()
    if shapes != ((3, 3), (5,)) or not finite or not np.isfinite(model.distortion_5).all():
        raise UserError(
            f"{path}: wanted a matrix of 3 x 3 and a distortion of 5 finite numbers, got {shapes[0]} and {shapes[1]}"
        )
    pose = checked_pose(raw[mount], f"{mount} in {path}") if mount else None
    return Calibration(str(raw["camera"]), str(raw["date"]), mode, model, pose, views, errors)
