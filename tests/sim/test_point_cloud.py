from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from sim.point_cloud import (
    BACKGROUND,
    FIRST_OBJECT,
    GRIPPER,
    NOTHING,
    ROBOT,
    PointCloud,
    RayCaster,
    camera_rays,
    segmentation_labels,
)
from sim.rendering import OffscreenRenderer
from sim.tasks.robosuite_task import RobosuiteEnv

import mujoco  # isort: skip  (after sim, which chooses the OpenGL back-end)

HALF_M = np.array([0.1, 0.08, 0.06])
RADIUS_M = 0.09
SCENE = f"""
<mujoco>
  <worldbody>
    <camera name="top" pos="0.1 0 1.4" fovy="50"/>
    <camera name="side" pos="0 -1.2 0.5" xyaxes="1 0 0 0 0.3 1" fovy="60"/>
    <geom name="floor" type="plane" size="3 3 0.1"/>
    <body name="block" pos="0.3 0.1 0.2" euler="20 30 40"><freejoint/>
      <geom name="block" type="box" size="{HALF_M[0]} {HALF_M[1]} {HALF_M[2]}"/></body>
    <body name="ball" pos="-0.3 0 0.2"><freejoint/><geom name="ball" type="sphere" size="{RADIUS_M}"/></body>
    <body name="arm" pos="0 0.4 0.1"><joint name="swing" axis="0 0 1"/>
      <geom name="arm" type="capsule" size="0.03 0.1"/>
      <body name="finger_left" pos="0 0 0.2"><geom name="finger" type="box" size="0.02 0.02 0.05"/></body></body>
    <body name="door"><geom name="frame" type="box" pos="-0.6 0.5 0.2" size="0.02 0.02 0.2"/>
      <body name="leaf" pos="-0.6 0.5 0.2"><joint axis="0 0 1"/>
        <geom name="leaf" type="box" pos="0.1 0 0" size="0.1 0.01 0.2"/></body></body>
  </worldbody>
  <actuator><motor joint="swing"/></actuator>
</mujoco>
"""
WHOLE = PointCloud(cameras=("top",), points=1500, rays=1500, low_m=(-1.0, -1.0, -0.1), high_m=(1.0, 1.0, 1.0))


def cast(scene: tuple[mujoco.MjModel, mujoco.MjData], config: PointCloud, seed: int = 0) -> np.ndarray:
    return RayCaster(scene[0], config).cast(scene[1], np.random.default_rng(seed))


def test_labels_tell_robot_gripper_and_objects_apart(scene) -> None:
    labels = segmentation_labels(scene[0])
    assert labels.names == ("background", "robot", "gripper", "block", "ball", "door")
    wanted = {"floor": BACKGROUND, "arm": ROBOT, "finger": GRIPPER, "block": 3, "ball": 4, "frame": 5, "leaf": 5}
    assert {name: labels.geom_label[scene[0].geom(name).id] for name in wanted} == wanted


@pytest.mark.parametrize("cameras", [("top",), ("side",), ("top", "side")])
def test_every_point_lies_on_the_surface_its_label_names(scene, cameras) -> None:
    model, data = scene
    caster = RayCaster(model, dataclasses.replace(WHOLE, cameras=cameras))
    cloud = caster.cast(data, np.random.default_rng(0)).astype(np.float64)
    points_m, label = cloud[:, :3], cloud[:, 3]
    tolerance_m = 1e-6
    assert {0, 3, 4} <= set(label)
    floor = points_m[label == BACKGROUND]
    assert np.abs(floor[:, 2]).max() < tolerance_m
    ball = points_m[label == 4]
    assert np.abs(np.linalg.norm(ball - data.body("ball").xpos, axis=1) - RADIUS_M).max() < tolerance_m
    block = (points_m[label == 3] - data.body("block").xpos) @ data.body("block").xmat.reshape(3, 3)
    assert np.abs((np.abs(block) / HALF_M).max(axis=1) - 1).max() * HALF_M.max() < tolerance_m


