"""A vla-rl policy as LeRobot configures it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import LRSchedulerConfig

from vla_rl.policies.base import PolicyConfig, discover_policies
from vla_rl.runtime.config import decode, load_named, read_yaml
from vla_rl.runtime.errors import UserError


@PreTrainedConfig.register_subclass("vla_rl")
@dataclass
class VlaRlConfig(PreTrainedConfig):
    """Which of vla-rl's policies, and what it was made for.

    kind: name of a policy in configs/policy, a .yaml file with one, or, as it is saved, one written out as JSON
    n_obs_steps: as the policy says
    chunk_size: as the policy says
    n_action_steps: as the policy says
    spec: observations, actions and task that the policy was made for, as JSON (empty: as the data set's)
    phrases: instructions that it has met
    learning_rate: of AdamW, where LeRobot trains
    normalization_mapping: none of LeRobot's: normalisers are the policy's own
    """

    kind: str = "flow_mlp"
    n_obs_steps: int = 0
    chunk_size: int = 0
    n_action_steps: int = 0
    spec: str = ""
    phrases: list[str] = field(default_factory=list)
    learning_rate: float = 3e-4
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("STATE", "VISUAL", "ENV", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        policy = self.policy()
        told = {
            "n_obs_steps": policy.observation_steps,
            "chunk_size": policy.chunk_steps,
            "n_action_steps": policy.execute_steps,
        }
        for name, value in told.items():
            given = getattr(self, name)
            if given not in (0, value):
                raise ValueError(f"{name} of the policy {self.kind!r} is {value}, got {given}; leave it out")
            setattr(self, name, value)

    def policy(self) -> PolicyConfig:
        """The policy's own config."""
        discover_policies()
        raw: dict[str, Any]
        if self.kind.lstrip().startswith("{"):
            raw = json.loads(self.kind)
        elif self.kind.endswith((".yaml", ".yml")):
            raw = read_yaml(Path(self.kind))
        else:
            raw = load_named("policy", self.kind)
        return decode(PolicyConfig, raw)

    @property
    def observation_delta_indices(self) -> list[int]:
        """Steps of the history."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """Steps of the chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards are read."""

    def get_optimizer_preset(self) -> AdamWConfig:
        """As ``vla-rl pretrain``."""
        return AdamWConfig(lr=self.learning_rate, betas=(0.95, 0.999), weight_decay=1e-4, grad_clip_norm=1.0)

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        """None: LeRobot's budget is not known here."""
        return None

    def validate_features(self) -> None:
        """Raise UserError unless there is a state to read and an action to give."""
        if self.robot_state_feature is None or self.action_feature is None:
            there = {**(self.input_features or {}), **(self.output_features or {})}
            raise UserError(f"a vla_rl policy wants observation.state and action, got {sorted(there)}")
