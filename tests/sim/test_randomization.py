"""Randomisation: the laws of the draws, the physics they stand for, no history, and nothing at all by default."""

from __future__ import annotations

import sim  # isort: skip  # noqa: F401  # chooses the OpenGL back-end, which MuJoCo reads when it is imported

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from sim import randomization
from sim.collect import run_expert
from sim.experts.base import ExpertConfig, HumanLike, load_expert
from sim.randomization import MODEL_KNOBS, Changes, Randomization, apply, randomized, values_of, with_noise
from sim.randomized_env import RandomizedEnv
from sim.task import TaskConfig, TaskEnv, load_task
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE, ActionSpec

GRAVITY_M_PER_S2 = 9.81
XML = """
<mujoco>
  <option timestep="0.001" integrator="RK4" gravity="0 0 -9.81"/>
  <statistic extent="5" center="0 0 1"/>
  <asset><material name="red" rgba="1 0 0 0.5"/><material name="grey" rgba="0.4 0.4 0.4 1"/></asset>
  <worldbody>
    <light pos="0 0 3" diffuse="0.6 0.6 0.6"/><light pos="1 0 3" mode="track"/>
    <camera name="front" pos="1 0 1" xyaxes="0 1 0 -1 0 1"/><camera name="top" pos="0 0 2"/>
    <geom name="shown" type="plane" size="9 9 1" pos="0 0 -9" contype="0" conaffinity="0" material="grey"/>
    <body name="post" pos="0 9 0"><geom size="0.1" material="red" rgba="0 0 1 1"/></body>
    <body name="ball" pos="0 0 5"><freejoint/><geom size="0.1" rgba="0.3 0.4 0.5 0.7"/></body>
    <body name="pendulum" pos="5 0 0">
      <joint name="swing" type="hinge" axis="0 1 0"/>
      <geom type="capsule" fromto="0 0 0 0 0 -1" size="0.02" contype="0" conaffinity="0"/>
      <body name="bob" pos="0 0 -1"><joint type="ball" damping="0.1"/><geom size="0.05" contype="0" conaffinity="0"/></body>
    </body>
    <body name="cart" pos="-5 0 0"><joint name="rail" type="slide" axis="1 0 0" damping="2"/><geom size="0.1"/></body>
  </worldbody>
  <actuator>
    <position name="servo" joint="rail" kp="200" kv="20"/><motor name="motor" joint="swing"/>
    <muscle name="muscle" joint="swing" lengthrange="0 1"/>
  </actuator>
</mujoco>
"""
# fields that hold a relative range as the factor of each entry
RELATIVE = {
    "friction": ("geom_friction",),
    "mass": ("body_mass", "body_inertia"),
    "damping": ("dof_damping",),
    "actuator_gain": ("actuator_gainprm", "actuator_biasprm"),
    "light": ("light_diffuse", "light_ambient", "vis.headlight.diffuse", "vis.headlight.ambient"),
}
ABSOLUTE = {"camera_position_m": "cam_pos", "light_position_m": "light_pos"}
EVERYTHING = Randomization(
    **{name: 0.2 for name in MODEL_KNOBS}, observation_noise=0.01, observation_delay_steps=3, action_delay_steps=3
)
DRAWS = 2000
SIGMAS = 4.5


@pytest.fixture
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(XML)


def snapshot(model: mujoco.MjModel) -> dict[str, bytes]:
    """Every array of a model, as a hash, and its statistics."""
    arrays = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    found = {
        name: hashlib.sha256(np.ascontiguousarray(value)).digest()
        for name, value in arrays.items()
        if isinstance(value, np.ndarray) and value.size
    }
    lights = [model.vis.headlight.ambient, model.vis.headlight.diffuse]
    stat = [getattr(model.stat, name) for name in ("meaninertia", "meanmass", "meansize", "extent", "center")]
    return found | {"other": b"".join(np.asarray(value).tobytes() for value in (*lights, *stat))}


def draws(model: mujoco.MjModel, knob: str, amount: float) -> list[Changes]:
    generator = np.random.default_rng(0)
    return [MODEL_KNOBS[knob](model, generator, amount) for _ in range(DRAWS)]