@pytest.mark.parametrize("camera", ["top", "side"])
def test_the_cloud_agrees_with_the_depth_image(scene, camera) -> None:
    model, data = scene
    grid = 96
    renderer = OffscreenRenderer(model, grid, grid)
    depth_m = renderer.depth(data, camera).reshape(-1).astype(np.float64)
    renderer.close()
    rays = camera_rays(model.camera(camera).fovy[0], grid)
    rotation = data.camera(camera).xmat.reshape(3, 3)
    seen_m = data.camera(camera).xpos + (rays / -rays[:, 2:] * depth_m[:, None]) @ rotation.T
    whole = dataclasses.replace(WHOLE, cameras=(camera,), grid=grid, rays=grid**2, points=grid**2)
    cloud_m = np.unique(cast(scene, whole)[:, :3], axis=0).astype(np.float64)
    inside = ((seen_m > np.array(whole.low_m)) & (seen_m < np.array(whole.high_m))).all(axis=1)
    assert len(cloud_m) > 0.9 * inside.sum() > 1000
    # the pixel that a point came from
    local = (cloud_m - data.camera(camera).xpos) @ rotation
    scale = 0.5 * grid / np.tan(np.deg2rad(model.camera(camera).fovy[0]) / 2) / -local[:, 2]
    row = np.floor(grid / 2 - local[:, 1] * scale).astype(int)
    column = np.floor(grid / 2 + local[:, 0] * scale).astype(int)
    error_m = np.linalg.norm(seen_m[row * grid + column] - cloud_m, axis=1)
    assert np.mean(error_m < 0.003) > 0.98  # round primitives are drawn as facets
    assert np.median(error_m) < 0.0005


def test_points_outside_the_workspace_are_cropped(scene) -> None:
    config = dataclasses.replace(WHOLE, low_m=(-0.5, -0.2, 0.05), high_m=(0.4, 0.3, 0.25), noise_std_m=0.01)
    cloud = cast(scene, config)
    assert (cloud[:, :3] >= np.float32(config.low_m)).all()
    assert (cloud[:, :3] <= np.float32(config.high_m)).all()
    assert len(np.unique(cloud, axis=0)) > 50


def test_an_empty_workspace_gives_zeros_labelled_nothing(scene) -> None:
    cloud = cast(scene, dataclasses.replace(WHOLE, low_m=(0.8, 0.8, 0.8), high_m=(0.9, 0.9, 0.9), points=7))
    assert cloud.shape == (7, 4)
    assert (cloud[:, :3] == 0).all()
    assert (cloud[:, 3] == NOTHING).all()


@pytest.mark.parametrize("points", [1, 512, 1024, 5000])
def test_a_cloud_has_as_many_points_as_asked_for(scene, points) -> None:
    cloud = cast(scene, dataclasses.replace(WHOLE, points=points))
    assert cloud.shape == (points, 4)
    assert cloud.dtype == np.float32
    returns = len(np.unique(cloud, axis=0))
    assert returns == min(points, 1500) or (points > 1000 and returns > 1000)


@pytest.mark.parametrize("change", [{}, {"noise_std_m": 0.01}, {"dropout": 0.3}, {"fixtures": False}])
def test_the_generator_decides_the_cloud(scene, change) -> None:
    config = dataclasses.replace(WHOLE, points=256, **change)
    np.testing.assert_array_equal(cast(scene, config, seed=1), cast(scene, config, seed=1))
    assert not np.array_equal(cast(scene, config, seed=1), cast(scene, config, seed=2))


def test_a_cast_does_not_depend_on_the_casts_before(scene) -> None:
    caster = RayCaster(scene[0], WHOLE)
    first = caster.cast(scene[1], np.random.default_rng(0))
    kept = first.copy()
    caster.cast(scene[1], np.random.default_rng(1))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(caster.cast(scene[1], np.random.default_rng(0)), kept)


def test_noise_moves_points_along_their_rays_by_its_deviation(scene) -> None:
    _, data = scene
    config = dataclasses.replace(WHOLE, low_m=(-1.0, -1.0, -0.5), noise_std_m=0.01, points=3000, rays=3000)
    cloud = np.unique(cast(scene, config), axis=0)
    floor = cloud[cloud[:, 3] == BACKGROUND, :3] - data.camera("top").xpos
    along_m = np.linalg.norm(floor, axis=1) * (1 - data.camera("top").xpos[2] / -floor[:, 2])
    assert len(along_m) > 1000
    assert along_m.mean() == pytest.approx(0, abs=0.001)
    assert along_m.std() == pytest.approx(0.01, rel=0.1)


def test_dropout_loses_its_share_of_the_returns(scene) -> None:
    config = dataclasses.replace(WHOLE, points=6000, rays=4000)
    whole = len(np.unique(cast(scene, config), axis=0))
    left = len(np.unique(cast(scene, dataclasses.replace(config, dropout=0.4)), axis=0))
    assert left / whole == pytest.approx(0.6, abs=0.03)


