"""What policies see of a robosuite scene, read from ``mjData`` in one compiled call."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numba
import numpy as np

from vla_rl.types import ENVIRONMENT_STATE, STATE


@dataclass(frozen=True)
class Watched:
    """What the environment state is made of, in this order.

    bodies: names; position (m) and rotation in the world, and position in the tool's frame: 12 numbers each
    sites: likewise
    joints: names; position of each (m or rad)
    """

    bodies: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    joints: tuple[str, ...] = ()


def free_bodies(model: mujoco.MjModel) -> Watched:
    """All bodies with a free joint."""
    free = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
    return Watched(bodies=tuple(model.body(body).name for body in free))


@numba.njit(cache=True, nogil=True)
def _fill(
    site_xpos: np.ndarray,
    site_xmat: np.ndarray,
    xpos: np.ndarray,
    xmat: np.ndarray,
    qpos: np.ndarray,
    indices: np.ndarray,
    state: np.ndarray,
    environment: np.ndarray,
) -> None:
    """Fill in both features; indices: tool, bodies, sites, joints and fingers (numbers of them first), then each one's."""
    tool, bodies, sites, joints, fingers = indices[0], indices[1], indices[2], indices[3], indices[4]
    for i in range(3):
        state[i] = site_xpos[tool, i]
        # the first two columns of the rotation: continuous, unlike quaternions and angles (arXiv 1812.07035)
        state[3 + i], state[6 + i] = site_xmat[tool, 3 * i], site_xmat[tool, 3 * i + 1]
    at = 0
    for watched in range(bodies + sites):
        index = indices[5 + watched]
        position, rotation = (xpos[index], xmat[index]) if watched < bodies else (site_xpos[index], site_xmat[index])
        for i in range(3):
            environment[at + i] = position[i]
            environment[at + 3 + i], environment[at + 6 + i] = rotation[3 * i], rotation[3 * i + 1]
            along = 0.0
            for k in range(3):
                along += site_xmat[tool, 3 * k + i] * (position[k] - site_xpos[tool, k])
            environment[at + 9 + i] = along
        at += 12
    for j in range(joints):
        environment[at + j] = qpos[indices[5 + bodies + sites + j]]
    for j in range(fingers):
        state[9 + j] = qpos[indices[5 + bodies + sites + joints + j]]


class Observer:
    """Observes one model and data; the arrays it returns are new in every call."""

    def __init__(
        self, model: mujoco.MjModel, data: mujoco.MjData, tool: str, fingers: tuple[str, ...], watched: Watched
    ) -> None:
        """Look the names up.

        Args:
            model: of the scene.
            data: its state.
            tool: site of the grip.
            fingers: joints of the gripper.
            watched: objects.

        Raises:
            KeyError: the model lacks one of the names; MuJoCo's message lists those it has.
        """
        things = [model.body(name).id for name in watched.bodies] + [model.site(name).id for name in watched.sites]
        joints = [model.joint(name).qposadr[0] for name in (*watched.joints, *fingers)]
        sizes = [len(watched.bodies), len(watched.sites), len(watched.joints), len(fingers)]
        indices = np.array([model.site(tool).id, *sizes, *things, *joints], dtype=np.int64)
        self._views = data.site_xpos, data.site_xmat, data.xpos, data.xmat, data.qpos, indices
        self._sizes = 9 + len(fingers), 12 * len(things) + len(watched.joints)

    def __call__(self) -> dict[str, np.ndarray]:
        """Tool position, rotation (first two columns) and finger positions; and the objects (float32)."""
        state, environment = np.empty(self._sizes[0], np.float32), np.empty(self._sizes[1], np.float32)
        _fill(*self._views, state, environment)
        return {STATE: state, ENVIRONMENT_STATE: environment}