def bit_equal(a: Changes, b: Changes) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def uniform(sample: np.ndarray, low: float, high: float) -> None:
    """Within the range, near both ends of it, and with the mean and variance of the uniform law."""
    sample, width = np.asarray(sample, np.float64), high - low
    assert sample.min() >= low - 1e-6
    assert sample.max() <= high + 1e-6
    assert sample.min() < low + 0.01 * width
    assert sample.max() > high - 0.01 * width
    assert abs(sample.mean() - (low + high) / 2) < SIGMAS * width / np.sqrt(12 * sample.size)
    # kurtosis of the uniform law is 9/5, so the variance of the sample variance is 4/5 of its square over n
    assert abs(sample.var() / (width**2 / 12) - 1) < SIGMAS * np.sqrt(0.8 / sample.size)


# the laws


@pytest.mark.parametrize("knob", MODEL_KNOBS)
def test_a_range_of_zero_is_the_nominal_model_to_the_bit(model: mujoco.MjModel, knob: str) -> None:
    before = snapshot(model)
    changes = MODEL_KNOBS[knob](model, np.random.default_rng(1), 0.0)
    nominal = values_of(model, changes)
    assert bit_equal(changes, nominal)
    assert all(changes[name].dtype == nominal[name].dtype for name in changes)
    apply(model, changes)
    assert snapshot(model) == before


@pytest.mark.parametrize("knob", MODEL_KNOBS)
def test_drawing_leaves_the_model_alone_and_no_two_knobs_share_a_field(model: mujoco.MjModel, knob: str) -> None:
    before = snapshot(model)
    changes = MODEL_KNOBS[knob](model, np.random.default_rng(1), 0.3)
    assert snapshot(model) == before
    assert all(value.dtype == values_of(model, changes)[name].dtype for name, value in changes.items())
    others = [name for other in MODEL_KNOBS if other != knob for name in draws_once(model, other)]
    assert not set(changes) & set(others)
    apply(model, changes)
    assert snapshot(model) != before


def draws_once(model: mujoco.MjModel, knob: str) -> Changes:
    return MODEL_KNOBS[knob](model, np.random.default_rng(1), 0.3)


@pytest.mark.parametrize("knob", RELATIVE)
def test_relative_ranges_are_uniform_factors(model: mujoco.MjModel, knob: str) -> None:
    samples = draws(model, knob, 0.3)
    for name in RELATIVE[knob]:
        nominal = values_of(model, samples[0])[name]
        values = np.array([changes[name] for changes in samples], np.float64)
        moved = (values != nominal).any(axis=0)
        assert moved.any() or not nominal.any()
        assert np.array_equal(values[:, ~moved], np.broadcast_to(nominal[~moved], values[:, ~moved].shape))
        for entry in zip(*np.nonzero(moved), strict=True):
            uniform(values[(slice(None), *entry)] / nominal[entry], 0.7, 1.3)


def test_the_axes_of_a_ball_joint_share_a_factor(model: mujoco.MjModel) -> None:
    dofs = model.body("bob").dofadr[0] + np.arange(3)
    for changes in draws(model, "damping", 0.3)[:9]:
        assert len(set(changes["dof_damping"][dofs])) == 1


@pytest.mark.parametrize("knob", ABSOLUTE)
def test_positions_are_uniform_in_a_cube(model: mujoco.MjModel, knob: str) -> None:
    samples, name = draws(model, knob, 0.05), ABSOLUTE[knob]
    shifts = np.array([changes[name] for changes in samples]) - getattr(model, name)
    for shift in shifts.reshape(DRAWS, -1).T:
        uniform(shift, -0.05, 0.05)
    correlation = np.corrcoef(shifts.reshape(DRAWS, -1).T) - np.eye(shifts[0].size)
    assert np.abs(correlation).max() < SIGMAS / np.sqrt(DRAWS)


def test_cameras_turn_by_a_uniform_angle_about_any_axis(model: mujoco.MjModel) -> None:
    angles, axes = [], []
    for changes in draws(model, "camera_rotation_rad", 0.4):
        for new, old in zip(changes["cam_quat"], model.cam_quat, strict=True):
            assert np.linalg.norm(new) == pytest.approx(1.0, abs=1e-12)
            inverse, turn, rotation = np.zeros(4), np.zeros(4), np.zeros(3)
            mujoco.mju_negQuat(inverse, old)
            mujoco.mju_mulQuat(turn, inverse, new)
            mujoco.mju_quat2Vel(rotation, turn, 1.0)
            angles.append(np.linalg.norm(rotation))
            axes.append(rotation / angles[-1])
    uniform(np.array(angles), 0.0, 0.4)
    for component in np.array(axes).T:  # each component of a uniform direction is uniform (Archimedes)
        uniform(component, -1.0, 1.0)


