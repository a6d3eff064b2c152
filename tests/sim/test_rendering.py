from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from sim.rendering import (
    MAX_FACES,
    MESH_SIZE_M,
    MissingOpenGLError,
    OffscreenRenderer,
    light_model,
    missing_opengl,
    thinned,
)
from sim.task import load_task
from sim.tasks.robosuite_task import RobosuiteEnv
from vla_rl.runtime.errors import UserError

import mujoco  # isort: skip  (after sim, which chooses the OpenGL back-end)

CAMERA_HEIGHT_M = 1.5
BOX_TOP_M = 0.2


def ball(rings: int = 40) -> str:
    """Vertices of a mesh of a ball, radius 0.1 m, with far more faces than the light look keeps."""
    angles = [(np.pi * (i + 0.5) / rings, np.pi * j / rings) for i in range(rings) for j in range(2 * rings)]
    points = [(np.sin(a) * np.cos(b), np.sin(a) * np.sin(b), np.cos(a)) for a, b in angles]
    return " ".join(f"{0.1 * x:.6f}" for point in points for x in point)


SCENE = f"""
<mujoco>
  <asset><mesh name="ball" vertex="{ball()}"/></asset>
  <worldbody>
    <light name="lamp" pos="0 0 3" dir="0 0 -1" diffuse="0.6 0.6 0.6"/>
    <camera name="top" pos="0 0 {CAMERA_HEIGHT_M}" fovy="60"/>
    <camera name="side" pos="0 -1.5 0.3" xyaxes="1 0 0 0 0.2 1"/>
    <geom name="floor" type="plane" size="5 5 0.1" rgba="0.3 0.3 0.3 1"/>
    <body name="block" pos="0.3 0 0.1"><freejoint/><geom name="block" type="box" size="0.1 0.1 0.1" rgba="0.8 0.1 0.1 1"/></body>
    <body name="ball" pos="-0.3 0 0.1"><freejoint/><geom name="ball" type="mesh" mesh="ball" rgba="0.1 0.7 0.1 1"/></body>
  </worldbody>
</mujoco>
"""


def drawn(renderer: OffscreenRenderer, data: mujoco.MjData, camera: str) -> np.ndarray:
    image = renderer.rgb(data, camera).astype(float)
    renderer.close()
    return image


def test_no_thinned_face_is_collapsed_or_there_twice() -> None:
    model = mujoco.MjModel.from_xml_string(SCENE)
    vertex, face = model.mesh_vert.astype(float), model.mesh_face
    for cells in (2, 5, 20):
        merged, faces, kept = thinned(vertex, face, cells)
        ordered = np.sort(faces[kept], axis=1)
        assert (np.diff(ordered, axis=1) > 0).all()
        assert len(np.unique(ordered, axis=0)) == len(kept)
        moved_m = np.linalg.norm(merged[faces] - vertex[face], axis=-1)
        assert moved_m.max() <= np.sqrt(3) * np.ptp(vertex, axis=0).max() / cells


def test_cells_finer_than_the_mesh_leave_it_as_it_is() -> None:
    model = mujoco.MjModel.from_xml_string(SCENE)
    vertex, face = model.mesh_vert.astype(float), model.mesh_face
    merged, faces, kept = thinned(vertex, face, 10_000)
    assert len(kept) == len(face)
    np.testing.assert_allclose(merged[faces], vertex[face])


