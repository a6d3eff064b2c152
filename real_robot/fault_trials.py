"""A fault is done to a moving robot, and what becomes of it is measured: when it holds, whether it stays, is recorded, and resumes gently.

All times are of this machine's monotonic clock, which the arm's process shares. The last valid command is the last one that moved the
robot: of the program's, or, where the fault cuts the link, the last one that the arm was told.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from real_robot.fault_stage import Driven, Fault, Stage
from real_robot.limits import Rules
from real_robot.loop import StopRequest, Timing, rest, run_episode
from real_robot.robot import Reading
from real_robot.safety import Decision
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.pace import Pace

Line = dict[str, Any]
TOLERANCE = 2e-6  # of a limit, as in ``vla-rl bench safety``
ROUNDED = 1e-9  # the log's numbers
STEPS = 300  # in which a fault has to be noticed
FIRST_STEPS = (10, 25)  # between which a fault begins
HELD_STEPS = 6  # of trying to move a held robot, with the fault and without
RESUMED_S = 1.0
OVER_S = 15.0  # in which the robot can be resumed, once the fault is over
MEASURED_SLACK = 1.2  # of a limit, that what is measured may have of an arm that follows
MEASURED_M = 1e-3


class SpoiledError(Exception):
    """The robot was held for another reason than the fault: the machine is busy."""


@dataclass
class Trial:
    """What became of one fault.

    hold_ms: from the last valid command to the first one that holds, or to the arm's own hold where the link is cut
    notice_ms: from the fault to the first command that holds
    latch_ms: from the last valid command to the latched fault
    latched: it stayed held, and at rest, until it was resumed
    recorded: the log has the fault, and the data set the episode
    jumped: a command after it was beyond the limits, or the arm jumped
    gap: of the arm's first command after its own hold, see ``arm_gap`` (None: the link was not cut)
    fault: as it was latched
    wrong: what was not as it should be
    """

    hold_ms: float = math.inf
    notice_ms: float = math.inf
    latch_ms: float = math.inf
    latched: bool = False
    recorded: bool = False
    jumped: bool = True
    gap: float | None = None
    fault: str = ""
    wrong: list[str] = field(default_factory=list)


class Injector:
    """Begins a fault so many steps after the first motion, at any time within the step, beside the loop."""

    def __init__(self, stage: Stage, fault: Fault, rng: np.random.Generator) -> None:
        self.begun_s = math.inf
        self._stage, self._fault, self._rng = stage, fault, rng
        self._left = int(rng.integers(*FIRST_STEPS))
        self._wait_s = float(rng.uniform(0, 1 / stage.config.action.control_hz))
        self._thread = threading.Thread(target=self._run, name="fault", daemon=True)

    def step(self, reading: Reading, decision: Decision) -> None:
        """For the loop's ``on_step``."""
        del reading
        self._left -= not decision.holding
        if not self._left and self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        time.sleep(self._wait_s)
        self.begun_s = time.monotonic()
        self._fault.begin(self._stage, self._rng)

    def join(self) -> None:
        """Wait until it has begun, if it is about to."""
        if self._thread.ident is not None:
            self._thread.join()