def test_colours_shift_within_the_cube_keep_alpha_and_do_not_hide_materials(model: mujoco.MjModel) -> None:
    samples = draws(model, "colour", 0.2)
    ball = model.body("ball").geomadr[0]
    geoms, materials = (np.array([c[name] for c in samples]) for name in ("geom_rgba", "mat_rgba"))
    for channel in range(3):
        uniform(geoms[:, ball, channel] - model.geom_rgba[ball, channel], -0.2, 0.2)
    assert np.array_equal(geoms[:, :, 3], np.broadcast_to(model.geom_rgba[:, 3], geoms.shape[:2]))
    assert np.array_equal(materials[:, :, 3], np.broadcast_to(model.mat_rgba[:, 3], materials.shape[:2]))
    for values in (geoms, materials):
        assert values.min() == 0.0  # clipped
        assert values.max() == 1.0
    shown = model.geom("shown").id
    assert (geoms[:, shown] == model.geom_rgba[shown]).all()


def test_noise_is_white_with_the_given_deviation_and_spares_images() -> None:
    observation = {"a": np.full((500, 40), 2.0, np.float32), "image": np.full((4, 4, 3), 7, np.uint8), "b": np.zeros(9)}
    noisy = with_noise(observation, np.random.default_rng(0), 0.3)
    assert list(noisy) == list(observation)
    assert noisy["image"] is observation["image"]
    assert noisy["a"].dtype == np.float32
    error = (noisy["a"] - 2.0).reshape(-1)
    assert abs(error.mean()) < SIGMAS * 0.3 / np.sqrt(error.size)
    assert abs(error.var() / 0.09 - 1) < SIGMAS * np.sqrt(2 / error.size)
    assert abs(np.corrcoef(error[1:], error[:-1])[0, 1]) < SIGMAS / np.sqrt(error.size)
    assert (observation["a"] == 2.0).all()
    assert all(
        np.array_equal(v, observation[k]) for k, v in with_noise(observation, np.random.default_rng(0), 0).items()
    )


def test_delays_are_uniform_whole_steps() -> None:
    generator = np.random.default_rng(0)
    counts = np.bincount([randomization.delay_steps(generator, 3) for _ in range(DRAWS)])
    assert counts.shape == (4,)
    assert np.abs(counts - DRAWS / 4).max() < SIGMAS * np.sqrt(DRAWS * 3 / 16)


def test_switching_a_knob_on_does_not_change_what_another_draws(model: mujoco.MjModel) -> None:
    alone = randomized(model, np.random.default_rng(3), Randomization(mass=0.2))
    full = randomized(model, np.random.default_rng(3), EVERYTHING)
    assert bit_equal(alone, {name: full[name] for name in alone})
    assert set(full) > set(alone)
    generators = [np.random.default_rng(3), np.random.default_rng(3)]
    for generator, config in zip(generators, (Randomization(), EVERYTHING), strict=True):
        randomized(model, generator, config)
    assert generators[0].random() == generators[1].random()
    assert not randomized(model, np.random.default_rng(3), Randomization())
    # the range scales the same draw
    wide = randomized(model, np.random.default_rng(3), Randomization(mass=0.4))
    assert np.allclose(wide["body_mass"] - model.body_mass, 2 * (alone["body_mass"] - model.body_mass))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in RELATIVE for value in (-0.1, 1.0, float("nan"))),
        *((name, value) for name in (*ABSOLUTE, "observation_noise") for value in (-0.1, float("inf"), float("nan"))),
        ("colour", 1.1),
        ("camera_rotation_rad", 3.2),
        *((name, value) for name in ("observation_delay_steps", "action_delay_steps") for value in (-1, 1.5, True)),
    ],
)
def test_ranges_that_make_no_sense_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field} wants .*, got {value}$"):
        Randomization(**{field: value})


def test_the_default_varies_nothing_and_any_field_enables() -> None:
    assert not Randomization().enabled
    for field in dataclasses.fields(Randomization):
        config = Randomization(**{field.name: 1 if field.name.endswith("_steps") else 0.5})
        assert config.enabled
        assert config.of_model == ((field.name,) if field.name in MODEL_KNOBS else ())


def test_a_change_of_the_wrong_shape_is_refused_before_anything_is_written(model: mujoco.MjModel) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"body_mass of the model has shape \(6,\), got \(2,\)"):
        apply(model, {"dof_damping": model.dof_damping + 1, "body_mass": np.ones(2)})
    assert snapshot(model) == before