def test_without_fixtures_only_what_moves_is_left(scene) -> None:
    cloud = cast(scene, dataclasses.replace(WHOLE, fixtures=False))
    assert set(cloud[:, 3]) == {1, 2, 3, 4, 5}


def test_objects_get_their_share_of_the_rays(scene) -> None:
    shares = [
        (cast(scene, dataclasses.replace(WHOLE, object_share=share, points=500))[:, 3] >= FIRST_OBJECT).mean()
        for share in (0.0, 0.3, 0.9)
    ]
    assert shares[0] < shares[1] < shares[2]


def test_rays_miss_no_part_of_an_object_beside_or_behind_the_camera(scene) -> None:
    # a box around the camera itself, of which corners lie ahead and behind
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><worldbody>
        <body name="eye"><freejoint/><camera name="eye" fovy="90"/>
          <geom type="box" pos="0.3 0 -0.1" size="0.1 0.2 0.4"/><geom type="box" pos="0 0 -1" size="0.2 0.2 0.1"/></body>
        </worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    box = {"low_m": (-3.0, -3.0, -3.0), "high_m": (3.0, 3.0, 3.0)}
    aimed = PointCloud(cameras=("eye",), points=2000, rays=1600, grid=40, fixtures=False, **box)  # type: ignore[arg-type]
    whole = dataclasses.replace(aimed, fixtures=True, object_share=0.0)
    returned = [np.unique(cast((model, data), config), axis=0) for config in (aimed, whole)]
    np.testing.assert_array_equal(*returned)


def test_the_cloud_follows_the_camera_and_the_state() -> None:
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    caster = RayCaster(model, WHOLE)
    model.camera("top").pos[0] -= 0.2
    model.camera("top").fovy[:] = 40
    data.qpos[2] += 0.1
    mujoco.mj_forward(model, data)
    cloud = caster.cast(data, np.random.default_rng(0)).astype(float)
    np.testing.assert_array_equal(cloud, cast((model, data), WHOLE).astype(float))
    block = (cloud[cloud[:, 3] == 3, :3] - data.body("block").xpos) @ data.body("block").xmat.reshape(3, 3)
    assert np.abs((np.abs(block) / HALF_M).max(axis=1) - 1).max() < 1e-4


def test_bad_configs_are_named(scene) -> None:
    for change, word in (
        ({"cameras": ()}, "camera"),
        ({"points": 0}, "points"),
        ({"rays": 0}, "rays"),
        ({"object_share": 1.5}, "1.5"),
        ({"low_m": (1.0, 0.0, 0.0)}, "low_m"),
        ({"noise_std_m": -1.0}, "-1.0"),
        ({"dropout": 1.0}, "1.0"),
        ({"groups": (9,)}, "9"),
    ):
        with pytest.raises(ValueError, match=word):
            dataclasses.replace(WHOLE, **change)
    with pytest.raises(ValueError, match=r"nose.*top.*side"):
        RayCaster(scene[0], dataclasses.replace(WHOLE, cameras=("nose",)))


def test_lift_shows_the_cube_where_it_is(lift: RobosuiteEnv) -> None:
    caster = RayCaster(lift.model, PointCloud(cameras=("agentview", "robot0_eye_in_hand")))
    assert caster.labels.names == ("background", "robot", "gripper", "cube_main")
    cloud = caster.cast(lift.data, np.random.default_rng(0))
    assert set(cloud[:, 3]) == {0, 1, 2, 3}
    cube_m = cloud[cloud[:, 3] == FIRST_OBJECT, :3]
    assert len(cube_m) > 50
    assert np.linalg.norm(cube_m - lift.body_pose("cube_main").position_m, axis=1).max() < 0.022 * np.sqrt(3)
    gripper_m = cloud[cloud[:, 3] == GRIPPER, :3]
    assert np.linalg.norm(gripper_m - lift.tool_pose().position_m, axis=1).max() < 0.25
    table_m = cloud[cloud[:, 3] == BACKGROUND, :3]
    assert (table_m[:, 2] < 0.801).all()
    assert len(np.unique(cloud, axis=0)) == len(cloud) == 1024


def test_a_cloud_of_lift_takes_about_a_millisecond(lift: RobosuiteEnv) -> None:
    caster = RayCaster(lift.model, PointCloud())
    generator = np.random.default_rng(0)
    times_s = []
    for _ in range(30):
        start_s = time.perf_counter()
        caster.cast(lift.data, generator)
        times_s.append(time.perf_counter() - start_s)
    assert min(times_s) < 0.002  # 0.0007 on an idle core
