"""What a policy is: observation and noise in, chunk of actions out; and the error it is trained on."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import draccus
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.data.normalizer import Mode, Normalizer
from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.encoders.base import discover_encoders
from vla_rl.encoders.config import EncoderConfig
from vla_rl.encoders.language import require_words
from vla_rl.encoders.observation import ObservationEncoder
from vla_rl.kernels import Grid, Kernel, KernelConfig
from vla_rl.nets.base import DenoiserNet, NetConfig, discover_nets
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.records import Draw, Generated, PolicySpec, Prefix, Seen, selected
from vla_rl.runtime.errors import UserError
from vla_rl.types import (
    ENVIRONMENT_STATE,
    LATENT,
    POINTS,
    STATE,
    ActionChunk,
    FeatureSpec,
    Observation,
    SpecMismatchError,
)

FAR_OUTSIDE = 20.0  # in the normaliser's units, where the data it was fitted on lie around [-1, 1]
SHARE_OUTSIDE = 0.05


@dataclass(frozen=True)
class PolicyConfig(draccus.ChoiceRegistry):
    """What all policies share.

    net: the denoiser
    encoder: what reads pictures and point clouds, where the observations have any
    observations: names of the features that are read, as observation.state (none: all there are)
    observation_steps: O, history that the policy sees
    chunk_steps: H, actions predicted at once (1: single-step)
    execute_steps: actions of a chunk that run before the next is asked for
    observation_normalizer: min_max, mean_std or quantile
    action_normalizer: min_max, or quantile where a few actions are far from all others
    max_prefix_steps: train with clean prefixes of up to this many actions, for chunking in real time
    relative_actions: predict absolute actions relative to the newest state of the same name (position targets)
    """

    net: NetConfig = field(default_factory=MLPConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    observations: tuple[str, ...] = ()
    observation_steps: int = 2
    chunk_steps: int = 16
    execute_steps: int = 8
    observation_normalizer: Mode = "min_max"
    action_normalizer: Literal["min_max", "quantile"] = "min_max"
    max_prefix_steps: int = 0
    relative_actions: bool = False

    def __post_init__(self) -> None:
        if self.observation_steps < 1 or self.chunk_steps < 1:
            raise ValueError(
                f"observation_steps and chunk_steps want at least 1, got {self.observation_steps}, {self.chunk_steps}"
            )
        if not 1 <= self.execute_steps <= self.chunk_steps:
            raise ValueError(f"execute_steps wants 1 to chunk_steps = {self.chunk_steps}, got {self.execute_steps}")
        if not 0 <= self.max_prefix_steps < self.chunk_steps:
            raise ValueError(
                f"max_prefix_steps wants 0 to chunk_steps - 1 = {self.chunk_steps - 1}, got {self.max_prefix_steps}"
            )

    @property
    def told_jumps(self) -> bool:
        """Whether the net is told how far in noise time its output leads."""
        return False

    def build(self, spec: PolicySpec) -> ChunkPolicy:
        """Build the policy with fresh weights and unfitted normalisers."""
        raise TypeError(f"{type(self).__name__} builds no policy")


def discover_policies() -> None:
    """Import every module of this package, of the nets and encoders, and of plug-ins (entry points of the group ``vla_rl.policies``)."""
    import vla_rl.policies

    discover_nets()
    discover_encoders()
    for module in pkgutil.iter_modules(vla_rl.policies.__path__):
        importlib.import_module(f"vla_rl.policies.{module.name}")
    for plug_in in importlib.metadata.entry_points(group="vla_rl.policies"):
        plug_in.load()


class ChunkPolicy(nn.Module, ABC):
    """A generative policy over chunks of actions. Abstract: ``denoising_error`` and ``generate`` are the heads'."""

    _reference_state_A: Tensor | None

    def __init__(self, config: PolicyConfig, spec: PolicySpec) -> None:
        """Build with fresh weights.

        Raises:
            UserError: ``config.observations`` names a feature that there is none of.
            SpecMismatchError: pictures of a shape that no encoder reads.
        """
        super().__init__()
        self.config = config
        self.instruction: str | None = None
        self.full_spec = self.spec = spec = replace(spec, observation_spec=selected(spec, config.observations))
        self.state_keys = [k for k in (STATE, ENVIRONMENT_STATE) if k in spec.observation_spec]
        state_dim = sum(spec.observation_spec[k].shape[0] for k in self.state_keys)
        self.encoder: ObservationEncoder | None = None
        latent_dim = 0
        if ObservationEncoder.wants(config.encoder, spec.observation_spec):
            self.encoder = ObservationEncoder(config.encoder, spec.observation_spec, config.observation_steps)
            latent_dim = self.encoder.latent_dim
        elif LATENT in spec.observation_spec:
            latent_dim = spec.observation_spec[LATENT].shape[0]
        self.latent_dim = latent_dim
        # rows that the net reads, and numbers of each: the steps, or their tokens, of which the state is one
        self.condition_shape = (config.observation_steps, state_dim + latent_dim)
        self.state_token: nn.Module | None = None
        if self.encoder is not None and self.encoder.tokens:
            width = latent_dim // self.encoder.tokens
            self.condition_shape = (config.observation_steps * (1 + self.encoder.tokens), width)
            self.state_token = nn.Linear(state_dim, width)
        self.condition_dim = self.condition_shape[0] * self.condition_shape[1]
        self.chunk_shape = (config.chunk_steps, spec.action_spec.dim)
        self.observation_normalizer = Normalizer(state_dim)
        # what is relative spreads with the step, so each step of the chunk has a range of its own
        steps = config.chunk_steps if config.relative_actions else 1
        self.action_normalizer = Normalizer(spec.action_spec.dim, steps)
        reference = torch.tensor(self._find_reference()) if config.relative_actions else None
        self.register_buffer("_reference_state_A", reference, persistent=False)
        self.net: DenoiserNet = config.net.build(
            action_dim=spec.action_spec.dim,
            chunk_steps=config.chunk_steps,
            observation_steps=self.condition_shape[0],
            condition_dim=self.condition_shape[1],
            jumps=config.told_jumps,
        )

    @property
    def latent_spec(self) -> PolicySpec:
        """What it reads behind its encoder: latents in the place of pictures and points."""
        if self.encoder is None:
            return self.full_spec
        kept = {k: f for k, f in self.full_spec.observation_spec.items() if k not in self.encoder.spec}
        latent = FeatureSpec((self.encoder.latent_dim,))
        return replace(self.full_spec, observation_spec={**kept, LATENT: latent})

    def see_latents(self) -> None:
        """Freeze the encoder: from now on observations hold its latents in the place of pictures and points.

        Whoever shows them to the policy has to encode them (``vla_rl.inference.perception``). ``full_spec``, which is what is saved,
        stays as it is. Without an encoder nothing changes.
        """
        if self.encoder is not None:
            self.encoder.requires_grad_(False)
        self.spec = self.latent_spec

    def _find_reference(self) -> list[int]:
        """For each action dimension, the index in the state that it is relative to."""
        names, action = self.spec.observation_spec[STATE].names, self.spec.action_spec
        if action.mode != "absolute" or not set(action.names) <= set(names):
            raise UserError(
                f"relative_actions wants absolute actions whose names are among the states' {names}, "
                f"got {action.mode} actions {action.names}"
            )
        return [names.index(name) for name in action.names]

    def fit_normalizers(self, windows: Windows) -> None:
        """Fit the normalisers on all frames and chunks of the training data; actions to [-1, 1]."""
        states_ND = torch.cat([windows.data.columns[k] for k in self.state_keys], dim=-1)
        observation = Normalizer.fit(states_ND[:, None], self.config.observation_normalizer)
        self.observation_normalizer.load_state_dict(observation.state_dict())
        action_BHA = windows.chunks()
        if self._reference_state_A is not None:
            now_BS = windows.data.columns[STATE][windows.frames_W]
            action_BHA = action_BHA - now_BS.index_select(1, self._reference_state_A)[:, None]
        rows_NSA = action_BHA if self.config.relative_actions else action_BHA.flatten(0, 1)[:, None]
        self.action_normalizer.load_state_dict(Normalizer.fit(rows_NSA, self.config.action_normalizer).state_dict())
        if self.encoder is not None and POINTS in self.spec.observation_spec:
            points_N3 = windows.data.columns[POINTS].flatten(0, 1)
            self.encoder.points_normalizer.load_state_dict(Normalizer.fit(points_N3[:, None], "min_max").state_dict())

    def require_normalizer_fits(self, windows: Windows) -> None:
        """Raise UserError if many states of some data lie far outside what the observation normaliser was fitted on."""
        states_ND = torch.cat([windows.data.columns[k] for k in self.state_keys], dim=-1)
        far_N = (self.observation_normalizer.normalize(states_ND).abs() > FAR_OUTSIDE).any(1)
        share = float(far_N.float().mean())
        if share > SHARE_OUTSIDE:
            raise UserError(
                f"the policy's normaliser was fitted on other data: {100 * share:.0f} % of these frames lie more than "
                f"{FAR_OUTSIDE:.0f} times its range away; train a policy on these data, or give the data it was trained on"
            )

    def _reference(self, observation: Observation) -> Tensor | float:
        """What actions are relative to: (B, 1, A), or zero."""
        if self._reference_state_A is None:
            return 0.0
        return observation.state_BOS[:, -1:].index_select(2, self._reference_state_A)

    def normalize_action(self, action_BHA: Float[Tensor, "B H A"], observation: Observation) -> Float[Tensor, "B H A"]:
        """Map actions in the spec's units to what the net sees."""
        return self.action_normalizer.normalize(action_BHA - self._reference(observation))

    def unnormalize_action(
        self, action_BHA: Float[Tensor, "B H A"], observation: Observation
    ) -> Float[Tensor, "B H A"]:
        """Undo ``normalize_action``."""
        return self.action_normalizer.unnormalize(action_BHA) + self._reference(observation)

    def normalize_prefix(self, prefix: Prefix, observation: Observation) -> Prefix:
        """A prefix in the units of the spec as the net sees it."""
        return Prefix(self.normalize_action(prefix.action_BHA, observation), prefix.fixed_B, prefix.known_B)

    def encode(self, observation: Observation, draw: Draw | None = None) -> Seen:
        """Turn an observation into the net's condition: the normalised states and what an encoder makes of the rest, one row per step.

        Args:
            observation: B histories of O steps.
            draw: in training, of crops and latents.

        Raises:
            SpecMismatchError: a camera or cloud is missing, unknown, or of another shape.
        """
        parts = {STATE: observation.state_BOS, ENVIRONMENT_STATE: observation.environment_state_BOS}
        states = torch.cat([parts[k] for k in self.state_keys], dim=-1)  # type: ignore[misc]
        state_BOS = self.observation_normalizer.normalize(states)
        if not self.latent_dim:
            return Seen(state_BOS)
        if observation.latent_BOL is not None:
            return Seen(self._joined(state_BOS, observation.latent_BOL))
        if self.encoder is None:
            raise SpecMismatchError(
                f"the observation lacks {LATENT!r}; the policy expects {self.latent_dim} numbers of it"
            )
        drawn = draw.encoder if draw is not None and self.training else None
        encoded = self.encoder(self.told(observation), drawn, state_BOS)
        return Seen(self._joined(state_BOS, encoded.latent_BOL), encoded.regularizer_B)

    def _joined(self, state_BOS: Tensor, latent_BOL: Tensor) -> Float[Tensor, "B O D"]:
        """State and latent of each step beside one another, or as tokens one after the other."""
        if self.state_token is None or self.encoder is None:
            return torch.cat([state_BOS, latent_BOL], dim=-1)
        token_BOTD = latent_BOL.unflatten(-1, (self.encoder.tokens, -1))
        return torch.cat([self.state_token(state_BOS)[:, :, None], token_BOTD], dim=2).flatten(1, 2)

    def require_offered(self, features: Mapping[str, Any]) -> None:
        """Raise SpecMismatchError unless a feature is offered for each that the encoder reads, in its shape behind the batch."""
        for key, feature in (self.encoder.spec if self.encoder is not None else {}).items():
            if key not in features:
                raise SpecMismatchError(
                    f"the observation lacks {key!r} of shape {feature.shape}, which the policy reads; it has {sorted(features)}"
                )
            if tuple(features[key].shape[1:]) != feature.shape:
                raise SpecMismatchError(
                    f"{key!r} has shape {tuple(features[key].shape[1:])}, the policy expects {feature.shape}"
                )

    @torch.no_grad()
    def read(self, observation: Observation) -> Observation:
        """The observation with latents in the place of what the encoder reads, so that it is read once, however often it is asked about."""
        if self.encoder is None or observation.latent_BOL is not None:
            return observation
        latent_BOL = self.encoder(self.told(observation)).latent_BOL
        return replace(observation, images={}, points_BOP3=None, latent_BOL=latent_BOL)

    def instruct(self, words: str) -> None:
        """Say what is to be done, for observations that do not say it themselves. Policies that read no language do not listen.

        Raises:
            UserError: nothing is said, or words are unknown where there is no sentence encoder.
        """
        if self.encoder is not None and self.encoder.words is not None:
            require_words(words)
            self.encoder.words.learn([words])
        self.instruction = words

    def told(self, observation: Observation) -> Observation:
        """The observation with the instruction, where the policy reads one and the observation has none."""
        if self.encoder is None or self.encoder.words is None or observation.task is not None:
            return observation
        require_words(self.instruction)
        return replace(observation, task=(str(self.instruction),) * observation.batch_size)

    def condition(self, observation: Observation, draw: Draw | None = None) -> Float[Tensor, "B O D"]:
        """What the net is conditioned on; see ``encode``."""
        return self.encode(observation, draw).condition_BOD

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """Draw the random part of ``batch_size`` training samples on the CPU."""
        steps, dim = self.config.chunk_steps, self.spec.action_spec.dim
        noise_BHA = torch.randn(batch_size, steps, dim, generator=generator)
        uniform_B = torch.rand(batch_size, generator=generator)
        length_B1 = torch.randint(0, self.config.max_prefix_steps + 1, (batch_size, 1), generator=generator)
        reads = self.encoder is not None and LATENT not in self.spec.observation_spec
        encoder = self.encoder.draw(batch_size, generator) if reads and self.encoder is not None else None
        return Draw(noise_BHA, uniform_B, torch.arange(steps) < length_B1, encoder)

    def forward(
        self, batch: WindowBatch, draw: Draw, objective: Callable[..., Tensor] | None = None
    ) -> Float[Tensor, "B H"]:
        """Training error of each action step, before masking: its own, or that of (policy, batch, draw) by an objective.

        As ``forward``, so that it goes through DDP.
        """
        return self.error(batch, draw) if objective is None else objective(self, batch=batch, draw=draw)

    def error(self, batch: WindowBatch, draw: Draw) -> Float[Tensor, "B H"]:
        """Mean squared error of the net's target over A, for each action step, and what the encoder adds to each sample's."""
        seen = self.encode(batch.observation, draw)
        error_BH = self.denoising_error(batch, draw, seen.condition_BOD)
        return error_BH if seen.regularizer_B is None else error_BH + seen.regularizer_B[:, None]

    @abstractmethod
    def denoising_error(
        self, batch: WindowBatch, draw: Draw, condition_BOD: Float[Tensor, "B O D"]
    ) -> Float[Tensor, "B H"]:
        """Mean squared error of the net's target over A, for each action step."""

    @abstractmethod
    def grid(self, steps: int = 0) -> Grid:
        """Noise levels of a chain of so many steps (0: the sampler's own).

        Raises:
            UserError: the sampler is no such chain.
        """

    @abstractmethod
    def make_kernel(self, config: KernelConfig) -> Kernel:
        """Build the Gaussian transitions of the sampler's chain.

        Raises:
            UserError: this head has no kernel of that kind.
        """

    @abstractmethod
    def estimates(
        self,
        x_BHA: Float[Tensor, "B H A"],
        output_BHA: Float[Tensor, "B H A"],
        signal_B11: Float[Tensor, "B 1 1"],
        noise_B11: Float[Tensor, "B 1 1"],
    ) -> tuple[Float[Tensor, "B H A"], Float[Tensor, "B H A"]]:
        """What the net's output says of the action and of the noise in x = signal * action + noise * epsilon."""

    @property
    @abstractmethod
    def noise_count(self) -> int:
        """Noise tensors K that one sample takes: the first is where the chain starts, the rest are its steps' noise."""

    @abstractmethod
    def generate(
        self,
        condition_BOD: Float[Tensor, "B O D"],
        noise_KBHA: Float[Tensor, "K B H A"],
        prefix: Prefix | None,
    ) -> Generated:
        """Denoise in normalised units; what a prefix has decided is held at it. One condition may stand for several rows of noise."""

    def clean_features(
        self, condition_COD: Float[Tensor, "C O D"], action_BHA: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B F"]:
        """What the net's last layer reads of a finished chunk (tau = 1), in normalised units; no noise is in it, as in ``generate``'s."""
        ones_1H = torch.ones(1, self.config.chunk_steps, device=action_BHA.device)
        jump_1H = torch.zeros_like(ones_1H) if self.config.told_jumps else None
        return self.net.features(self.net.hidden(action_BHA, ones_1H, condition_COD, jump_1H))

    @torch.no_grad()
    def sample(
        self,
        observation: Observation,
        noise_KBHA: Float[Tensor, "K B H A"],
        prefix: Prefix | None = None,
    ) -> ActionChunk:
        """Return the chunk for each observation: the same noise gives the same actions.

        Args:
            observation: B histories of O steps.
            noise_KBHA: standard normal, K = ``noise_count``.
            prefix: what is already decided, in the units of the action spec.
        """
        inside = None if prefix is None else self.normalize_prefix(prefix, observation)
        action_BHA = self.generate(self.condition(observation), noise_KBHA, inside).action_BHA
        action_BHA = self.unnormalize_action(action_BHA, observation)
        return ActionChunk(action_BHA, self.config.execute_steps, self.spec.action_spec)