# the physics


def masses_drawn(model: mujoco.MjModel, seed: int = 0) -> Changes:
    changes = randomization.mass(model, np.random.default_rng(seed), 0.5)
    apply(model, changes)
    return changes


def test_inertia_scales_with_mass_and_constants_follow(model: mujoco.MjModel) -> None:
    nominal = mujoco.MjModel.from_xml_string(XML)
    masses_drawn(model)
    factor = model.body_mass[1:] / nominal.body_mass[1:]
    assert np.allclose(model.body_inertia[1:], factor[:, None] * nominal.body_inertia[1:], rtol=1e-12)
    assert factor[model.body("post").id - 1] == 1.0  # welded to the world
    assert len(set(np.delete(factor, model.body("post").id - 1))) == 4
    assert model.body_subtreemass[0] == pytest.approx(model.body_mass.sum())
    bob, pendulum = model.body("bob").id, model.body("pendulum").id
    assert model.body_subtreemass[pendulum] == pytest.approx(model.body_mass[pendulum] + model.body_mass[bob])
    ball = model.body("ball").id
    dof = model.body_dofadr[ball]
    assert model.dof_M0[dof] == pytest.approx(model.body_mass[ball])
    assert model.dof_invweight0[dof] == pytest.approx(1 / model.body_mass[ball])
    assert model.body_invweight0[ball, 0] == pytest.approx(1 / model.body_mass[ball])
    assert model.stat.meanmass == pytest.approx(
        nominal.stat.meanmass * model.body_mass[1:].sum() / nominal.body_mass[1:].sum()
    )
    assert model.stat.meaninertia != nominal.stat.meaninertia
    # what masses have no part in is as compiled, the statistics that the XML gives too
    assert model.stat.extent == 5.0
    assert model.stat.center.tolist() == [0.0, 0.0, 1.0]
    for name in ("qpos0", "qpos_spring", "body_pos", "body_ipos", "body_iquat", "cam_pos0", "dof_armature", "key_qpos"):
        assert np.array_equal(getattr(model, name), getattr(nominal, name))


def test_constants_are_those_of_a_model_compiled_with_the_same_masses() -> None:
    def compiled(mass: str) -> mujoco.MjModel:
        ball = f'<geom size="0.1" mass="{mass}"/>'
        return mujoco.MjModel.from_xml_string(
            f'<mujoco><worldbody><body><joint axis="0 1 0"/><geom type="box" size="0.1 0.1 1" pos="0 0 1" mass="2"/>'
            f'<body pos="0 0 2"><joint type="slide"/>{ball}</body></body></worldbody></mujoco>'
        )

    changed, expected = compiled("1"), compiled("3")
    apply(changed, {"body_mass": expected.body_mass, "body_inertia": expected.body_inertia})
    for name in ("body_subtreemass", "dof_M0", "dof_invweight0", "body_invweight0"):
        assert np.allclose(getattr(changed, name), getattr(expected, name), rtol=1e-12)
    assert changed.stat.meaninertia == pytest.approx(expected.stat.meaninertia)


def test_a_heavier_body_falls_as_fast_and_accelerates_less_under_a_force(model: mujoco.MjModel) -> None:
    for seed in range(3):
        masses_drawn(model, seed)
        data = mujoco.MjData(model)
        ball = model.body("ball").id
        mujoco.mj_step(model, data, 500)
        fallen_m = 5.0 - data.body("ball").xpos[2]
        assert fallen_m == pytest.approx(0.5 * GRAVITY_M_PER_S2 * data.time**2, rel=0.01)
        data.xfrc_applied[ball, 0] = 3.0
        mujoco.mj_forward(model, data)
        assert data.qacc[model.body_dofadr[ball]] == pytest.approx(3.0 / model.body_mass[ball])


def period_s(model: mujoco.MjModel) -> float:
    """Time between two upward zero crossings of the pendulum's angle, by linear interpolation."""
    data = mujoco.MjData(model)
    data.joint("swing").qpos[0] = -0.1
    crossings, before = [], -0.1
    while len(crossings) < 2:
        mujoco.mj_step(model, data)
        now = float(data.joint("swing").qpos[0])
        if before < 0 <= now:
            crossings.append(data.time - model.opt.timestep * now / (now - before))
        before = now
    return crossings[1] - crossings[0]


