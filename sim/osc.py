"""A control step of a robosuite arm as one compiled call without the GIL: operational-space control and physics at 500 Hz.

The controller is robosuite 1.5's OSC pose (Khatib 1987; translation and rotation decoupled, a posture in the null space):

    torques = J^T [L_p (kp e_p - kd v), L_r (kp e_r - kd w)] + bias + N^T M (10 (q_0 - q) - 2 sqrt(10) dq)
    L_x = (J_x M^-1 J_x^T)^+,   N = I - M^-1 J^T L J

in robosuite's own order of operations and through the same BLAS and LAPACK routines, so that torques, and with them trajectories,
are equal to the last bit; contacts would make a large difference of a small one. Quirks of robosuite that are kept:

- The goal is the *achieved* tool pose plus the action, in the frame of the arm's base, and stays put for the 25 substeps.
- Torques are computed between ``mj_step1`` and ``mj_step2`` (``lite_physics``), so from the state at the start of the substep.
- The gripper does not take the action's value but its sign, moves its set points by 0.2 per control step, and remembers them.
- Kinematics are refreshed lazily. After a reset the first substep uses the Jacobian, mass matrix and tool pose of the moment in
  the reset when the controller was built, before the gripper's fingers were placed; only the bias forces are new.

MuJoCo's step is called in its parts (``sim.stepping``), between which collision tests that cannot find anything are left out
(``sim.clearance``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

import sim.clearance
import sim.linalg
import sim.native
import sim.stepping
from sim.clearance import Clearances, exclude_clear_pairs, include_all_pairs
from sim.linalg import PinvWork, pinv, pinv_work, product
from sim.native import mj_jacSite, source_of
from sim.stepping import accelerate, integrate_euler, is_healthy, update_contacts_and_velocities, update_kinematics

NULL_SPACE_KP = 10.0
GRIPPER_SPEED = 0.2  # of the range from -1 to 1, per control step


class Arm(NamedTuple):
    """Views of one environment's model and data, the controller's constants and its memory. J joints, V degrees of freedom."""

    qpos: np.ndarray  # of the whole model
    qvel: np.ndarray
    bias_V: np.ndarray  # Coriolis and gravity forces
    inertia_sparse: np.ndarray  # qM
    ctrl: np.ndarray
    warnings: np.ndarray  # MuJoCo's counters
    site_xpos: np.ndarray
    site_xmat: np.ndarray
    diagonal_V: np.ndarray  # dof_Madr: where the rows of qM start
    ctrlrange: np.ndarray  # (actuators, 2)
    tool: int  # sites
    base: int
    qpos_J: np.ndarray  # addresses
    qvel_J: np.ndarray
    actuator_J: np.ndarray
    gripper_actuators: np.ndarray  # G of them: 2, or 0 where the hand holds a tool
    gripper_G: np.ndarray  # set points in [-1, 1], remembered from step to step
    input_36: np.ndarray  # of an action: lowest, highest and middle value
    output_26: np.ndarray  # of the goal: scale and middle, m and rad
    kp_kd_26: np.ndarray
    posture_J: np.ndarray  # the null space's goal
    jacobian_6J: np.ndarray  # the memory of the lazy kinematics, from here ...
    inertia_JJ: np.ndarray  # in Fortran order, as robosuite's
    position_3: np.ndarray
    rotation_33: np.ndarray
    velocity_6: np.ndarray
    joints_J: np.ndarray
    joint_velocity_J: np.ndarray  # ... to here


@numba.njit(cache=True, nogil=True)
def _scaled(input_36: np.ndarray, output_26: np.ndarray, action_A: np.ndarray, first: int) -> np.ndarray:
    """Three numbers of an action, clipped to what robosuite takes and scaled to what they mean."""
    delta_3 = np.empty(3)
    for i in range(3):
        k = first + i
        clipped = min(max(action_A[k], input_36[0, k]), input_36[1, k])
        delta_3[i] = (clipped - input_36[2, k]) * output_26[0, k] + output_26[1, k]
    return delta_3


@numba.njit(cache=True, nogil=True)
def rotation_vector(input_36: np.ndarray, output_26: np.ndarray, action_A: np.ndarray) -> np.ndarray:
    """Rotation (3,) that an action asks for, axis times angle, rad. The first two arguments are as in ``Arm``."""
    return _scaled(input_36, output_26, action_A, 3)


@numba.njit(cache=True, nogil=True)
def _refresh(model: int, data: int, arm: Arm, jacobian_3V: np.ndarray, rotation_jacobian_3V: np.ndarray) -> None:
    """Read the tool's pose and velocity, Jacobian, mass matrix and joint state; the last two arguments are scratch."""
    mj_jacSite(model, data, jacobian_3V.ctypes.data, rotation_jacobian_3V.ctypes.data, arm.tool)
    for j in range(arm.qvel_J.size):
        column = arm.qvel_J[j]
        arm.joints_J[j] = arm.qpos[arm.qpos_J[j]]
        arm.joint_velocity_J[j] = arm.qvel[column]
        for i in range(3):
            arm.jacobian_6J[i, j] = jacobian_3V[i, column]
            arm.jacobian_6J[3 + i, j] = rotation_jacobian_3V[i, column]
        # a row of qM holds the entries of a degree of freedom with itself and its ancestors, and the arm is one chain
        address = arm.diagonal_V[column]
        for k in range(j, -1, -1):
            arm.inertia_JJ[j, k] = arm.inertia_JJ[k, j] = arm.inertia_sparse[address]
            address += 1
    np.dot(jacobian_3V, arm.qvel, arm.velocity_6[:3])
    np.dot(rotation_jacobian_3V, arm.qvel, arm.velocity_6[3:])
    for i in range(3):
        arm.position_3[i] = arm.site_xpos[arm.tool, i]
        for k in range(3):
            arm.rotation_33[i, k] = arm.site_xmat[arm.tool, 3 * i + k]


