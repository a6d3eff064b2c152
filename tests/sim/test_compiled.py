"""The compiled path against robosuite's own step: the same bits, contacts and grasps included, whoever else uses MuJoCo meanwhile."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mujoco
import numba
import numpy as np
import pytest

from sim.clearance import NO_PAIR, exclude_clear_pairs, include_all_pairs
from sim.compiled_arm import CompiledArm, UnsupportedArmError
from sim.experts.base import ExpertConfig, HumanLike, load_expert
from sim.fast_physics import parked_bodies
from sim.linalg import pinv, pinv_work
from sim.osc import control_step
from sim.robosuite_own import OwnEnvironment, build_robosuite, global_numpy_seed
from sim.task import load_task
from sim.tasks.robosuite_task import ACTION_SPEC, RobosuiteEnv, RobosuiteTask
from sim.vector import make_vector_env
from vla_rl.runtime.seeding import numpy_generator

STEPS = 200
TASKS = {"lift": "Lift", "can": "PickPlaceCan", "square": "NutAssemblySquare", "stack": "Stack", "door": "Door"}
OTHERS = ["PickPlaceMilk", "NutAssemblyRound", "ToolHang"]


def task_of(name: str, **options: str) -> RobosuiteTask:
    """A task by our name or by robosuite's."""
    if name in TASKS:
        return load_task(name, **options)  # type: ignore[return-value]
    return RobosuiteTask(name=name, robosuite_name=name, instruction="", max_episode_steps=10_000, **options)  # type: ignore[arg-type]


@functools.cache
def env_of(name: str, **options: str) -> RobosuiteEnv:
    """Built once per run: an environment takes half a second to build, and resets leave no trace."""
    return task_of(name, **options).build_env()


def jittery(seed: int) -> np.ndarray:
    """A new action in every step, a third of its numbers at or beyond the limits."""
    return numpy_generator(seed, "actions").uniform(-1.5, 1.5, (STEPS, 7))