def test_the_period_of_a_pendulum_does_not_depend_on_its_mass() -> None:
    xml = (
        '<mujoco><option timestep="0.002" integrator="RK4"/><worldbody><body><joint name="swing" axis="0 1 0"/>'
        '<geom type="capsule" fromto="0 0 0 0 0 -1" size="0.02"/></body></worldbody></mujoco>'
    )
    model = mujoco.MjModel.from_xml_string(xml)
    nominal_s = period_s(model)
    inertia = model.body_inertia[1, 0] + model.body_mass[1] * model.body_ipos[1, 2] ** 2
    small_angle_s = 2 * np.pi * np.sqrt(inertia / (model.body_mass[1] * GRAVITY_M_PER_S2 * -model.body_ipos[1, 2]))
    assert nominal_s == pytest.approx(small_angle_s * (1 + 0.1**2 / 16), rel=1e-4)
    mass_kg = model.body_mass[1]
    masses_drawn(model)
    assert abs(model.body_mass[1] / mass_kg - 1) > 0.05
    assert period_s(model) == pytest.approx(nominal_s, rel=1e-9)


def test_a_sliding_box_stops_after_the_distance_of_its_friction() -> None:
    xml = (
        '<mujoco><option timestep="0.0005" cone="elliptic" impratio="20"/><worldbody>'
        '<geom type="plane" size="9 9 1" friction="0.01 0 0"/>'
        '<body pos="0 0 0.02"><freejoint/><geom type="box" size="0.1 0.1 0.02" friction="0.3 0 0"/></body></worldbody></mujoco>'
    )
    speed_m_per_s, frictions = 1.0, []
    for seed in range(4):
        model = mujoco.MjModel.from_xml_string(xml)
        apply(model, randomization.friction(model, np.random.default_rng(seed), 0.6))
        data = mujoco.MjData(model)
        mujoco.mj_step(model, data, 200)  # settle
        start_m, data.qvel[0] = data.qpos[0], speed_m_per_s
        while data.qvel[0] > 1e-3:
            mujoco.mj_step(model, data)
        mu = model.geom_friction[1, 0]  # the plane's is smaller, and the larger one counts
        assert data.qpos[0] - start_m == pytest.approx(speed_m_per_s**2 / (2 * mu * GRAVITY_M_PER_S2), rel=0.02)
        frictions.append(mu)
    assert np.ptp(frictions) > 0.05


def test_a_servo_of_any_gain_rests_at_its_target_and_forces_scale(model: mujoco.MjModel) -> None:
    nominal = mujoco.MjModel.from_xml_string(XML)
    apply(model, randomization.actuator_gain(model, np.random.default_rng(0), 0.5))
    servo, muscle = model.actuator("servo").id, model.actuator("muscle").id
    factor = model.actuator_gainprm[:, 0] / nominal.actuator_gainprm[:, 0]
    assert abs(factor[servo] - 1) > 0.05
    assert model.actuator_biasprm[servo, :3] == pytest.approx([0.0, -200 * factor[servo], -20 * factor[servo]])
    assert np.array_equal(model.actuator_gainprm[muscle], nominal.actuator_gainprm[muscle])
    forces = []
    for any_model in (nominal, model):
        data = mujoco.MjData(any_model)
        data.ctrl[:] = 0.3, 2.0, 0.5
        data.joint("rail").qpos[0], data.joint("rail").qvel[0] = 0.1, -0.2
        mujoco.mj_forward(any_model, data)
        forces.append(data.actuator_force.copy())
        data.ctrl[1:] = 0.0
        mujoco.mj_step(any_model, data, 5000)
        assert data.joint("rail").qpos[0] == pytest.approx(0.3, abs=1e-6)
    assert forces[1][:2] == pytest.approx(factor[:2] * forces[0][:2])
    assert forces[1][muscle] == forces[0][muscle]


def test_friction_is_one_factor_per_body_and_of_colliding_geoms_only() -> None:
    model = load_task("push_t").make_env().model  # type: ignore[attr-defined]
    new = randomization.friction(model, np.random.default_rng(0), 0.5)["geom_friction"]
    changed = new[:, 0] != model.geom_friction[:, 0]
    assert np.array_equal(changed, (model.geom_contype != 0) | (model.geom_conaffinity != 0))
    assert np.array_equal(new[:, 1:], model.geom_friction[:, 1:])
    assert len(set(new[model.geom_bodyid == model.body("tee").id, 0])) == 1


# the environment