@numba.njit(cache=True, nogil=True)
def _torques(
    arm: Arm,
    goal_3: np.ndarray,
    goal_33: np.ndarray,
    base_3: np.ndarray,
    base_33: np.ndarray,
    pinv_3: PinvWork,
    pinv_6: PinvWork,
) -> np.ndarray:
    """Torques (J,) that pull the tool to a goal pose in the base's frame; the base stands still."""
    joints = arm.qvel_J.size
    jacobian, translation, rotation = arm.jacobian_6J, arm.jacobian_6J[:3], arm.jacobian_6J[3:]
    target_3, target_33 = np.dot(base_33, goal_3), product(base_33, goal_33)
    force, torque = np.empty(3), np.empty(3)
    for i in range(3):
        error = base_3[i] + target_3[i] - arm.position_3[i]
        force[i] = error * arm.kp_kd_26[0, i] - arm.velocity_6[i] * arm.kp_kd_26[1, i]
        j, k = (i + 1) % 3, (i + 2) % 3
        crosses = 0.0  # of the axes as they are and as they should be
        for axis in range(3):
            crosses += arm.rotation_33[j, axis] * target_33[k, axis] - arm.rotation_33[k, axis] * target_33[j, axis]
        torque[i] = 0.5 * crosses * arm.kp_kd_26[0, 3 + i] - arm.velocity_6[3 + i] * arm.kp_kd_26[1, 3 + i]

    mobility = np.linalg.inv(arm.inertia_JJ)
    full = pinv(product(product(jacobian, mobility), jacobian.T), pinv_6)
    wrench = np.empty(6)
    np.dot(pinv(product(product(translation, mobility), translation.T), pinv_3), force, wrench[:3])
    np.dot(pinv(product(product(rotation, mobility), rotation.T), pinv_3), torque, wrench[3:])

    null_space = product(product(product(mobility, jacobian.T), full), jacobian)
    pull = np.empty(joints)
    for j in range(joints):
        for k in range(joints):
            null_space[j, k] = (1.0 if j == k else 0.0) - null_space[j, k]
        error = arm.posture_J[j] - arm.joints_J[j]
        pull[j] = NULL_SPACE_KP * error - np.sqrt(NULL_SPACE_KP) * 2 * arm.joint_velocity_J[j]
    torques = np.dot(jacobian.T, wrench)
    posture = np.dot(null_space.T, np.dot(arm.inertia_JJ, pull))
    for j in range(joints):
        torques[j] = torques[j] + arm.bias_V[arm.qvel_J[j]] + posture[j]
    return torques


