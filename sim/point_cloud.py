"""Labelled point clouds by ray casting against collision geometry: no OpenGL, under a millisecond.

A camera's square image is a grid of rays, of which a fixed number is cast: a share towards the boxes around the
objects, which are small, and the rest towards the whole workspace or, without fixtures, towards all that moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

NOTHING = -1
BACKGROUND, ROBOT, GRIPPER, FIRST_OBJECT = range(4)
# robosuite prefixes a gripper's bodies with "gripper0_right_"; other models name the fingers
GRIPPER_WORDS = ("gripper", "finger")
# boxes that reach behind the camera are cut here
MIN_DEPTH_M = 1e-3
# corners and edges of a box; the ends of an edge differ in one coordinate
_SIGNS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
_EDGES = np.array([[i, i | bit] for i in range(8) for bit in (1, 2, 4) if not i & bit])


@dataclass(frozen=True)
class PointCloud:
    """What a point cloud is made of.

    cameras: names of the model's cameras that the rays start from
    points: rows of a cloud, as 512 or 1024
    rays: rays of a cloud, shared alike by the cameras; 0.5 us each, and up to 3 us on the meshes of a robot
    object_share: share of the rays that is aimed at the objects alone, 0 to 1
    grid: pixels along each side of a camera's square image; a ray goes through the centre of a pixel
    low_m: corner of the workspace (x, y, z) in the world; points outside are cropped
    high_m: opposite corner of the workspace
    fixtures: whether points on the background (label 0: table, bins) are kept; it hides what is behind it either way
    groups: geom groups that rays see; 0 is robosuite's collision geometry
    noise_std_m: standard deviation of the measured distance along a ray
    dropout: fraction of rays whose return is lost, 0 to below 1
    """

    cameras: tuple[str, ...] = ("agentview",)
    points: int = 1024
    rays: int = 1280
    object_share: float = 0.2
    grid: int = 160
    low_m: tuple[float, float, float] = (-0.8, -0.8, 0.7)
    high_m: tuple[float, float, float] = (0.8, 0.8, 1.7)
    fixtures: bool = True
    groups: tuple[int, ...] = (0,)
    noise_std_m: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.cameras:
            raise ValueError("a point cloud wants at least one camera, got none")
        if self.points < 1 or self.grid < 1:
            raise ValueError(f"points and grid want at least 1, got {self.points} and {self.grid}")
        if self.rays < len(self.cameras):
            raise ValueError(f"rays wants at least one for each of {len(self.cameras)} cameras, got {self.rays}")
        if not 0.0 <= self.object_share <= 1.0:
            raise ValueError(f"object_share wants 0 to 1, got {self.object_share}")
        if not all(low < high for low, high in zip(self.low_m, self.high_m, strict=True)):
            raise ValueError(f"low_m must be below high_m, got {self.low_m} and {self.high_m}")
        if not 0.0 <= self.noise_std_m < np.inf:
            raise ValueError(f"noise_std_m wants a finite number of at least 0, got {self.noise_std_m}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout wants at least 0 and less than 1, got {self.dropout}")
        if not self.groups or not set(self.groups) <= set(range(mujoco.mjNGROUP)):
            raise ValueError(f"groups wants some of 0 to {mujoco.mjNGROUP - 1}, got {self.groups}")


@dataclass(frozen=True)
class SegmentationLabels:
    """Which thing each geom belongs to.

    names: name of each label: background, robot, gripper, then the objects by the names of their root bodies
    geom_label: (ngeom,) int32, the label of each geom
    """

    names: tuple[str, ...]
    geom_label: np.ndarray


def segmentation_labels(model: mujoco.MjModel) -> SegmentationLabels:
    """Label every geom: 0 background, 1 robot, 2 gripper, 3 and up the objects in the order of their bodies.

    A tree of bodies with an actuated joint is a robot, its gripper the bodies named so; any other tree with a joint
    is an object as a whole (a door with its frame); what has no joint is background.
    """
    root = model.body_rootid
    robot_roots = set(root[model.jnt_bodyid[_actuated_joints(model)]].tolist())
    moving_roots = sorted(set(root[model.jnt_bodyid].tolist()) - robot_roots)
    objects = {body: FIRST_OBJECT + index for index, body in enumerate(moving_roots)}
    body_label = np.array([objects.get(r, ROBOT if r in robot_roots else BACKGROUND) for r in root.tolist()], np.int32)
    for body in np.flatnonzero(body_label == ROBOT):
        if any(word in model.body(body).name for word in GRIPPER_WORDS):
            body_label[body] = GRIPPER
    names = ("background", "robot", "gripper", *(model.body(body).name for body in moving_roots))
    return SegmentationLabels(names, body_label[model.geom_bodyid])


def _actuated_joints(model: mujoco.MjModel) -> np.ndarray:
    """Joints that an actuator moves, itself or by a tendon."""
    kind, target = model.actuator_trntype, model.actuator_trnid[:, 0]
    direct = np.isin(kind, (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT))
    joints = [target[direct]]
    for tendon in target[kind == mujoco.mjtTrn.mjTRN_TENDON]:
        wraps = slice(model.tendon_adr[tendon], model.tendon_adr[tendon] + model.tendon_num[tendon])
        joints.append(model.wrap_objid[wraps][model.wrap_type[wraps] == mujoco.mjtWrap.mjWRAP_JOINT])
    return np.unique(np.concatenate(joints)).astype(int)


def camera_rays(fovy_deg: float, grid: int) -> np.ndarray:
    """Unit vectors through the pixel centres of a square image, in MuJoCo's camera frame (x right, y up, -z ahead).

    Returns:
        (grid * grid, 3) float64, row by row from the top left as in an image.
    """
    offset = (2.0 * np.arange(grid) + 1.0) / grid - 1.0
    extent = np.tan(np.deg2rad(fovy_deg) / 2)
    x, y = np.meshgrid(offset * extent, -offset * extent)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def box_corners(centre_N3: np.ndarray, half_N3: np.ndarray, rotation_N33: np.ndarray) -> np.ndarray:
    """Corners of boxes: (N, 8, 3), in the frame of ``centre_N3``; the columns of ``rotation_N33`` are the box's axes."""
    return centre_N3[:, None] + (_SIGNS * half_N3[:, None]) @ rotation_N33.transpose(0, 2, 1)


