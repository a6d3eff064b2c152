"""The compiled path of a robosuite environment: what robosuite's objects know, handed to ``sim.osc``."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from robosuite.models.grippers import PandaGripper
from robosuite.utils.transform_utils import axisangle2quat, quat2mat

from sim.clearance import clearances, near_mesh_pairs, with_exclusions
from sim.fast_physics import coarsen
from sim.osc import Arm, control_step, rotation_vector
from vla_rl.runtime.errors import UserError

_WANTED = {
    "name": "OSC_POSE",
    "impedance_mode": "fixed",
    "input_type": "delta",
    "input_ref_frame": "base",
    "interpolator_pos": None,
    "interpolator_ori": None,
    "uncoupling": True,
    "lite_physics": True,
}


class UnsupportedArmError(UserError):
    """The robot, its controller or its model is not one that the compiled path computes."""


class CompiledArm:
    """Steps one robosuite environment; call ``reset`` after each of its resets.

    Raises:
        UnsupportedArmError: the environment has another robot, controller or model than a fixed arm under OSC pose.
    """

    def __init__(self, environment: Any, *, fast: bool = False) -> None:
        """Build the model once more, prepared for leaving out collision tests.

        Args:
            environment: of robosuite.
            fast: coarser physics (``sim.fast_physics``).
        """
        self._environment = environment
        self._name = type(environment).__name__
        self._require_supported()
        # two liberties that change no number: collision tests of provably separate meshes are left out, and so is a record of
        # active bounding volumes for drawing (it clears 0.1 to 0.4 MB in each substep)
        sim = environment.sim
        pairs = near_mesh_pairs(sim.model._model, sim.data._data)
        environment._initialize_sim(with_exclusions(environment.model.get_xml(), pairs))
        environment.reset()
        self._model: mujoco.MjModel = environment.sim.model._model
        self._data: mujoco.MjData = environment.sim.data._data
        self._model.vis.global_.bvactive = 0
        self._pairs = clearances(self._model, self._data, pairs)
        self._substeps = int(environment.control_timestep / environment.model_timestep)
        if fast:
            self._substeps = coarsen(self._model, self._data, environment.control_timestep)
        self.reset()

    def _require_supported(self) -> None:
        environment = self._environment
        if len(environment.robots) != 1 or list(environment.robots[0].arms) != ["right"]:
            raise UnsupportedArmError(
                f"the compiled path wants one robot with one arm, got {environment.robots} in {self._name}"
            )
        osc = environment.robots[0].part_controllers["right"]
        for key, value in _WANTED.items():
            got = getattr(osc, key, "no such attribute")
            if got != value:
                raise UnsupportedArmError(
                    f"the compiled path wants a controller with {key} {value!r}, got {got!r} in {self._name}"
                )
        gripper = environment.robots[0].gripper["right"]
        if gripper.dof and not isinstance(gripper, PandaGripper):
            raise UnsupportedArmError(
                f"the compiled path wants a PandaGripper or none, got {type(gripper).__name__} in {self._name}"
            )
        model = environment.sim.model._model
        dofs = np.asarray(osc.qvel_index)
        chain = np.concatenate([[-1], dofs[:-1]])
        if (np.diff(dofs) != 1).any() or (model.dof_parentid[dofs] != chain).any():
            raise UnsupportedArmError(
                f"the compiled path wants an arm that is one chain of joints on a fixed base, got {self._name}"
            )
        if model.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER:
            integrator = mujoco.mjtIntegrator(model.opt.integrator).name
            raise UnsupportedArmError(f"the compiled path wants the Euler integrator, got {integrator} in {self._name}")

    def reset(self) -> None:
        """Take over the controller as robosuite's reset left it."""
        model, data = self._model, self._data
        robot = self._environment.robots[0]
        osc = robot.part_controllers["right"]
        scale_6 = abs(osc.output_max - osc.output_min) / abs(osc.input_max - osc.input_min)
        gripper = robot.gripper["right"]
        has_gripper = gripper.dof == 1
        gripper_actuators = robot._ref_actuators_indexes_dict[robot.get_gripper_name("right")] if has_gripper else []
        self._stale = True
        self._arm = Arm(
            qpos=data.qpos,
            qvel=data.qvel,
            bias_V=data.qfrc_bias,
            inertia_sparse=data.qM,
            ctrl=data.ctrl,
            warnings=data.warning.number,
            site_xpos=data.site_xpos,
            site_xmat=data.site_xmat,
            diagonal_V=model.dof_Madr,
            ctrlrange=model.actuator_ctrlrange,
            tool=model.site(osc.ref_name).id,
            base=model.site(f"{osc.naming_prefix}{osc.part_name}_center").id,
            qpos_J=np.array(osc.qpos_index, dtype=np.int64),
            qvel_J=np.array(osc.qvel_index, dtype=np.int64),
            actuator_J=np.array(robot._ref_actuators_indexes_dict["right"], dtype=np.int64),
            gripper_actuators=np.array(gripper_actuators, dtype=np.int64),
            gripper_G=np.zeros(len(gripper_actuators)) + gripper.current_action if has_gripper else np.empty(0),
            input_36=np.array([osc.input_min, osc.input_max, (osc.input_max + osc.input_min) / 2.0]),
            output_26=np.array([scale_6, (osc.output_max + osc.output_min) / 2.0]),
            kp_kd_26=np.array([osc.kp, osc.kd], dtype=np.float64),
            posture_J=np.array(osc.initial_joint, dtype=np.float64),
            jacobian_6J=osc.J_full.copy(),
            inertia_JJ=np.asfortranarray(osc.mass_matrix),
            position_3=osc.ref_pos.copy(),
            rotation_33=osc.ref_ori_mat.copy(),
            velocity_6=np.concatenate([osc.ref_pos_vel, osc.ref_ori_vel]),
            joints_J=osc.joint_pos.copy(),
            joint_velocity_J=osc.joint_vel.copy(),
        )

    def step(self, action_A: np.ndarray) -> bool:
        """Execute an action in robosuite's units; what exceeds [-1, 1] is clipped as robosuite clips it.

        The delta rotation is made by robosuite's functions, which round it to single precision on the way.

        Args:
            action_A: (6 + gripper,) float64.

        Returns:
            Whether MuJoCo met no bad numbers and all positions are finite.
        """
        rotation_33 = quat2mat(axisangle2quat(rotation_vector(self._arm.input_36, self._arm.output_26, action_A)))
        healthy = control_step(
            self._model._address,
            self._data._address,
            self._arm,
            self._pairs,
            action_A,
            rotation_33,
            self._substeps,
            self._stale,
        )
        self._stale = False
        return healthy
