"""Everything that determines what the residual stage leaves, beside data, base and task."""

from __future__ import annotations

from dataclasses import dataclass, field

from vla_rl.algos.residual_td3 import ResidualTD3Config
from vla_rl.inference.residual_controller import NoiseConfig
from vla_rl.policies.residual import ResidualConfig


@dataclass(frozen=True)
class ResidualSettings:
    """Everything that determines the weights, beside data, base and task.

    env_steps: budget of control steps for learning, warm-up included (evaluations on selection scenes are counted apart)
    seed: of all draws
    base_episodes: warm-up episodes of the base alone
    noise_episodes: warm-up episodes of the base with noise
    order_episodes: episodes of an order: what is collected between two looks at newer weights
    anchor_updates: critic updates on realised returns
    warmup_updates: critic updates by temporal differences before the actor moves
    imitation_updates: of the actor, towards demonstrations, before it learns from roll-outs; it then has its full reach at once
    actor_from: environment steps after the warm-up from which on the actor learns; until then the critic learns what the policy is worth
    updates_per_step: critic updates per environment step after the warm-up
    ramp_steps: environment steps after the warm-up over which the residual's reach grows to its full
    demonstration_share: of a batch, at first (0: demonstrations are imitated before, and do not stand in batches)
    last_demonstration_share: of a batch, in the end
    only_interventions: of the policy's episodes among the demonstrations, those steps alone in which a person acted (HIL-SERL, 2410.21845)
    label_copies: times that each demonstration is labelled with the base's actions, from another place in the chunk each time
    last_noise_share: of the exploring noise that is left in the end
    last_rate_share: of the actor's learning rate that is left in the end
    selection_scenes: on which the best is chosen
    select_every: environment steps between evaluations
    stop_at: success on the selection scenes that ends the stage early
    worse_evidence: e-value of being worse than the best so far at which an evaluation ends in a roll-back, and of the base being worse at
        which a residual takes its place
    residual: nets and limits
    td3: updates
    noise: that explores
    """

    env_steps: int = 60_000
    seed: int = 0
    base_episodes: int = 20
    noise_episodes: int = 20
    order_episodes: int = 8
    anchor_updates: int = 1000
    warmup_updates: int = 1000
    imitation_updates: int = 5000
    actor_from: int = 0
    updates_per_step: float = 1.0
    ramp_steps: int = 5_000
    demonstration_share: float = 0.5
    last_demonstration_share: float = 0.25
    only_interventions: bool = False
    label_copies: int = 4
    last_noise_share: float = 0.5
    last_rate_share: float = 0.1
    selection_scenes: int = 100
    select_every: int = 5_000
    stop_at: float = 1.0
    worse_evidence: float = 10.0
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    td3: ResidualTD3Config = field(default_factory=ResidualTD3Config)
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    def __post_init__(self) -> None:
        counts = ("env_steps", "base_episodes", "order_episodes", "label_copies", "selection_scenes", "select_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} wants at least 1, got {getattr(self, name)}")
        for name in (
            "noise_episodes",
            "anchor_updates",
            "warmup_updates",
            "imitation_updates",
            "actor_from",
            "updates_per_step",
            "ramp_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} wants a number >= 0, got {getattr(self, name)}")
        for name in ("demonstration_share", "last_demonstration_share", "last_noise_share", "last_rate_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} wants a share in [0, 1], got {getattr(self, name)}")
        if not 0 < self.stop_at <= 1 or self.worse_evidence <= 1:
            raise ValueError(
                f"stop_at wants a rate in (0, 1], worse_evidence more than 1, got {self.stop_at}, {self.worse_evidence}"
            )
