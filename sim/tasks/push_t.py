"""Push a T onto its target in the plane: the Push-T of Diffusion Policy (arXiv 2303.04137) in MuJoCo primitives.

Quasi-static as the original: the T has no inertia to speak of against its viscous drag, so it stops when it is
not pushed. Lengths are 50 mm per unit of the original's T (a 4 x 1 bar on a 1 x 3 stem).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from sim.mujoco_env import MujocoEnv
from sim.push_t_kernel import BAD_ACTION, DIVERGED, control_step, observe, overlap_m2
from sim.task import Outcome, TaskConfig
from vla_rl.types import ENVIRONMENT_STATE, STATE, ActionSpec, FeatureSpec, ObservationSpec

UNIT_M = 0.05
BAR_HALF_M = (2.0 * UNIT_M, 0.5 * UNIT_M)
STEM_HALF_M = (0.5 * UNIT_M, 1.5 * UNIT_M)
# the body frame is at the centre of area of the T, so that drag acts there
BAR_Y_M = 6.0 / 7.0 * UNIT_M
STEM_Y_M = -8.0 / 7.0 * UNIT_M
AREA_M2 = 7.0 * UNIT_M**2
PUSHER_RADIUS_M = 0.02
REACH_M = 0.35  # the pusher moves in [-REACH_M, REACH_M]^2; the target is at the origin, unrotated
START_RANGE_M = 0.12
PUSHER_START_RANGE_M = 0.24
SUCCESS_COVERAGE = 0.9
CONTROL_HZ = 20.0
TIMESTEP_S = 0.005
SUBSTEPS = 10

ACTION_SPEC = ActionSpec(
    names=("x", "y"),
    units=("m", "m"),
    low=(-REACH_M, -REACH_M),
    high=(REACH_M, REACH_M),
    mode="absolute",
    control_hz=CONTROL_HZ,
)


def _rectangle(half_m: tuple[float, float], y_m: float) -> np.ndarray:
    hx, hy = half_m
    return np.array([(-hx, y_m - hy), (hx, y_m - hy), (hx, y_m + hy), (-hx, y_m + hy)])


RECTANGLES_M = np.stack([_rectangle(BAR_HALF_M, BAR_Y_M), _rectangle(STEM_HALF_M, STEM_Y_M)])
# the eight corners of the outline, counter-clockwise from the lower left of the stem
OUTLINE_M = np.array(
    [
        RECTANGLES_M[1][0],
        RECTANGLES_M[1][1],
        (STEM_HALF_M[0], BAR_Y_M - BAR_HALF_M[1]),
        RECTANGLES_M[0][1],
        RECTANGLES_M[0][2],
        RECTANGLES_M[0][3],
        RECTANGLES_M[0][0],
        (-STEM_HALF_M[0], BAR_Y_M - BAR_HALF_M[1]),
    ]
)


def to_tee_frame(point_m: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """A point of the world in the frame of a T at ``pose``."""
    c, s = np.cos(pose[2]), np.sin(pose[2])
    return np.array([[c, s], [-s, c]]) @ (np.asarray(point_m) - pose[:2])


def coverage(pose: np.ndarray) -> float:
    """Share of the target's area that a T at ``pose`` covers, in [0, 1]; exact, by clipping its two rectangles."""
    return min(overlap_m2(RECTANGLES_M, pose[0], pose[1], np.cos(pose[2]), np.sin(pose[2])) / AREA_M2, 1.0)


def _geom(half_m: tuple[float, float], y_m: float, extra: str) -> str:
    return f'<geom type="box" pos="0 {y_m:.9f} 0" size="{half_m[0]:.9f} {half_m[1]:.9f} 0.02" {extra}/>'


_T_GEOMS = _geom(BAR_HALF_M, BAR_Y_M, 'class="tee"') + _geom(STEM_HALF_M, STEM_Y_M, 'class="tee"')
_TARGET_GEOMS = _geom(BAR_HALF_M, BAR_Y_M, 'class="target"') + _geom(STEM_HALF_M, STEM_Y_M, 'class="target"')
XML = f"""
<mujoco model="push_t">
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" gravity="0 0 0" cone="elliptic"/>
  <visual><headlight ambient="0.6 0.6 0.6" diffuse="0.4 0.4 0.4" specular="0 0 0"/><quality shadowsize="0"/></visual>
  <default>
    <default class="tee"><geom rgba="0.45 0.50 0.60 1" mass="0.05" contype="1" conaffinity="2" friction="0.3 0 0"/></default>
    <default class="target"><geom rgba="0.55 0.85 0.55 1" contype="0" conaffinity="0"/></default>
  </default>
  <worldbody>
    <camera name="top" pos="0 0 0.9" fovy="45"/>
    <geom type="plane" size="0.6 0.6 0.1" pos="0 0 -0.03" rgba="0.95 0.95 0.95 1" contype="0" conaffinity="0"/>
    <body name="target" pos="0 0 -0.024">{_TARGET_GEOMS}</body>
    <body name="tee">
      <joint name="tee_x" type="slide" axis="1 0 0" damping="10"/>
      <joint name="tee_y" type="slide" axis="0 1 0" damping="10"/>
      <joint name="tee_theta" type="hinge" axis="0 0 1" damping="0.04"/>
      {_T_GEOMS}
    </body>
    <body name="pusher">
      <joint name="pusher_x" type="slide" axis="1 0 0" damping="10"/>
      <joint name="pusher_y" type="slide" axis="0 1 0" damping="10"/>
      <geom type="cylinder" size="{PUSHER_RADIUS_M} 0.02" mass="0.3" rgba="0.2 0.4 0.9 1" contype="2" conaffinity="1" friction="0.3 0 0"/>
    </body>
  </worldbody>
  <actuator>
    <position joint="pusher_x" kp="200" kv="10" forcerange="-6 6"/>
    <position joint="pusher_y" kp="200" kv="10" forcerange="-6 6"/>
  </actuator>
</mujoco>
"""
# order of qpos, qvel
TEE = slice(0, 3)
PUSHER = slice(3, 5)