def play(env: TaskEnv, seed: int | None, actions: np.ndarray) -> list[Any]:
    observation, info = env.reset(seed=seed)
    seen: list[Any] = [(observation, info["success"])]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append((observation, reward, terminated, truncated, info["success"]))
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(
        same(x, y) if isinstance(x, dict | list | tuple) else x == y for x, y in zip(a, b, strict=True)
    )


def random_actions(env: TaskEnv, steps: int, seed: int = 0) -> np.ndarray:
    spec = env.action_spec
    return np.random.default_rng(seed).uniform(spec.low, spec.high, (steps, spec.dim)).astype(np.float32)


def push_t(**knobs: Any) -> RandomizedEnv:
    return RandomizedEnv(load_task("push_t").make_env(), Randomization(**knobs))


def seed_with(env: RandomizedEnv, **wanted: int) -> int:
    """The first seed whose draw has the wanted delays."""
    for seed in range(100):
        drawn = env.reset(seed=seed)[1]["randomization"]
        if all(drawn[name] == value for name, value in wanted.items()):
            return seed
    raise AssertionError(wanted)


@dataclasses.dataclass(frozen=True)
class CartTask(TaskConfig):
    name: str = "cart"
    instruction: str = ""
    max_episode_steps: int = 1000


class Cart(TaskEnv):
    """A point that moves by its action: the least environment of deltas, with a reward that says when it was paid."""

    def __init__(self) -> None:
        self.config = CartTask()
        self.action_spec = ActionSpec(("dx",), ("m",), (-1.0,), (1.0,), "delta", 20.0)
        self.action_space = self.box(self.action_spec)
        self.observation_space = gym.spaces.Dict({STATE: gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)})
        self.position = np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.position[:] = self.np_random.uniform()
        return {STATE: self.position}, {"success": False}  # the same array every time: a delay has to copy

    def step(self, action: np.ndarray) -> Any:
        self.position += self.checked_action(action)
        return {STATE: self.position}, float(self.position[0]), False, False, {"success": False}

    def render_rgb(self, width: int, height: int) -> np.ndarray:
        return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize("seeds", [(5, 6, 5), (5, None, None)])
def test_by_default_it_is_the_inner_environment_to_the_bit(seeds: tuple[int | None, ...]) -> None:
    inner, wrapped = load_task("push_t").make_env(), push_t()
    actions = random_actions(inner, 30)
    before = snapshot(wrapped.model)
    for seed in seeds:
        assert same(play(inner, seed, actions), play(wrapped, seed, actions))
        assert np.array_equal(inner.data.qpos, wrapped.data.qpos)  # type: ignore[attr-defined]
    assert snapshot(wrapped.model) == before
    assert "randomization" not in wrapped.reset(seed=0)[1]


def test_a_seed_determines_the_episode_whatever_ran_before() -> None:
    used, fresh = push_t(**dataclasses.asdict(EVERYTHING)), push_t(**dataclasses.asdict(EVERYTHING))
    actions = random_actions(used, 20)
    for seed in (1, 2, None):
        play(used, seed, actions)
    first = play(used, 7, actions)
    assert snapshot(used.model) != snapshot(load_task("push_t").make_env().model)  # type: ignore[attr-defined]
    assert same(first, play(fresh, 7, actions))
    assert snapshot(used.model) == snapshot(fresh.model)
    assert bit_equal(used.drawn, fresh.drawn)
    assert not same(first, play(fresh, 8, actions))


def test_draws_start_from_the_nominal_model_and_do_not_compound() -> None:
    nominal = load_task("push_t").make_env().model  # type: ignore[attr-defined]
    env = push_t(mass=0.5, friction=0.5, colour=0.3, camera_rotation_rad=0.3)
    for seed in range(200):
        env.reset(seed=seed)
    assert (np.abs(env.model.body_mass[2:] / nominal.body_mass[2:] - 1) <= 0.5).all()
    assert (np.abs(env.model.geom_rgba - nominal.geom_rgba) <= 0.3 + 1e-6).all()
    assert bit_equal(env._nominal, values_of(nominal, env.drawn))


def test_a_reset_without_seed_draws_one() -> None:
    a, b = push_t(mass=0.2), push_t(mass=0.2)
    for env in (a, b):
        env.reset(seed=4)
        env.reset()
    first = a.model.body_mass.copy()
    assert np.array_equal(first, b.model.body_mass)
    a.reset()
    assert not np.array_equal(first, a.model.body_mass)


def test_the_scene_is_that_of_the_inner_environment() -> None:
    inner, wrapped = (
        load_task("push_t").make_env(),
        push_t(**{**dataclasses.asdict(EVERYTHING), "observation_noise": 0.0}),
    )
    for seed in range(5):
        assert same(inner.reset(seed=seed)[0], wrapped.reset(seed=seed)[0])


