"""Run a policy on a robot through the safety filter, software WITHOUT A SAFETY RATING: keep a hardware emergency stop within reach.

No option switches the filter off. Try a policy in mode dry, then shadow, then slowly, before you trust it. Ctrl-C brings the robot to rest.
With --operator keyboard or gamepad a person takes over while a key is held, and says how episodes end (docs/robot.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from real_robot.loop import Actor, Judge, Outcome, StepActor, StopRequest, Timing, run_episode
from real_robot.operators.base import Operator
from real_robot.operators.devices import open_person
from real_robot.recorded import recorded
from real_robot.recorder import BagRecorder
from real_robot.robot import Robot, RobotConfig, load_robot
from real_robot.stopping import StopAsked, stop_on_signals
from real_robot.transports.base import discover_transports
from real_robot.view import View, open_view, require_view
from vla_rl.cli.common import CommandConfig, RobotExecutionConfig, find_lone_base, server_token
from vla_rl.cli.on_robot import open_judge, say_unrated
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

EXAMPLE = "vla-rl deploy runs/lift/pretrain --robot lift_fake --operator gamepad --episodes 20 --out runs/lift/robot"
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
    operator: who may take over: none, keyboard (a window of its own), or gamepad
    mode: live, shadow (the policy runs, nothing is sent), dry (check everything once, and end)
    task: the task in words, recorded (none: the policy's)
    episodes: to run
    seconds: after which an episode is truncated
    seed: of the first scene, the others follow; and of the policy's noise
    out: folder for the recorded episodes and the log of every step (none: only the log, in runs/deploy)
    bag: record every message as MCAP in OUT/bags too (robots of type ros)
    view: live (a window of rerun's), or a file.rrd to be opened later (none: no view)
    judge: folder of 'vla-rl robot judge', where robot and person do not say what succeeded (none: then nothing has)
    priority: 2 to 99: the loop's thread runs before all that has no such priority (Linux, SCHED_FIFO; 0: as any other)
    execution: how chunks become actions
    """

    policy: str
    robot: str
    operator: Literal["none", "keyboard", "gamepad"] = "none"
    mode: Mode = "live"
    task: str | None = None
    episodes: int = 1
    seconds: float = 60.0
    seed: int = TEST_SCENES
    out: Path | None = None
    bag: bool = False
    view: str | None = None
    judge: Path | None = None
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
    if config.view is not None:
        require_view(config.view)
    robot_config = load_robot(config.robot)
    source = open_policy(config)
    spec = source.spec.policy
    log = (config.out or Path("runs/deploy")) / "steps.jsonl"
    robot = Robot(robot_config, log, silent=config.mode != "live")
    _require_person(config, robot_config)
    robot.require_fit(spec.action_spec, spec.observation_spec, f"policy {config.policy}")
    judge = open_judge(config.judge, robot_config)
    say_unrated()
    run = _Run(config, robot, source, stop=StopRequest(), judge=judge)
    with _bag(config, robot, source) as bag, ExitStack() as stack, suppress(StopAsked):
        run.stop = stack.enter_context(stop_on_signals())
        operator: Operator | None = None
        if config.operator != "none" and config.mode != "dry":
            operator = stack.enter_context(
                open_person(config.operator, robot.rules, robot_config.operator, robot_config.name)
            )
        if config.view is not None and config.mode != "dry":
            run.view = stack.enter_context(open_view(config.view, robot.action_spec, run.timing))
        stack.callback(robot.stop)
        with run.stop.breaks_off():
            stack.enter_context(fixed_priority(config.priority))  # before the links' threads begin, which inherit it
            robot.connect()
            run.actor = actor = stack.enter_context(acting(config, source, robot))
        if run.view is not None:
            run.view.inference_s = getattr(actor, "latencies_s", ())
        stack.callback(robot.stop)  # before the policy's thread is waited for
        if config.mode == "dry":
            return _dry(robot, actor, robot_config)
        writer = _writer(config, robot, source)
        stack.enter_context(without_pauses())
        _episodes(run, actor, operator, writer)
    results = _summary(run)
    if bag is not None:
        print(bag.told())
        results["bag"] = {"path": str(bag.path), **bag.result.summary()}
    if run.view is not None:
        results["view"] = run.view.summary()
    return results


@dataclass
class _Run:
    """What a run is made of, and what has become of it.

    stop: asked for by a signal
    judge: of what succeeded, where neither robot nor person says
    actor: decides (None: the run was stopped before)
    view: shows it
    outcomes: of the episodes that count
    forgotten: episodes that a person had recorded again
    """

    config: Config
    robot: Robot
    source: BaseSource
    stop: StopRequest
    judge: Judge | None = None
    actor: Actor | None = None
    view: View | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    forgotten: int = 0
    timing: Timing = field(default_factory=Timing)