def run_trial(stage: Stage, fault: Fault, name: str, scene: int, rng: np.random.Generator) -> Trial:
    """Run an episode, do a fault to it, look after it and go on.

    Raises:
        SpoiledError: the robot was held for another reason.
        UserError: the robot cannot be driven at all.
    """
    driven = stage.drive(fault.over_topics)
    robot, trial = driven.robot, Trial()
    log_at = driven.log.stat().st_size
    stage.ask(call="record")
    injector = Injector(stage, fault, rng)
    outcome = run_episode(
        robot,
        driven.actor,
        seed=scene,
        steps=STEPS,
        instruction=name,
        timing=Timing(),
        stop=StopRequest(),
        provenance={"strategy": name},
        on_step=injector.step,
    )
    injector.join()
    if math.isinf(injector.begun_s):
        raise SpoiledError(f"the episode ended by {outcome.ended_by} ({outcome.fault}) before the fault began")
    trial.fault = str(outcome.fault)
    if outcome.ended_by == "fault" and not trial.fault.startswith(fault.says):
        fault.end(stage)
        raise SpoiledError(trial.fault)
    held_A = robot.state.command_A
    held = _drive(driven, HELD_STEPS, pushes=True)
    refused = not fault.lasts or not _resumes(driven)
    fault.end(stage)
    over_s = time.monotonic()
    held += _drive(driven, HELD_STEPS, pushes=True)
    while driven.actor.standing or not _resumes(driven):
        if time.monotonic() - over_s > OVER_S:
            raise UserError(f"it cannot be resumed within {OVER_S:g} s after the fault was over ({robot.fault})")
        held += _drive(driven, 1, pushes=True)
    resumed_s = time.monotonic()
    driven.actor.drop()
    after = _drive(driven, round(RESUMED_S * robot.action_spec.control_hz))
    rest(robot)
    if str(robot.fault).startswith("heartbeat"):
        raise SpoiledError(str(robot.fault))
    lines, rows = lines_from(driven.log, log_at), stage.ask(call="record")["executed"]
    _measure(trial, fault, lines, rows, injector.begun_s, over_s, robot.rules)
    _check(trial, "latched", _stayed(held, held_A, outcome.fault, robot.rules) + ([] if refused else ["resumed early"]))
    wrong = (
        [] if any(line["fault"] == outcome.fault for line in lines if "sent" in line) else ["no line of the log has it"]
    )
    if outcome.ended_by != "fault" or outcome.episode is None or not outcome.episode.truncated:
        wrong.append(f"the episode ended by {outcome.ended_by}")
    else:
        try:
            driven.writer.add(outcome.episode)
        except UserError as error:
            wrong.append(str(error))
    _check(trial, "recorded", wrong)
    wrong = jumps(lines, resumed_s, robot.rules, fault.cuts)
    if fault.cuts:
        trial.gap = arm_gap(rows, over_s, robot.rules)
        if trial.gap is None or trial.gap > 1 + TOLERANCE:
            wrong.append(f"the arm was told to move by {trial.gap} of what it may in a step after its hold")
    wrong += [f"held again: {d.fault}" for d in after if d.fault is not None][:1]
    wrong += [] if any(not d.holding for d in after) else ["it did not move again"]
    _check(trial, "not jumped", wrong)
    return trial


def _check(trial: Trial, what: str, wrong: list[str]) -> None:
    if what == "not jumped":
        trial.jumped = bool(wrong)
    else:
        setattr(trial, what, not wrong)
    trial.wrong += [f"{what}: {w}" for w in wrong]


def _drive(driven: Driven, steps: int, pushes: bool = False) -> list[Decision]:
    """Step as the loop does; where the policy has nothing, want another place nevertheless if it ``pushes``."""
    robot, decisions = driven.robot, []
    pace, moved_s = Pace(robot.action_spec.control_hz), time.monotonic()
    for _ in range(steps):
        pace.wait()
        wanted_A = driven.actor.act(robot.observe().features)
        wanted_A = None if driven.actor.standing else wanted_A
        if wanted_A is None and pushes:
            base_A = robot.state.command_A if robot.action_spec.mode == "absolute" else np.zeros(robot.action_spec.dim)
            wanted_A = robot.action_spec.clip(base_A + 0.01).astype(float)
        moved_s = moved_s if wanted_A is None else time.monotonic()
        decisions.append(robot.send(wanted_A, without_s=time.monotonic() - moved_s))
    return decisions


def _resumes(driven: Driven) -> bool:
    try:
        driven.robot.resume()
    except UserError:
        return False
    return True


def _stayed(held: Sequence[Decision], place_A: np.ndarray, fault: str | None, rules: Rules) -> list[str]:
    """What of the commands to a held robot was not at rest, or not held."""
    moving_A = rules.moving_A
    rest_A = place_A if rules.spec.mode == "absolute" else np.zeros(rules.spec.dim)
    if fault is None or not all(d.holding and d.fault == fault for d in held):
        return ["it let go by itself"]
    moved = max(float(np.abs(d.sent_A - rest_A)[moving_A].max()) for d in held)
    return [f"it moved by {moved:g} while it was held"] if moved > 0 else []


def lines_from(log: Path, offset: int) -> list[Line]:
    """The log's lines from a place in the file on."""
    with log.open() as file:
        file.seek(offset)
        return [json.loads(line) for line in file]


def _measure(
    trial: Trial, fault: Fault, lines: list[Line], rows: list[Line], begun_s: float, over_s: float, rules: Rules
) -> None:
    """Fill in the times; raises SpoiledError where the robot was held before the fault."""
    steps = [line for line in lines if "sent" in line]
    latched = next((i for i, line in enumerate(steps) if line["fault"]), None)
    if latched is None:
        trial.wrong.append("hold: it was never noticed")
        return
    hold = latched
    while hold > 0 and steps[hold - 1]["holding"]:
        hold -= 1
    if steps[hold]["t"] < begun_s:
        raise SpoiledError(steps[latched]["fault"])
    valid_s = steps[hold - 1]["t"]
    trial.notice_ms = 1e3 * (steps[hold]["t"] - begun_s)
    held_s = steps[hold]["t"]
    if fault.cuts:
        found = arm_hold(rows, steps, over_s)
        if found is None:
            trial.wrong.append("hold: the arm itself did not hold")
            return
        valid_s, held_s = found
    trial.hold_ms, trial.latch_ms = 1e3 * (held_s - valid_s), 1e3 * (steps[latched]["t"] - valid_s)


