"""An environment whose model, sensing and actuation vary from episode to episode, around any task's environment."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from sim.randomization import Changes, Randomization, apply, delay_steps, randomized, values_of, with_noise
from sim.task import Outcome, TaskEnv
from sim.wrappers import TaskWrapper
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import numpy_generator

# where bodies stand: some tasks write it at a reset (robosuite's Door, PickPlace)
LAYOUT = ("body_pos", "body_quat")


class RandomizedEnv(TaskWrapper):
    """``inner`` with a ``Randomization``.

    What an episode draws is a function of its scene seed alone, and the scene is the one that ``inner`` places for that
    seed. Randomise an environment as soon as it is built: its model at that moment is the nominal one. Rewards, success
    and ends of episodes are never delayed, and neither is what experts read from ``model`` and ``data``.

    Attributes:
        randomization: how far.
        drawn: fields of the model that this episode changed, with their values.
    """

    def __init__(self, inner: TaskEnv, randomization: Randomization) -> None:
        """Wrap ``inner``; raises UserError where a knob needs a MuJoCo model and there is none."""
        super().__init__(inner)
        self.randomization = randomization
        self.drawn: Changes = {}
        self._nominal: Changes = {}
        self._layout: Changes = {}
        self._model: mujoco.MjModel | None = None
        if randomization.of_model:
            self._model = getattr(inner, "model", None)
            if not isinstance(self._model, mujoco.MjModel):
                raise UserError(
                    f"task {inner.config.name!r} has no MuJoCo model to randomise: {', '.join(randomization.of_model)} "
                    "want 0; observation_noise, observation_delay_steps and action_delay_steps may be set"
                )
            self._layout = {name: getattr(self._model, name).copy() for name in LAYOUT}
        self._noise = np.random.default_rng(0)
        self._action_delay_steps = self._observation_delay_steps = 0
        self._actions: deque[np.ndarray] = deque()
        self._observations: deque[dict[str, np.ndarray]] = deque()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw model, delays and noise of ``seed`` (drawn when None), then place its scene.

        ``info["randomization"]`` has the delays in steps and, for every field of the model that changed, the largest
        change in the field's own unit.

        Raises:
            RuntimeError: the inner environment built another model, in which nothing would be randomised.
        """
        gym.Env.reset(self, seed=seed)
        if seed is None and self.randomization.enabled:
            seed = int(self.np_random.integers(2**31))
        drawn = {} if seed is None else self._draw(seed)
        observation, info = self.inner.reset(seed=seed, options=options)
        if self._model is not None and getattr(self.inner, "model", None) is not self._model:
            raise RuntimeError(f"task {self.inner.config.name!r} replaced its MuJoCo model at a reset")
        self._actions.clear()
        self._observations.clear()
        if self.randomization.enabled:
            info = {**info, "randomization": drawn}
        return self._sensed(observation), info

    def _draw(self, seed: int) -> dict[str, float | int]:
        config = self.randomization
        self._noise = numpy_generator(seed, "randomization", "observation_noise")
        self._observation_delay_steps, self._action_delay_steps = (
            delay_steps(numpy_generator(seed, "randomization", name), getattr(config, name))
            for name in ("observation_delay_steps", "action_delay_steps")
        )
        changes = self._draw_model(seed)
        return {
            "observation_delay_steps": self._observation_delay_steps,
            "action_delay_steps": self._action_delay_steps,
            **{name: float(np.abs(change).max(initial=0.0)) for name, change in changes.items()},
        }

    def _draw_model(self, seed: int) -> Changes:
        """Put the model of ``seed`` in place of the last episode's; return its differences from the nominal model."""
        if self._model is None:
            return {}
        # derived constants too must not depend on where the last scene's bodies stood, not even in their last bits
        now_standing = values_of(self._model, self._layout)
        apply(self._model, {**self._layout, **self._nominal})
        changes = randomized(self._model, numpy_generator(seed, "randomization"), self.randomization)
        self._nominal = values_of(self._model, changes)
        apply(self._model, changes)
        apply(self._model, now_standing)
        self.drawn = changes
        return {name: value - self._nominal[name] for name, value in changes.items()}

    def step(self, action: np.ndarray) -> Outcome:
        """Execute the action given ``action_delay_steps`` ago; return the observation of ``observation_delay_steps`` ago.

        Before the first action arrives the robot is told to hold: zeros within the limits, or for absolute targets the
        first action given, since an absolute action says nowhere what standing still is. Before the first observation
        arrives it is that of the reset.
        """
        observation, *outcome = self.inner.step(self._actuated(self.checked_action(action)))
        return (self._sensed(observation), *outcome)  # type: ignore[return-value]

    def _actuated(self, action_A: np.ndarray) -> np.ndarray:
        if not self._actions:
            spec = self.inner.action_spec
            hold_A = action_A if spec.mode == "absolute" else spec.clip(np.zeros(spec.dim))
            self._actions.extend([hold_A] * self._action_delay_steps)
        self._actions.append(action_A)
        return self._actions.popleft()

    def _sensed(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The noise is the sensor's, so a late observation has the noise of when it was taken."""
        if self.randomization.observation_noise:
            observation = with_noise(observation, self._noise, self.randomization.observation_noise)
        if self._observation_delay_steps == 0:
            return observation
        kept = {name: value.copy() for name, value in observation.items()}
        if not self._observations:
            self._observations.extend([kept] * self._observation_delay_steps)
        self._observations.append(kept)
        return self._observations.popleft()
