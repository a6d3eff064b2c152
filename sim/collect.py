"""Run experts through scenes and hand out their episodes, in the order of the scenes whatever the number of workers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

from sim.experts.base import ExpertConfig, HumanLike, load_expert
from sim.task import SimulationDivergedError, TaskConfig, TaskEnv
from sim.workers import enter_worker
from vla_rl.data.episode import Episode, EpisodeRecorder, Provenance
from vla_rl.runtime.seeding import numpy_generator


def run_expert(env: TaskEnv, demonstrator: HumanLike, scene_seed: int) -> Episode:
    """Run one episode; everything in it follows from the scene's seed and the demonstrator's config.

    Where the simulation diverges the episode is truncated, and its provenance says why under ``diverged``.
    """
    observation, _ = env.reset(seed=scene_seed)
    demonstrator.reset(env, numpy_generator(scene_seed, "expert"))
    provenance: Provenance = {
        "source": "expert",
        "round": 0,
        "scene_seed": scene_seed,
        "strategy": demonstrator.strategy,
        "meant_to_fail": demonstrator.fails,
        "policy_hash": "",
    }
    recorder = EpisodeRecorder(observation, env.config.wording(scene_seed), provenance)
    terminated = truncated = False
    while not (terminated or truncated):
        executed_A, wanted_A = demonstrator.act(env)
        try:
            observation, reward, terminated, truncated, info = env.step(executed_A)
        except SimulationDivergedError as error:
            recorder.provenance["diverged"] = str(error)
            reward, truncated, info = 0.0, True, {"success": False}
        recorder.add(
            executed_A=executed_A,
            intended_A=wanted_A,
            observation=observation,
            reward=float(reward),
            success=info["success"],
        )
    return recorder.episode(terminated=terminated, truncated=truncated)


_worker: tuple[TaskEnv, HumanLike] | None = None


def _enter(task: TaskConfig, config: ExpertConfig) -> None:
    global _worker
    enter_worker()
    _worker = (task.make_env(), HumanLike(load_expert(task), config))


def _run(scene_seed: int) -> Episode:
    assert _worker is not None
    return run_expert(*_worker, scene_seed)


def expert_episodes(task: TaskConfig, config: ExpertConfig, scenes: Sequence[int], workers: int) -> Iterator[Episode]:
    """Yield the expert's episode of each scene, in order.

    Args:
        task: the task.
        config: the expert's knobs.
        scenes: seeds.
        workers: processes; 1 runs in this one. The episodes are the same for any number.
    """
    load_expert(task)  # fails here rather than in a worker
    if workers <= 1:
        env, demonstrator = task.make_env(), HumanLike(load_expert(task), config)
        try:
            for scene in scenes:
                yield run_expert(env, demonstrator, scene)
        finally:
            env.close()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(task, config)) as pool:
        ahead: list[Future[Episode]] = []
        waiting = list(scenes)[::-1]
        while waiting or ahead:
            while waiting and len(ahead) < 2 * workers:
                ahead.append(pool.submit(_run, waiting.pop()))
            yield ahead.pop(0).result()
