"""Run a policy on a robot through the safety filter, software WITHOUT A SAFETY RATING: keep a hardware emergency stop within reach.

No option switches the filter off. Try a policy in mode dry, then shadow, then slowly, before you trust it. Ctrl-C brings the robot to rest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from real_robot.loop import Actor, Outcome, StepActor, StopRequest, Timing, run_episode, stop_on_signals
from real_robot.robot import Robot, RobotConfig, load_robot
from real_robot.robots.ros import RosRobotConfig
from real_robot.transports.base import discover_transports
from vla_rl.cli.common import CommandConfig, RobotExecutionConfig, find_lone_base, server_token
from vla_rl.data.writer import EpisodeWriter
from vla_rl.inference.bases import BaseSource, agent_base
from vla_rl.inference.checkpoint import load_agent
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.delayed import execution_sampler
from vla_rl.inference.policy_server import remote_base
from vla_rl.inference.worker import RealTimeController
from vla_rl.policies.base import discover_policies
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import fixed_priority, without_pauses
from vla_rl.runtime.seeding import TEST_SCENES
from vla_rl.statistics import as_dict, proportion

EXAMPLE = "vla-rl deploy runs/lift/pretrain --robot configs/robot/lift_fake.yaml --episodes 20 --out runs/lift/robot"
POSITIONALS = ("policy",)
Mode = Literal["live", "shadow", "dry"]


def prepare() -> None:
    """Register policies and transports."""
    discover_policies()
    discover_transports()


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl deploy``.

    policy: folder of a policy, residual, selector or graph, or tcp://host:port of a policy server
    robot: YAML file of the robot, or its name in configs/robot
    mode: live, shadow (the policy runs, nothing is sent), dry (check everything once, and end)
    task: the task in words, recorded (none: the policy's)
    episodes: to run
    seconds: after which an episode is truncated
    seed: of the first scene, the others follow; and of the policy's noise
    out: folder for the recorded episodes and the log of every step (none: only the log, in runs/deploy)
    priority: 2 to 99: the loop's thread runs before all that has no such priority (Linux, SCHED_FIFO; 0: as any other)
    execution: how chunks become actions
    """

    policy: str
    robot: str
    mode: Mode = "live"
    task: str | None = None
    episodes: int = 1
    seconds: float = 60.0
    seed: int = TEST_SCENES
    out: Path | None = None
    priority: int = 0
    execution: RobotExecutionConfig = field(default_factory=RobotExecutionConfig)

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.seed < 0 or not 0 < self.seconds < float("inf"):
            raise ValueError(
                f"episodes wants at least 1, seconds a time > 0, seed a number >= 0, got {self.episodes}, {self.seconds}, {self.seed}"
            )
        if self.priority and not 2 <= self.priority <= 99:  # the thread that computes has one less
            raise ValueError(f"priority wants 2 to 99, or 0 for none, got {self.priority}")


def open_policy(config: Config) -> BaseSource:
    """The policy as a base, whatever it is."""
    if config.policy.startswith("tcp://"):
        return remote_base(config.policy, server_token())
    path = Path(config.policy)
    agent = load_agent(path, find_lone_base)
    if isinstance(agent, PolicyAgent):
        agent = PolicyAgent(agent.policy, execution_sampler(agent.policy, config.execution, agent.sampler))
    return agent_base(path, agent)


@contextmanager
def acting(config: Config, source: BaseSource, robot: Robot) -> Iterator[Actor]:
    """The policy beside the loop: chunks in a thread, single steps in the loop itself; its slow first calls are over."""
    base = source.open(1, config.seed)
    features = robot.observe().features
    if base.spec.chunk_steps == 1:
        actor = StepActor(base, config.seed)
        actor.act(features)
        yield actor
        return
    priority = config.priority and config.priority - 1
    with RealTimeController(base, config.execution, config.seed, priority, robot.admit) as controller:
        controller.warm_up(features)
        yield controller


def run(config: Config) -> dict[str, Any]:
    """Run the episodes; return what happened."""
    robot_config = load_robot(config.robot)
    source = open_policy(config)
    spec = source.spec.policy
    log = (config.out or Path("runs/deploy")) / "steps.jsonl"
    robot = Robot(robot_config, log, silent=config.mode != "live")
    _require_nobody(config, robot_config)
    robot.require_fit(spec.action_spec, spec.observation_spec, f"policy {config.policy}")
    print(
        "the safety filter is software without a safety rating; keep a hardware emergency stop within reach",
        file=sys.stderr,
    )
    outcomes: list[Outcome] = []
    timing = Timing()
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        robot.connect()
        stack.callback(robot.stop)
        stack.enter_context(fixed_priority(config.priority))
        actor = stack.enter_context(acting(config, source, robot))
        stack.callback(robot.stop)  # before the policy's thread is waited for
        if config.mode == "dry":
            return _dry(robot, actor, robot_config)
        writer = _writer(config, robot, source)
        stack.enter_context(without_pauses())
        for seed in range(config.seed, config.seed + config.episodes):
            if writer is not None and writer.last_scene is not None and seed <= writer.last_scene:
                continue  # recorded before the same command was cut
            outcome = run_episode(
                robot,
                actor,
                seed=seed,
                steps=round(config.seconds * robot.action_spec.control_hz),
                instruction=config.task or spec.task,
                timing=timing,
                stop=stop,
                provenance={"policy_hash": source.digest, "strategy": config.mode},
            )
            outcomes.append(outcome)
            _report(outcome)
            if writer is not None and outcome.episode is not None:
                writer.add(outcome.episode)
            if stop.asked or outcome.fault is not None:
                break
        failures = getattr(actor, "failures", 0)
        latencies_s = list(getattr(actor, "latencies_s", []))
    return _summary(config, robot, outcomes, timing, stop, failures, latencies_s)


