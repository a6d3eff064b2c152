"""An ensemble of models of what a decision does: next state, reward, and whether the task ends.

RL-100 (arXiv 2510.14830) rolls policies out in such a model to judge them. Differs from its code: members have seeds and bootstrap
samples of their own, so that their disagreement means something; reward and end of the task are learned; how far the model may be
trusted is measured on held-out episodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_rl.algos.guard import GuardedOptimizer
from vla_rl.data.decisions import Decisions
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.nets.ensemble import EnsembleMLP
from vla_rl.runtime.seeding import initial_weights
from vla_rl.types import ACTION

LOG_STD_RANGE = (-7.0, 1.0)


@dataclass(frozen=True)
class DynamicsConfig:
    """Nets and optimisation.

    steps: gradient steps
    batch_size: decisions per step and member
    learning_rate: of Adam
    width: hidden units of each layer
    depth: hidden layers
    members: models
    largest_error: share of a state's variance that an open-loop prediction may miss before the horizon ends
    largest_horizon: decisions
    """

    steps: int = 2500
    batch_size: int = 256
    learning_rate: float = 5e-4
    width: int = 256
    depth: int = 3
    members: int = 5
    largest_error: float = 0.3
    largest_horizon: int = 50

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.width, self.depth, self.largest_horizon) < 1 or self.members < 2:
            raise ValueError("steps, batch_size, width, depth and largest_horizon want at least 1, members at least 2")
        if not (self.learning_rate > 0 and 0 < self.largest_error <= 1):
            raise ValueError(
                f"learning_rate wants a positive number, largest_error one in (0, 1], got {self.learning_rate}, {self.largest_error}"
            )


@dataclass(frozen=True)
class Prediction:
    """What each member expects of a decision; states are encoded, rewards discounted inside the decision."""

    mean_EBD: Float[Tensor, "E B D"]
    std_EBD: Float[Tensor, "E B D"]
    reward_EB: Float[Tensor, "E B"]
    end_logit_EB: Float[Tensor, "E B"]


class DynamicsEnsemble(nn.Module):
    """Predicts in the space of a ``StateEncoder``; one gradient step of all members per ``update``.

    Reward and end have a net of their own that also sees the next state: in one with the next state they are not learned at all, since
    its likelihood outweighs them. The reward is predicted for each outcome apart, as a departure from what the data have there: where
    all decisions that go on earn nothing, the models cannot promise anything for them either, and no policy can be drawn to it.
    """

    reward_mean_2: Tensor
    reward_std_2: Tensor

    def __init__(self, encoder: StateEncoder, config: DynamicsConfig, generator: torch.Generator) -> None:
        """Set up with fresh nets.

        Args:
            encoder: normalisers fitted on the data.
            config: nets and optimisation.
            generator: of the initial weights.
        """
        super().__init__()
        self.config = config
        self.encoder = encoder
        widths = (config.width,) * config.depth
        with initial_weights(generator):
            inputs = encoder.state_dim + encoder.action_dim
            self.net = EnsembleMLP(config.members, inputs, widths, 2 * encoder.state_dim)
            self.outcome = EnsembleMLP(config.members, inputs + encoder.state_dim, widths, 3)
        # of the decisions that go on, and of those that end the task
        self.register_buffer("reward_mean_2", torch.zeros(2))
        self.register_buffer("reward_std_2", torch.ones(2))
        adam, other = (
            torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=1e-4)
            for net in (self.net, self.outcome)
        )
        self.optimizer = GuardedOptimizer(adam, clip_norm=10.0, name="dynamics")
        self.outcome_optimizer = GuardedOptimizer(other, clip_norm=10.0, name="reward and end")

    def predict(self, state: Tensor, action: Tensor) -> Prediction:
        """Predict from encoded states and actions, (B, D) or (E, B, D); the reward is the expected one."""
        mean, std = self.move(state, action)
        reward_EB2, end_EB = self._judge(state, action, mean)
        chance_EB = torch.sigmoid(end_EB)
        return Prediction(mean, std, (1 - chance_EB) * reward_EB2[..., 0] + chance_EB * reward_EB2[..., 1], end_EB)

    def fit_rewards(self, decisions: Decisions) -> None:
        """Learn what decisions that go on, and decisions that end the task, earn in the data: mean and spread."""
        reward_W, ended_W = decisions.outcomes
        for outcome, mine_W in enumerate((~ended_W, ended_W)):
            some = reward_W[mine_W] if mine_W.any() else reward_W.new_zeros(1)
            self.reward_mean_2[outcome] = some.mean()
            self.reward_std_2[outcome] = some.std(correction=0)

    def move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the next state alone: (E, B, D) each."""
        change, log_std = self.net(torch.cat([state, action], dim=-1)).chunk(2, dim=-1)
        low, high = LOG_STD_RANGE
        return state + change, (low + (high - low) * torch.sigmoid(log_std)).exp()

    def _judge(self, state: Tensor, action: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Reward if the task goes on and if it ends, (E, B, 2), and logit of the end, (E, B), of a step from one state to another."""
        members = len(following)
        state, action = (x.expand(members, *x.shape) if x.ndim == 2 else x for x in (state, action))
        outcome = self.outcome(torch.cat([state, action, following], dim=-1))
        return self.reward_mean_2 + self.reward_std_2 * outcome[..., 1:], outcome[..., 0]

    def update(self, decisions: Decisions, index_EB: Tensor) -> dict[str, float]:
        """Gaussian likelihood of the next state, squared error of the reward, cross entropy of the end.

        Args:
            decisions: the data.
            index_EB: the decisions of each member's batch.
        """
        batch = decisions.batch(index_EB.flatten())
        shape = index_EB.shape

        def rows(x: Tensor) -> Tensor:
            return x.view(*shape, *x.shape[1:])

        state_EBD, next_EBD = (rows(self.encoder.encode(o)) for o in (batch.observation, batch.next_observation))
        action_EBD = rows(self.encoder.encode_action(batch.action_BHA))
        mean_EBD, std_EBD = self.move(state_EBD, action_EBD)
        z = (next_EBD - mean_EBD) / std_EBD
        likelihood = (0.5 * z.square() + std_EBD.log() + 0.5 * math.log(2 * math.pi)).mean()
        norm = self.optimizer.step(likelihood)
        reward_EB2, end_EB = self._judge(state_EBD, action_EBD, next_EBD)
        ended_EB = rows(batch.terminated_B)
        reward_EB = torch.where(ended_EB, reward_EB2[..., 1], reward_EB2[..., 0])
        reward = (reward_EB - rows(batch.reward_B)).square().mean()
        end = torch.nn.functional.binary_cross_entropy_with_logits(end_EB, ended_EB.to(end_EB.dtype))
        self.outcome_optimizer.step(reward + end)
        return {
            "dynamics/negative_log_likelihood": likelihood.item(),
            "dynamics/reward_error": reward.item(),
            "dynamics/end_cross_entropy": end.item(),
            "dynamics/gradient_norm": norm,
        }


def bootstrap_rows(count: int, members: int, generator: torch.Generator) -> Tensor:
    """A bootstrap sample of the decisions for each member: (E, count)."""
    return torch.randint(0, count, (members, count), generator=generator)


@torch.no_grad()
def error_curve(
    model: DynamicsEnsemble, held_out: Decisions, horizon: int, samples: int, generator: torch.Generator
) -> Tensor:
    """Share of the states' variance that open-loop predictions miss after 1, 2, ... decisions on recorded actions: (horizon,).

    A start counts as long as its episode lasts; where fewer than two are left, the curve ends.
    """
    steps, frames_W, columns = held_out.steps, held_out.frames_W, held_out.data.columns
    everything = model.encoder.encode(held_out.observe(frames_W, held_out.episode_W))
    variance = everything.var(0, correction=0).mean().clamp_min(1e-8)
    chosen = torch.randint(0, len(held_out), (samples,), generator=generator)
    frame_B, episode_B = frames_W[chosen], held_out.episode_W[chosen]
    stop_B = held_out.data.episode_to_E[episode_B]
    state = model.encoder.encode(held_out.observe(frame_B, episode_B)).expand(model.config.members, -1, -1)
    curve = []
    for h in range(1, horizon + 1):
        wanted_BH = torch.minimum(frame_B[:, None] + (h - 1) * steps + torch.arange(steps), stop_B[:, None] - 1)
        action_BD = model.encoder.encode_action(columns[ACTION][wanted_BH])
        state, _ = model.move(state, action_BD.expand(model.config.members, -1, -1))
        lasts_B = frame_B + h * steps <= stop_B
        if int(lasts_B.sum()) < 2:
            break
        truth_BD = model.encoder.encode(held_out.observe((frame_B + h * steps)[lasts_B], episode_B[lasts_B]))
        curve.append(float((state[:, lasts_B] - truth_BD).square().mean() / variance))
    return torch.tensor(curve)


def trusted_horizon(curve: Float[Tensor, " H"], largest_error: float) -> int:
    """Decisions up to which the error stays within bounds; at least 1."""
    good: Bool[Tensor, " H"] = curve <= largest_error
    return max(int(good.long().cumprod(0).sum()), 1)
