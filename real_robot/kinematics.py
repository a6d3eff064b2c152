"""What a robot's model file says: limits of its joints, and where its tool is."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from real_robot.limits import SafetyConfig
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec

TOLERANCE = 1e-6


@dataclass(frozen=True)
class JointLimits:
    """Limits of a joint, rad or m and per second; velocity is infinite where the file has none (MJCF)."""

    low: float
    high: float
    velocity: float


@dataclass(frozen=True)
class ModelConfig:
    """A model of the robot.

    file: URDF or MJCF (none: the limits of the config stand alone)
    joints: names in the file, one per action of the arm, in the actions' order
    tool: body or site that workspaces without action names are about
    """

    file: Path | None = None
    joints: tuple[str, ...] = ()
    tool: str = ""

    def require_within(self, action: ActionSpec, safety: SafetyConfig) -> None:
        """Raise UserError that names both sides where a limit of the config is wider than the model's."""
        if self.file is None or not self.joints:
            return
        if action.mode != "absolute":
            raise UserError(
                f"joints of {self.file} bound commands of places; these actions are of mode {action.mode!r}"
            )
        if len(self.joints) > action.dim:
            raise UserError(
                f"{len(self.joints)} joints of {self.file} for the {action.dim} actions {', '.join(action.names)}"
            )
        limits = read_limits(self.file)
        for i, joint in enumerate(self.joints):
            if joint not in limits:
                raise UserError(f"{self.file} has no joint {joint!r} with limits; it has {', '.join(limits) or 'none'}")
            bound = limits[joint]
            if action.low[i] < bound.low - TOLERANCE or action.high[i] > bound.high + TOLERANCE:
                raise UserError(
                    f"action {action.names[i]} reaches from {action.low[i]:g} to {action.high[i]:g} {action.units[i]}, joint {joint!r} of "
                    f"{self.file.name} from {bound.low:g} to {bound.high:g}"
                )
            if safety.max_velocity[i] > bound.velocity * (1 + TOLERANCE):
                raise UserError(
                    f"max_velocity of {action.names[i]} is {safety.max_velocity[i]:g}, joint {joint!r} of {self.file.name} has "
                    f"{bound.velocity:g}"
                )

    def forward_kinematics(self, action: ActionSpec) -> Callable[[np.ndarray], np.ndarray] | None:
        """From the places of all axes to the tool's position (m) in the model's world frame; None without a file or tool."""
        if self.file is None or not self.tool:
            return None
        kinematics = Kinematics(self.file, self.joints)
        count = len(self.joints)
        return lambda places_A: kinematics.position_m(self.tool, places_A[:count])


class Kinematics:
    """Forward kinematics of a URDF or MJCF file by MuJoCo."""

    def __init__(self, file: Path, joints: tuple[str, ...]) -> None:
        """Load it; raises UserError for a file that MuJoCo cannot read or that lacks a joint."""
        self.model = _compile(file)
        self.data = mujoco.MjData(self.model)
        try:
            self._addresses = [int(self.model.joint(name).qposadr[0]) for name in joints]
        except KeyError as error:
            raise UserError(f"{file}: {error.args[0]}") from error

    def _place(self, name: str, joint_pos: np.ndarray) -> Any:
        self.data.qpos[self._addresses] = joint_pos
        mujoco.mj_kinematics(self.model, self.data)
        is_site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, name) >= 0
        try:
            return self.data.site(name) if is_site else self.data.body(name)
        except KeyError as error:
            raise UserError(f"no body or site {name!r} in the model") from error

    def position_m(self, name: str, joint_pos: np.ndarray) -> np.ndarray:
        """Position of a body or site in the world, (3,) m."""
        return np.array(self._place(name, joint_pos).xpos)

    def pose(self, name: str, joint_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) m and rotation matrix (3, 3) of a body or site in the world."""
        place = self._place(name, joint_pos)
        return np.array(place.xpos), np.array(place.xmat).reshape(3, 3)


def _compile(file: Path) -> mujoco.MjModel:
    if not file.is_file():
        raise UserError(f"no file {str(file)!r}")
    spec = mujoco.MjSpec.from_file(str(file))
    spec.compiler.fusestatic = False  # a tool frame without mass stays a body of its own
    try:
        return spec.compile()
    except ValueError as error:
        raise UserError(f"{file} is no model that MuJoCo reads: {' '.join(str(error).split())[:200]}") from error


def read_limits(file: Path) -> dict[str, JointLimits]:
    """Limits of the joints of a URDF or MJCF file; joints without limits are left out.

    Raises:
        UserError: there is no such file, it is neither, or none of its joints has limits.
    """
    if not file.is_file():
        raise UserError(f"no file {str(file)!r}")
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{file} is no URDF or MJCF: {error}") from error
    if root.tag == "robot":
        found = _urdf_limits(root, file)
    elif root.tag == "mujoco":
        model = _compile(file)
        joints = [model.joint(i) for i in range(model.njnt)]
        found = {
            j.name: JointLimits(float(j.range[0]), float(j.range[1]), math.inf)
            for j in joints
            if model.jnt_limited[j.id]
        }
    else:
        raise UserError(f"{file} is no URDF (<robot>) or MJCF (<mujoco>), but <{root.tag}>")
    if not found:
        raise UserError(f"no joint of {file} has limits; a robot without limits is not moved")
    return found


def _urdf_limits(root: ElementTree.Element, file: Path) -> dict[str, JointLimits]:
    found = {}
    for joint in root.iter("joint"):
        limit, kind, name = joint.find("limit"), joint.get("type"), joint.get("name")
        if limit is None or kind not in ("revolute", "prismatic") or name is None:
            continue
        try:
            values = [float(limit.attrib[key]) for key in ("lower", "upper", "velocity")]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"joint {name!r} of {file} wants lower, upper and velocity in its <limit>, got {limit.attrib}"
            ) from error
        if values[0] < values[1]:
            found[name] = JointLimits(*values)
    return found
