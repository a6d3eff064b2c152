"""A coarser simulation for training: longer steps, and no contacts of what cannot matter. Policies are judged in exact physics.

Off by default (``--task-physics exact``). Twelve steps of 4.17 ms in place of 25 of 2 ms, at which robosuite's gains and contacts are still
stable; and objects that robosuite has put away (it parks those of other tasks 10 m off, inside one another) collide with nothing.
"""

from __future__ import annotations

import mujoco
import numpy as np

SUBSTEPS = 12
AWAY_M = 5.0


def parked_bodies(model: mujoco.MjModel, data: mujoco.MjData) -> list[int]:
    """Bodies with a free joint that stand farther from the origin than any scene reaches."""
    free = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
    return [int(body) for body in free if np.linalg.norm(data.xpos[body]) > AWAY_M]


def coarsen(model: mujoco.MjModel, data: mujoco.MjData, control_timestep_s: float) -> int:
    """Change a model in place.

    Args:
        model: of the scene.
        data: its state after a reset.
        control_timestep_s: duration of a control step.

    Returns:
        How many MuJoCo steps make a control step.
    """
    model.opt.timestep = control_timestep_s / SUBSTEPS
    for body in parked_bodies(model, data):
        geoms = model.geom_bodyid == body
        model.geom_contype[geoms] = model.geom_conaffinity[geoms] = 0
        model.body_contype[body] = model.body_conaffinity[body] = 0
    return SUBSTEPS
