"""Off-screen colour and depth images of a MuJoCo scene, in a look that a CPU can carry and in the full one.

``light``: no shadows, reflections or multisampling, and meshes thinned out to a few hundred faces each; the colours,
textures and lights are those of the scene. ``full``: the scene as robosuite itself draws it.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Literal

import numpy as np

from vla_rl.runtime.errors import UserError

BACKENDS = ("egl", "osmesa", "glfw")
Look = Literal["light", "full"]
LOOKS = ("light", "full")
# faces that a mesh of up to MESH_SIZE_M keeps in the light look; a larger one keeps more in proportion
MAX_FACES = 400
MESH_SIZE_M = 0.3
# cells along a mesh that the search for its budget starts from, and coarsens
FINEST_CELLS = 64
# what may change in the caller's model after the renderer was built, and is drawn as it is there
FOLLOWED = (
    *(f"geom_{n}" for n in ("rgba", "matid", "size", "group")),
    *(f"mat_{n}" for n in ("rgba", "emission", "specular", "shininess", "reflectance", "texid", "texrepeat")),
    *(f"light_{n}" for n in ("active", "ambient", "diffuse", "specular", "attenuation", "cutoff", "exponent")),
    *(f"light_{n}" for n in ("castshadow", "type", "intensity", "range")),
    *(f"cam_{n}" for n in ("fovy", "intrinsic", "sensorsize")),
)
FOLLOWED_HEADLIGHT = ("ambient", "diffuse", "specular")


class MissingOpenGLError(UserError):
    """OpenGL cannot be used: the back-end has no library, no device, or does not exist."""


def missing_opengl(reason: BaseException) -> MissingOpenGLError:
    """Say in one line which back-end was tried, why it failed, and which there are."""
    backend = os.environ.get("MUJOCO_GL") or "glfw, for want of an EGL or OSMesa library"
    why = " ".join(str(reason).split())[:100] or type(reason).__name__
    return MissingOpenGLError(
        f"no off-screen rendering with MUJOCO_GL={backend} ({why}); "
        f"allowed are {', '.join(BACKENDS)}: run 'vla-rl doctor' to see which of them works here"
    )


try:  # MuJoCo loads the back-end's library when it is imported
    import mujoco
    from OpenGL.error import Error as OpenGLError
except (ImportError, AttributeError, OSError, RuntimeError) as error:
    raise missing_opengl(error) from error

# what MuJoCo, PyOpenGL and ctypes raise for a library, display or device that is missing
_OPENGL_ERRORS = (ImportError, AttributeError, OSError, RuntimeError, TypeError, mujoco.FatalError, OpenGLError)

_FLAG = mujoco.mjtRndFlag
_LOOK_FLAGS = {
    look: {
        _FLAG.mjRND_SHADOW: full,
        _FLAG.mjRND_REFLECTION: full,
        _FLAG.mjRND_SEGMENT: False,
        _FLAG.mjRND_IDCOLOR: False,
    }
    for look, full in (("light", False), ("full", True))
}
# distances want no light and no textures
_DEPTH_FLAGS = {
    _FLAG.mjRND_SHADOW: False,
    _FLAG.mjRND_REFLECTION: False,
    _FLAG.mjRND_SEGMENT: True,
    _FLAG.mjRND_IDCOLOR: True,
}


def thinned(vertex_V3: np.ndarray, face_F3: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge the vertices of a mesh that share a cell of a cubic lattice (Rossignac and Borrel, 1993).

    Args:
        vertex_V3: vertices (m).
        face_F3: indices of each triangle's vertices.
        cells: cells along the longest side of the mesh.

    Returns:
        Merged vertices, (F, 3) indices of the triangles into them, and the indices of the triangles that remain:
        neither collapsed nor the same as an earlier one.
    """
    low = vertex_V3.min(axis=0)
    width_m = float((vertex_V3.max(axis=0) - low).max()) / cells
    cell_V3 = np.floor((vertex_V3 - low) / width_m).astype(np.int64)
    _, merged_V = np.unique(cell_V3 @ np.array([(cells + 1) ** 2, cells + 1, 1]), return_inverse=True)
    count = np.bincount(merged_V)
    centre = np.stack([np.bincount(merged_V, vertex_V3[:, i]) / count for i in range(3)], axis=1)
    face = merged_V[face_F3]
    ordered = np.sort(face, axis=1)
    whole = np.flatnonzero((np.diff(ordered, axis=1) > 0).all(axis=1))
    key = ordered[whole] @ np.array([len(count) ** 2, len(count), 1])
    _, first = np.unique(key, return_index=True)
    return centre, face, whole[np.sort(first)]


