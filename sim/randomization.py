"""Domain randomisation (arXiv 1703.06907, 1710.06537) as pure functions of a nominal MuJoCo model and a generator.

Every knob is a function ``(model, generator, range) -> {field of MjModel: new array}`` that leaves the model as it is;
``apply`` writes such a mapping into a live model. A range of 0 gives the nominal values back to the bit. A relative
range ``r`` stands for factors uniform in [1 - r, 1 + r], so the nominal value is the mean and the ends are what the
name says. Each knob draws from a stream of its own, named after it: switching one on does not change what another draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter

import mujoco
import numpy as np

from vla_rl.runtime.seeding import numpy_generator

# field of MjModel (a dot descends: ``vis.headlight.diffuse``) -> array of that field's shape and dtype
Changes = dict[str, np.ndarray]

# rgba of a geom that was given none: MuJoCo then shows its material's colour, and only then
UNSET_RGBA = np.array([0.5, 0.5, 0.5, 1.0], dtype=np.float32)
# parameters of the force law of an affine actuator: constant, length, velocity
AFFINE = slice(0, 3)
# what mj_setConst derives further constants from; the other fields of this module enter no derived constant
SETS_CONSTANTS = frozenset({"body_mass", "body_inertia", "cam_pos", "cam_quat", "light_pos"})
# statistics of the geometry, which a model's XML may set: mj_setConst would put its own numbers in their place
GEOMETRIC_STATISTICS = ("center", "extent", "meansize")


@dataclass(frozen=True)
class Randomization:
    """What varies from episode to episode, and how far; the default varies nothing.

    friction: relative range of the sliding friction of each body's colliding geoms, in [0, 1)
    mass: relative range of mass and inertia of each body that can move, in [0, 1)
    damping: relative range of the damping of each joint, in [0, 1)
    actuator_gain: relative range of the force of each actuator (gain and bias together), in [0, 1)
    camera_position_m: cameras are shifted by up to this along each axis of the body they sit on
    camera_rotation_rad: cameras are turned by up to this about a random axis, in [0, pi]
    light: relative range of the brightness (ambient and diffuse) of each light, in [0, 1)
    light_position_m: lights are shifted by up to this along each axis
    colour: largest change of red, green and blue of each body and material, in [0, 1]
    observation_noise: standard deviation of white noise on every feature of real numbers, in the feature's own unit
    observation_delay_steps: largest delay of observations; each episode draws one of 0, ..., this
    action_delay_steps: largest delay of actions; each episode draws one of 0, ..., this
    """

    friction: float = 0.0
    mass: float = 0.0
    damping: float = 0.0
    actuator_gain: float = 0.0
    camera_position_m: float = 0.0
    camera_rotation_rad: float = 0.0
    light: float = 0.0
    light_position_m: float = 0.0
    colour: float = 0.0
    observation_noise: float = 0.0
    observation_delay_steps: int = 0
    action_delay_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("friction", "mass", "damping", "actuator_gain", "light"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} wants a relative range in [0, 1), got {getattr(self, name)}")
        if not 0.0 <= self.colour <= 1.0:
            raise ValueError(f"colour wants a range in [0, 1], got {self.colour}")
        if not 0.0 <= self.camera_rotation_rad <= math.pi:
            raise ValueError(f"camera_rotation_rad wants an angle in [0, pi], got {self.camera_rotation_rad}")
        for name in ("camera_position_m", "light_position_m", "observation_noise"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} wants a finite number >= 0, got {getattr(self, name)}")
        for name in ("observation_delay_steps", "action_delay_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise ValueError(f"{name} wants a whole number of steps >= 0, got {steps!r}")

    @property
    def enabled(self) -> bool:
        """Whether anything varies."""
        return any(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def of_model(self) -> tuple[str, ...]:
        """The knobs that are on and need a MuJoCo model."""
        return tuple(name for name in MODEL_KNOBS if getattr(self, name))


def _factors(generator: np.random.Generator, relative_range: float, count: int) -> np.ndarray:
    return 1.0 + relative_range * generator.uniform(-1.0, 1.0, count)


def friction(model: mujoco.MjModel, generator: np.random.Generator, relative_range: float) -> Changes:
    """Scale the sliding friction (``geom_friction[:, 0]``, (ngeom, 3)) of colliding geoms, one factor per body.

    A body is taken to be of one material. Torsional and rolling friction and explicit contact pairs keep their values.
    A contact's friction is the larger of its two geoms' (unless one has priority), so its mean lies above the nominal
    value where both are alike.
    """
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    factor = _factors(generator, relative_range, model.nbody)[model.geom_bodyid]
    new = model.geom_friction.copy()
    new[:, 0] *= np.where(collides, factor, 1.0)
    return {"geom_friction": new}


def mass(model: mujoco.MjModel, generator: np.random.Generator, relative_range: float) -> Changes:
    """Scale mass (nbody,) and principal inertias (nbody, 3) of every body that can move, one factor per body.

    That is every body not welded to the world: objects, and the robot's links too. Centres of mass, and so density
    ratios within a body, stay. robosuite's operational-space controller computes with the live model, so it makes up
    for a heavier arm, but not for a heavier object in the hand.
    """
    movable = model.body_weldid != 0
    factor = np.where(movable, _factors(generator, relative_range, model.nbody), 1.0)
    return {"body_mass": model.body_mass * factor, "body_inertia": model.body_inertia * factor[:, None]}


def damping(model: mujoco.MjModel, generator: np.random.Generator, relative_range: float) -> Changes:
    """Scale the damping (nv,) of every joint, one factor per joint."""
    factor = _factors(generator, relative_range, model.njnt)[model.dof_jntid]
    return {"dof_damping": model.dof_damping * factor}


def actuator_gain(model: mujoco.MjModel, generator: np.random.Generator, relative_range: float) -> Changes:
    """Scale the force law of every fixed or affine actuator, one factor per actuator.

    The force is gain * ctrl + bias; both are scaled, so at the same state and control the force is the nominal one
    times the factor, before force limits, which stay. For a position servo that is kp and kv together, and where it
    comes to rest without load does not move. A motor has no bias. Muscles and user-defined actuators are left alone.
    """
    gains, biases = mujoco.mjtGain, mujoco.mjtBias
    known = np.isin(model.actuator_gaintype, [gains.mjGAIN_FIXED, gains.mjGAIN_AFFINE])
    known &= np.isin(model.actuator_biastype, [biases.mjBIAS_NONE, biases.mjBIAS_AFFINE])
    factor = np.where(known, _factors(generator, relative_range, model.nu), 1.0)
    gain, bias = model.actuator_gainprm.copy(), model.actuator_biasprm.copy()
    gain[:, AFFINE] *= factor[:, None]
    bias[:, AFFINE] *= factor[:, None]
    return {"actuator_gainprm": gain, "actuator_biasprm": bias}


def camera_position(model: mujoco.MjModel, generator: np.random.Generator, half_range_m: float) -> Changes:
    """Shift every camera, uniformly in a cube of +-half_range_m in the frame of its body: (ncam, 3)."""
    return {"cam_pos": model.cam_pos + half_range_m * generator.uniform(-1.0, 1.0, (model.ncam, 3))}


def camera_rotation(model: mujoco.MjModel, generator: np.random.Generator, largest_rad: float) -> Changes:
    """Turn every camera about an axis uniform on the sphere by an angle uniform in [0, largest_rad]: (ncam, 4) wxyz."""
    axes = generator.standard_normal((model.ncam, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles_rad = largest_rad * generator.uniform(0.0, 1.0, model.ncam)
    new, turn = model.cam_quat.copy(), np.zeros(4)
    for camera in range(model.ncam):
        mujoco.mju_axisAngle2Quat(turn, axes[camera], angles_rad[camera])
        mujoco.mju_mulQuat(new[camera], model.cam_quat[camera], turn)
    return {"cam_quat": new}


def light(model: mujoco.MjModel, generator: np.random.Generator, relative_range: float) -> Changes:
    """Scale ambient and diffuse brightness (nlight, 3) of every light and of the headlight, one factor per light."""
    head, *rest = _factors(generator, relative_range, model.nlight + 1).astype(np.float32)
    factor = np.array(rest, dtype=np.float32)[:, None]
    return {
        "light_ambient": model.light_ambient * factor,
        "light_diffuse": model.light_diffuse * factor,
        "vis.headlight.ambient": model.vis.headlight.ambient * head,
        "vis.headlight.diffuse": model.vis.headlight.diffuse * head,
    }


def light_position(model: mujoco.MjModel, generator: np.random.Generator, half_range_m: float) -> Changes:
    """Shift every light, uniformly in a cube of +-half_range_m in the frame of its body: (nlight, 3)."""
    return {"light_pos": model.light_pos + half_range_m * generator.uniform(-1.0, 1.0, (model.nlight, 3))}


def colour(model: mujoco.MjModel, generator: np.random.Generator, largest_change: float) -> Changes:
    """Shift red, green and blue by up to +-largest_change, clipped to [0, 1]: (ngeom, 4) and (nmat, 4); alpha stays.

    One shift per body and one per material. A geom that shows its material's colour keeps its unset ``rgba``: another
    value there would hide the material.
    """
    body_shift, material_shift = (
        largest_change * generator.uniform(-1.0, 1.0, (count, 3)) for count in (model.nbody, model.nmat)
    )
    own = (model.geom_matid < 0) | (model.geom_rgba != UNSET_RGBA).any(axis=1)
    geoms, materials = model.geom_rgba.copy(), model.mat_rgba.copy()
    geoms[own, :3] = np.clip(geoms[own, :3] + body_shift[model.geom_bodyid[own]], 0.0, 1.0)
    materials[:, :3] = np.clip(materials[:, :3] + material_shift, 0.0, 1.0)
    return {"geom_rgba": geoms, "mat_rgba": materials}


# field of Randomization -> the function it is the range of; no two write the same field of a model
MODEL_KNOBS: dict[str, Callable[[mujoco.MjModel, np.random.Generator, float], Changes]] = {
    "friction": friction,
    "mass": mass,
    "damping": damping,
    "actuator_gain": actuator_gain,
    "camera_position_m": camera_position,
    "camera_rotation_rad": camera_rotation,
    "light": light,
    "light_position_m": light_position,
    "colour": colour,
}


def randomized(model: mujoco.MjModel, generator: np.random.Generator, config: Randomization) -> Changes:
    """Draw the changes of one episode from a nominal model, which stays as it is.

    Takes one number from ``generator`` whatever is switched on. The result has the fields of the knobs that are on only.
    """
    root = int(generator.integers(2**63))
    changes: Changes = {}
    for name in config.of_model:
        changes |= MODEL_KNOBS[name](model, numpy_generator(root, name), getattr(config, name))
    return changes


def values_of(model: mujoco.MjModel, fields: Mapping[str, np.ndarray]) -> Changes:
    """Copies of what a model has now in the fields of a mapping."""
    return {name: attrgetter(name)(model).copy() for name in fields}


def apply(model: mujoco.MjModel, changes: Mapping[str, np.ndarray]) -> None:
    """Write changes into a live model, and have MuJoCo derive anew the constants that depend on them.

    Where masses, camera or light poses change, ``mj_setConst`` on a scratch state does that (0.1 ms for a robosuite
    model, and 1 to 2 ms for the scratch state): subtree masses, inverse weights, ``dof_M0``, mean mass and inertia and
    the like. It changes neither ``qpos0`` nor, on a compiled model, any constant whose inputs are as compiled. Mean
    mass and inertia that a model's XML gives are replaced; extent, centre and mean size are kept.

    Raises:
        ValueError: a value's shape is not its field's; nothing has been written then.
    """
    fields = {name: attrgetter(name)(model) for name in changes}
    for name, field in fields.items():
        if changes[name].shape != field.shape:
            raise ValueError(f"{name} of the model has shape {field.shape}, got {changes[name].shape}")
    for name, field in fields.items():
        field[:] = changes[name]
    if SETS_CONSTANTS & changes.keys():
        kept = {name: np.copy(getattr(model.stat, name)) for name in GEOMETRIC_STATISTICS}
        mujoco.mj_setConst(model, mujoco.MjData(model))
        for name, value in kept.items():
            setattr(model.stat, name, value)


def with_noise(
    observation: Mapping[str, np.ndarray], generator: np.random.Generator, deviation: float
) -> dict[str, np.ndarray]:
    """Add white noise of standard deviation ``deviation``, in each feature's own unit, to the features of real numbers.

    Images (integers) stay as they are. Shapes and dtypes stay. Features draw in the order of their names.
    """
    noisy = dict(observation)
    for name in sorted(observation):
        value = observation[name]
        if np.issubdtype(value.dtype, np.floating):
            noisy[name] = (value + deviation * generator.standard_normal(value.shape)).astype(value.dtype)
    return noisy


def delay_steps(generator: np.random.Generator, largest: int) -> int:
    """Draw a delay in control steps, uniform on 0, ..., largest."""
    return int(generator.integers(largest + 1))
