"""Expert for any Gymnasium task: model-predictive control by sampling, with the simulator itself as the model.

Cross-entropy method with temporally correlated noise, a plan that is kept from step to step, and averaging of the elite
(iCEM, arXiv 2008.06389, minus its decaying population). It maximises the environment's own reward, so it needs to know
nothing of the task.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np

from sim.experts.base import Expert
from vla_rl.runtime.errors import UserError

if TYPE_CHECKING:
    from sim.tasks.gym_task import GymEnv

NOISE_STD = 0.3  # of the first iteration, as a share of half the action range
NOISE_CORRELATION = 0.7  # from one step of a plan to the next
LEAST_STD = 0.05  # the search never narrows below this share
FINEST_SCALE = 0.05  # candidates are spread from the full noise to this share of it: coarse and fine search at once
ELITE_SHARE = 0.15
# Tie breakers for flat rewards (balancing pays the same wherever the cart is), too small to matter otherwise:
EFFORT_COST = 2e-4  # per step at full action
HOME_BONUS = 0.02  # per step at the first observation: what does not pay is left as it was


@dataclass(frozen=True)
class Search:
    """How far and how hard to plan."""

    horizon_steps: int
    candidates: int
    iterations: int


SEARCHES = {
    "planned": Search(horizon_steps=15, candidates=48, iterations=3),
    "planned_rough": Search(horizon_steps=12, candidates=24, iterations=2),
}


class Model(Protocol):
    """Something that simulates from the present state of an environment without touching that environment."""

    def look(self, env: GymEnv) -> None:
        """Remember the present state."""
        ...

    def branch(self) -> Any:
        """Return an environment in the remembered state, valid until the next call."""
        ...


class CopyModel:
    """Copies of the environment object: classic control and other environments in pure Python."""

    def look(self, env: GymEnv) -> None:
        """Remember the present state."""
        real = env.env.unwrapped
        # windows cannot be copied; spaces and specs need not be
        shared = [
            v for v in vars(real).values() if isinstance(v, gym.Space) or type(v).__module__.split(".")[0] == "pygame"
        ]
        shared.append(vars(real).get("spec"))
        self._shared = {id(value): value for value in shared if value is not None}
        try:
            self._snapshot = copy.deepcopy(real, dict(self._shared))
        except TypeError as error:
            raise UserError(f"the planner cannot copy {env.config.env_id!r}: {error}") from error

    def branch(self) -> Any:
        """Return a fresh copy."""
        return copy.deepcopy(self._snapshot, dict(self._shared))


class MujocoModel:
    """One second environment of the same id, whose physics state is set to the real one's."""

    def __init__(self, env_id: str) -> None:
        self._copy: Any = gym.make(env_id).unwrapped
        self._copy.reset(seed=0)

    def look(self, env: GymEnv) -> None:
        """Remember the present state."""
        import mujoco

        real: Any = env.env.unwrapped
        self._state = np.empty(mujoco.mj_stateSize(real.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(real.model, real.data, self._state, mujoco.mjtState.mjSTATE_INTEGRATION)

    def branch(self) -> Any:
        """Return the copy, set back."""
        import mujoco

        twin = self._copy
        mujoco.mj_setState(twin.model, twin.data, self._state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(twin.model, twin.data)
        return twin


def build_model(env: GymEnv) -> Model:
    """Choose how to simulate ahead."""
    if any(base.__name__ == "MujocoEnv" for base in type(env.env.unwrapped).__mro__):  # mujoco may not be installed
        return MujocoModel(env.config.env_id)
    return CopyModel()


def correlated_noise(rng: np.random.Generator, shape_NHA: tuple[int, int, int], correlation: float) -> np.ndarray:
    """Draw noise of unit variance that is correlated along the second axis: (N, H, A)."""
    noise_NHA = rng.standard_normal(shape_NHA)
    for step in range(1, shape_NHA[1]):
        noise_NHA[:, step] = correlation * noise_NHA[:, step - 1] + np.sqrt(1 - correlation**2) * noise_NHA[:, step]
    return noise_NHA


def _flat(space: gym.Space[Any], observation: Any) -> np.ndarray:
    """Flatten an observation to (O,)."""
    return np.asarray(gym.spaces.flatten(space, observation), dtype=np.float64)


def _shifted(plan_HA: np.ndarray) -> np.ndarray:
    """Drop the step that is done and repeat the last one."""
    return np.concatenate([plan_HA[1:], plan_HA[-1:]])


class GymPlanner(Expert):
    """Plan a sequence of actions at every step, execute the first."""

    tasks: ClassVar[tuple[str, ...]] = ("gym:*",)
    strategies: ClassVar[tuple[str, ...]] = tuple(SEARCHES)

    def __init__(self) -> None:
        self._model: Model | None = None
        self._env_id = ""

    def reset(self, env: GymEnv, strategy: str, rng: np.random.Generator, misperception: float) -> None:
        """Forget the plan; at misperception 1 the sign of the reward is mistaken."""
        if self._model is None or self._env_id != env.config.env_id:
            self._model, self._env_id = build_model(env), env.config.env_id
        self._model.look(env)
        first, *_ = self._model.branch().step(
            env.action_spec.clip(np.zeros(env.action_spec.dim)).reshape(self._shape(env))
        )
        self._first_O = _flat(env.env.observation_space, first)
        self._rng = rng
        self._search = SEARCHES[strategy]
        self._reward_scale = 1.0 - 2.0 * misperception
        self._plan_HA = np.zeros((self._search.horizon_steps, env.action_spec.dim))
        self._best_HA = self._plan_HA

    def act(self, env: GymEnv) -> np.ndarray:
        """Return the first action of the improved plan (A,)."""
        search, model = self._search, self._model
        assert model is not None
        model.look(env)
        low_A, high_A = env.action_spec.low_array(), env.action_spec.high_array()
        middle_A, half_A = (low_A + high_A) / 2, (high_A - low_A) / 2
        scale_N11 = np.geomspace(1.0, FINEST_SCALE, search.candidates)[:, None, None]
        shape_NHA = (search.candidates, *self._plan_HA.shape)
        plan_HA, std_HA = self._plan_HA, np.full(self._plan_HA.shape, NOISE_STD)  # both as shares of half the range
        best_HA = self._best_HA
        for _ in range(search.iterations):
            noise_NHA = correlated_noise(self._rng, shape_NHA, NOISE_CORRELATION)
            noise_NHA[0] = 0.0  # the plan itself is always a candidate, and so is the best one so far
            candidates_NHA = np.clip(plan_HA + scale_N11 * std_HA * noise_NHA, -1.0, 1.0)
            candidates_NHA[1] = best_HA
            score_N = np.array([self._score(env, model.branch(), c_HA, middle_A, half_A) for c_HA in candidates_NHA])
            elite_N = np.argsort(-score_N, kind="stable")[: max(int(ELITE_SHARE * search.candidates), 1)]
            plan_HA, best_HA = candidates_NHA[elite_N].mean(0), candidates_NHA[elite_N[0]]
            std_HA = np.maximum(candidates_NHA[elite_N].std(0), LEAST_STD)
        self._plan_HA, self._best_HA = _shifted(plan_HA), _shifted(best_HA)
        return middle_A + half_A * plan_HA[0]

    def _score(self, env: GymEnv, branch: Any, plan_HA: np.ndarray, middle_A: np.ndarray, half_A: np.ndarray) -> float:
        """Sum the rewards of a plan until its end or the end of the episode, less its tie breakers."""
        shape, space = self._shape(env), env.env.observation_space
        total = -EFFORT_COST * float(np.square(plan_HA).mean(1).sum())
        for action_A in middle_A + half_A * plan_HA:
            observation, reward, terminated, _, _ = branch.step(action_A.astype(np.float32).reshape(shape))
            total += self._reward_scale * float(reward)
            if terminated:
                break
            away_O = _flat(space, observation) - self._first_O
            total += HOME_BONUS * float(np.exp(-np.square(away_O).mean()))
        return total

    @staticmethod
    def _shape(env: GymEnv) -> tuple[int, ...]:
        """The shape that the environment wants its actions in."""
        return env.env.action_space.shape or ()
