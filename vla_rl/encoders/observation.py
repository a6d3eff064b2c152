"""From pictures, point clouds and the instruction of an observation to one latent vector per step: all that nets, critics, selectors read.

An encoder runs once per observation. Stages that freeze it keep its latents (``observation.latent``) in the place of the pictures, so
that likelihood ratios stay one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.data.normalizer import Normalizer
from vla_rl.encoders.augment import DRAWS, augment, centre_crop, to_float
from vla_rl.encoders.config import EncoderConfig
from vla_rl.encoders.language import SENTENCE_DIM, Words
from vla_rl.encoders.point_net import PointNet
from vla_rl.encoders.pool import Flatten, Keypoints
from vla_rl.encoders.regularizers import Regularizer
from vla_rl.encoders.resampler import Resampler
from vla_rl.types import IMAGE_PREFIX, POINTS, STATE, Observation, ObservationSpec, SpecMismatchError

SHARED = "shared"  # name of the net that all cameras have in common


@dataclass(frozen=True)
class EncoderDraw:
    """The random part of encoding training samples.

    uniform_BU: in [0, 1); of crops, shifts and light
    normal_BOL: of the bottleneck
    points_BP: places of the points that are read of each cloud
    words_B384: of the instruction
    """

    uniform_BU: Float[Tensor, "B U"]
    normal_BOL: Float[Tensor, "B O L"] | None = None
    points_BP: Tensor | None = None
    words_B384: Float[Tensor, "B 384"] | None = None

    def rows(self, index: Tensor | slice) -> EncoderDraw:
        """Some rows of the draw."""
        return EncoderDraw(*(None if x is None else x[index] for x in self._parts()))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> EncoderDraw:
        """The draw on another device."""
        return EncoderDraw(*(None if x is None else x.to(device) for x in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.uniform_BU, self.normal_BOL, self.points_BP, self.words_B384


@dataclass(frozen=True)
class Encoded:
    """Latents, and what training adds to the loss of each sample (None: nothing)."""

    latent_BOL: Float[Tensor, "B O L"]
    regularizer_B: Float[Tensor, " B"] | None = None


@functools.cache
def has_bf16(device: str) -> bool:
    """Whether bfloat16 is worth it: on GPUs, and on processors with instructions for it; elsewhere it is emulated."""
    return device != "cpu" or bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class ObservationEncoder(nn.Module):
    """Encodes the cameras and the cloud that an observation spec has, and the instruction. Use ``wants`` to see whether there is any.

    Attributes:
        latent_dim: L.
        tokens: into how many of L / tokens numbers a latent is split for nets that attend to them (0: it is no tokens).
        words: of the instruction, where the config asks for them.
    """

    def __init__(self, config: EncoderConfig, spec: ObservationSpec, observation_steps: int) -> None:
        """Build the nets.

        Raises:
            SpecMismatchError: a camera's shape is none, or cameras that share a net differ in size.
        """
        super().__init__()
        self.config = config
        self.spec = {k: f for k, f in spec.items() if k.startswith(IMAGE_PREFIX) or k == POINTS}
        self.cameras = [k for k in self.spec if k != POINTS]
        self.names = [k.removeprefix(IMAGE_PREFIX).replace(".", "_") for k in self.cameras]
        self._steps = observation_steps
        features, sizes = config.features, self._sizes()
        self.words = Words(features) if config.language else None
        self.images, self.pools = nn.ModuleDict(), nn.ModuleDict()
        grids: dict[str, tuple[int, int]] = {}
        channels = 0
        for index, name in enumerate(self.names):
            if not (config.shared and index):
                self.images[SHARED if config.shared else name] = net = config.image.build(
                    sizes[index], features if config.language else 0
                )
                with torch.no_grad():
                    grid = net(torch.zeros(1, 3, *sizes[index])).shape[2:]
                channels = net.channels
                if config.pool != "tokens":
                    self.pools[SHARED if config.shared else name] = self._pool(channels, (int(grid[0]), int(grid[1])))
            grids[name] = int(grid[0]), int(grid[1])
        self.resampler: Resampler | None = None
        if config.pool == "tokens" and self.cameras:
            self.resampler = Resampler(config.resampler, channels, grids, features)
        self.points = PointNet(config.points, features) if POINTS in self.spec else None
        self.points_normalizer = Normalizer(3)
        of_pictures = config.resampler.queries if self.resampler is not None else len(self.cameras)
        seen = of_pictures + (self.points is not None)
        self.tokens = seen + config.language if config.pool == "tokens" else 0
        self._seen_dim = seen * features
        self.latent_dim = self._seen_dim + (features if config.language else 0)
        self.regularizer: Regularizer | None = None
        if self._seen_dim and (config.kl_weight or config.reconstruction_weight):
            state_dim = spec[STATE].shape[0] if STATE in spec else 0
            self.regularizer = Regularizer(
                config, self._seen_dim, dict(zip(self.names, sizes, strict=True)), self.points is not None, state_dim
            )

    def _sizes(self) -> list[tuple[int, int]]:
        """Height and width of each camera's pictures, after cutting."""
        crop, found = self.config.augment.crop, []
        for key in self.cameras:
            shape = self.spec[key].shape
            if len(shape) != 3 or shape[0] != 3:
                raise SpecMismatchError(f"{key!r} wants pictures of shape (3, height, width), RGB, got {shape}")
            if min(shape[1:]) <= crop:
                raise SpecMismatchError(
                    f"encoder.augment.crop wants less than {key!r} has pixels, {shape[1:]}, got {crop}"
                )
            found.append((shape[1] - crop, shape[2] - crop))
        if self.config.shared and len(set(found)) > 1:
            raise SpecMismatchError(
                f"cameras that share a net want one size, got {[f.shape for f in self.spec.values()]}"
            )
        return found

    @staticmethod
    def wants(config: EncoderConfig, spec: ObservationSpec) -> bool:
        """Whether there is anything to encode."""
        return config.language or any(k.startswith(IMAGE_PREFIX) or k == POINTS for k in spec)

    def _pool(self, channels: int, grid: tuple[int, int]) -> nn.Module:
        if self.config.pool == "keypoints":
            return Keypoints(channels, grid, self.config.keypoints, self.config.features)
        return Flatten(channels, grid, self.config.features)

    def draw(self, batch_size: int, generator: torch.Generator) -> EncoderDraw:
        """Draw what training on ``batch_size`` samples takes."""
        config = self.config
        uniform_BU = torch.rand(batch_size, DRAWS * max(len(self.cameras), 1), generator=generator)
        normal_BOL = points_BP = words_B384 = None
        if config.kl_weight:
            normal_BOL = torch.randn(batch_size, self._steps, self._seen_dim, generator=generator)
        there, count = self.spec[POINTS].shape[0] if self.points is not None else 0, config.points.train_points
        if 0 < count < there:
            points_BP = torch.rand(batch_size, there, generator=generator).argsort(1)[:, :count]
        if config.language and config.word_noise:
            scale = config.word_noise / SENTENCE_DIM**0.5
            words_B384 = scale * torch.randn(batch_size, SENTENCE_DIM, generator=generator)
        return EncoderDraw(uniform_BU, normal_BOL, points_BP, words_B384)

    def require_fit(self, observation: Observation) -> None:
        """Raise SpecMismatchError unless the observation has what is encoded, in its shapes, and no other cameras."""
        wanted = ", ".join(f"{k} {f.shape}" for k, f in self.spec.items()) or "neither cameras nor points"
        given = {IMAGE_PREFIX + k: v for k, v in observation.images.items()}
        if observation.points_BOP3 is not None:
            given[POINTS] = observation.points_BOP3
        for key in (*self.spec, *given):
            if key not in given:
                raise SpecMismatchError(f"the observation lacks {key!r}; the policy expects {wanted}")
            if key not in self.spec:
                raise SpecMismatchError(
                    f"the observation has {key!r}, which the policy does not know; it expects {wanted}"
                )
            found = tuple(given[key].shape[2:])
            if found != self.spec[key].shape:
                order = "; channels come first" if found[-1:] == (3,) and key != POINTS else ""
                raise SpecMismatchError(f"{key!r} has shape {found}, the policy expects {self.spec[key].shape}{order}")
            if key != POINTS and given[key].dtype != torch.uint8:
                raise SpecMismatchError(f"{key!r} is {given[key].dtype}, the policy expects uint8, 0 to 255")
        if self.words is not None and observation.task is None:
            raise SpecMismatchError("the observation has no instruction (task), and the policy expects one")

    def forward(
        self, observation: Observation, draw: EncoderDraw | None = None, state_BOS: Tensor | None = None
    ) -> Encoded:
        """Encode histories.

        Args:
            observation: with the cameras and points of the spec, and the instruction where it is read.
            draw: augments and samples, in training (None: what is seen as it is, and the mean of the latents).
            state_BOS: the normalised state, which regularisation lets the features tell.

        Raises:
            SpecMismatchError: see ``require_fit``.
            UserError: an instruction is empty, or unknown where there is no sentence encoder.
        """
        self.require_fit(observation)
        rows, steps = observation.state_BOS.shape[:2]
        words_BD = words_RD = None
        if self.words is not None:
            assert observation.task is not None
            words_BD = self.words(observation.task, None if draw is None else draw.words_B384)
            words_RD = words_BD.repeat_interleave(steps, 0)
        pictures = self._pictures(observation, draw)
        cloud_RP3 = self._cloud(observation, draw)
        device = next(self.parameters()).device.type
        low = self.training and self.config.bf16 and has_bf16(device)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            parts = self._read(pictures, cloud_RP3, words_RD)
        if words_BD is not None and not parts:
            return Encoded(words_BD[:, None].expand(-1, steps, -1))
        latent_BOL = torch.cat([p.float() for p in parts], dim=1).unflatten(0, (rows, steps))
        penalty_B = None
        if self.regularizer is not None:
            normal_BOL = None if draw is None else draw.normal_BOL
            latent_BOL, penalty_B = self.regularizer(latent_BOL, normal_BOL, pictures, cloud_RP3, state_BOS)
        if words_BD is not None:
            latent_BOL = torch.cat([latent_BOL, words_BD[:, None].expand(-1, steps, -1)], dim=-1)
        return Encoded(latent_BOL, penalty_B if draw is not None else None)

    def _pictures(self, observation: Observation, draw: EncoderDraw | None) -> dict[str, Float[Tensor, "R 3 y x"]]:
        """What the nets of the pictures read, by camera: all steps of all rows."""
        config, found = self.config.augment, {}
        for index, (name, key) in enumerate(zip(self.names, self.cameras, strict=True)):
            picture = observation.images[key.removeprefix(IMAGE_PREFIX)]
            if draw is None:
                read = to_float(centre_crop(picture, config.crop))
            else:
                read = augment(picture, draw.uniform_BU[:, DRAWS * index : DRAWS * (index + 1)], config)
            found[name] = read.flatten(0, 1)
        return found

    def _cloud(self, observation: Observation, draw: EncoderDraw | None) -> Float[Tensor, "R P 3"] | None:
        """What the net of the points reads."""
        if observation.points_BOP3 is None:
            return None
        cloud_BOP3 = self.points_normalizer.normalize(observation.points_BOP3)
        if draw is not None and draw.points_BP is not None:
            index_BOP3 = draw.points_BP[:, None, :, None].expand(-1, cloud_BOP3.shape[1], -1, 3)
            cloud_BOP3 = cloud_BOP3.gather(2, index_BOP3)
        return cloud_BOP3.flatten(0, 1)

    def _read(
        self, pictures: dict[str, Tensor], cloud_RP3: Tensor | None, words_RD: Tensor | None
    ) -> list[Float[Tensor, "R D"]]:
        """What the nets make of it."""
        shared, parts = self.config.shared, []
        grids = {n: self.images[SHARED if shared else n](x, words_RD) for n, x in pictures.items()}
        if self.resampler is not None:
            parts = [self.resampler(grids, words_RD).flatten(1)]
        else:
            parts = [self.pools[SHARED if shared else n](grid) for n, grid in grids.items()]
        if self.points is not None and cloud_RP3 is not None:
            parts.append(self.points(cloud_RP3))
        return parts
