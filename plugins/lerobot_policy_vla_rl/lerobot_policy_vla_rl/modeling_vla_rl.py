"""One of vla-rl's policies behind LeRobot's interface."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_vla_rl.configuration_vla_rl import VlaRlConfig
from lerobot_policy_vla_rl.processor_vla_rl import make_vla_rl_pre_post_processors
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import encode_policy, load_policy
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.types import ACTION, IMAGE_PREFIX, POINTS, STATE, Observation


class VlaRlPolicy(PreTrainedPolicy):
    """Reads observations as LeRobot gives them (pictures in [0, 1]) and gives actions in the units of the data."""

    config_class = VlaRlConfig
    name = "vla_rl"

    def __init__(self, config: VlaRlConfig, dataset_stats: Any = None, dataset_meta: Any = None, **_: Any) -> None:
        """Build the policy: for what it was made for, or for a data set, on which its normalisers are fitted.

        Raises:
            UserError: neither is there.
        """
        super().__init__(config)
        if config.spec:
            self.policy: ChunkPolicy = config.policy().build(PolicySpec.from_dict(json.loads(config.spec)))
        elif dataset_meta is not None:
            self.policy = _fitted(config, Path(dataset_meta.root))
        else:
            raise UserError("a vla_rl policy wants a data set to be made for, or a folder that holds one")
        words = self.policy.encoder.words if self.policy.encoder is not None else None
        if words is not None and config.phrases:
            words.learn(config.phrases)
        self.reset()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any) -> VlaRlPolicy:
        """As LeRobot's, but weights that are missing or unknown are an error."""
        return super().from_pretrained(pretrained_name_or_path, strict=True, **kwargs)

    def get_optim_params(self) -> list[Tensor]:
        """All that learns."""
        return [p for p in self.parameters() if p.requires_grad]

    def reset(self) -> None:
        """Forget the last episodes."""
        self._seen: deque[dict[str, Tensor]] = deque(maxlen=self.config.n_obs_steps)
        self._actions: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Imitation loss over the actions that are no padding."""
        action_BHA = batch[ACTION]
        is_pad_BH = batch.get(f"{ACTION}_is_pad", torch.zeros(action_BHA.shape[:2], dtype=torch.bool)).to(
            action_BHA.device
        )
        observation = self._observation({k: batch[k] for k in self._keys()}, batch.get("task"))
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        draw = self.policy.draw(len(action_BHA), generator).to(action_BHA.device)
        error_BH = self.policy(WindowBatch(observation, action_BHA, is_pad_BH), draw)
        keep_BH = ~is_pad_BH & ~draw.prefix_BH
        loss = (error_BH * keep_BH).sum() / keep_BH.sum().clamp_min(1)
        return loss, {"loss": float(loss.detach())}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """A chunk (B, H, A); moments without a time axis are appended to what was seen before."""
        if batch[STATE].ndim == 2:
            self._see(batch)
            batch = {**{k: torch.stack([s[k] for s in self._seen], 1) for k in self._keys()}, "task": batch.get("task")}
        observation = self._observation({k: batch[k] for k in self._keys()}, batch.get("task"))
        if noise is None:
            shape = self.policy.noise_count, observation.batch_size, *self.policy.chunk_shape
            noise = torch.randn(shape, device=observation.state_BOS.device)
        action_BHA = self.policy.sample(observation, noise).action_BHA
        return self.policy.spec.action_spec.clip_tensor(action_BHA)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action (B, A): a new chunk wherever the last one has run."""
        if self._actions:
            self._see(batch)
        else:
            chunk_BHA = self.predict_action_chunk(batch, **kwargs)
            self._actions.extend(chunk_BHA[:, : self.config.n_action_steps].unbind(1))
        return self._actions.popleft()

    def _keys(self) -> list[str]:
        return list(self.policy.full_spec.observation_spec)

    def _see(self, batch: dict[str, Any]) -> None:
        moment = {k: batch[k] for k in self._keys()}
        missing = self.config.n_obs_steps - len(self._seen)
        self._seen.extend([moment] * max(missing, 1))  # an episode's first moment stands for those before it

    def _observation(self, features: dict[str, Tensor], task: Any) -> Observation:
        """As vla-rl sees it: histories, pictures as bytes, instructions."""
        seen = {}
        for key, value in features.items():
            history = (
                value if value.ndim == 2 + len(self.policy.full_spec.observation_spec[key].shape) else value[:, None]
            )
            seen[key] = (history * 255).round().to(torch.uint8) if key.startswith(IMAGE_PREFIX) else history.float()
        told = tuple(task) if isinstance(task, list | tuple) and all(task) else None
        return Observation.from_features(seen, told)


def _fitted(config: VlaRlConfig, root: Path) -> ChunkPolicy:
    """A policy with fresh weights for a data set on this machine, whose normalisers are fitted on it; the config learns what it is for."""
    data = load_dataset(root)
    policy = config.policy().build(PolicySpec(data.observation_spec, data.action_spec, data.task))
    states = {k for k in policy.full_spec.observation_spec if not k.startswith(IMAGE_PREFIX)}
    policy.fit_normalizers(Windows(data.seen(states | {POINTS}), config.n_obs_steps, config.chunk_size))
    wanted = policy.full_spec.observation_spec
    config.input_features = {k: f for k, f in (config.input_features or {}).items() if k in wanted}
    config.spec = json.dumps(policy.full_spec.to_dict())
    config.kind = json.dumps(encode_policy(policy.config))
    if policy.encoder is not None and policy.encoder.words is not None:
        config.phrases = list(data.tasks)
    return policy


def export_policy(source: Path, out: Path) -> None:
    """Write a policy folder of vla-rl as LeRobot keeps its own: ``config.json``, ``model.safetensors``, processors.

    Args:
        source: policy folder, or the run folder of a training that ended with one.
        out: folder that is not there yet.

    Raises:
        UserError: no policy there, or ``out`` exists.
    """
    from lerobot.configs.types import FeatureType, PolicyFeature

    if out.exists():
        raise UserError(f"{out} exists; choose another --out, or remove it")
    policy = load_policy(source)
    spec = policy.full_spec

    def kind(key: str) -> FeatureType:
        if key.startswith(IMAGE_PREFIX):
            return FeatureType.VISUAL
        return FeatureType.STATE if key == STATE else FeatureType.ENV

    config = VlaRlConfig(
        kind=json.dumps(encode_policy(policy.config)),
        spec=json.dumps(spec.to_dict()),
        input_features={k: PolicyFeature(kind(k), f.shape) for k, f in spec.observation_spec.items()},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (spec.action_spec.dim,))},
        device="cpu",
        push_to_hub=False,
    )
    if policy.encoder is not None and policy.encoder.words is not None:
        config.phrases = list(policy.encoder.words.phrases)
    theirs = VlaRlPolicy(config)
    theirs.policy.load_state_dict(policy.state_dict())
    theirs.save_pretrained(out)
    for pipeline in make_vla_rl_pre_post_processors(config):
        pipeline.save_pretrained(out)