@pytest.mark.parametrize("delay", [1, 3])
def test_actions_are_executed_late(delay: int) -> None:
    env, inner = push_t(action_delay_steps=delay), load_task("push_t").make_env()
    seed = seed_with(env, action_delay_steps=delay)
    actions = random_actions(inner, 15)
    hold = np.repeat(actions[:1], delay, axis=0)  # absolute targets: the first one given, until it would have arrived
    expected = play(inner, seed, np.concatenate([hold, actions]))
    late = play(env, seed, actions)
    assert same(late, expected[: len(late)])
    # from standing still (targets where the robot is) the motion is the undelayed one, shifted
    cart, delayed = Cart(), RandomizedEnv(Cart(), Randomization(action_delay_steps=delay))
    seed = seed_with(delayed, action_delay_steps=delay)
    deltas = random_actions(cart, 15)

    def path(env: TaskEnv) -> list[float]:
        observation, _ = env.reset(seed=seed)
        start = float(observation[STATE][0])
        return [start, *(float(env.step(delta)[0][STATE][0]) for delta in deltas)]

    undelayed, shifted = path(cart), path(delayed)
    assert shifted[delay:] == undelayed[:-delay]
    assert shifted[:delay] == [undelayed[0]] * delay


@pytest.mark.parametrize("delay", [1, 3])
def test_observations_are_late_and_rewards_are_not(delay: int) -> None:
    for make in (lambda: load_task("push_t").make_env(), Cart):
        inner, env = make(), RandomizedEnv(make(), Randomization(observation_delay_steps=delay))
        seed = seed_with(env, observation_delay_steps=delay)
        actions = random_actions(inner, 12)
        observation, _ = inner.reset(seed=seed)
        true = [{k: v.copy() for k, v in observation.items()}]
        late = [env.reset(seed=seed)[0]]
        for action in actions:
            observation, *outcome = inner.step(action)
            true.append({k: v.copy() for k, v in observation.items()})
            seen, *its_outcome = env.step(action)
            late.append(seen)
            assert outcome == its_outcome
        assert same(late[delay:], true[:-delay])
        assert same(late[:delay], true[:1] * delay)


def test_noise_follows_the_seed_and_does_not_reach_the_physics() -> None:
    env, inner = push_t(observation_noise=0.01), load_task("push_t").make_env()
    actions = random_actions(env, 40)
    first, again, clean = play(env, 3, actions), play(env, 3, actions), play(inner, 3, actions)
    assert same(first, again)
    assert same([step[1:] for step in first], [step[1:] for step in clean])
    errors = np.concatenate([a[0][k] - b[0][k] for a, b in zip(first, clean, strict=True) for k in a[0]])
    assert errors.std() == pytest.approx(0.01, rel=0.15)
    assert np.abs(env.data.qpos - inner.data.qpos).max() == 0.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("knob", "seen"),
    [("colour", True), ("light", True), ("camera_position_m", True), ("camera_rotation_rad", True), ("mass", False)],
)
def test_pictures_show_what_is_visible_only(knob: str, seen: bool) -> None:
    plain, env = push_t(), push_t(**{knob: 0.2})
    pictures = []
    for each in (plain, env):
        each.reset(seed=0)
        pictures.append(each.render_rgb(64, 64))
        each.close()
    assert (pictures[0] != pictures[1]).any() == seen


def test_experts_play_in_it() -> None:
    env = push_t(mass=0.3, friction=0.3, damping=0.1, actuator_gain=0.1)
    demonstrator = HumanLike(load_expert(load_task("push_t")), ExpertConfig())
    assert sum(run_expert(env, demonstrator, scene).success for scene in range(50_000, 50_003)) >= 2


def test_bad_actions_are_refused_when_given_and_not_when_due() -> None:
    env = push_t(action_delay_steps=3)
    env.reset(seed=seed_with(env, action_delay_steps=3))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(2, np.nan))


def test_what_it_does_not_define_is_the_inner_environments() -> None:
    env = push_t(mass=0.1)
    assert isinstance(env, TaskEnv)
    assert env.model is env.inner.model  # type: ignore[attr-defined]
    assert env.pusher_m.shape == (2,)
    assert env.observation_spec == env.inner.observation_spec
    assert env.action_spec is env.inner.action_spec
    assert env.observation_space is env.inner.observation_space
    assert env.config is env.inner.config
    assert env.unwrapped is env.inner
    with pytest.raises(AttributeError, match="no_such_thing"):
        env.no_such_thing  # noqa: B018


