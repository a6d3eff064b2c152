"""Compare robosuite's own environment, ours, and the bare physics: on the same model, in the same states, in one run.

Step by step and interleaved: a bare ``mj_step`` from robosuite's state, robosuite's own ``step`` from there, and ours, whose state is
the same to the last bit (checked). Then resets, pictures and point clouds in turn; last, all cores at once. Medians are reported.
"""

from __future__ import annotations

import copy
import functools
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import mujoco
import numpy as np
from rich.console import Console
from rich.table import Table

from sim.mujoco_env import MujocoEnv
from sim.point_cloud import PointCloud
from sim.robosuite_own import BENCH_CAMERA, OwnEnvironment, own_rate_on
from sim.task import load_task
from sim.tasks.robosuite_task import RobosuiteTask
from sim.vector import make_vector_env
from vla_rl.cli.common import CommandConfig
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import numpy_generator

EXAMPLE = "vla-rl bench sim lift can --json results/bench_sim.json"
POSITIONALS = ("tasks*",)
CLOUD = PointCloud(points=1024)
BLOCKS = 3  # of pictures of each kind, in turn
SLOTS_PER_CORE = 8
ROUNDS = 5
WARM_UP_STEPS = 5
Times = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench sim``.

    tasks: names of robosuite tasks, and push_t
    steps: control steps of each episode
    episodes: from scenes 0, 1, ...
    resets: of each kind
    pictures: of each kind and block, and point clouds
    image_size: pixels along each side
    cores: threads, and processes of robosuite's own environment (0: all)
    batch_steps: of each batch on one and on all threads
    seconds: of robosuite's own environments on all cores
    """

    tasks: tuple[str, ...] = ("lift", "can", "square", "push_t")
    steps: int = 60
    episodes: int = 5
    resets: int = 10
    pictures: int = 10
    image_size: int = 84
    cores: int = 0
    batch_steps: int = 100
    seconds: float = 2.0

    def __post_init__(self) -> None:
        counts = (self.steps, self.episodes, self.resets, self.pictures, self.image_size, self.batch_steps)
        if min(counts) < 1 or self.cores < 0 or self.seconds <= 0:
            raise ValueError(f"counts want at least 1, cores at least 0, seconds more than 0; got {counts}")


def _timed(times: Times, name: str, call: Callable[..., object], *arguments: object) -> None:
    started = time.perf_counter()
    call(*arguments)
    times.setdefault(name, []).append(time.perf_counter() - started)


class _Bare:
    """MuJoCo alone, from a state and back to it."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, substeps: int) -> None:
        self.model, self.data, self.substeps = model, data, substeps
        self._kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self._state = np.empty(mujoco.mj_stateSize(model, self._kind))

    def measure(self, times: Times) -> None:
        """Time a control step of physics, with the controls that are in force."""
        mujoco.mj_getState(self.model, self.data, self._state, self._kind)
        _timed(times, "bare", mujoco.mj_step, self.model, self.data, self.substeps)
        mujoco.mj_setState(self.model, self.data, self._state, self._kind)


def _robosuite_steps(config: Config, task: RobosuiteTask, times: Times) -> None:
    """Fill in ``bare``, ``own``, ``ours`` and ``fast``; all but the last in equal states."""
    own = OwnEnvironment(task.robosuite_name)
    ours, fast = task.build_env(), replace(task, physics="fast").build_env()
    model, data = own.robosuite.sim.model._model, own.robosuite.sim.data._data
    bare = _Bare(model, data, round(own.robosuite.control_timestep / own.robosuite.model_timestep))
    high_A = ours.action_spec.high_array()
    for scene in range(config.episodes):
        rng = numpy_generator(scene, "bench")
        own.reset(scene)
        for env in (ours, fast):
            env.reset(seed=scene)
        for _ in range(config.steps):
            action_A = (rng.uniform(-1, 1, high_A.size) * high_A).astype(np.float32)
            unit_A = action_A / high_A  # as our environment scales it
            bare.measure(times)
            _timed(times, "own", own.step, unit_A)
            _timed(times, "ours", ours.step, action_A)
            _timed(times, "fast", fast.step, action_A)
        if not np.array_equal(data.qpos, ours.data.qpos):
            raise UserError(f"the paths differ after scene {scene} of {task.name!r}: these times do not compare")
    ours.close()
    fast.close()


def _plain_steps(config: Config, env: MujocoEnv, substeps: int, times: Times) -> None:
    bare = _Bare(env.model, env.data, substeps)
    low, high = env.action_spec.low_array(), env.action_spec.high_array()
    for scene in range(config.episodes):
        rng = numpy_generator(scene, "bench")
        env.reset(seed=scene)
        for _ in range(config.steps):
            action_A = rng.uniform(low, high).astype(np.float32)
            bare.measure(times)
            _timed(times, "ours", env.step, action_A)


def _resets(config: Config, task: RobosuiteTask, env: MujocoEnv, times: Times) -> None:
    own = OwnEnvironment(task.robosuite_name, hard_reset=True)
    for scene in range(config.resets):
        _timed(times, "own_reset", own.reset, scene)
        _timed(times, "ours_reset", functools.partial(env.reset, seed=scene))


def _pictures(config: Config, task: RobosuiteTask, env: MujocoEnv, times: Times) -> None:
    size = config.image_size
    own = OwnEnvironment(task.robosuite_name, image_size=size)
    own.reset(0)
    env.reset(seed=0)
    generator = numpy_generator(0, "bench")
    kinds: dict[str, Callable[[], object]] = {
        "own_rgb": own.camera_observation,
        "light_rgb": lambda: env.image(BENCH_CAMERA, size, size, "light"),
        "full_rgb": lambda: env.image(BENCH_CAMERA, size, size, "full"),
        "light_depth": lambda: env.depth(BENCH_CAMERA, size, size, "light"),
        "cloud": lambda: env.point_cloud(CLOUD, generator),
    }
    for _ in range(BLOCKS):
        for name, call in kinds.items():
            call()  # takes the OpenGL context over, which nobody does between two pictures of one camera
            for _ in range(config.pictures):
                _timed(times, name, call)
    own.robosuite.close()