def _episodes(run: _Run, actor: Actor, operator: Operator | None, writer: EpisodeWriter | None) -> None:
    """Run one after the other, some of them again."""
    config, robot = run.config, run.robot
    scenes = iter(range(config.seed, config.seed + config.episodes))
    seed = next(scenes, None)
    while seed is not None:
        if writer is not None and writer.last_scene is not None and seed <= writer.last_scene:
            seed = next(scenes, None)  # recorded before the same command was cut
            continue
        outcome = run_episode(
            robot,
            actor,
            seed=seed,
            steps=round(config.seconds * robot.action_spec.control_hz),
            instruction=config.task or run.source.spec.policy.task,
            timing=run.timing,
            stop=run.stop,
            operator=operator,
            judge=run.judge,
            provenance={"policy_hash": run.source.digest, "strategy": config.mode},
            waits_for_ready=operator is not None and robot.config.set_by_person,
            waits_for_resume=operator is not None,
            on_step=None if run.view is None else run.view.step,
        )
        _report(outcome)
        if outcome.ended_by == "rerecord":
            run.forgotten += 1
            continue
        if outcome.steps:
            run.outcomes.append(outcome)
        if writer is not None and outcome.episode is not None:
            writer.add(outcome.episode)
        if run.stop.asked or outcome.ended_by == "operator" or (outcome.fault is not None and operator is None):
            break
        seed = next(scenes, None)


def _require_person(config: Config, robot: RobotConfig) -> None:
    """Refuse what wants a person where none is named."""
    if config.mode != "live" or config.operator != "none":
        return
    if robot.safety.dead_man:
        raise UserError(
            f"robot {robot.name!r} wants its dead-man switch held; say by what with --operator keyboard or gamepad"
        )
    if robot.set_by_person and config.episodes > 1:
        raise UserError(
            f"a person sets the scene of robot {robot.name!r} before each episode, and says so with --operator keyboard or gamepad; "
            "without, run one at a time (--episodes 1)"
        )


@contextmanager
def _bag(config: Config, robot: Robot, source: BaseSource) -> Iterator[BagRecorder | None]:
    """Records all messages where that is wanted; it ends when the robot is at rest."""
    if not config.bag or config.mode == "dry":
        yield None
        return
    if config.out is None:
        raise UserError("--bag records messages into OUT/bags, so it wants --out")
    about = {"instruction": config.task or source.spec.policy.task, "policy": source.digest}
    with recorded(robot, config.out / "bags" / time.strftime("%Y%m%d-%H%M%S"), about) as bag:
        yield bag


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
    taken = f", {outcome.taken_over} of them a person's" if outcome.taken_over else ""
    print(
        f"episode {outcome.seed}: {verdict} after {outcome.steps} steps{taken}, ended by {outcome.ended_by}{why}",
        flush=True,
    )
    for fault in outcome.resumed:
        print(f"  a person resumed after: {fault}", flush=True)


def _summary(run: _Run) -> dict[str, Any]:
    config, outcomes, timing = run.config, run.outcomes, run.timing
    tally, done, steps = run.robot.tally, len(outcomes), len(timing.parts_s["late"])
    results: dict[str, Any] = {
        "robot": run.robot.config.name,
        "policy": config.policy,
        "mode": config.mode,
        "operator": config.operator,
        "episodes": done,
        "scenes": [
            {
                "scene_seed": o.seed,
                "success": o.success,
                "length": o.steps,
                "ended_by": o.ended_by,
                "taken_over": o.taken_over,
            }
            for o in outcomes
        ],
        "recorded_again": run.forgotten,
        "faults": [o.fault for o in outcomes if o.fault],
        "resumed_faults": [fault for o in outcomes for fault in o.resumed],
        "clip_rate": tally.clipped / steps if steps else 0.0,
        "fault_rate": tally.faults / done if done else 0.0,
        "held_steps": sum(o.held for o in outcomes),
        "refused_chunks": tally.refused,
        "policy_failures": getattr(run.actor, "failures", 0),
        "timing": timing.summary(),
        "stopped": run.stop.asked or any(o.ended_by == "operator" for o in outcomes),
        "exit_code": int(any(o.fault for o in outcomes)),
    }
    latencies_s = list(getattr(run.actor, "latencies_s", []))
    if latencies_s:
        p50, p99 = 1e3 * np.percentile(latencies_s, [50, 99])
        results["timing"]["inference"] = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}
    if done:
        rate = proportion(sum(o.success for o in outcomes), done)
        results["success"] = as_dict(rate)
        print(
            f"success {rate}; {100 * results['clip_rate']:.1f} % of the steps clipped, {tally.faults} faults, "
            f"{timing.missed} of {steps} deadlines missed by more than 2 ms"
        )
    return results
