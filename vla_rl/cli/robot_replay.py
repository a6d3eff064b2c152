"""Play a recorded episode on a robot through the safety filter, software WITHOUT A SAFETY RATING: keep an emergency stop within reach.

The robot has to be near where the episode begins. What is played is limited as a policy is, whatever the speed. Ctrl-C brings it to rest.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from real_robot.loop import Outcome, Timing, run_episode
from real_robot.playback import Deviation, Playback, at_speed, deviation, require_at_start, state_names
from real_robot.robot import Robot, RobotConfig, load_robot
from real_robot.stopping import StopAsked, stop_on_signals
from real_robot.transports.base import discover_transports
from vla_rl.cli.common import CommandConfig
from vla_rl.cli.on_robot import say_unrated
from vla_rl.data import schema
from vla_rl.data.reader import PROVENANCE_PREFIX, EpisodeData, load_dataset
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import without_pauses
from vla_rl.types import ACTION, STATE

EXAMPLE = "vla-rl robot replay runs/lift/demos --robot lift_fake --episode 0"
POSITIONALS = ("data",)
START_S = 10.0  # in which the first command has to be reached
prepare = discover_transports


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl robot replay``.

    data: folder of the data set
    robot: YAML file of the robot, or its name in configs/robot
    episode: number of the episode, from 0
    mode: live, shadow (nothing is sent), dry (check everything once, and end)
    speed: of the motion; what is too fast for the robot's limits is limited
    out: folder for the recorded replays and the log of every step (none: only the log, in runs/replay)
    """

    data: Path
    robot: str
    episode: int
    mode: Literal["live", "shadow", "dry"] = "live"
    speed: float = 1.0
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.episode < 0 or not 0 < self.speed < float("inf"):
            raise ValueError(f"episode wants a number >= 0, speed a number > 0, got {self.episode} and {self.speed}")


@dataclass(frozen=True)
class _Recording:
    """An episode that is played: actions (T, A), states (T + 1 or T, S) where there are some, the task in words, and the scene."""

    action_TA: np.ndarray
    state_TS: np.ndarray | None
    instruction: str
    seed: int


def _recording(data: EpisodeData, config: Config) -> _Recording:
    if config.episode >= data.num_episodes:
        raise UserError(f"{config.data} has episodes 0 to {data.num_episodes - 1}, got --episode {config.episode}")
    rows = slice(int(data.episode_from_E[config.episode]), int(data.episode_to_E[config.episode]))
    row = data.episodes.iloc[config.episode]
    state_TS = data.columns[STATE][rows].numpy() if STATE in data.columns else None
    if state_TS is not None and row.get(schema.FINAL_PREFIX + STATE) is not None:
        state_TS = np.concatenate([state_TS, data.final(STATE, slice(config.episode, config.episode + 1))])
    seed = row.get(f"{PROVENANCE_PREFIX}scene_seed")
    return _Recording(
        data.columns[ACTION][rows].numpy(),
        state_TS,
        data.tasks[int(data.columns["task_index"][rows][0])],
        int(seed) if seed is not None and np.isfinite(seed) else 0,
    )


def run(config: Config) -> dict[str, Any]:
    """Play the episode; return what happened."""
    robot_config, data = load_robot(config.robot), load_dataset(config.data)
    log = (config.out or Path("runs/replay")) / "steps.jsonl"
    robot = Robot(robot_config, log, silent=config.mode != "live")
    robot.action_spec.require_equal(
        data.action_spec, mine=f"robot {robot_config.name!r}", theirs=f"data set {config.data}"
    )
    recording = _recording(data, config)
    playback = Playback(robot, at_speed(recording.action_TA, robot.rules, config.speed))
    if config.mode == "live" and robot_config.safety.dead_man:
        raise UserError(f"robot {robot_config.name!r} wants its dead-man switch held, and a replay has no operator")
    say_unrated()
    outcome, timing = None, Timing()
    with ExitStack() as stack, suppress(StopAsked):
        stop = stack.enter_context(stop_on_signals())
        stack.callback(robot.stop)
        with stop.breaks_off():
            robot.connect()
        if config.mode == "dry":
            return _dry(robot, playback)
        writer = _writer(config, robot, data)
        stack.enter_context(without_pauses())
        outcome = run_episode(
            robot,
            playback,
            seed=recording.seed,
            steps=len(playback.action_TA) + round(START_S * robot.action_spec.control_hz),
            instruction=recording.instruction,
            timing=timing,
            stop=stop,
            operator=playback,
            provenance={
                "source": "replay",
                "strategy": config.mode,
                "replayed": f"{data.digest[:12]}/{config.episode}",
            },
        )
        if writer is not None and outcome.episode is not None:
            writer.add(outcome.episode)
    apart = None if outcome is None else _deviation(config, robot.config, data, recording, playback, outcome)
    return _summary(config, robot, playback, outcome, apart, timing)