def arm_hold(rows: Sequence[Line], steps: Sequence[Line], over_s: float) -> tuple[float, float] | None:
    """When the last command that an arm was told was sent, and when the arm held by itself for good; None if it did not.

    Args:
        rows: what the arm executed when, and whether it was holding by itself.
        steps: of the log.
        over_s: when the fault was over.
    """
    before = [row for row in rows if row["t"] < over_s]
    told = [i for i, row in enumerate(before) if not row["holding"]]
    if not told or told[-1] + 1 == len(before):
        return None
    action_A = np.asarray(before[told[-1]]["action"])
    sent = [s["t"] for s in steps if np.abs(np.asarray(s["sent"]) - action_A).max() <= 2 * ROUNDED]
    return (sent[0], before[told[-1] + 1]["t"]) if sent else None


def jumps(lines: Sequence[Line], resumed_s: float, rules: Rules, lost: bool = False) -> list[str]:
    """What of the commands of an episode, over the fault and its end, is beyond the limits; and of what is measured after it.

    Args:
        lines: of the log.
        resumed_s: when the robot was resumed.
        rules: limits.
        lost: commands before that may not have reached the arm, so that those after it begin anew, from where it is.
    """
    moving_A = rules.moving_A
    begun = max((i for i, line in enumerate(lines) if str(line.get("event", "")).startswith("reset")), default=0)
    steps = [line for line in lines[begun:] if "sent" in line]
    later = next(i for i, line in enumerate(steps) if line["t"] > resumed_s)
    sent_TA = np.array([line["sent"] for line in steps])
    found = [f for part_TA in (np.split(sent_TA, [later]) if lost else [sent_TA]) for f in _beyond(part_TA, rules)]
    measured_TA = np.array([line["measured"] for line in steps[later - 1 :]], float)
    took_T1 = (
        np.diff([line["t"] for line in steps[later - 1 :]])[:, None] + rules.dt
    )  # what is measured is up to a step old
    most_TA = MEASURED_SLACK * rules.v_max_A * took_T1 + MEASURED_M
    beyond_TA = np.abs(np.diff(measured_TA, axis=0)) - most_TA
    if (beyond_TA[:, moving_A] > 0).any():
        found.append(f"the arm jumped by {np.nanmax(beyond_TA[:, moving_A]):g} more than it may move")
    return found


def _beyond(sent_TA: np.ndarray, rules: Rules) -> list[str]:
    """Which rates of commands are beyond their limits."""
    spec, dt = rules.spec, rules.dt
    v_TA = np.diff(sent_TA, axis=0) / dt if spec.mode == "absolute" else sent_TA / (dt if spec.mode == "delta" else 1.0)
    a_TA = np.diff(v_TA, axis=0) / dt
    found = []
    for name, rate_TA, most_A, rounded in (
        ("velocity", v_TA, rules.v_max_A, 2 * ROUNDED / dt),
        ("acceleration", a_TA, rules.a_max_A, 4 * ROUNDED / dt**2),
        ("jerk", np.diff(a_TA, axis=0) / dt, rules.j_max_A, 8 * ROUNDED / dt**3),
    ):
        beyond = float((np.abs(rate_TA) - most_A * (1 + TOLERANCE) - rounded)[:, rules.moving_A].max())
        if beyond > 0:
            found.append(f"{name} of a command is beyond its limit by {beyond:g}")
    return found


def arm_gap(rows: Sequence[Line], over_s: float, rules: Rules) -> float | None:
    """How far the first command that the arm was told after its own hold is away from it, as a share of what it may move in a step.

    Commands that were lost leave such a gap. None: it was told nothing. Arguments as of ``arm_hold``.
    """
    told = [i for i, row in enumerate(rows) if not row["holding"]]
    last = max((i for i in told if rows[i]["t"] < over_s), default=None)
    first = next((i for i in told if rows[i]["t"] >= over_s), None)
    if last is None or first is None:
        return None
    moved_A = np.abs(np.subtract(rows[first]["action"], rows[last]["action"] if rules.spec.mode == "absolute" else 0.0))
    moved_A = moved_A * (rules.dt if rules.spec.mode == "velocity" else 1.0)
    return float((moved_A / (rules.v_max_A * rules.dt))[rules.moving_A].max())
