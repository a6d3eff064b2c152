"""What a step of the residual stage costs on this machine, part by part, and how many updates per environment step it affords."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vla_rl.actors import own_team
from vla_rl.algos.residual_td3 import ResidualTD3, ResidualTD3Config
from vla_rl.data.replay import Replay
from vla_rl.data.step_encoder import StepEncoder
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.residual_controller import NoiseConfig
from vla_rl.inference.steps import Order
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.runtime.seeding import torch_generator

WARM_UP = 5  # updates that are not measured


@dataclass(frozen=True)
class ResidualBenchSettings:
    """What is measured.

    updates: of the critic, measured
    seed: of all draws
    residual: nets and limits
    td3: updates
    """

    updates: int = 100
    seed: int = 0
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    td3: ResidualTD3Config = field(default_factory=ResidualTD3Config)

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates wants at least 1, got {self.updates}")


def bench_residual(base: BaseSource, arena: Arena, settings: ResidualBenchSettings) -> dict[str, Any]:
    """Time roll-outs, one episode per environment, and updates on what they bring.

    Returns:
        Milliseconds per environment step of simulation and of deciding, per update of drawing, critic and actor; the share of each in the
        time of a run of one process at one update per step; and the updates per step at which learner and actor, each on a core of its
        own, take equally long.
    """
    spec = base.spec.policy
    torch.manual_seed(settings.seed)
    encoder = StepEncoder(spec.observation_spec, spec.action_spec, base.spec.execute_steps)
    algorithm = ResidualTD3(ResidualPolicy(settings.residual, encoder), settings.td3)
    team = own_team(arena, base, settings.residual)
    slots = arena.env.num_envs
    spent = {"simulation": 0.0, "roll out": 0.0, "draw": 0.0, "critic": 0.0, "actor": 0.0}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[part] += time.perf_counter() - started

    step: Callable[..., Any] = arena.env.step

    def timed_step(actions: Any) -> Any:
        with timed("simulation"):
            return step(actions)

    def collect(number: int) -> list[Any]:
        scenes = tuple(range(number * slots, (number + 1) * slots))
        team.submit(Order(number, "policy", scenes, settings.seed, NoiseConfig()), algorithm.policy)
        return team.result()

    warm = collect(0)  # compiles the simulation's steps
    arena.env.step = timed_step  # type: ignore[method-assign]
    try:
        with timed("roll out"):
            found = collect(1)
    finally:
        del arena.env.step
    env_steps = sum(steps.length for steps in found)
    replay = Replay.open(None, spec.observation_spec, spec.action_spec.dim, sum(s.length + 1 for s in [*warm, *found]))
    for steps in [*warm, *found]:
        replay.add(steps, "policy")
    everything = replay.gather(torch.arange(replay.transitions), 1, 1.0)
    encoder.fit(everything.now, everything.action_BA)
    algorithm.settle()
    generator = torch_generator(settings.seed, "bench")
    for number in range(-WARM_UP, settings.updates):
        if number == 0:
            spent |= {"draw": 0.0, "critic": 0.0, "actor": 0.0}
        with timed("draw"):
            index_B = replay.draw(settings.td3.batch_size, generator)
            batch = replay.gather(index_B, settings.td3.n_steps, settings.td3.discount)
        with timed("critic"):
            algorithm.update(batch, generator, moves_actor=False)
        if number % settings.td3.actor_every == 0:
            with timed("actor"):
                algorithm.update_actor(batch)
    per_step = {
        "simulation": spent["simulation"] / env_steps,
        "deciding and recording": (spent["roll out"] - spent["simulation"]) / env_steps,
    }
    per_update = {name: spent[name] / settings.updates for name in ("draw", "critic", "actor")}
    whole = sum(per_step.values()) + sum(per_update.values())
    return {
        "task": arena.task,
        "num_envs": slots,
        "ms_per_env_step": {k: 1e3 * v for k, v in per_step.items()},
        "ms_per_update": {k: 1e3 * v for k, v in per_update.items()},
        "share_at_one_update_per_step": {k: v / whole for k, v in (per_step | per_update).items()},
        "steps_per_hour_in_one_process": 3600 / whole,
        "steps_per_hour_in_two_processes": 3600 / max(sum(per_step.values()), sum(per_update.values())),
        "updates_per_step_where_two_processes_are_in_balance": sum(per_step.values()) / sum(per_update.values()),
    }
