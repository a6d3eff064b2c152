"""robosuite tasks (Panda, OSC pose, 20 Hz, sparse success) behind one adapter, at the speed of MuJoCo.

robosuite builds the model, places the scene and judges success; controller and physics run as one compiled call
(``sim.compiled_arm``), to the last bit as robosuite's own ``step`` does it, which ``stepping: robosuite`` keeps as a reference.
The scene is reset softly (``hard_reset=False``, 2 ms in place of 0.2-1.4 s): robosuite's own samplers place the
objects, and the physics state is MuJoCo's own reset, so the scene is the same as after a hard reset.
Observations are read from ``mjData`` once per control step instead of through robosuite's observables, which
return a sample from before the last substep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import mujoco
import numpy as np

from sim.mujoco_env import MujocoEnv
from sim.robosuite_observation import Observer, Watched, free_bodies
from sim.robosuite_own import CONTROL_HZ, build_robosuite, global_numpy_seed
from sim.task import ModelMismatchError, Outcome, Placement, TaskConfig
from vla_rl.types import ActionSpec

if TYPE_CHECKING:
    from sim.compiled_arm import CompiledArm

# output_max of robosuite's default OSC_POSE: an action of 1 moves the goal by 5 cm and 0.5 rad
MAX_TRANSLATION_M = 0.05
MAX_ROTATION_RAD = 0.5

ACTION_SPEC = ActionSpec(
    names=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
    units=("m", "m", "m", "rad", "rad", "rad", "1"),
    low=(-MAX_TRANSLATION_M,) * 3 + (-MAX_ROTATION_RAD,) * 3 + (-1.0,),
    high=(MAX_TRANSLATION_M,) * 3 + (MAX_ROTATION_RAD,) * 3 + (1.0,),  # gripper: -1 opens, +1 closes
    mode="delta",
    control_hz=CONTROL_HZ,
)

LIFTED_M = 0.04  # robosuite's own measure, in Lift
HIGH_A = ACTION_SPEC.high_array()


@dataclass(frozen=True)
class Pose:
    """Position (m) and rotation matrix of a body or site in the world frame."""

    position_m: np.ndarray
    rotation_33: np.ndarray


@TaskConfig.register_subclass("robosuite")
@dataclass(frozen=True)
class RobosuiteTask(TaskConfig):
    """A robosuite environment with the Panda and its default controller.

    robosuite_name: name of robosuite's class
    camera: the one that videos are taken from
    stepping: compiled, or robosuite for its own step, which is the reference and takes 5 to 10 times as long
    physics: exact, or fast for training only (sim.fast_physics); policies are judged in exact physics
    lifts: body that is to be raised, in place of what robosuite itself calls success (empty: robosuite's)
    """

    robosuite_name: str = "Lift"
    camera: str = "frontview"
    stepping: Literal["compiled", "robosuite"] = "compiled"
    physics: Literal["exact", "fast"] = "exact"
    lifts: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.physics == "fast" and self.stepping == "robosuite":
            raise ValueError("physics: fast wants stepping: compiled; robosuite's own step is the exact reference")

    @property
    def placement(self) -> Placement:
        """Threads: a compiled step holds no GIL; robosuite's own step is Python. Pictures are drawn in one thread, and take longer."""
        if self.sensors.cameras:
            return "inline"
        return "threads" if self.stepping == "compiled" else "processes"

    @property
    def batch(self) -> int:
        """Few, since a step is costly."""
        return 4

    @property
    def exact_physics(self) -> bool:
        """Not in the fast preset."""
        return self.physics == "exact"

    def build_env(self) -> RobosuiteEnv:
        """Build the environment (about half a second, 4 s more to import robosuite, 30 s more where numba's cache is cold)."""
        return RobosuiteEnv(self)


class RobosuiteEnv(MujocoEnv):
    """A robosuite environment behind ``TaskEnv``."""

    def __init__(self, config: RobosuiteTask) -> None:
        super().__init__()
        self.config: RobosuiteTask = config
        self.camera = config.camera
        self.action_spec = ACTION_SPEC
        self.action_space = self.box(ACTION_SPEC)
        self.robosuite = build_robosuite(config.robosuite_name, horizon=config.max_episode_steps, hard_reset=False)
        for name in self.robosuite.observation_names:
            self.robosuite.modify_observable(name, "active", False)
            self.robosuite.modify_observable(name, "enabled", False)
        self._compiled: CompiledArm | None = None
        if config.stepping == "compiled":
            from sim.compiled_arm import CompiledArm  # which imports robosuite

            with global_numpy_seed(0):
                self._compiled = CompiledArm(self.robosuite, fast=config.physics == "fast")
        self.model: mujoco.MjModel = self.robosuite.sim.model._model
        self.data: mujoco.MjData = self.robosuite.sim.data._data
        if self.robosuite.action_dim != ACTION_SPEC.dim:
            raise ModelMismatchError(
                f"task {config.name!r} wants the {ACTION_SPEC.dim} actions of a Panda with its gripper, "
                f"{config.robosuite_name} takes {self.robosuite.action_dim}"
            )
        watched = WATCHED.get(config.robosuite_name, _free_bodies)
        gripper = self.robosuite.robots[0].gripper["right"]
        self._tool, self._fingers = gripper.important_sites["grip_site"], tuple(gripper.joints)
        try:
            watched = watched if isinstance(watched, Watched) else watched(self)
            if config.lifts:
                self.model.body(config.lifts)
            self._observe = Observer(self.model, self.data, self._tool, self._fingers, watched)
        except KeyError as error:
            raise ModelMismatchError(
                f"task {config.name!r}: the model of {config.robosuite_name} lacks what is observed: {error.args[0]}"
            ) from None
        sizes = {k: v.shape for k, v in self._observe().items()}
        self.observation_space = gym.spaces.Dict(
            {k: gym.spaces.Box(-np.inf, np.inf, shape, np.float32) for k, shape in sizes.items()}
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Place the scene of ``seed`` (drawn when None)."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        with global_numpy_seed(seed):  # robosuite's samplers draw from numpy's global state
            self.robosuite.reset()
        if self._compiled is not None:
            self._compiled.reset()
        self._lies_m = self.data.body(self.config.lifts).xpos[2] if self.config.lifts else 0.0
        self.steps = 0
        return self._observe(), {"success": False}

    def step(self, action: np.ndarray) -> Outcome:
        """Execute one action in metres, radians and gripper units.

        Raises:
            InvalidActionError: the action's shape or a number in it is bad; nothing has moved.
            SimulationDivergedError: the physics broke down; reset before going on.
        """
        unit_A = (self.checked_action(action) / HIGH_A).astype(np.float64)
        self.steps += 1
        if self._compiled is None:
            self.robosuite.step(unit_A)
            self.require_healthy()
        elif not self._compiled.step(unit_A):
            self.require_healthy()
        success = self._succeeds()
        truncated = not success and self.steps >= self.config.max_episode_steps
        return self._observe(), float(success), success, truncated, {"success": success}

    def _succeeds(self) -> bool:
        if not self.config.lifts:
            return bool(self.robosuite._check_success())
        return bool(self.data.body(self.config.lifts).xpos[2] > self._lies_m + LIFTED_M)

    def tool_pose(self) -> Pose:
        """Pose of the gripper's grip site in the world."""
        return self.site_pose(self._tool)

    def site_pose(self, name: str) -> Pose:
        """Pose of a site in the world."""
        site = self.data.site(name)
        return Pose(site.xpos.copy(), site.xmat.reshape(3, 3).copy())

    def body_pose(self, name: str) -> Pose:
        """Pose of a body in the world."""
        body = self.data.body(name)
        return Pose(body.xpos.copy(), body.xmat.reshape(3, 3).copy())

    def gripper_width_m(self) -> float:
        """Opening between the two fingers."""
        left, right = (self.data.joint(name).qpos[0] for name in self._fingers)
        return float(left - right)


def _door(env: RobosuiteEnv) -> Watched:
    """Frame, handle, hinge and latch."""
    door = env.robosuite.door
    return Watched((door.root_body,), (door.important_sites["handle"],), tuple(door.joints))


def _free_bodies(env: RobosuiteEnv) -> Watched:
    """The default for tasks without an entry of their own."""
    return free_bodies(env.model)


WATCHED: dict[str, Watched | Callable[[RobosuiteEnv], Watched]] = {
    "Lift": Watched(("cube_main",)),
    "PickPlaceCan": Watched(("Can_main",)),
    "NutAssemblySquare": Watched(("SquareNut_main",)),
    "Stack": Watched(("cubeA_main", "cubeB_main")),
    "Door": _door,
}
