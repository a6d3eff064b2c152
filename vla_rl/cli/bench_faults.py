"""Do one fault after the other to a moving simulated robot: does it hold in time, stay held, get recorded, resume gently?

Link cut, bridge killed or hanging, policy killed, inference that hangs, a frozen camera, a clock that jumps, a robot that falls silent or
says what is no number. Arm, policy, bridge and camera are processes of their own. It is a measurement in real time: leave the machine
alone meanwhile.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from real_robot.fault_stage import FAULTS, Stage, open_stage
from real_robot.fault_trials import SpoiledError, Trial, run_trial
from real_robot.robot import load_robot
from real_robot.robots.fake import FakeRobotConfig
from real_robot.transports.base import discover_transports
from vla_rl.cli.common import CommandConfig
from vla_rl.data.reader import load_dataset
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import without_pauses

EXAMPLE = "vla-rl bench faults --trials 20 --robot lift_fake --json results/faults_lift.json"
POSITIONALS = ()
SPOILED = 2  # times the trials that may be made anew, since the robot was held for another reason
prepare = discover_transports


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench faults``.

    robot: file or name of a robot of type fake
    faults: of link_cut, bridge_hangs, bridge_killed, frozen_camera, policy_killed, inference_hangs, clock_jumps, robot_silent, not_finite
    trials: of each fault
    hold_ms: longest time from the last valid command to the hold
    watchdog_s: age of a command at which the simulated arm holds by itself; it looks once in each of its steps of 50 ms
    domain: of DDS (ROS_DOMAIN_ID), on loopback, that nobody else may be in
    seed: of the faults' times and of the scenes
    out: folder for logs and episodes (none: they are forgotten)
    """

    robot: str = "push_t_fake"
    faults: tuple[str, ...] = tuple(FAULTS)
    trials: int = 20
    hold_ms: float = 100.0
    watchdog_s: float = 0.048
    domain: int = 87
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.trials < 1 or self.seed < 0 or not (self.hold_ms > 0 and self.watchdog_s > 0):
            raise ValueError(
                f"trials wants at least 1, seed a number >= 0, hold_ms and watchdog_s times > 0, "
                f"got {self.trials}, {self.seed}, {self.hold_ms}, {self.watchdog_s}"
            )
        unknown = [name for name in self.faults if name not in FAULTS]
        if unknown or not self.faults:
            raise ValueError(f"faults wants some of {', '.join(FAULTS)}, got {', '.join(unknown) or 'none'}")


def run(config: Config) -> dict[str, Any]:
    """Do the faults; return what was found."""
    robot = load_robot(config.robot)
    if not isinstance(robot, FakeRobotConfig):
        raise UserError(f"faults are done to simulated robots (type fake); {config.robot} is none")
    found: dict[str, list[Trial]] = {name: [] for name in config.faults}
    spoiled: list[str] = []
    with (
        _folder(config.out) as folder,
        open_stage(robot, folder, config.domain, config.watchdog_s) as stage,
        tqdm(total=config.trials * len(found), desc="faults", unit="trial") as bar,
        without_pauses(),
    ):
        for name in sorted(found, key=lambda name: FAULTS[name].over_topics):
            rng = np.random.default_rng([config.seed, list(FAULTS).index(name)])
            while len(found[name]) < config.trials:
                scene = config.seed + len(found[name]) + len(spoiled)
                try:
                    found[name].append(_trial(stage, name, scene, rng))
                except SpoiledError as error:
                    spoiled.append(f"{name}: {error}")
                    if len(spoiled) > SPOILED * config.trials * len(found):
                        raise UserError(
                            f"the machine is too busy: the robot was held for another reason than {name} ({error})"
                        ) from error
                    stage.mend()
                    continue
                bar.update()
                if stage.driven is not None and stage.driven.robot.fault is not None:
                    stage.mend()
            _look_up(folder, found[name], stage, name)
    rows = {name: summary(trials, config.hold_ms) for name, trials in found.items()}
    _print(rows, config, spoiled)
    failed = sum(row["failed"] for row in rows.values())
    return {
        "robot": config.robot,
        "control_hz": robot.action.control_hz,
        "hold_limit_ms": config.hold_ms,
        "watchdog_s": config.watchdog_s,
        "limits": {
            name: getattr(robot.safety, name) for name in ("joints_age_s", "camera_age_s", "inference_s", "heartbeat_s")
        },
        "seed": config.seed,
        "faults": rows,
        "spoiled": spoiled,
        "exit_code": int(failed > 0),
    }


