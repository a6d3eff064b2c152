"""A MuJoCo step in its parts, compiled and without the GIL, in the order and to the bits of ``mj_step`` (MuJoCo 3.3).

Without the control callback: one that another library sets is neither called nor replaced. Energies are not computed.
"""

from __future__ import annotations

import mujoco
import numba
import numpy as np

from sim.native import (
    mj_camlight,
    mj_checkAcc,
    mj_checkPos,
    mj_checkVel,
    mj_collision,
    mj_comPos,
    mj_Euler,
    mj_factorM,
    mj_flex,
    mj_fwdAcceleration,
    mj_fwdActuation,
    mj_fwdConstraint,
    mj_fwdVelocity,
    mj_implicit,
    mj_island,
    mj_kinematics,
    mj_makeConstraint,
    mj_makeM,
    mj_projectConstraint,
    mj_sensorAcc,
    mj_sensorPos,
    mj_sensorVel,
    mj_tendon,
    mj_transmission,
)

_W = mujoco.mjtWarning
BAD_NUMBERS = int(_W.mjWARN_BADQPOS), int(_W.mjWARN_BADQVEL), int(_W.mjWARN_BADQACC)


@numba.njit(cache=True, nogil=True)
def is_healthy(warnings: np.ndarray, qpos: np.ndarray) -> bool:
    """Whether MuJoCo's counters (``data.warning.number``) record no bad numbers and all positions are finite."""
    for warning in BAD_NUMBERS:
        if warnings[warning] > 0:
            return False
    return bool(np.isfinite(qpos).all())


@numba.njit(cache=True, nogil=True)
def update_kinematics(model: int, data: int) -> None:
    """Poses and inertia; before contacts are sought."""
    mj_checkPos(model, data)
    mj_checkVel(model, data)
    mj_kinematics(model, data)
    mj_comPos(model, data)
    mj_camlight(model, data)
    mj_flex(model, data)
    mj_tendon(model, data)
    mj_makeM(model, data)
    mj_factorM(model, data)


@numba.njit(cache=True, nogil=True)
def update_contacts_and_velocities(model: int, data: int) -> None:
    """Contacts, constraints, bias forces: the rest of ``mj_step1``; controls may be set after it."""
    mj_collision(model, data)
    mj_makeConstraint(model, data)
    mj_island(model, data)
    mj_transmission(model, data)
    mj_projectConstraint(model, data)
    mj_sensorPos(model, data)
    mj_fwdVelocity(model, data)
    mj_sensorVel(model, data)


@numba.njit(cache=True, nogil=True)
def accelerate(model: int, data: int, sensors: bool) -> None:
    """Forces and accelerations; accelerometers and force sensors, which feed nothing back, only where they are read."""
    mj_fwdActuation(model, data)
    mj_fwdAcceleration(model, data)
    mj_fwdConstraint(model, data)
    if sensors:
        mj_sensorAcc(model, data)
    mj_checkAcc(model, data)


@numba.njit(cache=True, nogil=True)
def integrate_euler(model: int, data: int) -> None:
    """Advance by a time step where the model's integrator is Euler."""
    mj_Euler(model, data)


@numba.njit(cache=True, nogil=True)
def step_implicitfast(model: int, data: int) -> None:
    """All of ``mj_step`` where the model's integrator is implicitfast and it has no sensors."""
    update_kinematics(model, data)
    update_contacts_and_velocities(model, data)
    accelerate(model, data, False)
    mj_implicit(model, data)