def test_draws_are_reported_singly_and_in_batches() -> None:
    knobs = {"mass": 0.3, "observation_delay_steps": 2}
    makers: list[Callable[[], TaskEnv]] = [functools.partial(push_t, **knobs) for _ in range(3)]
    vector, single = SyncVectorEnv(makers), push_t(**knobs)
    _, info = vector.reset(seed=[4, 5, 6])
    _, alone = single.reset(seed=5)
    assert set(alone["randomization"]) == {"observation_delay_steps", "action_delay_steps", "body_mass", "body_inertia"}
    nominal = load_task("push_t").make_env().model  # type: ignore[attr-defined]
    largest_kg = np.abs(single.model.body_mass - nominal.body_mass).max()
    assert alone["randomization"]["body_mass"] == pytest.approx(largest_kg)
    for name, value in alone["randomization"].items():
        assert info["randomization"][name].shape == (3,)
        assert info["randomization"][name][1] == value
    assert np.array_equal(vector.get_attr("drawn")[1]["body_mass"], single.drawn["body_mass"])
    vector.close()


def test_a_task_without_a_model_takes_delays_and_noise_only() -> None:
    config = Randomization(observation_noise=0.1, action_delay_steps=2)
    env = RandomizedEnv(load_task("gym:Pendulum-v1").make_env(), config)
    env.reset(seed=0)
    env.step(np.zeros(1))
    with pytest.raises(UserError, match=r"'cart' has no MuJoCo model to randomise: friction, mass want 0"):
        RandomizedEnv(Cart(), Randomization(mass=0.1, friction=0.2))


def test_fields_that_no_knob_varies_are_left_as_they_are_found() -> None:
    env = push_t(mass=0.3, camera_position_m=0.1)
    env.reset(seed=0)
    env.model.body_pos[1] += 0.2  # as robosuite's Door does
    env.model.geom_friction[:, 0] = 0.9
    moved = env.model.body_pos.copy()
    env.reset(seed=1)
    assert np.array_equal(env.model.body_pos, moved)
    assert (env.model.geom_friction[:, 0] == 0.9).all()


def test_a_late_observation_has_the_noise_of_when_it_was_taken() -> None:
    env = push_t(observation_noise=0.1, observation_delay_steps=2)
    seed = seed_with(env, observation_delay_steps=2)
    seen = [step[0] for step in play(env, seed, random_actions(env, 3))]
    assert same(seen[0], seen[1])
    assert same(seen[1], seen[2])
    assert not same(seen[2], seen[3])


def test_a_replaced_model_is_noticed() -> None:
    env = push_t(mass=0.1)
    env.reset(seed=0)
    env.inner.model = mujoco.MjModel.from_xml_string(XML)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="replaced its MuJoCo model"):
        env.reset(seed=1)


@pytest.fixture(scope="module", params=["lift", "door"])
def arm(request: pytest.FixtureRequest) -> Iterator[TaskEnv]:
    built = load_task(request.param).make_env()
    yield built
    built.close()


def test_a_robosuite_scene_is_the_same_with_other_masses_and_then_moves_otherwise(arm: Any) -> None:
    actions = random_actions(arm, 8)
    play(arm, 12, actions)
    nominal = snapshot(arm.model)
    plain, qpos = arm.reset(seed=11)[0], arm.data.qpos.copy()
    standing = arm.model.body_pos.copy()
    moved = [arm.step(action)[0] for action in actions][-1]
    env = RandomizedEnv(arm, Randomization(mass=0.5, friction=0.5, actuator_gain=0.3, colour=0.2))
    runs = []
    for history in ((), (12, 13)):
        for seed in history:
            play(env, seed, actions)
        varied, _ = env.reset(seed=11)
        assert np.array_equal(env.data.qpos, qpos)
        assert np.array_equal(env.model.body_pos, standing)
        assert same(plain, varied)
        runs.append(([env.step(action)[0] for action in actions], snapshot(env.model)))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not same(runs[0][0][-1], moved)
    apply(arm.model, env._nominal)
    restored = snapshot(arm.model)
    assert all(restored[name] == nominal[name] for name in env.drawn if name in nominal)
    if arm.config.name != "door":  # its frame stands elsewhere now, so the last bits of derived constants differ
        assert restored == nominal