def sustained(seed: int) -> np.ndarray:
    """Each action for a second, beyond the limits: the arm stretches, turns its joints to their stops and pushes into the table."""
    return np.repeat(numpy_generator(seed, "actions").uniform(-1.5, 1.5, (STEPS // 20, 7)), 20, axis=0)


@pytest.mark.parametrize("actions", [jittery, sustained])
@pytest.mark.parametrize("name", [*TASKS, *OTHERS])
def test_the_compiled_path_equals_robosuites_own_step_to_the_last_bit(
    name: str, actions: Callable[[int], np.ndarray]
) -> None:
    ours, own = env_of(name), env_of(name, stepping="robosuite")
    seed = 3 if actions is jittery else 4
    ours.reset(seed=seed)
    own.reset(seed=seed)
    np.testing.assert_array_equal(ours.data.qpos, own.data.qpos)
    assert ours._compiled is not None
    for step, action_A in enumerate(actions(seed)):
        ours._compiled.step(action_A)  # below the border, where actions are clipped: robosuite clips them itself
        _, reward, _, _ = own.robosuite.step(action_A)
        np.testing.assert_array_equal(ours.data.qpos, own.data.qpos, err_msg=f"qpos at step {step}")
        np.testing.assert_array_equal(ours.data.qvel, own.data.qvel, err_msg=f"qvel at step {step}")
        a, b = ours._observe(), own._observe()
        assert all(np.array_equal(a[key], b[key]) for key in b)
        assert ours.robosuite.reward(action_A) == reward
        assert ours.robosuite._check_success() == own.robosuite._check_success()


@pytest.mark.parametrize("name", ["lift", "stack"])
def test_a_grasp_and_a_success_are_the_same_through_the_whole_interface(name: str) -> None:
    """The expert's actions, replayed on robosuite's own step and on an environment with all of robosuite's observables on."""
    ours, reference, own = env_of(name), env_of(name, stepping="robosuite"), OwnEnvironment(TASKS[name])
    expert = HumanLike(load_expert(ours.config), ExpertConfig())
    ours.reset(seed=11)
    reference.reset(seed=11)
    own.reset(11)
    expert.reset(ours, np.random.default_rng(0))
    finished = False
    while not finished:
        action_A, _ = expert.act(ours)
        outcome, expected = ours.step(action_A), reference.step(action_A)
        _, reward, _, _ = own.step(action_A / ACTION_SPEC.high_array())
        assert outcome[1:] == expected[1:]
        assert outcome[1] == reward
        np.testing.assert_array_equal(ours.data.qpos, own.robosuite.sim.data.qpos)
        finished = outcome[2] or outcome[3]
    assert outcome[4]["success"]


def test_resets_keep_the_model_and_give_robosuites_scene() -> None:
    env = env_of("can")
    own = build_robosuite("PickPlaceCan")  # a hard reset, as is robosuite's default
    model = env.model
    for scene in (5, 6):
        env.reset(seed=scene)
        with global_numpy_seed(scene):
            own.reset()
        assert env.robosuite.sim.model._model is model
        np.testing.assert_array_equal(env.data.qpos, own.sim.data.qpos)


# ---------------------------------------------------------------- others in the same process


def trajectory(env: RobosuiteEnv, seed: int, steps: int = 20) -> np.ndarray:
    env.reset(seed=seed)
    for action_A in jittery(seed)[:steps]:
        env.step(action_A * ACTION_SPEC.high_array())
    return np.concatenate([env.data.qpos, env.data.qvel])


def test_a_foreign_control_callback_is_neither_called_nor_replaced() -> None:
    env = env_of("lift")
    expected = trajectory(env, 1)
    called = []

    def ruin(model: mujoco.MjModel, data: mujoco.MjData) -> None:
        called.append(True)
        data.ctrl[:] = 1.0

    other = mujoco.MjModel.from_xml_string("<mujoco/>")
    other_data = mujoco.MjData(other)
    env.reset(seed=1)  # robosuite's reset uses MuJoCo as anyone does
    mujoco.set_mjcb_control(ruin)
    try:
        for action_A in jittery(1)[:20]:
            env.step(action_A * ACTION_SPEC.high_array())
        assert not called
        assert mujoco.get_mjcb_control() is ruin
        mujoco.mj_step(other, other_data)
        assert called
    finally:
        mujoco.set_mjcb_control(None)
    np.testing.assert_array_equal(np.concatenate([env.data.qpos, env.data.qvel]), expected)


def test_batches_in_threads_equal_single_environments_and_leave_one_another_alone() -> None:
    lift, door = (make_vector_env(load_task(name), 3, threads=2) for name in ("lift", "door"))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (15, 3, 7)).astype(np.float32) * ACTION_SPEC.high_array()
    lift.reset(seed=[1, 2, 3])
    door.reset(seed=[4, 5, 6])
    for action_NA in actions:
        last_lift, *_ = lift.step(action_NA)
        last_door, *_ = door.step(action_NA)
    for last, name, seeds in ((last_lift, "lift", (1, 2, 3)), (last_door, "door", (4, 5, 6))):
        single = env_of(name)
        for slot, seed in enumerate(seeds):
            single.reset(seed=seed)
            for action_NA in actions:
                expected, *_ = single.step(action_NA[slot])
            assert all(np.array_equal(last[key][slot], expected[key]) for key in expected)
    lift.close()
    door.close()


# ---------------------------------------------------------------- parts


def test_mujoco_finds_no_contact_of_an_excluded_pair_wherever_the_arm_goes() -> None:
    env = env_of("lift")
    env.reset(seed=0)
    assert env._compiled is not None
    model, data, pairs = env.model, env.data, env._compiled._pairs
    excluded = touching = 0
    rng = np.random.default_rng(1)
    joints = model.jnt_range[:7]
    of_pairs = {tuple(sorted(pair)) for pair in pairs.geoms_P2.tolist()}
    for walk in range(100):
        data.qpos[:7] = rng.uniform(joints[:, 0], joints[:, 1])
        velocity_J = rng.normal(0, 2.0, 7)
        for _ in range(30):  # small steps, in which old measurements must stay valid; beyond the limits too
            data.qpos[:7] += 0.002 * velocity_J * (1 + walk % 3 * 5)
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            exclude_clear_pairs(model._address, data._address, pairs)
            held = pairs.exclude_signature[pairs.slot_P] != NO_PAIR
            clear = {tuple(sorted(pair)) for pair in pairs.geoms_P2[held].tolist()}
            include_all_pairs(pairs)
            mujoco.mj_collision(model, data)
            contacts = {tuple(sorted(pair)) for pair in data.contact.geom.tolist()}
            assert not clear & contacts
            excluded += len(clear)
            touching += len(of_pairs & contacts)
    assert excluded > 10_000
    assert touching > 100  # walks that do collide are among them
    trajectory(env, 0, steps=2)
    assert (pairs.exclude_signature[pairs.slot_P] == NO_PAIR).all()


def test_pairs_of_the_arm_are_really_left_out_of_collision_tests() -> None:
    env = env_of("lift")
    env.reset(seed=0)
    assert env._compiled is not None
    pairs = env._compiled._pairs
    mujoco.mj_kinematics(env.model, env.data)
    exclude_clear_pairs(env.model._address, env.data._address, pairs)
    names = {
        tuple(env.model.body(s >> 16).name for s in (x, x << 16 & 0xFFFFFFFF))
        for x in pairs.exclude_signature.tolist()
        if x
    }
    include_all_pairs(pairs)
    assert ("robot0_link5", "robot0_link7") in names


@numba.njit
def numpys_pinv(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.pinv(matrix)


@pytest.mark.parametrize("n", [3, 6])
def test_pinv_has_the_bits_of_numpys_near_singular_and_singular_matrices_included(n: int) -> None:
    rng = np.random.default_rng(n)
    scratch = pinv_work(n)
    for trial in range(2000):
        jacobian = rng.normal(size=(n, 7)) * 10.0 ** rng.uniform(-2, 2)
        if trial % 2:
            jacobian[-1] = jacobian[0] * (1.0 + 10.0 ** -rng.uniform(0, 20) * rng.normal(size=7))
        matrix = jacobian @ jacobian.T
        np.testing.assert_array_equal(pinv(matrix, scratch), numpys_pinv(matrix))


def test_compiled_code_is_kept_on_disk() -> None:
    trajectory(env_of("lift"), 0, steps=1)
    stats = control_step.stats  # type: ignore[attr-defined]
    assert stats.cache_hits or stats.cache_misses
    assert list(Path(stats.cache_path).glob("osc._compiled.locals.control_step-*.nbi"))


OUTER = """
import sys

import numba

import inner
from sim.native import source_of

def compiled(sources):
    @numba.njit(cache=True)
    def call():
        _ = sources
        return inner.answer()
    return call

call = compiled(source_of(inner))
print(call(), sum(call.stats.cache_hits.values()))
"""


def test_a_change_in_another_file_reaches_compiled_code_that_closes_over_its_source(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text(OUTER)
    printed = []
    for answer in (1, 1, 2):
        inner = f"import numba\n@numba.njit(cache=True)\ndef answer():\n    return {answer}\n"
        (tmp_path / "inner.py").write_text(inner)
        path = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(
            [sys.executable, str(tmp_path / "outer.py")],
            env=os.environ | path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        printed.append(ran.stdout.split())
    assert printed == [["1", "0"], ["1", "1"], ["2", "0"]]


# ---------------------------------------------------------------- what it does not take, and the coarse preset


def test_other_controllers_are_named() -> None:
    from robosuite.controllers import load_composite_controller_config

    config = load_composite_controller_config(controller="BASIC", robot="Panda")
    config["body_parts"]["right"]["type"] = "JOINT_VELOCITY"
    other = build_robosuite("Lift", controller_configs=config)
    with pytest.raises(UnsupportedArmError, match=r"name 'OSC_POSE', got 'JOINT_VELOCITY' in Lift"):
        CompiledArm(other)


def test_a_task_without_the_gripper_is_named() -> None:
    with pytest.raises(ValueError, match=r"wants the 7 actions of a Panda with its gripper, Wipe takes 6"):
        task_of("Wipe").build_env()


def test_fast_physics_keep_the_control_rate_and_drop_parked_objects() -> None:
    exact, fast = env_of("can"), env_of("can", physics="fast")
    exact.reset(seed=0)
    fast.reset(seed=0)
    np.testing.assert_array_equal(exact.data.qpos, fast.data.qpos)
    parked = {fast.model.body(b).name for b in parked_bodies(fast.model, fast.data)}
    assert parked == {"Milk_main", "Bread_main", "Cereal_main"}
    for env in (exact, fast):
        for _ in range(3):
            env.step(np.zeros(7, np.float32))
    assert fast.data.time == pytest.approx(exact.data.time, abs=1e-12)
    touched = {fast.model.body(fast.model.geom_bodyid[g]).name for c in fast.data.contact for g in (c.geom1, c.geom2)}
    assert touched
    assert not touched & parked
    # a slow motion in free space ends at the same place
    for _ in range(20):
        for env in (exact, fast):
            env.step(np.array([0.01, 0.005, 0.01, 0, 0, 0.02, -1], np.float32))
    a, b = exact.tool_pose(), fast.tool_pose()
    np.testing.assert_allclose(a.position_m, b.position_m, atol=2e-3)
    with pytest.raises(ValueError, match="physics: fast wants stepping: compiled"):
        task_of("Lift", physics="fast", stepping="robosuite")