def _dry(robot: Robot, playback: Playback) -> dict[str, Any]:
    """Where the robot is, what the first command would be; nothing is sent."""
    reading, first_A = robot.observe(), playback.action_TA[0]
    require_at_start(robot.rules, reading.measured_A, first_A, robot.config.name)
    decision = robot.send(first_A)
    steps, fault = len(playback.action_TA), decision.fault or "none"
    print(f"robot {robot.config.name!r} and the episode of {steps} steps fit; fault: {fault}; nothing was sent")
    return {"fits": True, "fault": decision.fault, "exit_code": int(decision.fault is not None)}


def _writer(config: Config, robot: Robot, data: EpisodeData) -> EpisodeWriter | None:
    """Of the replays, one more with each call of the same command."""
    if config.out is None:
        return None
    recipe = {
        "source": "replay",
        "robot": robot.config.name,
        "data": data.digest,
        "episode": config.episode,
        "speed": config.speed,
        "mode": config.mode,
    }
    return EpisodeWriter.open_or_create(
        config.out / "episodes",
        action_spec=robot.action_spec,
        observation_spec=robot.observation_spec,
        task=data.task,
        recipe=recipe,
    )


def _deviation(
    config: Config, robot: RobotConfig, data: EpisodeData, recording: _Recording, playback: Playback, outcome: Outcome
) -> Deviation | None:
    names = state_names(robot.observation_spec, data.observation_spec)
    if names is None or recording.state_TS is None or outcome.episode is None:
        return None
    measured_KS = outcome.episode.observations[STATE]
    if len(measured_KS) <= playback.waited:
        return None
    return deviation(recording.state_TS, measured_KS, config.speed, playback.waited, names)


def _summary(
    config: Config, robot: Robot, playback: Playback, outcome: Outcome | None, apart: Deviation | None, timing: Timing
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "robot": robot.config.name,
        "data": str(config.data),
        "episode": config.episode,
        "mode": config.mode,
        "speed": config.speed,
        "ended_by": "operator",
        "fault": None,
        "exit_code": 0,
    }
    if outcome is None:
        print("stopped before the episode began")
        return results
    played = playback.over and outcome.ended_by == "reset"
    results |= {
        "ended_by": "end of the recording" if played else outcome.ended_by,
        "success": outcome.success,
        "steps": outcome.steps,
        "recorded_steps": len(playback.action_TA),
        "waited_steps": playback.waited,
        "clip_rate": robot.tally.clipped / outcome.steps if outcome.steps else 0.0,
        "held_steps": outcome.held,
        "fault": outcome.fault,
        "timing": timing.summary(),
        "exit_code": int(outcome.fault is not None or outcome.ended_by == "time"),  # its start was not reached
    }
    why = f" ({outcome.fault})" if outcome.fault else ""
    print(
        f"episode {config.episode}: {'success' if outcome.success else 'no success'} after {outcome.steps} steps, ended by "
        f"{results['ended_by']}{why}; {100 * results['clip_rate']:.1f} % of the steps clipped"
    )
    if apart is None:
        print("the recording and the robot know no state in common, so how far their paths were apart is not known")
        return results
    results["path"] = {
        name: {"max": float(most), "rms": float(rms)}
        for name, most, rms in zip(apart.names, apart.most_S, apart.rms_S, strict=True)
    }
    table = Table("measured against recorded", "max", "RMS")
    for name, numbers in results["path"].items():
        table.add_row(name, f"{numbers['max']:.4f}", f"{numbers['rms']:.4f}")
    Console().print(table)
    return results
