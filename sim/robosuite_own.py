"""robosuite's own environments: built quietly, seeded without a trace, and as they are for comparisons."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from sim.workers import enter_worker

CONTROL_HZ = 20.0
BENCH_CAMERA = "agentview"

_global_generator = threading.Lock()


@contextlib.contextmanager
def global_numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which robosuite draws from, for the duration, and restore it; one thread at a time."""
    with _global_generator:
        saved = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(saved)  # noqa: NPY002


def build_robosuite(name: str, **options: Any) -> Any:
    """Build a robosuite environment with a Panda under its default controller at 20 Hz.

    Args:
        name: robosuite's class, such as ``Lift``.
        options: of ``robosuite.make``, beyond or in place of the defaults.

    Raises:
        ValueError: robosuite has no such class; the message lists those there are.
    """
    logging.disable(logging.WARNING)  # robosuite warns of optional parts that are not used here
    try:
        import robosuite
        from robosuite.controllers import load_composite_controller_config
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    if name not in robosuite.ALL_ENVIRONMENTS:
        raise ValueError(f"no robosuite environment named {name!r}; there are {sorted(robosuite.ALL_ENVIRONMENTS)}")
    defaults: dict[str, Any] = {
        "robots": "Panda",
        "controller_configs": load_composite_controller_config(controller="BASIC", robot="Panda"),
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "use_camera_obs": False,
        "use_object_obs": True,
        "control_freq": CONTROL_HZ,
        "reward_shaping": False,
        "ignore_done": True,
    }
    with global_numpy_seed(0):  # construction samples a first scene
        return robosuite.make(name, **{**defaults, **options})


class OwnEnvironment:
    """A robosuite environment as its users have it, all observables on, for comparisons."""

    def __init__(self, name: str, *, hard_reset: bool = False, image_size: int | None = None) -> None:
        """Build it.

        Args:
            name: robosuite's class.
            hard_reset: robosuite's default, which parses and compiles the model anew.
            image_size: pixels along each side of a camera observation; None for no camera.
        """
        camera = {} if image_size is None else {"camera_heights": image_size, "camera_widths": image_size}
        if camera:
            camera |= {"use_camera_obs": True, "has_offscreen_renderer": True, "camera_names": BENCH_CAMERA}  # type: ignore[dict-item]
        self.robosuite = build_robosuite(name, hard_reset=hard_reset, **camera)

    def reset(self, scene: int) -> None:
        """Place the scene of a seed."""
        with global_numpy_seed(scene):
            self.robosuite.reset()

    def step(self, action_A: np.ndarray) -> tuple[Any, float, bool, dict[str, Any]]:
        """Robosuite's own step, with an action in [-1, 1]."""
        return self.robosuite.step(action_A)

    def camera_observation(self) -> np.ndarray:
        """The image that robosuite's camera observable makes: (height, width, 3) uint8."""
        return self.robosuite._observables[f"{BENCH_CAMERA}_image"]._sensor({})


def _rate(name: str, seconds: float) -> tuple[float, float, int]:
    """Step from a scene on; return when the measurement began, when it ended, and the steps between."""
    own = OwnEnvironment(name)
    own.reset(0)
    rng = np.random.default_rng(0)
    own.step(rng.uniform(-1, 1, own.robosuite.action_dim))
    steps, began = 0, time.time()
    while time.time() - began < seconds:
        own.step(rng.uniform(-1, 1, own.robosuite.action_dim))
        steps += 1
    return began, time.time(), steps


def own_rate_on(name: str, processes: int, seconds: float) -> float:
    """Control steps per second of robosuite's own environments, one in each of some processes at the same time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=enter_worker) as pool:
        list(pool.map(abs, range(processes)))  # the processes are up
        spans = list(pool.map(_rate, [name] * processes, [seconds] * processes))
    return sum(steps / (ended - began) for began, ended, steps in spans)