@TaskConfig.register_subclass("push_t")
@dataclass(frozen=True)
class PushTTask(TaskConfig):
    """Push-T; start poses of the T are uniform in a square of +-12 cm and all headings."""

    def build_env(self) -> PushTEnv:
        """Build the environment."""
        return PushTEnv(self)


class PushTEnv(MujocoEnv):
    """State: pusher position. Environment state: T position, heading as (cos, sin), corners, pusher in the T's frame."""

    camera = "top"

    def __init__(self, config: PushTTask) -> None:
        super().__init__()
        self.config = config
        self.action_spec = ACTION_SPEC
        self.action_space = self.box(ACTION_SPEC)
        self.model = mujoco.MjModel.from_xml_string(XML)
        self.data = mujoco.MjData(self.model)
        data = self.data
        self._views = self.model._address, data._address, data.qpos, data.ctrl, data.warning.number
        self.observation_space = gym.spaces.Dict(
            {
                STATE: gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
                ENVIRONMENT_STATE: gym.spaces.Box(-np.inf, np.inf, (22,), np.float32),
            }
        )

    @property
    def observation_spec(self) -> ObservationSpec:
        """Shapes, and the names of the pusher's coordinates, which are those of the action."""
        return {**super().observation_spec, STATE: FeatureSpec((2,), ACTION_SPEC.names)}

    @property
    def tee_pose(self) -> np.ndarray:
        """The T's pose (x m, y m, theta rad); theta is not wrapped."""
        return self.data.qpos[TEE].copy()

    @property
    def pusher_m(self) -> np.ndarray:
        """The pusher's position (x, y)."""
        return self.data.qpos[PUSHER].copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw a start: T anywhere near the target in any heading and not yet successful, pusher clear of it."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        pose = np.zeros(3)
        while coverage(pose) >= 0.5 * SUCCESS_COVERAGE:
            pose[:2] = self.np_random.uniform(-START_RANGE_M, START_RANGE_M, 2)
            pose[2] = self.np_random.uniform(-np.pi, np.pi)
        pusher_m = pose[:2]
        while signed_distance_m(pusher_m, pose) < 2 * PUSHER_RADIUS_M:
            pusher_m = self.np_random.uniform(-PUSHER_START_RANGE_M, PUSHER_START_RANGE_M, 2)
        self.data.qpos[TEE] = pose
        self.data.qpos[PUSHER] = pusher_m
        self.data.ctrl[:] = pusher_m
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self._observe(), {"success": False, "coverage": coverage(pose)}

    def step(self, action: np.ndarray) -> Outcome:
        """Move the pusher's set point to ``action`` (x m, y m) for 50 ms."""
        action_A = np.asarray(action, dtype=np.float32)
        if action_A.shape != (2,):
            self.checked_action(action)
        state, environment_state = np.empty(2, np.float32), np.empty(22, np.float32)
        area_m2 = control_step(
            *self._views, RECTANGLES_M, OUTLINE_M, action_A, REACH_M, SUBSTEPS, state, environment_state
        )
        if area_m2 == BAD_ACTION:
            self.checked_action(action)
        self.steps += 1
        if area_m2 == DIVERGED:
            self.require_healthy()
        covered = min(area_m2 / AREA_M2, 1.0)
        success = covered >= SUCCESS_COVERAGE
        truncated = not success and self.steps >= self.config.max_episode_steps
        observation = {STATE: state, ENVIRONMENT_STATE: environment_state}
        return observation, float(success), success, truncated, {"success": success, "coverage": covered}

    def _observe(self) -> dict[str, np.ndarray]:
        state, environment_state = np.empty(2, np.float32), np.empty(22, np.float32)
        observe(self.data.qpos, OUTLINE_M, state, environment_state)
        return {STATE: state, ENVIRONMENT_STATE: environment_state}


def signed_distance_m(point_m: np.ndarray, pose: np.ndarray) -> float:
    """Distance from a point to the T's outline, negative inside."""
    local_m = to_tee_frame(point_m, pose)
    distances = []
    for half_m, y_m in ((BAR_HALF_M, BAR_Y_M), (STEM_HALF_M, STEM_Y_M)):
        q = np.abs(local_m - (0.0, y_m)) - half_m
        distances.append(np.linalg.norm(np.maximum(q, 0.0)) + min(max(q[0], q[1]), 0.0))
    return float(min(distances))