def image_rectangles(corners_N83: np.ndarray, fovy_deg: float, grid: int) -> np.ndarray:
    """Bounding rectangle of each box's image: (N, 4) int as first row, first column, row and column past the last.

    A rectangle may hold pixels beside its box, and misses none whose centre is on it; it is empty out of view.

    Args:
        corners_N83: corners in the camera frame (m), in the order of ``box_corners``.
        fovy_deg: vertical field of view.
        grid: pixels along each side of the image.
    """
    # the part of an edge that reaches behind the camera ends at the plane of least depth
    start_N12, end_N12 = corners_N83[:, _EDGES[:, 0]], corners_N83[:, _EDGES[:, 1]]
    start_depth, end_depth = -start_N12[..., 2], -end_N12[..., 2]
    crosses = (start_depth > MIN_DEPTH_M) != (end_depth > MIN_DEPTH_M)
    share = np.where(crosses, (MIN_DEPTH_M - start_depth) / np.where(crosses, end_depth - start_depth, 1.0), 0.0)
    points = np.concatenate([corners_N83, start_N12 + share[..., None] * (end_N12 - start_N12)], axis=1)
    depth = -points[..., 2]
    seen = np.concatenate([-corners_N83[..., 2] > MIN_DEPTH_M, crosses], axis=1)
    focal = 0.5 * grid / np.tan(np.deg2rad(fovy_deg) / 2)
    scale = focal / np.where(seen, depth, 1.0)
    column, row = 0.5 * grid + points[..., 0] * scale, 0.5 * grid - points[..., 1] * scale
    image = np.stack([row, column], axis=-1)
    low = np.where(seen[..., None], image, np.inf).min(axis=1)
    high = np.where(seen[..., None], image, -np.inf).max(axis=1)
    return np.concatenate([np.clip(np.floor(low), 0, grid), np.clip(np.floor(high) + 1, 0, grid)], axis=1).astype(int)


