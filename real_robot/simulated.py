"""The robot's safety filter in a batch of simulated episodes, so that a policy is judged under the limits that it will run under."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from real_robot.limits import Rules
from real_robot.motion import FilterState
from real_robot.robot import RobotConfig
from real_robot.robots.fake import FakeRobotConfig
from real_robot.robots.ros import RosRobotConfig
from real_robot.safety import View, filter_step, start
from vla_rl.data.episode import Provenance
from vla_rl.inference.rollout import CLIPPED_BY
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE


class SimulatedGuard:
    """See ``vla_rl.inference.rollout.Guard``. Time is the number of the step; observations are always fresh."""

    def __init__(self, config: RobotConfig, num_envs: int) -> None:
        """Set up; raises UserError where a place that the limits speak of is in no feature."""
        self.rules: Rules = config.rules()
        self._where = measured_features(config)
        self._states: list[FilterState | None] = [None] * num_envs
        self._steps = np.zeros(num_envs, int)
        self._clipped = np.zeros(num_envs, int)
        self._reasons: list[Counter[str]] = [Counter() for _ in range(num_envs)]

    def _measured(self, features: Mapping[str, np.ndarray], slot: int | None = None) -> np.ndarray:
        place_A = np.full(self.rules.spec.dim, np.nan)
        for axis, (feature, index) in self._where.items():
            place_A[axis] = features[feature][index] if slot is None else features[feature][slot, index]
        return place_A

    def begin(self, slot: int, features: Mapping[str, np.ndarray]) -> None:
        """See ``Guard``."""
        self._states[slot] = start(self.rules, self._measured(features))
        self._steps[slot] = self._clipped[slot] = 0
        self._reasons[slot].clear()

    def filter(self, wanted_NA: np.ndarray, features: Mapping[str, np.ndarray], active_N: np.ndarray) -> np.ndarray:
        """See ``Guard``."""
        sent_NA = np.zeros(wanted_NA.shape, np.float32)
        for slot in map(int, np.flatnonzero(active_N)):
            state = self._states[slot]
            assert state is not None
            view = View(self._steps[slot] * self.rules.dt, self._measured(features, slot), held_switch=True)
            self._states[slot], decision = filter_step(self.rules, state, wanted_NA[slot], view)
            self._steps[slot] += 1
            self._clipped[slot] += bool(decision.reasons)
            self._reasons[slot].update(decision.reasons)
            sent_NA[slot] = decision.sent_A
        return sent_NA

    def finish(self, slot: int) -> Provenance:
        """See ``Guard``."""
        state = self._states[slot]
        assert state is not None
        told: dict[str, str | int | float] = {"clipped_steps": int(self._clipped[slot])}
        told |= {f"{CLIPPED_BY}{name}": count for name, count in self._reasons[slot].items()}
        return told if state.fault is None else told | {"fault": state.fault}


def measured_features(config: RobotConfig) -> dict[int, tuple[str, int]]:
    """In which feature, and where in it, the place of each measured axis is.

    Raises:
        UserError: the robot measures a place that is in none of its features.
    """
    names = config.action.names
    if isinstance(config, FakeRobotConfig):
        pairs = [pair for key, where in config.measured.items() for pair in zip(key.split(), where, strict=True)]
        return {names.index(name): (STATE, index) for name, index in pairs}
    if not isinstance(config, RosRobotConfig):
        raise UserError(f"robot {config.name!r} does not say where its places are measured")
    found: dict[int, tuple[str, int]] = {}
    for key, part in config.map.measured.items():
        for feature, parts in config.map.observations.items():
            if part in parts:
                offset = sum(p.feature_shape[0] for p in parts[: parts.index(part)])
                found |= {names.index(name): (feature, offset + i) for i, name in enumerate(key.split())}
                break
        else:
            raise UserError(f"robot {config.name!r} measures {key}, which is in none of its features")
    return found
