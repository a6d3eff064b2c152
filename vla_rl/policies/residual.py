"""A per-step residual on a frozen base: what it reads, what it may change, and when it may.

ResFiT (arXiv 2509.19301): executed = clip(base + scale * half range * residual). Differs: actor and critic see the base's action and its
place in the chunk, without which the next base action would be hidden from them; scale is per dimension; a gripper is switched rather than
nudged; of {base, base + residual} runs the one whose value has the better lower confidence bound (IBRL 2311.02198, EXPO 2507.07986).
``kind: full`` replaces the base's action instead of adding to it: RLPD (2302.02948) without a base, IBRL beside one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import StepContext
from vla_rl.nets.step_critics import EnsembleCriticConfig, StepCritic, StepCriticConfig
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec

GRIPPER = "gripper"
BEYOND = 0.01  # of half the range, that an action may be away from the nearest one within reach
SWITCH = 0.5  # a residual beyond it switches a discrete gripper


@dataclass(frozen=True)
class ResidualConfig:
    """Nets and limits of a residual.

    kind: residual is added to the base's action, full is an action of its own
    scale: largest residual, as a share of half the action's range
    scales: the same for single dimensions, by name
    gripper: discrete residuals switch it, scaled ones are added like all others, frozen leaves it to the base
    width: hidden units of each layer
    depth: hidden layers
    critic: the value of a step's action
    gate: compose only where the lower bound of the lead reaches the margin; a residual that succeeds more often without it goes without
    pessimism: standard deviations between the members' differences that the bound lies below their mean; for the gate and the actor
    margin: how much the composed action's lead has to be
    """

    kind: Literal["residual", "full"] = "residual"
    scale: float = 0.2
    scales: Mapping[str, float] = field(default_factory=dict)
    gripper: Literal["discrete", "scaled", "frozen"] = "discrete"
    width: int = 256
    depth: int = 2
    critic: StepCriticConfig = field(default_factory=EnsembleCriticConfig)
    gate: bool = True
    pessimism: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 2 or not all(0 <= s <= 2 for s in self.scales.values()):
            raise ValueError(
                f"scale wants a number in (0, 2], scales ones in [0, 2], got {self.scale} and {dict(self.scales)}"
            )
        if min(self.width, self.depth) < 1 or self.pessimism < 0 or self.margin < 0:
            raise ValueError("width and depth want at least 1, pessimism and margin numbers >= 0")


def lower_bound(difference_EB: Float[Tensor, "E B"], deviations: float) -> Float[Tensor, " B"]:
    """Mean of the members' differences, less so many standard deviations between them."""
    return difference_EB.mean(0) - deviations * difference_EB.std(0, correction=0)