def test_the_light_model_has_few_faces_and_the_source_is_untouched(lift: RobosuiteEnv) -> None:
    model = lift.model
    before = model.mesh_face.copy(), model.mesh_vert.copy(), model.mesh_facenum.copy(), model.vis.quality.offsamples
    light = light_model(model)
    for mesh in range(model.nmesh):
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        size_m = float(np.ptp(model.mesh_vert[vertices], axis=0).max())
        assert 0 < light.mesh_facenum[mesh] <= MAX_FACES * max(1.0, size_m / MESH_SIZE_M)
    assert light.mesh_facenum.sum() * 10 < model.mesh_facenum.sum()
    assert (light.nq, light.nbody, light.ngeom) == (model.nq, model.nbody, model.ngeom)
    after = model.mesh_face, model.mesh_vert, model.mesh_facenum, model.vis.quality.offsamples
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("look", ["light", "full"])
@pytest.mark.parametrize(("width", "height"), [(84, 84), (224, 224), (120, 90), (700, 500)])
def test_depth_is_the_distance_along_the_axis(scene, look, width, height) -> None:
    model, data = scene
    renderer = OffscreenRenderer(model, width, height, look=look)
    depth = renderer.depth(data, "top")
    renderer.close()
    assert depth.shape == (height, width)
    assert depth.dtype == np.float32
    focal = 0.5 * height / np.tan(np.deg2rad(30))
    column = round(width / 2 + focal * 0.3 / (CAMERA_HEIGHT_M - BOX_TOP_M))
    assert depth[height // 2, column] == pytest.approx(CAMERA_HEIGHT_M - BOX_TOP_M, abs=1e-4)
    np.testing.assert_allclose(depth[:5], CAMERA_HEIGHT_M, atol=1e-4)  # a plane is as far in the corners


def test_the_top_row_of_an_image_is_up(scene) -> None:
    model, data = scene
    renderer = OffscreenRenderer(model, 64, 64)
    depth = renderer.depth(data, "side")
    renderer.close()
    assert depth[0].mean() > depth[-1].mean()  # sky above, floor below


def test_looks_agree_in_the_colour_of_every_object(scene) -> None:
    model, data = scene
    images = {look: drawn(OffscreenRenderer(model, 128, 128, look=look), data, "top") for look in ("light", "full")}
    pixel = {"block": (64, 64 + 26), "ball": (64, 64 - 26), "floor": (15, 64)}
    for name, (row, column) in pixel.items():
        light, full = (
            images[k][row - 4 : row + 5, column - 4 : column + 5].mean(axis=(0, 1)) for k in ("light", "full")
        )
        assert np.abs(light - full).max() < 12, name
        assert np.argmax(light) == {"block": 0, "ball": 1}.get(name, np.argmax(light))


@pytest.mark.parametrize("camera", ["agentview", "frontview", "robot0_eye_in_hand"])
def test_lift_looks_alike_in_both_looks(lift: RobosuiteEnv, camera: str) -> None:
    light, full = (
        drawn(OffscreenRenderer(lift.model, 84, 84, look=look), lift.data, camera) for look in ("light", "full")
    )
    assert np.abs(light - full).mean() < 8
    assert np.abs(light.mean(axis=(0, 1)) - full.mean(axis=(0, 1))).max() < 4

    def red(image: np.ndarray) -> np.ndarray:
        return (image[..., 0] > 70) & (image[..., 0] > 2 * image[..., 1]) & (image[..., 0] > 2 * image[..., 2])

    cube = red(light) & red(full)
    assert cube.sum() >= 0.6 * max(red(light).sum(), red(full).sum()) > 0
    assert np.abs(light[cube].mean(axis=0) - full[cube].mean(axis=0)).max() < 15


def test_the_light_look_is_many_times_faster(lift: RobosuiteEnv) -> None:
    least_s = {}
    for look in ("light", "full"):
        renderer = OffscreenRenderer(lift.model, 84, 84, look=look)
        times_s = []
        for _ in range(6):
            start_s = time.perf_counter()
            renderer.rgb(lift.data, "agentview")
            times_s.append(time.perf_counter() - start_s)
        least_s[look] = min(times_s)
        renderer.close()
    assert least_s["light"] * 8 < least_s["full"]  # 18 on an idle core


def test_push_t_is_drawn_in_both_looks() -> None:
    env = load_task("push_t").make_env()
    env.reset(seed=0)
    model, data = env.model, env.data  # type: ignore[attr-defined]
    light, full = (drawn(OffscreenRenderer(model, 96, 96, look=look), data, "top") for look in ("light", "full"))
    env.close()
    assert np.abs(light - full).mean() < 4
    assert light.std() > 10


def test_the_model_of_the_caller_is_not_written_to(scene) -> None:
    model, data = scene
    size = model.vis.global_.offwidth, model.vis.global_.offheight
    drawn(OffscreenRenderer(model, 1000, 900), data, "top")
    assert (model.vis.global_.offwidth, model.vis.global_.offheight) == size


@pytest.mark.parametrize("look", ["light", "full"])
def test_colours_lights_and_cameras_of_the_model_are_followed(scene, look) -> None:
    model, data = scene
    renderer = OffscreenRenderer(model, 64, 64, look=look)
    centre = slice(28, 36), slice(41, 49)
    assert renderer.rgb(data, "top")[centre].mean(axis=(0, 1)).argmax() == 0
    model.geom("block").rgba[:] = (0.1, 0.1, 0.9, 1)
    blue = renderer.rgb(data, "top")
    assert blue[centre].mean(axis=(0, 1)).argmax() == 2
    model.light("lamp").diffuse[:] = 0
    assert renderer.rgb(data, "top").mean() < blue.mean()
    model.camera("top").pos[2] += 1.0
    mujoco.mj_forward(model, data)
    assert renderer.depth(data, "top")[0, 0] == pytest.approx(CAMERA_HEIGHT_M + 1.0, abs=1e-3)
    renderer.close()


def test_an_image_does_not_depend_on_what_was_drawn_before(scene) -> None:
    model, data = scene
    first, second = OffscreenRenderer(model, 64, 64, look="full"), OffscreenRenderer(model, 80, 60)
    alone = first.rgb(data, "top")
    second.depth(data, "side")
    first.depth(data, "side")
    np.testing.assert_array_equal(first.rgb(data, "top"), alone)
    second.close()
    np.testing.assert_array_equal(first.rgb(data, "top"), alone)
    first.close()


def test_an_unknown_camera_names_those_there_are(scene) -> None:
    model, data = scene
    renderer = OffscreenRenderer(model, 32, 32)
    for camera in ("nose", 2, -1):
        for draw in (renderer.rgb, renderer.depth):
            with pytest.raises(ValueError, match=rf"{camera}.*top.*side"):
                draw(data, camera)
    np.testing.assert_array_equal(renderer.rgb(data, 1), renderer.rgb(data, "side"))
    renderer.close()
    renderer.close()
    with pytest.raises(RuntimeError, match="closed"):
        renderer.rgb(data, "top")


def test_bad_arguments_are_named(scene) -> None:
    model, _ = scene
    with pytest.raises(ValueError, match="0 x 32"):
        OffscreenRenderer(model, 0, 32)
    with pytest.raises(ValueError, match=r"ugly.*light.*full"):
        OffscreenRenderer(model, 32, 32, look="ugly")  # type: ignore[arg-type]


_DRAW = """
from vla_rl.runtime.errors import UserError
try:
    from sim.rendering import OffscreenRenderer, mujoco
    OffscreenRenderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 32, 32)
except UserError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "broken",
    [
        {"MUJOCO_GL": "bogus"},
        {"MUJOCO_GL": "glfw"},
        {"MUJOCO_GL": "disable"},
        {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"},
        {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"},
    ],
    ids=lambda b: " ".join(b.values()),
)
def test_a_backend_that_does_not_work_is_one_line(broken: dict[str, str]) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM")}
    ran = subprocess.run([sys.executable, "-c", _DRAW], env=kept | broken, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("MissingOpenGLError")
    assert ran.stdout.count("\n") == 1
    assert ran.stderr == ""
    for word in (f"MUJOCO_GL={broken['MUJOCO_GL']}", "egl, osmesa, glfw", "vla-rl doctor"):
        assert word in ran.stdout


def test_missing_opengl_is_an_error_of_the_user() -> None:
    assert issubclass(MissingOpenGLError, UserError)
    assert "\n" not in str(missing_opengl(RuntimeError("two\nlines")))