def _trial(stage: Stage, name: str, scene: int, rng: np.random.Generator) -> Trial:
    try:
        return run_trial(stage, FAULTS[name], name, scene, rng)
    except UserError as error:
        stage.mend()
        return Trial(wrong=[str(error)])


def _look_up(folder: Path, trials: list[Trial], stage: Stage, name: str) -> None:
    """Whether the data set has an episode for each trial that is said to be recorded."""
    root = folder / stage.drive(FAULTS[name].over_topics).robot.config.name
    kept = sum(trial.recorded for trial in trials)
    if not kept:
        return
    data = load_dataset(root)
    there = sum(data.episode(i).instruction == name for i in range(data.num_episodes))
    if there < kept:
        for trial in trials:
            trial.recorded = False
            trial.wrong.append(f"recorded: the data set has {there} episodes of {kept}")


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="vla-rl-faults-") as folder:
            yield Path(folder)
        return
    if out.exists():
        raise UserError(f"{out} is there already; choose another --out")
    out.mkdir(parents=True)
    yield out


def summary(trials: list[Trial], hold_ms: float) -> dict[str, Any]:
    """Counts and times of one fault's trials."""
    good = [t.hold_ms <= hold_ms and t.latched and t.recorded and not t.jumped and not t.wrong for t in trials]
    return {
        "n": len(trials),
        "failed": good.count(False),
        "held_in_time": sum(t.hold_ms <= hold_ms for t in trials),
        **_times("hold", [t.hold_ms for t in trials]),
        **_times("notice", [t.notice_ms for t in trials]),
        **_times("latch", [t.latch_ms for t in trials]),
        "latched": sum(t.latched for t in trials),
        "recorded": sum(t.recorded for t in trials),
        "jumps": sum(t.jumped for t in trials),
        "gap_max": max((t.gap for t in trials if t.gap is not None), default=None),
        "said": sorted({t.fault.split(":")[0] for t in trials if t.fault}),
        "wrong": [w for t in trials for w in t.wrong],
    }


def _times(name: str, values: list[float]) -> dict[str, float | None]:
    finite = [v for v in values if np.isfinite(v)]
    return {
        f"{name}_median_ms": round(float(np.median(finite)), 1) if finite else None,
        f"{name}_max_ms": round(max(finite), 1) if finite else None,
    }


def _print(rows: dict[str, dict[str, Any]], config: Config, spoiled: list[str]) -> None:
    table = Table(
        "fault",
        f"in {config.hold_ms:g} ms",
        "hold ms",
        "notice ms",
        "latch ms",
        "latched",
        "recorded",
        "jumps",
        title="median / max; hold and latch: since the last valid command, notice: since the fault",
    )
    for name, row in rows.items():
        times = [f"{row[f'{what}_median_ms']} / {row[f'{what}_max_ms']}" for what in ("hold", "notice", "latch")]
        counts = [str(row[what]) for what in ("latched", "recorded", "jumps")]
        table.add_row(name, f"{row['held_in_time']} of {row['n']}", *times, *counts)
    Console(width=110).print(table)
    for name, row in rows.items():
        for wrong in dict.fromkeys(row["wrong"]):
            print(f"{name}: {wrong}")
    if spoiled:
        print(f"{len(spoiled)} trials were made anew: the robot was held for another reason, such as {spoiled[0]}")