def _vector_rates(task: RobosuiteTask, threads: tuple[int, int], slots: int, steps: int) -> np.ndarray:
    """Environment steps per second of a batch on few and on many threads, in turn: (rounds, 2).

    The same steps for both, and not as many as fit a time: later steps of an episode have more contacts and cost more.
    """
    endless = replace(task, max_episode_steps=10**9)
    envs = [make_vector_env(endless, slots, placement="threads", threads=count) for count in threads]
    high_A = envs[0].action_spec.high_array()
    rates = np.zeros((ROUNDS, 2))
    for row in rates:
        for column, env in enumerate(envs):
            rng = numpy_generator(0, "bench")
            env.reset(seed=list(range(slots)))  # type: ignore[arg-type]
            started = 0.0
            for step in range(WARM_UP_STEPS + steps):
                if step == WARM_UP_STEPS:
                    started = time.perf_counter()
                _, _, succeeded, _, _ = env.step(rng.uniform(-1, 1, (slots, high_A.size)).astype(np.float32) * high_A)
                if succeeded.any():
                    env.reset(seed=list(range(slots)), options={"reset_mask": succeeded})  # type: ignore[arg-type]
            row[column] = steps * slots / (time.perf_counter() - started)
    for env in envs:
        env.close()
    return rates


def _bare_rates(env: MujocoEnv, substeps: int, threads: tuple[int, int], slots: int, steps: int) -> np.ndarray:
    """The same of bare physics, with as many states: what the machine itself gives."""

    def work(states: list[mujoco.MjData]) -> None:
        for _ in range(steps):
            for state in states:
                mujoco.mj_step(env.model, state, substeps)

    rates = np.zeros((ROUNDS, 2))
    for row in rates:
        for column, count in enumerate(threads):
            states = [copy.copy(env.data) for _ in range(slots)]
            with ThreadPoolExecutor(count) as pool:
                started = time.perf_counter()
                list(pool.map(work, [states[first::count] for first in range(count)]))
                row[column] = steps * slots / (time.perf_counter() - started)
    return rates


def _all_cores(config: Config, task: RobosuiteTask, env: MujocoEnv, substeps: int) -> dict[str, float]:
    cores = config.cores or os.cpu_count() or 1
    threads, slots = (1, cores), SLOTS_PER_CORE * cores
    env.reset(seed=0)
    result: dict[str, float] = {"cores": cores}
    for name, rates in (
        ("ours", _vector_rates(task, threads, slots, config.batch_steps)),
        ("bare", _bare_rates(env, substeps, threads, slots, config.batch_steps)),
    ):
        result |= {
            f"{name}_one_thread_per_s": float(np.median(rates[:, 0])),
            f"{name}_all_threads_per_s": float(np.median(rates[:, 1])),
            f"{name}_threads_ratio": float(np.median(rates[:, 1] / rates[:, 0])),
        }
    return result | {"own_all_processes_per_s": own_rate_on(task.robosuite_name, cores, config.seconds)}


def run(config: Config) -> dict[str, Any]:
    """Measure, print and return rates and ratios."""
    # robosuite, closing off-screen contexts, calls a library of windows that nobody has opened
    warnings.filterwarnings("ignore", message=".*GLFW library is not initialized")
    result: dict[str, Any] = {}
    for name in config.tasks:
        task, times = load_task(name), Times()
        env = task.build_env()
        if not isinstance(env, MujocoEnv):
            raise UserError(f"bench sim takes robosuite tasks and push_t, got {name!r}")
        substeps = round(1 / env.action_spec.control_hz / env.model.opt.timestep)
        if isinstance(task, RobosuiteTask):
            _robosuite_steps(config, task, times)
            _resets(config, task, env, times)
            _pictures(config, task, env, times)
        else:
            _plain_steps(config, env, substeps, times)
        numbers: dict[str, Any] = {f"{k}_ms": 1e3 * float(np.median(v)) for k, v in times.items()}
        numbers |= _ratios(numbers)
        if isinstance(task, RobosuiteTask):
            numbers["all_cores"] = _all_cores(config, task, env, substeps)
        env.close()
        result[name] = numbers
        _show(name, numbers)
    return result


def _ratios(ms: dict[str, float]) -> dict[str, float]:
    pairs = {
        "speedup": ("own_ms", "ours_ms"),
        "share_of_bare": ("bare_ms", "ours_ms"),
        "speedup_fast": ("own_ms", "fast_ms"),
        "speedup_reset": ("own_reset_ms", "ours_reset_ms"),
        "speedup_light_rgb": ("own_rgb_ms", "light_rgb_ms"),
    }
    return {name: ms[a] / ms[b] for name, (a, b) in pairs.items() if a in ms and b in ms}


def _show(task: str, numbers: dict[str, Any]) -> None:
    table = Table("what", "ms", "per second", title=f"{task}, one core", title_justify="left")
    for key, value in numbers.items():
        if key.endswith("_ms"):
            table.add_row(key.removesuffix("_ms"), f"{value:.3f}", f"{1e3 / value:,.0f}")
    console = Console()
    console.print(table)
    console.print("  ".join(f"{k} {v:.2f}" for k, v in numbers.items() if "sh" in k or "speed" in k))
    for key, value in numbers.get("all_cores", {}).items():
        console.print(f"  {key}: {value:,.2f}")
