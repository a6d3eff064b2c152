"""Off-policy evaluation in a learned model, and the gate that lets a policy update pass or not.

RL-100 (arXiv 2510.14830) accepts an update when its estimate in the model exceeds the old one's by 5 %. Here the gate is a statistical
test: the same start states and the same noise for both policies (common random numbers), the difference bootstrapped over models and
starts, and a threshold in units of that difference's standard error, whatever the size of the values. Terminal states end a roll-out.
An estimate is only asked where it knows something: an update that explains held-out episodes much worse has left the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.algos.critic import Critic, executed_actions
from vla_rl.algos.dynamics import DynamicsEnsemble
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.seeding import torch_generator
from vla_rl.types import Observation

Estimate = Literal["return", "am_q", "fqe", "likelihood"]
BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True)
class GateConfig:
    """The estimate and the test.

    estimate: return (model's rewards, and the critic's value after the horizon), am_q (mean Q of the states visited, as RL-100),
        fqe (fitted Q evaluation), or likelihood (of what turned out well in held-out episodes)
    starts: start states, the same for all comparisons
    threshold: standard errors that the lower bound of the difference has to exceed
    confidence: one-sided, of that bound; nominal, since few models are too few to tell how much models differ (of updates that change
        nothing but are judged differently by each of five models, 11 % pass at 95 %), and of one look
    disagreement_penalty: value taken off per unit of the models' disagreement on the next state
    smallest_coverage: share of the data's successes that have to be as short as the models may be trusted for
    largest_departure: share by which the denoising error on held-out episodes may grow in one update
    """

    estimate: Estimate = "return"
    starts: int = 256
    threshold: float = 0.0
    confidence: float = 0.95
    disagreement_penalty: float = 0.0
    smallest_coverage: float = 0.1
    largest_departure: float = 0.1

    def __post_init__(self) -> None:
        if self.starts < 2 or self.disagreement_penalty < 0:
            raise ValueError(
                f"starts wants at least 2, disagreement_penalty a number >= 0, got {self.starts}, {self.disagreement_penalty}"
            )
        if self.threshold < 0:
            raise ValueError(f"threshold wants a number >= 0, got {self.threshold}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence wants a number in [0.5, 1), got {self.confidence}")
        if not 0 <= self.smallest_coverage <= 1:
            raise ValueError(f"smallest_coverage wants a share, got {self.smallest_coverage}")
        if self.largest_departure < 0:
            raise ValueError(f"largest_departure wants a number >= 0, got {self.largest_departure}")


@dataclass(frozen=True)
class Accepted:
    """The candidate passes: estimated gain and its lower bound."""

    estimate: float
    bound: float


@dataclass(frozen=True)
class Rejected:
    """The candidate does not pass, and why; undecided: it seems to be better, and more of the same may show whether it is."""

    reason: str
    estimate: float
    bound: float
    undecided: bool = False


Decision = Accepted | Rejected


def gate(
    candidate_EN: Float[Tensor, "E N"],
    base_EN: Float[Tensor, "E N"],
    config: GateConfig,
    rng: np.random.Generator,
    departure: float = 0.0,
) -> Decision:
    """Accept a candidate whose gain over the base is real, and which has not left the data.

    Args:
        candidate_EN: estimate for each model and start; base_EN: of the same, with the same noise.
        base_EN: see candidate_EN.
        config: the test.
        rng: of the bootstrap.
        departure: share by which the candidate's denoising error on held-out episodes is larger than the base's.
    """
    gain_EN = (candidate_EN - base_EN).double().numpy()
    estimate = float(gain_EN.mean())
    if not np.isfinite(gain_EN).all():
        return Rejected("the estimate is not finite", 0.0, 0.0)
    members, starts = gain_EN.shape
    drawn_M = rng.integers(0, members, (BOOTSTRAP_DRAWS, members))
    drawn_N = rng.integers(0, starts, (BOOTSTRAP_DRAWS, starts))
    means = np.array([gain_EN[m][:, n].mean() for m, n in zip(drawn_M, drawn_N, strict=True)])
    bound, error = float(np.quantile(means, 1 - config.confidence)), float(means.std())
    if not departure <= config.largest_departure:
        text = f"it explains held-out episodes {100 * departure:.0f} % worse, allowed are {100 * config.largest_departure:.0f} %"
        return Rejected(text, estimate, bound)
    if bound > config.threshold * error:
        return Accepted(estimate, bound)
    if estimate <= 0:
        return Rejected("the estimate does not rise", estimate, bound)
    return Rejected(f"the rise is within the noise (standard error {error:.2g})", estimate, bound, undecided=True)


def as_record(decision: Decision, **more: Any) -> Mapping[str, Any]:
    """A decision as a line of ``gate.jsonl``."""
    return {"accepted": isinstance(decision, Accepted), **asdict(decision), **more}


class ModelEvaluator:
    """Estimates what a policy is worth from fixed starts, with fixed noise, in each model of an ensemble."""

    def __init__(
        self,
        model: DynamicsEnsemble,
        critic: Critic,
        starts: Observation,
        horizon: int,
        discount: float,
        reward_range: tuple[float, float],
        config: GateConfig,
        seed: int,
    ) -> None:
        """Fix what is common to all comparisons.

        Args:
            model: the ensemble.
            critic: gives Q, and the value after the horizon.
            starts: N start states.
            horizon: decisions to roll out.
            discount: gamma of a decision, that is gamma per control step to the power of its steps.
            reward_range: of decisions in the data; what the model says is held within.
            config: which estimate.
            seed: of the noise.
        """
        self.model, self.critic, self.config = model, critic, config
        self.horizon, self.discount, self.reward_range = horizon, discount, reward_range
        self.seed = seed
        self._start_BD = model.encoder.encode(starts)

    @torch.no_grad()
    def evaluate(self, policy: ChunkPolicy) -> Float[Tensor, "E N"]:
        """Estimate for each model and start.

        One model rolls out all starts with its own beliefs; a row's noise depends on its start and decision, not on the model
        or the policy.
        """
        members, starts = self.model.config.members, len(self._start_BD)
        generator = torch_generator(self.seed, "ope")
        state_EBD = self._start_BD.expand(members, -1, -1)
        alive_EB = torch.ones(members, starts)
        return_EB, q_EB, visited_EB = torch.zeros(3, members, starts)
        low, high = self.reward_range
        for t in range(self.horizon):
            noise_KBHA = torch.randn(policy.noise_count, starts, *policy.chunk_shape, generator=generator)
            shock_BD = torch.randn(starts, self._start_BD.shape[1], generator=generator)
            observation = self.model.encoder.decode(state_EBD.flatten(0, 1))
            action_BHA = executed_actions(policy, observation, noise_KBHA.repeat(1, members, 1, 1))
            q_EB += alive_EB * self.critic.q_values(observation, action_BHA).min(0).values.view(members, starts)
            visited_EB += alive_EB
            action_EBD = self.model.encoder.encode_action(action_BHA).view(members, starts, -1)
            found = self.model.predict(state_EBD, action_EBD)
            reward_EB = found.reward_EB.clamp(low, high)
            spread_B = found.mean_EBD.std(0, correction=0).mean(-1)
            reward_EB = reward_EB - self.config.disagreement_penalty * spread_B
            return_EB += self.discount**t * alive_EB * reward_EB
            alive_EB = alive_EB * (1 - torch.sigmoid(found.end_logit_EB))
            state_EBD = found.mean_EBD + found.std_EBD * shock_BD
        if self.config.estimate == "am_q":
            return q_EB / visited_EB.clamp_min(1e-6)
        last_EB = self.critic.value(self.model.encoder.decode(state_EBD.flatten(0, 1))).view(members, starts)
        return return_EB + self.discount**self.horizon * alive_EB * last_EB