def _require_nobody(config: Config, robot: RobotConfig) -> None:
    """Refuse what wants a person, whom this command does not know yet."""
    if config.mode != "live":
        return
    if robot.safety.dead_man:
        raise UserError(f"robot {robot.name!r} wants its dead-man switch held, and deploy has no operator input yet")
    if isinstance(robot, RosRobotConfig) and robot.reset.how == "operator" and config.episodes > 1:
        raise UserError(
            f"a person sets the scene of robot {robot.name!r} before each episode; run one at a time (--episodes 1)"
        )


def _writer(config: Config, robot: Robot, source: BaseSource) -> EpisodeWriter | None:
    if config.out is None:
        return None
    recipe = {
        "source": "robot",
        "robot": robot.config.name,
        "policy": source.digest,
        "seed": config.seed,
        "mode": config.mode,
    }
    return EpisodeWriter.open_or_create(
        config.out / "episodes",
        action_spec=robot.action_spec,
        observation_spec=robot.observation_spec,
        task=source.spec.policy.task,
        recipe=recipe,
        watched=True,
    )


def _dry(robot: Robot, actor: Actor, config: RobotConfig) -> dict[str, Any]:
    """One decision, nothing sent."""
    reading = robot.observe()
    action_A = None
    for _ in range(200):
        proposed_A = actor.act(reading.features)
        if not actor.standing:
            action_A = proposed_A
            break
        time.sleep(1 / robot.action_spec.control_hz)
        reading = robot.observe()
    decision = robot.send(action_A)
    table = Table("action", "unit", "wanted", "would be sent")
    for i, name in enumerate(robot.action_spec.names):
        wanted = "none" if action_A is None else f"{action_A[i]:.4f}"
        table.add_row(name, robot.action_spec.units[i], wanted, f"{decision.sent_A[i]:.4f}")
    Console().print(table)
    ages = ", ".join(f"{name} {1e3 * age_s:.0f} ms" for name, (_, age_s) in reading.ages_s.items())
    print(
        f"robot {config.name!r} and the policy fit; observations are {ages} old; fault: {decision.fault or 'none'}; nothing was sent"
    )
    return {
        "fits": True,
        "fault": decision.fault,
        "reasons": list(decision.reasons),
        "exit_code": int(decision.fault is not None),
    }


def _report(outcome: Outcome) -> None:
    why = f" ({outcome.fault})" if outcome.fault else ""
    verdict = "success" if outcome.success else "no success"
    print(
        f"episode {outcome.seed}: {verdict} after {outcome.steps} steps, ended by {outcome.ended_by}{why}", flush=True
    )


def _summary(
    config: Config,
    robot: Robot,
    outcomes: list[Outcome],
    timing: Timing,
    stop: StopRequest,
    failures: int,
    latencies_s: list[float],
) -> dict[str, Any]:
    tally, done = robot.tally, len(outcomes)
    results: dict[str, Any] = {
        "robot": robot.config.name,
        "policy": config.policy,
        "mode": config.mode,
        "episodes": done,
        "scenes": [
            {"scene_seed": o.seed, "success": o.success, "length": o.steps, "ended_by": o.ended_by} for o in outcomes
        ],
        "faults": [o.fault for o in outcomes if o.fault],
        "clip_rate": tally.clipped / tally.steps if tally.steps else 0.0,
        "fault_rate": tally.faults / done if done else 0.0,
        "held_steps": tally.held,
        "refused_chunks": tally.refused,
        "policy_failures": failures,
        "timing": timing.summary(),
        "stopped": stop.asked,
        "exit_code": int(any(o.fault for o in outcomes)),
    }
    if latencies_s:
        p50, p99 = 1e3 * np.percentile(latencies_s, [50, 99])
        results["timing"]["inference"] = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}
    if done:
        rate = proportion(sum(o.success for o in outcomes), done)
        results["success"] = as_dict(rate)
        print(
            f"success {rate}; {100 * results['clip_rate']:.1f} % of the steps clipped, {tally.faults} faults, "
            f"{timing.missed} of {len(timing.parts_s['late'])} deadlines missed by more than 2 ms"
        )
    return results
