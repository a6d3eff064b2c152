"""Residual TD3 on a frozen base: one step's critic and actor update (ResFiT, arXiv 2509.19301, section 3).

Differs from the paper: members learn apart; the target is clamped to the returns there can be; time-outs are bootstrapped through; the
target takes the better of {base, base + residual} by a lower confidence bound, as acting does; the actor's loss is normalised by the
size of Q (TD3+BC, 2106.06860), so that one learning rate serves all; a human's corrections are targets of the residual (Res-HIL).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_rl.algos import distributional_critic, ensemble_critic
from vla_rl.algos.guard import GuardedOptimizer, load_optimizer_tensors, optimizer_tensors
from vla_rl.data.steps import StepBatch, StepContext
from vla_rl.nets.step_critics import DistributionalCriticConfig, EnsembleCriticConfig
from vla_rl.policies.residual import ResidualPolicy, lower_bound
from vla_rl.runtime.checkpoints import part

TD_LOSS: dict[type, Callable[..., Tensor]] = {
    EnsembleCriticConfig: ensemble_critic.td_loss,
    DistributionalCriticConfig: distributional_critic.td_loss,
}
IMITATION_RATE = 1e-3  # learning rate of an actor that imitates before it climbs
LAST_IMITATION_RATE = 0.1  # share of it that is left in the end
# what a roll-back takes: names in a state_dict begin with
ACTING = (
    "policy.actor.",
    "policy.ramp",
    "policy.gated",
    "target.actor.",
    "target.ramp",
    "target.gated",
    "actor_optimizer.",
)
SATURATED = 0.95  # a residual beyond it is at the end of its range


@dataclass(frozen=True)
class ResidualTD3Config:
    """Optimisation.

    batch_size: steps per update, demonstrations included
    critic_rate: learning rate of the critic
    actor_rate: learning rate of the actor
    n_steps: rewards that are summed before bootstrapping
    discount: gamma per control step; gamma to the length of a success wants to stay well above zero
    polyak: share of the new weights that the targets take per update
    actor_every: critic updates per actor update
    smoothing: noise on the target's residual, clipped at twice it
    return_lowest: lowest return there can be
    return_highest: highest return there can be
    value_weight: weight of the lead over the base's action in the actor's loss
    penalty: weight of the squared residual in the actor's loss
    correction_weight: weight of a human's corrections in the actor's loss
    imitation_weight: weight of demonstrations in the actor's loss, but where the critic prefers the composed action
    imitation_doubt: standard deviations between the members' differences that this preference has to exceed
    """

    batch_size: int = 256
    critic_rate: float = 3e-4
    actor_rate: float = 1e-4
    n_steps: int = 3
    discount: float = 0.99
    polyak: float = 0.005
    actor_every: int = 2
    smoothing: float = 0.1
    return_lowest: float = 0.0
    return_highest: float = 1.0
    value_weight: float = 1.0
    penalty: float = 0.0
    correction_weight: float = 1.0
    imitation_weight: float = 1.0
    imitation_doubt: float = 0.0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.n_steps, self.actor_every) < 1:
            raise ValueError("batch_size, n_steps and actor_every want at least 1")
        if min(self.critic_rate, self.actor_rate) <= 0 or not (0 < self.discount <= 1 and 0 < self.polyak <= 1):
            raise ValueError("critic_rate and actor_rate want positive numbers, discount and polyak ones in (0, 1]")
        for name in (
            "smoothing",
            "value_weight",
            "penalty",
            "correction_weight",
            "imitation_weight",
            "imitation_doubt",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} wants a number >= 0, got {getattr(self, name)}")
        if not self.return_lowest < self.return_highest:
            raise ValueError(
                f"return_lowest wants to be below return_highest, got {self.return_lowest}, {self.return_highest}"
            )


def correction_loss(
    residual_BA: Float[Tensor, "B A"], wanted_BA: Float[Tensor, "B A"], human_B: Tensor
) -> Float[Tensor, ""]:
    """Squared distance of the residual to what a human did, within its reach, over the steps in which one acted."""
    error_B = (residual_BA - wanted_BA.clamp(-1, 1)).square().mean(1)
    return (error_B * human_B).sum() / human_B.sum().clamp_min(1)


class ResidualTD3:
    """Learns ``policy``; everything it needs to go on is in ``state_dict``."""

    def __init__(self, policy: ResidualPolicy, config: ResidualTD3Config) -> None:
        self.policy = policy
        self.config = config
        self.target = copy.deepcopy(policy).requires_grad_(False)
        self.updates = 0
        adam = torch.optim.AdamW(policy.critic.parameters(), config.critic_rate, weight_decay=0.0, fused=True)
        self.critic_optimizer = GuardedOptimizer(adam, clip_norm=10.0, name="critic")
        adam = torch.optim.AdamW(policy.actor.parameters(), config.actor_rate, weight_decay=0.0, fused=True)
        self.actor_optimizer = GuardedOptimizer(adam, clip_norm=1.0, name="actor")

    def imitate(self, draw: Callable[[], StepBatch], updates: int) -> dict[str, float]:
        """Let the actor imitate demonstrations before it climbs any value: what they did, within its reach, in their own states.

        A base that runs its chunks blindly drifts within them; what would bring it back needs no reward to be learned.
        """
        adam = torch.optim.AdamW(self.policy.actor.parameters(), IMITATION_RATE, weight_decay=0.0, fused=True)
        optimizer = GuardedOptimizer(adam, clip_norm=1.0, name="imitation")
        value = math.nan
        for done in range(updates):
            optimizer.set_learning_rate(IMITATION_RATE * (1 - (1 - LAST_IMITATION_RATE) * done / updates))
            batch = draw()
            raw_BA = self.policy.actor(self.policy.encoder(batch.now)).tanh()
            wanted_BA = self.policy.composition.residual(batch.now.base_BA, batch.action_BA)
            loss = correction_loss(raw_BA, wanted_BA, batch.shown_B)
            optimizer.step(loss)
            value = float(loss.detach())
        self.target.actor.load_state_dict(self.policy.actor.state_dict())
        return {"actor/imitation_loss": value}

    def anchor(self, batch: StepBatch, return_B: Float[Tensor, " B"], generator: torch.Generator) -> dict[str, float]:
        """Regress the critic on realised returns: what the base is worth, before anything is bootstrapped."""
        known = replace(batch, reward_B=return_B, discount_B=torch.zeros_like(return_B))
        return {"critic/anchor_loss": self._update_critic(known, generator)}

    def update(self, batch: StepBatch, generator: torch.Generator, moves_actor: bool = True) -> dict[str, float]:
        """Take a step of the critic, and every few a step of the actor."""
        metrics = {"critic/loss": self._update_critic(batch, generator)}
        self.updates += 1
        if moves_actor and self.updates % self.config.actor_every == 0:
            metrics |= self.update_actor(batch)
        return metrics

    @torch.no_grad()
    def following(self, step: StepContext, generator: torch.Generator) -> Float[Tensor, "C B F"]:
        """What a random subset of the target critic says of what the target policy would execute: the better of {base, composed}."""
        policy, target, config = self.policy, self.target, self.config
        context_BD = policy.encoder(step)
        residual_BA = target.mean(context_BD)
        noise_BA = torch.randn(residual_BA.shape, generator=generator) * config.smoothing
        noise_BA = noise_BA.clamp(-2 * config.smoothing, 2 * config.smoothing)
        action_BA = policy.composition.compose(step.base_BA, (residual_BA + noise_BA).clamp(-1, 1))
        chosen = self._choose(generator)
        if not policy.gated:
            return target.critic.outputs(policy.inputs(step, context_BD, action_BA), chosen)
        composed_CBF, base_CBF = policy.compare(target.critic, step, context_BD, action_BA, chosen)
        return torch.where(policy.prefers(composed_CBF, base_CBF)[:, None], composed_CBF, base_CBF)

    def _choose(self, generator: torch.Generator) -> Int[Tensor, " C"]:
        """Numbers of the members that this batch asks (REDQ)."""
        critic = self.policy.config.critic
        return torch.randperm(critic.members, generator=generator)[: critic.subset]

    def _update_critic(self, batch: StepBatch, generator: torch.Generator) -> float:
        policy, config = self.policy, self.config
        with torch.no_grad():
            x_BD = policy.inputs(batch.now, policy.encoder(batch.now), batch.action_BA)
            following_CBF = self.following(batch.following, generator)
        loss = TD_LOSS[type(policy.config.critic)](
            policy.critic,
            x_BD,
            following_CBF,
            batch.reward_B,
            batch.discount_B,
            (config.return_lowest, config.return_highest),
            generator,
        )
        self.critic_optimizer.step(loss)
        self._follow(policy.critic, self.target.critic)
        return float(loss.detach())

    def update_actor(self, batch: StepBatch) -> dict[str, float]:
        """Climb the lower bound of what the composed action is worth beyond the base's; imitate and follow corrections."""
        policy, config, now = self.policy, self.config, batch.now
        context_BD = policy.encoder(now)
        raw_BA = policy.actor(context_BD).tanh()
        action_BA = policy.composition.act(now.base_BA, raw_BA)
        with _frozen(policy.critic):
            composed_EB = policy.critic(policy.inputs(now, context_BD, action_BA))
        shown = batch.shown_B if config.imitation_weight else torch.zeros_like(batch.shown_B)
        with torch.no_grad():
            base_BD = policy.inputs(now, context_BD, now.base_BA)
            shown_BD = policy.inputs(now, context_BD, batch.action_BA)[shown]
            base_EB, shown_EB = policy.critic(torch.cat([base_BD, shown_BD])).split([len(base_BD), len(shown_BD)], 1)
        lead_B = policy.lead(composed_EB, base_EB)
        slope_BA = torch.autograd.grad(lead_B.sum(), raw_BA)[0]  # of Q's part of the graph, once
        q_B = composed_EB.detach().mean(0)
        # what follows has the gradient of -lead
        loss = -config.value_weight * (slope_BA * raw_BA).sum(1).mean() / q_B.abs().mean().clamp_min(1e-3)
        loss = loss + config.penalty * raw_BA.square().mean()
        wanted_BA = policy.composition.residual(now.base_BA, batch.action_BA)
        if bool(batch.intervened_B.any()):
            loss = loss + config.correction_weight * correction_loss(raw_BA, wanted_BA, batch.intervened_B)
        if bool(shown.any()):
            better_B = shown.clone()
            better_B[shown] = lower_bound(composed_EB[:, shown].detach() - shown_EB, config.imitation_doubt) <= 0
            loss = loss + config.imitation_weight * correction_loss(raw_BA, wanted_BA, better_B)
        self.actor_optimizer.step(loss)
        self._follow(policy.actor, self.target.actor)
        return {
            "actor/q": float(q_B.mean()),
            "actor/lead": float(lead_B.detach().mean()),
            "actor/gate": float((lead_B.detach() >= policy.config.margin).float().mean()),
            "actor/residual": float(raw_BA.detach().abs().mean()),
            "actor/saturation": float((raw_BA.detach().abs() > SATURATED).float().mean()),
            "actor/slope": float(slope_BA.abs().mean()),
        }

    @torch.no_grad()
    def _follow(self, net: torch.nn.Module, target: torch.nn.Module) -> None:
        torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), self.config.polyak)

    def set_actor_rate(self, share: float) -> None:
        """Set the actor's learning rate to a share of its config's."""
        self.actor_optimizer.set_learning_rate(share * self.config.actor_rate)

    def set_ramp(self, ramp: float) -> None:
        """Let the residual act by a share of its reach, in acting and in the target."""
        for policy in (self.policy, self.target):
            policy.ramp.fill_(ramp)

    def set_gated(self, *, gated: bool) -> None:
        """Let the gate choose, in acting and in the target, or compose always."""
        for policy in (self.policy, self.target):
            policy.gated.fill_(gated)

    def settle(self) -> None:
        """Make the targets what the nets are."""
        self.target.load_state_dict(self.policy.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors."""
        state = {f"policy.{k}": v.clone() for k, v in self.policy.state_dict().items()}
        state |= {f"target.{k}": v.clone() for k, v in self.target.state_dict().items()}
        for name, optimizer in self._optimizers():
            state |= {k: v.clone() for k, v in optimizer_tensors(optimizer, name).items()}
        return state | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``."""
        self.policy.load_state_dict(part(state, "policy."))
        self.target.load_state_dict(part(state, "target."))
        for name, optimizer in self._optimizers():
            load_optimizer_tensors(optimizer, state, name)
        self.updates = int(state["updates"])

    def roll_back(self, state: dict[str, Tensor]) -> None:
        """Take the actor from an earlier ``state_dict``, its target, optimiser and gate; the critic keeps what it has seen since."""
        now = {k: v for k, v in self.state_dict().items() if not k.startswith("actor_optimizer.")}
        actors = {k: v for k, v in state.items() if k.startswith(ACTING)}
        self.load_state_dict(now | actors)

    def _optimizers(self) -> list[tuple[str, Any]]:
        return [
            ("critic_optimizer.", self.critic_optimizer.optimizer),
            ("actor_optimizer.", self.actor_optimizer.optimizer),
        ]


class _frozen:  # noqa: N801  (reads as a verb)
    """Leave a net's parameters out of the graph."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net

    def __enter__(self) -> None:
        self.net.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        self.net.requires_grad_(True)