class RayCaster:
    """Cast the clouds of one model. Follows the camera poses and fields of view that the model has at each cast."""

    def __init__(self, model: mujoco.MjModel, config: PointCloud) -> None:
        """Build the label table.

        Raises:
            ValueError: a camera is unknown; the message lists those that there are.
        """
        self.config = config
        self.labels = segmentation_labels(model)
        self._model = model
        self._cameras = [_camera_index(model, name) for name in config.cameras]
        self._groups = np.isin(np.arange(mujoco.mjNGROUP), config.groups).astype(np.uint8)
        seen, label = np.isin(model.geom_group, config.groups), self.labels.geom_label
        self._objects = np.flatnonzero(seen & (label >= FIRST_OBJECT))
        moves = model.body_weldid[model.geom_bodyid] != 0
        self._arm = np.flatnonzero(seen & moves & np.isin(label, (ROBOT, GRIPPER)))
        self._low_m, self._high_m = np.array(config.low_m), np.array(config.high_m)
        self._rays = {fovy: camera_rays(fovy, config.grid) for fovy in model.cam_fovy[self._cameras].tolist()}
        self._budget = min(config.rays // len(config.cameras), config.grid**2)
        self._geom = np.empty(self._budget, np.int32)
        self._distance_m = np.empty(self._budget)

    def cast(self, data: mujoco.MjData, generator: np.random.Generator) -> np.ndarray:
        """Return the cloud of a state whose kinematics are up to date (``mj_forward``, ``mj_step1``).

        Args:
            data: state of the model that the caster was built with.
            generator: draws the rays, the noise and the rows; the same generator state gives the same cloud.

        Returns:
            (points, 4) float32: x, y, z in the world (m) and the segmentation label. Each return is there at most
            once where there are enough, at least once where there are too few; without any, all is zero and the
            label -1.
        """
        on_objects = self._boxes(data, self._objects)
        if self.config.fixtures:
            half_m = (self._high_m - self._low_m) / 2
            others = box_corners((self._low_m + half_m)[None], half_m[None], np.eye(3)[None])
        else:
            others = self._boxes(data, self._arm)
        boxes_N83 = np.concatenate([on_objects, others])
        parts = [self._returns(camera, data, boxes_N83, len(on_objects), generator) for camera in self._cameras]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        count, wanted = len(found), self.config.points
        if count == 0:
            cloud = np.zeros((wanted, 4), np.float32)
            cloud[:, 3] = NOTHING
            return cloud
        if count >= wanted:
            return found[generator.choice(count, wanted, replace=False)]
        return np.concatenate([found, found[generator.integers(count, size=wanted - count)]])

    def _returns(
        self, camera: int, data: mujoco.MjData, boxes_N83: np.ndarray, objects: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Points of one camera inside the workspace, with labels: (N, 4) float32; the first boxes are the objects'."""
        config = self.config
        origin_m, rotation_33 = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
        fovy_deg = float(self._model.cam_fovy[camera])
        if fovy_deg not in self._rays:
            self._rays = {fovy_deg: camera_rays(fovy_deg, config.grid)}
        rectangles = image_rectangles((boxes_N83 - origin_m) @ rotation_33, fovy_deg, config.grid).tolist()
        pixels = self._pixels(rectangles[:objects], rectangles[objects:], generator)
        count = len(pixels)
        if count == 0:
            return np.zeros((0, 4), np.float32)
        rays_N3 = self._rays[fovy_deg][pixels] @ rotation_33.T
        reach_m = float(np.linalg.norm(np.maximum(abs(self._low_m - origin_m), abs(self._high_m - origin_m))))
        geom, distance_m = self._geom[:count], self._distance_m[:count]
        mujoco.mj_multiRay(
            self._model, data, origin_m, rays_N3.reshape(-1), self._groups, 1, -1, geom, distance_m, count, reach_m
        )
        kept = geom >= 0
        label = self.labels.geom_label[geom]
        if not config.fixtures:
            kept &= label != BACKGROUND
        if config.dropout > 0.0:
            kept &= generator.random(count) >= config.dropout
        if config.noise_std_m > 0.0:
            distance_m += generator.normal(0.0, config.noise_std_m, count)
        points_N3 = origin_m + distance_m[:, None] * rays_N3
        kept &= ((points_N3 >= self._low_m) & (points_N3 <= self._high_m)).all(axis=1)
        found = np.empty((int(kept.sum()), 4), np.float32)
        found[:, :3] = points_N3[kept]
        found[:, 3] = label[kept]
        return found

    def _pixels(
        self, on_objects: list[list[int]], others: list[list[int]], generator: np.random.Generator
    ) -> np.ndarray:
        """Draw the pixels that rays go through: (N,) indices into the image, none twice."""
        mask = np.zeros((self.config.grid, self.config.grid), bool)
        for top, left, bottom, right in on_objects:
            mask[top:bottom, left:right] = True
        share = round(self.config.object_share * self._budget)
        first = _spread(np.flatnonzero(mask), share, generator)
        for top, left, bottom, right in others:
            mask[top:bottom, left:right] = True
        mask.reshape(-1)[first] = False
        return np.concatenate([first, _spread(np.flatnonzero(mask), self._budget - len(first), generator)])

    def _boxes(self, data: mujoco.MjData, geoms: np.ndarray) -> np.ndarray:
        """Corners in the world of the bounding boxes of those geoms that may reach into the workspace: (N, 8, 3)."""
        rotation_G33 = data.geom_xmat[geoms].reshape(-1, 3, 3)
        offset_G3, half_G3 = self._model.geom_aabb[geoms, :3], self._model.geom_aabb[geoms, 3:]
        centre_G3 = data.geom_xpos[geoms] + np.einsum("gij,gj->gi", rotation_G33, offset_G3)
        radius_G1 = np.linalg.norm(half_G3, axis=1, keepdims=True)
        near = ((centre_G3 + radius_G1 >= self._low_m) & (centre_G3 - radius_G1 <= self._high_m)).all(axis=1)
        return box_corners(centre_G3[near], half_G3[near], rotation_G33[near])


def _spread(pixels: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """At most ``most`` of the sorted pixels, none twice: one drawn from each of ``most`` strata of equal width."""
    if len(pixels) <= most:
        return pixels
    index = ((np.arange(most) + generator.random(most)) * (len(pixels) / max(most, 1))).astype(int)
    index = np.minimum(index, len(pixels) - 1)  # the sum may round up to the next whole number
    return pixels[index[np.diff(index, prepend=-1) > 0]]


def _camera_index(model: mujoco.MjModel, name: str) -> int:
    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
    if index < 0:
        raise ValueError(f"no camera named {name!r}; there are {[model.camera(i).name for i in range(model.ncam)]}")
    return index
