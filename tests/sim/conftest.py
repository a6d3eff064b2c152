from __future__ import annotations

import sim  # isort: skip  # noqa: F401  # chooses the OpenGL back-end, which MuJoCo reads when it is imported

import mujoco
import pytest

from sim.task import load_task
from sim.tasks.robosuite_task import RobosuiteEnv


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> tuple[mujoco.MjModel, mujoco.MjData]:
    """Model and state of the test module's own ``SCENE``."""
    model = mujoco.MjModel.from_xml_string(request.module.SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


@pytest.fixture(scope="session")
def lift() -> RobosuiteEnv:
    """Lift in scene 0, for looking at only."""
    env = load_task("lift").build_env()
    assert isinstance(env, RobosuiteEnv)
    env.reset(seed=0)
    return env
