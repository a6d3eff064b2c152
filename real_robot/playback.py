"""Recorded actions, played to a robot again: from the place where they begin, at another speed if wanted, to where they end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from real_robot.limits import FREE_UNIT, Rules
from real_robot.motion import angle_between
from real_robot.operators.base import Input, Situation
from real_robot.robot import Robot, RobotError
from vla_rl.types import STATE, ObservationSpec

ARRIVED = 1e-3  # of max_step, between the last command and the first recorded one
ROUNDING = 1e-9  # of a step


def at_speed(action_TA: np.ndarray, rules: Rules, speed: float) -> np.ndarray:
    """Actions that make the recorded motion at another speed: (T', A), about T / speed; grippers take their newest value.

    Places lie on the lines between the recorded ones, rotation vectors on the shortest turn between them; movements and velocities are
    what the recorded motion covers in a step.

    Args:
        action_TA: with at least one step.
        rules: limits of the robot.
        speed: above 0.
    """
    spec, steps = rules.spec, len(action_TA)
    if speed == 1:
        return action_TA
    free_A = np.array([unit == FREE_UNIT for unit in spec.units])
    if spec.mode == "absolute":
        at_K = np.minimum(np.arange(math.ceil((steps - 1) / speed - ROUNDING) + 1) * speed, steps - 1)
        made_KA = np.stack([np.interp(at_K, np.arange(steps), column_T) for column_T in action_TA.T], axis=1)
        for turn in rules.rotations if steps > 1 else ():
            turns = Slerp(np.arange(steps), Rotation.from_rotvec(action_TA[:, turn]))(at_K).as_rotvec()
            exact_K = at_K == at_K.round()  # a rotation has two vectors: keep the recorded one
            made_KA[:, turn] = np.where(exact_K[:, None], action_TA[at_K.astype(int)][:, turn], turns)
    else:
        edge_K = np.minimum(np.arange(math.ceil(steps / speed - ROUNDING) + 1) * speed, steps)
        covered_TA = np.concatenate([np.zeros((1, spec.dim)), np.cumsum(action_TA, axis=0, dtype=float)])
        reached_KA = np.stack([np.interp(edge_K, np.arange(steps + 1), c_T) for c_T in covered_TA.T], axis=1)
        at_K, made_KA = edge_K[:-1], np.diff(reached_KA, axis=0)
    newest_KA = action_TA[np.minimum((at_K + ROUNDING).astype(int), steps - 1)]
    return np.where(free_A, newest_KA, made_KA).astype(action_TA.dtype)


def require_at_start(rules: Rules, measured_A: np.ndarray, first_A: np.ndarray, name: str) -> None:
    """Raise RobotError, naming both places, where a robot of places is too far from the first command to head for it."""
    spec, allowed_A = rules.spec, rules.config.max_tracking_error
    apart_A = np.abs(measured_A - first_A)
    turning_A = np.zeros(spec.dim, bool)
    for turn in rules.rotations:
        turning_A[turn] = True
        angle, allowed = angle_between(measured_A[turn], first_A[turn]), min(allowed_A[turn])
        if angle > allowed:
            here, there = measured_A[turn].round(4).tolist(), first_A[turn].round(4).tolist()
            raise RobotError(
                f"robot {name!r} has {spec.names[turn.start]} and the two after it at {here} rad, and the episode begins at {there} rad, "
                f"{angle:.3g} rad from there; {allowed:g} are allowed: bring it there first"
            )
    for i in np.flatnonzero(rules.follows_A & ~turning_A):
        if not apart_A[i] <= allowed_A[i]:
            raise RobotError(
                f"robot {name!r} is at {measured_A[i]:.4g} {spec.units[i]} in {spec.names[i]}, and the episode begins at {first_A[i]:.4g}; "
                f"{allowed_A[i]:g} apart are allowed: bring it there first"
            )


class Playback:
    """Gives recorded actions, see ``Actor``; and ends the episode when there are no more, see ``Operator``.

    Until the robot of places has been told the first one in full, which its limits may not allow at once, that one is given again.

    waited: steps before the second action, beyond one
    """

    def __init__(self, robot: Robot, action_TA: np.ndarray) -> None:
        """Set up; ``action_TA`` has at least one step."""
        self.robot, self.action_TA = robot, action_TA
        self.failure: Exception | None = None
        self.standing = False
        self.waited = self._at = 0

    def reset(self, seed: int) -> None:
        """See ``Actor``; raises RobotError where the robot is too far from the first command."""
        del seed
        self.waited = self._at = 0
        require_at_start(self.robot.rules, self.robot.observe().measured_A, self.action_TA[0], self.robot.config.name)

    def act(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Actor``."""
        del features
        if self._at == 1 and not self._arrived():
            self.waited += 1
        else:
            self._at += 1
        return self.action_TA[self._at - 1]

    def _arrived(self) -> bool:
        rules = self.robot.rules
        if self.robot.silent:  # it goes its own way
            return True
        behind_A = np.abs(self.robot.state.command_A - self.action_TA[0])
        return bool((behind_A <= ARRIVED * np.asarray(rules.config.max_step))[rules.follows_A].all())

    def drop(self) -> None:
        """See ``Actor``: what was recorded stays what it is."""

    @property
    def over(self) -> bool:
        """Whether all actions were given."""
        return self._at == len(self.action_TA)

    def poll(self, situation: Situation) -> Input:
        """See ``Operator``."""
        del situation
        return Input(ready=True, reset=self.over)


@dataclass(frozen=True)
class Deviation:
    """How far a path was from another, in the units of the state.

    names: of the axes
    most_S, rms_S: largest distance and root mean square, (S,)
    """

    names: tuple[str, ...]
    most_S: np.ndarray
    rms_S: np.ndarray


def deviation(
    recorded_TS: np.ndarray, measured_KS: np.ndarray, speed: float, waited: int, names: Sequence[str]
) -> Deviation:
    """Compare the states of a playback with the recorded ones at the same time of the motion; what was waited for is left out."""
    at_K = np.clip((np.arange(len(measured_KS)) - waited) * speed, 0, len(recorded_TS) - 1)
    wanted_KS = np.stack([np.interp(at_K, np.arange(len(recorded_TS)), s_T) for s_T in recorded_TS.T], axis=1)
    apart_KS = np.abs(measured_KS - wanted_KS)[waited:]
    return Deviation(tuple(names), apart_KS.max(axis=0), np.sqrt((apart_KS**2).mean(axis=0)))


def state_names(mine: ObservationSpec, theirs: ObservationSpec) -> tuple[str, ...] | None:
    """Names of the state's axes where both know the same state; None where they do not."""
    if STATE not in mine or STATE not in theirs or mine[STATE].shape != theirs[STATE].shape:
        return None
    names = mine[STATE].names or theirs[STATE].names
    return names or tuple(f"state_{i}" for i in range(mine[STATE].shape[0]))