class Composition:
    """Maps residuals in [-1, 1] to executed actions, and back."""

    def __init__(self, config: ResidualConfig, spec: ActionSpec) -> None:
        """Set up; raises UserError where ``scales`` names a dimension that the actions lack."""
        unknown = set(config.scales) - set(spec.names)
        if unknown:
            raise UserError(f"scales wants names among {', '.join(spec.names)}, got {', '.join(sorted(unknown))}")
        low_A, high_A = torch.from_numpy(spec.low_array()), torch.from_numpy(spec.high_array())
        full = config.kind == "full"
        share = [1.0 if full else config.scales.get(name, config.scale) for name in spec.names]
        self.spec = spec
        self.switched_A = torch.tensor([n == GRIPPER and config.gripper == "discrete" and not full for n in spec.names])
        frozen_A = torch.tensor([n == GRIPPER and config.gripper == "frozen" and not full for n in spec.names])
        self.limit_A = (high_A - low_A) / 2
        scale_A = torch.where(self.switched_A, self.limit_A, self.limit_A * torch.tensor(share))
        self.scale_A = scale_A.masked_fill(frozen_A, 0.0)
        self.center_A = (high_A + low_A) / 2
        self.full = full

    def compose(self, base_BA: Float[Tensor, "B A"], residual_BA: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        """Return what is executed, within the action's limits; a residual of zero leaves the base's action as it is."""
        anchor_BA = self.center_A.expand_as(base_BA) if self.full else base_BA
        moved_BA = anchor_BA + self.scale_A * residual_BA
        if bool(self.switched_A.any()):
            side_BA = self.center_A + self.limit_A * residual_BA.sign()
            switches_BA = (residual_BA.abs() > SWITCH) & (residual_BA.sign() != (base_BA - self.center_A).sign())
            moved_BA = torch.where(self.switched_A, torch.where(switches_BA, side_BA, base_BA), moved_BA)
        return self.spec.clip_tensor(moved_BA)

    def disturb(self, base_BA: Float[Tensor, "B A"], noise_BA: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        """The base's action with noise in the residual's units; around the base where the residual is an action of its own, too."""
        if self.full:
            return self.spec.clip_tensor(base_BA + self.scale_A * noise_BA)
        return self.compose(base_BA, noise_BA)

    def residual(self, base_BA: Float[Tensor, "B A"], action_BA: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        """Return the residual that was executed; beyond [-1, 1] where an action lies out of the composition's reach.

        A discrete gripper's is -1, 0 or 1: what it was switched to, or that it was not.
        """
        anchor_BA = self.center_A.expand_as(base_BA) if self.full else base_BA
        moved_BA = torch.where(self.scale_A > 0, (action_BA - anchor_BA) / self.scale_A.clamp_min(1e-12), 0.0)
        side_BA = (action_BA - self.center_A).sign()
        switched_BA = torch.where(side_BA != (base_BA - self.center_A).sign(), side_BA, 0.0)
        return torch.where(self.switched_A, switched_BA, moved_BA)

    def beyond(self, base_BA: Float[Tensor, "B A"], action_BA: Float[Tensor, "B A"]) -> Bool[Tensor, " B"]:
        """Where an action lies out of the composition's reach: no residual can make it of the base's."""
        nearest_BA = self.compose(base_BA, self.residual(base_BA, action_BA).clamp(-1, 1))
        off_BA = (nearest_BA - action_BA).abs() > BEYOND * self.limit_A
        return (off_BA & ~self.switched_A).any(1)

    def act(self, base_BA: Float[Tensor, "B A"], residual_BA: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        """``compose``, with a gradient that goes straight through limits and switches."""
        anchor_BA = self.center_A.expand_as(base_BA) if self.full else base_BA
        free_BA = anchor_BA + self.scale_A * residual_BA
        return free_BA + (self.compose(base_BA, residual_BA) - free_BA).detach()


class ResidualActor(nn.Module):
    """Context -> residual in (-1, 1); zero before the first step, so that the composed policy begins as the base."""

    def __init__(self, context_dim: int, action_dim: int, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in [context_dim] + [width] * (depth - 1):
            layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.SiLU()]
        last = nn.Linear(width, action_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)

    def forward(self, context_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B A"]:
        """Return the residual before it is squashed by tanh."""
        return self.net(context_BD)


@dataclass(frozen=True)
class Choice:
    """What a residual policy does in a step.

    action_BA: executed, in the units of the action spec
    residual_BA: of the composed action as it was drawn, before limits, switches and the gate
    composed_B: where the composed action runs rather than the base's
    intervened_B: where a human's action runs instead (None: nobody watches)
    """

    action_BA: Float[Tensor, "B A"]
    residual_BA: Float[Tensor, "B A"]
    composed_B: Bool[Tensor, " B"]
    intervened_B: Bool[Tensor, " B"] | None = None

    def rows(self, rows: list[int]) -> Choice:
        """Some rows of it."""
        human_B = None if self.intervened_B is None else self.intervened_B[rows]
        return Choice(self.action_BA[rows], self.residual_BA[rows], self.composed_B[rows], human_B)


class ResidualPolicy(nn.Module):
    """Encoder, actor and critic of a residual; everything that acting needs."""

    ramp: Tensor
    gated: Tensor

    def __init__(self, config: ResidualConfig, encoder: StepEncoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.composition = Composition(config, encoder.action_spec)
        dim = encoder.action_spec.dim
        self.actor = ResidualActor(encoder.context_dim, dim, config.width, config.depth)
        self.critic: StepCritic = config.critic.build(encoder.context_dim + dim)
        self.register_buffer("ramp", torch.ones(()))  # share of the residual that may act yet
        self.register_buffer("gated", torch.tensor(config.gate))  # a residual that has proved itself may go without

    def mean(self, context_BD: Tensor) -> Float[Tensor, "B A"]:
        """The actor's residual, held back by the ramp."""
        return self.actor(context_BD).tanh() * self.ramp

    def inputs(self, step: StepContext, context_BD: Tensor, action_BA: Tensor) -> Float[Tensor, "B D"]:
        """What the critic reads: the action that is executed, in the units in which the base's action stands in the context.

        Not the residual: how the base's own actions vary, and demonstrations, tell what an action is worth long before residuals do.
        """
        return torch.cat([context_BD, self.encoder.scaled(action_BA, step)], dim=1)

    def lead(self, composed_EB: Float[Tensor, "E B"], base_EB: Float[Tensor, "E B"]) -> Float[Tensor, " B"]:
        """Lower confidence bound of what a composed action is worth beyond the base's, by the members' own differences.

        What members disagree on in both alike says nothing of which is better.
        """
        return lower_bound(composed_EB - base_EB, self.config.pessimism)

    def compare(
        self,
        critic: StepCritic,
        step: StepContext,
        context_BD: Tensor,
        action_BA: Tensor,
        chosen: Int[Tensor, " C"] | None = None,
    ) -> tuple[Float[Tensor, "E B F"], Float[Tensor, "E B F"]]:
        """What a critic says of the composed action and of the base's; in one pass."""
        both = torch.cat([self.inputs(step, context_BD, a_BA) for a_BA in (action_BA, step.base_BA)])
        composed_EBF, base_EBF = critic.outputs(both, chosen).chunk(2, dim=1)
        return composed_EBF, base_EBF

    def prefers(self, composed_EBF: Float[Tensor, "E B F"], base_EBF: Float[Tensor, "E B F"]) -> Bool[Tensor, " B"]:
        """Where the composed action's lead reaches the margin."""
        return self.lead(composed_EBF[..., 0], base_EBF[..., 0]) >= self.config.margin

    @torch.no_grad()
    def decide(self, step: StepContext, noise_BA: Tensor | None = None) -> Choice:
        """Compose, and choose between base and composed action where the gate is on.

        Args:
            step: what is seen.
            noise_BA: added to the residual, to explore.
        """
        context_BD = self.encoder(step)
        residual_BA = self.mean(context_BD)
        if noise_BA is not None:
            residual_BA = residual_BA + noise_BA
        action_BA = self.composition.compose(step.base_BA, residual_BA.clamp(-1, 1))
        composed_B = torch.ones(len(action_BA), dtype=torch.bool)
        if self.gated:
            composed_B = self.prefers(*self.compare(self.critic, step, context_BD, action_BA))
            action_BA = torch.where(composed_B[:, None], action_BA, step.base_BA)
        return Choice(action_BA, residual_BA, composed_B)