def light_model(model: mujoco.MjModel) -> mujoco.MjModel:
    """Copy a model with its meshes thinned out, for drawing only: sizes, poses, colours and textures are unchanged.

    The copy must not be stepped or cast rays at: its collision trees are those of the original meshes.
    """
    light = copy.copy(model)
    light.vis.quality.offsamples = 0
    light.vis.quality.shadowsize = 0
    for mesh in range(model.nmesh):
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        vertex_V3 = model.mesh_vert[vertices].astype(np.float64)
        budget = MAX_FACES * max(1.0, float(np.ptp(vertex_V3, axis=0).max()) / MESH_SIZE_M)
        if model.mesh_facenum[mesh] <= budget:
            continue
        cells = FINEST_CELLS
        centre, face_F3, kept = thinned(vertex_V3, model.mesh_face[faces], cells)
        while len(kept) > budget and cells > 1:
            cells = max(1, int(cells * min(0.93, (budget / len(kept)) ** 0.5)))
            centre, face_F3, kept = thinned(vertex_V3, model.mesh_face[faces], cells)
        remaining = slice(faces.start, faces.start + len(kept))
        light.mesh_vert[vertices.start : vertices.start + len(centre)] = centre
        light.mesh_face[remaining] = face_F3[kept]
        light.mesh_facenormal[remaining] = model.mesh_facenormal[faces][kept]
        light.mesh_facetexcoord[remaining] = model.mesh_facetexcoord[faces][kept]
        light.mesh_facenum[mesh] = len(kept)
    return light


class OffscreenRenderer:
    """Draw one model at one size. Owns an OpenGL context: close it, and use it in the process that made it.

    Colours, materials, lights and fields of view are read from the caller's model, and poses from the data, at each
    image; the model is not written to. Changed textures and mesh vertices want a new renderer.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int, look: Look = "light") -> None:
        """Open a context of ``width`` by ``height`` pixels.

        Raises:
            ValueError: a size below 1, or an unknown look.
            MissingOpenGLError: the back-end in ``MUJOCO_GL`` cannot be used.
        """
        if width < 1 or height < 1:
            raise ValueError(f"an image wants at least 1 x 1 pixels, got {width} x {height}")
        if look not in LOOKS:
            raise ValueError(f"no look named {look!r}; there are {LOOKS}")
        self.size = (width, height)
        self.look = look
        self._model = light_model(model) if look == "light" else copy.copy(model)
        self._model.vis.global_.offwidth, self._model.vis.global_.offheight = width, height
        self.cameras = tuple(model.camera(i).name for i in range(model.ncam))
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        self._option = mujoco.MjvOption()
        if (model.geom_group == 1).any():
            self._option.geomgroup[0] = 0  # robosuite: group 0 is for collisions, group 1 for the eye
        self._option.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._scene = mujoco.MjvScene(self._model, maxgeom=model.ngeom + 100)
        self._followed = [(getattr(self._model, n), getattr(model, n)) for n in FOLLOWED]
        ours, theirs = self._model.vis.headlight, model.vis.headlight
        self._followed += [(getattr(ours, n), getattr(theirs, n)) for n in FOLLOWED_HEADLIGHT]
        self._open(width, height)

    def _open(self, width: int, height: int) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # glfw warns of a missing display and goes on
                # with a default for _context, one that fails to open is freed without a complaint on stderr
                context_type = type("QuietContext", (mujoco.GLContext,), {"_context": None})
                self._gl = context_type(width, height)
                self._gl.make_current()
            self._context: mujoco.MjrContext | None = mujoco.MjrContext(
                self._model, mujoco.mjtFontScale.mjFONTSCALE_100
            )
        except _OPENGL_ERRORS as error:
            raise missing_opengl(error) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR

    def rgb(self, data: mujoco.MjData, camera: str | int) -> np.ndarray:
        """Return the colours that a camera sees: (height, width, 3) uint8, the top row first.

        Raises:
            ValueError: the model has no such camera; the message lists those that it has.
        """
        context = self._draw(data, camera, _LOOK_FLAGS[self.look])
        image = np.empty((self.size[1], self.size[0], 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self._rectangle, context)
        return image[::-1].copy()

    def depth(self, data: mujoco.MjData, camera: str | int) -> np.ndarray:
        """Return the distance along the camera's axis: (height, width) float32 in metres, the top row first.

        A pixel that sees nothing holds the distance of the far plane (``vis.map.zfar`` times ``stat.extent``).

        Raises:
            ValueError: the model has no such camera; the message lists those that it has.
        """
        context = self._draw(data, camera, _DEPTH_FLAGS)
        reading = np.empty((self.size[1], self.size[0]), np.float32)
        mujoco.mjr_readPixels(None, reading, self._rectangle, context)
        near_m = self._model.vis.map.znear * self._model.stat.extent
        far_m = self._model.vis.map.zfar * self._model.stat.extent
        # reversed z: 1 at the near plane, 0 at the far plane, linear in the inverse of the distance
        inverse = 1.0 / far_m + reading[::-1].astype(np.float64) * (1.0 / near_m - 1.0 / far_m)
        return (1.0 / inverse).astype(np.float32)

    def _draw(self, data: mujoco.MjData, camera: str | int, flags: dict[int, bool]) -> mujoco.MjrContext:
        if self._context is None:
            raise RuntimeError("the renderer is closed")
        index = self.cameras.index(camera) if camera in self.cameras else camera
        if isinstance(index, str) or not 0 <= index < len(self.cameras):
            raise ValueError(f"no camera named {camera!r}; there are {list(self.cameras)}")
        for ours, theirs in self._followed:
            ours[...] = theirs
        self._camera.fixedcamid = index
        for flag, value in flags.items():
            self._scene.flags[flag] = value
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self._gl.make_current()
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        return self._context

    def close(self) -> None:
        """Free the OpenGL context; a second call does nothing."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._context = None
            self._gl.free()