@numba.njit(cache=True, nogil=True)
def _set_goal(
    arm: Arm,
    delta_3: np.ndarray,
    delta_33: np.ndarray,
    base_3: np.ndarray,
    base_33: np.ndarray,
    goal_3: np.ndarray,
    goal_33: np.ndarray,
) -> None:
    """Write the tool's present pose in the base's frame, moved by a translation and turned by a rotation, to the goal."""
    world_to_base = np.zeros((4, 4))
    world_to_base[:3, :3] = base_33.T
    world_to_base[:3, 3] = np.dot(-base_33.T, base_3)
    world_to_base[3, 3] = 1.0
    pose = np.eye(4)
    pose[:3, 3] = arm.position_3
    goal_3[:] = np.dot(world_to_base, pose)[:3, 3] + delta_3
    pose[:3, :3] = arm.rotation_33
    np.dot(delta_33, np.dot(world_to_base, pose)[:3, :3].copy(), goal_33)


def _compiled(sources: str) -> Callable[..., bool]:
    """Build ``control_step``; ``sources`` is what it calls in other files (see ``sim.native.source_of``)."""

    @numba.njit(cache=True, nogil=True)
    def control_step(
        model: int,
        data: int,
        arm: Arm,
        pairs: Clearances,
        action_A: np.ndarray,
        delta_33: np.ndarray,
        substeps: int,
        stale: bool,
    ) -> bool:
        """Set the goal, then control and simulate ``substeps`` steps of physics; return whether all went well.

        Args:
            model: address of the mjModel.
            data: address of the mjData that ``arm`` views.
            arm: the arm.
            pairs: of meshes that need not be tested while they are provably apart.
            action_A: robosuite's action; a seventh number closes the gripper where positive, opens it where negative.
            delta_33: rotation that the action asks for, in the base's frame.
            substeps: MuJoCo steps.
            stale: whether the first substep uses the kinematics that the arm remembers (see the module's quirks).
        """
        _ = sources
        goal_3, goal_33, base_33 = np.empty(3), np.empty((3, 3)), np.empty((3, 3))
        jacobian_3V, rotation_jacobian_3V = np.empty((3, arm.qvel.size)), np.empty((3, arm.qvel.size))
        pinv_3, pinv_6 = pinv_work(3), pinv_work(6)
        delta_3 = _scaled(arm.input_36, arm.output_26, action_A, 0)
        for j in range(arm.gripper_G.size):
            finger = -1.0 if j == 0 else 1.0
            arm.gripper_G[j] = min(max(arm.gripper_G[j] + finger * GRIPPER_SPEED * np.sign(action_A[6]), -1.0), 1.0)
        for substep in range(substeps):
            update_kinematics(model, data)
            exclude_clear_pairs(model, data, pairs)
            update_contacts_and_velocities(model, data)
            base_3 = arm.site_xpos[arm.base]
            for i in range(3):
                for k in range(3):
                    base_33[i, k] = arm.site_xmat[arm.base, 3 * i + k]
            if substep > 0 or not stale:
                _refresh(model, data, arm, jacobian_3V, rotation_jacobian_3V)
            if substep == 0:
                _set_goal(arm, delta_3, delta_33, base_3, base_33, goal_3, goal_33)
            torques = _torques(arm, goal_3, goal_33, base_3, base_33, pinv_3, pinv_6)
            for j in range(torques.size):
                actuator = arm.actuator_J[j]
                arm.ctrl[actuator] = min(max(torques[j], arm.ctrlrange[actuator, 0]), arm.ctrlrange[actuator, 1])
            for j in range(arm.gripper_G.size):
                actuator = arm.gripper_actuators[j]
                low, high = arm.ctrlrange[actuator, 0], arm.ctrlrange[actuator, 1]
                arm.ctrl[actuator] = min(max(0.5 * (high + low) + 0.5 * (high - low) * arm.gripper_G[j], low), high)
            accelerate(model, data, substep == substeps - 1)
            integrate_euler(model, data)
        include_all_pairs(pairs)
        return bool(is_healthy(arm.warnings, arm.qpos))

    return control_step


control_step = _compiled(source_of(sim.clearance, sim.linalg, sim.native, sim.stepping))
