"""A person's keys and sticks as actions, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from real_robot.limiter import brake_velocity, limit_velocities
from real_robot.limits import Rules
from real_robot.operators.config import OperatorConfig
from real_robot.safety import FilterState


@dataclass(frozen=True)
class _Path:
    """Where a person leads the places: position, velocity and acceleration, (A,) each."""

    place_A: np.ndarray
    velocity_A: np.ndarray
    acceleration_A: np.ndarray


class Teleop:
    """Turns deflections into actions.

    Places are led along a path that keeps the robot's limits by itself, so that the filter lets it through as it is. It begins where the
    last command is, with its velocity, begins there anew whenever the robot was brought to rest, and is never further ahead of the
    commands than a stop is long: nothing winds up while something else holds the robot back. Where the filter is still catching up with
    what the policy wanted, it would go on with that: the robot comes to rest first.
    """

    def __init__(self, rules: Rules, config: OperatorConfig) -> None:
        """Set up; raises UserError where the config does not fit the robot."""
        self.rules, self.config = rules, config.resolved(rules)
        names = rules.spec.names
        self._speed_A = np.array([self.config.moves[n].speed if n in self.config.moves else 0.0 for n in names])
        self._goals: dict[str, float] = {}
        self._path: _Path | None = None
        still_A = np.zeros(rules.spec.dim)
        self._next_velocity(_Path(still_A, still_A, still_A), still_A)  # its first, slow call is not the robot's

    def begin(self, state: FilterState) -> None:
        """A take-over begins: places go on from the last command, grippers stay as they are."""
        names = self.rules.spec.names
        self._path = None
        self._goals = {name: float(state.command_A[names.index(name)]) for name in self.config.switches}

    def action(
        self, deflections: Mapping[str, float], pressed: frozenset[str], held: frozenset[str], state: FilterState
    ) -> np.ndarray | None:
        """The action (A,) of this step; None: come to rest first.

        Args:
            deflections: -1 to 1 by action; what is not named stays.
            pressed: actions whose switch went down.
            held: actions whose switch is held.
            state: of the filter, after the last step.
        """
        rules, spec = self.rules, self.rules.spec
        share_A = np.array([deflections.get(name, 0.0) for name in spec.names])
        velocity_A = self._speed_A * share_A
        scale = {"absolute": 0.0, "delta": rules.dt, "velocity": 1.0}[spec.mode]
        moved_A = velocity_A * scale if scale else self._led(velocity_A, state)
        if moved_A is None:
            return None
        action_A = np.where(rules.moving_A, moved_A, state.command_A)
        for name, switch in self.config.switches.items():
            action_A[spec.names.index(name)] = self._switched(name, switch.values, switch.held, pressed, held)
        return action_A

    def _led(self, wanted_A: np.ndarray, state: FilterState) -> np.ndarray | None:
        """The next places of the path, towards a wanted velocity."""
        rules, path = self.rules, self._path
        rested = np.isnan(state.wanted_A).any()  # the filter brought the robot to rest in the last step
        if path is None or rested:
            if not state.at_rest and (rested or (state.chases_A & rules.follows_A).any()):
                return None
            path = _Path(state.command_A, state.velocity_A, state.acceleration_A)
        velocity_A = self._next_velocity(path, wanted_A)
        lead_A = self._longest_lead(velocity_A)
        place_A = np.clip(path.place_A + velocity_A * rules.dt, state.command_A - lead_A, state.command_A + lead_A)
        for turn in rules.rotations:
            place_A[turn] = _turned(path.place_A[turn], velocity_A[turn] * rules.dt)
            ahead = Rotation.from_rotvec(place_A[turn]) * Rotation.from_rotvec(state.command_A[turn]).inv()
            if ahead.magnitude() > max(lead_A[turn]):
                place_A[turn] = _turned(state.command_A[turn], velocity_A[turn] * rules.dt)
        self._path = _Path(place_A, velocity_A, (velocity_A - path.velocity_A) / rules.dt)
        return place_A

    def _next_velocity(self, path: _Path, wanted_A: np.ndarray) -> np.ndarray:
        """Of the path's next step: towards a wanted one, within the limits, and able to stop within the bounds."""
        rules = self.rules
        at_A = path.place_A.copy()
        for turn in rules.rotations:
            at_A[turn] = 0.0  # turns are counted from the last place
        free_A, never_A, to_A = ~rules.moving_A, np.zeros(rules.spec.dim, bool), np.zeros(rules.spec.dim)
        for i in np.flatnonzero(rules.moving_A):  # to the wanted velocity as to a stop, so that it is not overshot
            slower = brake_velocity(
                path.velocity_A[i] - wanted_A[i], path.acceleration_A[i], rules.a_max_A[i], rules.j_max_A[i], rules.dt
            )
            to_A[i] = wanted_A[i] + slower
        return limit_velocities(
            at_A,
            path.velocity_A,
            path.acceleration_A,
            to_A,
            np.where(free_A, -np.inf, np.minimum(rules.low_A, at_A)),
            np.where(free_A, np.inf, np.maximum(rules.high_A, at_A)),
            np.where(free_A, 1.0, np.maximum(rules.v_max_A, np.abs(path.velocity_A))),
            np.where(free_A, 1.0, rules.a_max_A),
            np.where(free_A, 1.0, rules.j_max_A),
            rules.dt,
            never_A,
            never_A,
            np.zeros(rules.spec.dim),
        )

    def _longest_lead(self, velocity_A: np.ndarray) -> np.ndarray:
        """How far the path may be ahead of the commands: about the way of a stop."""
        rules, fast_A = self.rules, np.maximum(self._speed_A, np.abs(velocity_A))
        a_A, j_A = (np.where(rules.moving_A, limit_A, 1.0) for limit_A in (rules.a_max_A, rules.j_max_A))
        return fast_A**2 / (2 * a_A) + fast_A * a_A / (2 * j_A) + 3 * fast_A * rules.dt

    def _switched(
        self, name: str, values: tuple[float, ...], while_held: bool, pressed: frozenset[str], held: frozenset[str]
    ) -> float:
        first, second = values
        if while_held:
            self._goals[name] = second if name in held else first
        elif name in pressed:  # to the place that it is further from
            goal = self._goals[name]
            self._goals[name] = second if abs(goal - first) <= abs(goal - second) else first
        return self._goals[name]


def _turned(from_3: np.ndarray, by_3: np.ndarray) -> np.ndarray:
    """A rotation vector turned further, about axes of the world; as it is where it is not turned."""
    if not by_3.any():
        return from_3.copy()
    return (Rotation.from_rotvec(by_3) * Rotation.from_rotvec(from_3)).as_rotvec()
