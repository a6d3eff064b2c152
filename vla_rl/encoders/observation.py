"""From pictures and point clouds of an observation to one latent vector per step, which is all that nets, critics and selectors read.

An encoder runs once per observation. Stages that freeze it keep its latents (``observation.latent``) in the place of the pictures, so
that likelihood ratios stay one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.data.normalizer import Normalizer
from vla_rl.encoders.augment import DRAWS, AugmentConfig, augment, centre_crop, to_float
from vla_rl.encoders.base import ImageEncoderConfig
from vla_rl.encoders.cnn import CNNConfig
from vla_rl.encoders.point_net import PointNet, PointNetConfig
from vla_rl.encoders.pool import Flatten, Keypoints
from vla_rl.encoders.regularizers import Bottleneck, PictureDecoder, PointDecoder, gaussian_kl
from vla_rl.types import IMAGE_PREFIX, POINTS, STATE, Observation, ObservationSpec, SpecMismatchError

CLOUD = "points"


@dataclass(frozen=True)
class EncoderConfig:
    """How pictures and point clouds are read.

    image: net of the pictures
    shared: one net for all cameras, in place of one each
    pool: keypoints (where things are) or flatten (the whole grid)
    keypoints: maps of pool keypoints
    features: numbers that each camera, and the cloud, is reduced to
    points: net of point clouds
    augment: of pictures, in training
    kl_weight: of the information bottleneck (0: none)
    reconstruction_weight: of reconstructing what was seen from the features (0: none)
    bf16: train the nets of pictures and points in bfloat16, where the processor has instructions for it
    """

    image: ImageEncoderConfig = field(default_factory=CNNConfig)
    shared: bool = False
    pool: Literal["keypoints", "flatten"] = "flatten"
    keypoints: int = 32
    features: int = 64
    points: PointNetConfig = field(default_factory=PointNetConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    kl_weight: float = 0.0
    reconstruction_weight: float = 0.0
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.features < 1 or self.keypoints < 1:
            raise ValueError(f"features and keypoints want at least 1, got {self.features} and {self.keypoints}")
        if self.kl_weight < 0 or self.reconstruction_weight < 0:
            raise ValueError(
                f"kl_weight and reconstruction_weight want numbers >= 0, got {self.kl_weight} and {self.reconstruction_weight}"
            )


@dataclass(frozen=True)
class EncoderDraw:
    """The random part of encoding training samples.

    uniform_BU: in [0, 1); of crops, shifts and light
    normal_BOL: of the bottleneck
    points_BP: places of the points that are read of each cloud
    """

    uniform_BU: Float[Tensor, "B U"]
    normal_BOL: Float[Tensor, "B O L"] | None = None
    points_BP: Tensor | None = None

    def rows(self, index: Tensor | slice) -> EncoderDraw:
        """Some rows of the draw."""
        return EncoderDraw(*(None if x is None else x[index] for x in self._parts()))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> EncoderDraw:
        """The draw on another device."""
        return EncoderDraw(*(None if x is None else x.to(device) for x in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.uniform_BU, self.normal_BOL, self.points_BP


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
    """Encodes the cameras and the cloud that an observation spec has. Use ``wants`` to see whether it has any."""

    def __init__(self, config: EncoderConfig, spec: ObservationSpec, observation_steps: int) -> None:
        """Build the nets.

        Raises:
            SpecMismatchError: a camera's shape is none, or cameras that share a net differ in size.
        """
        super().__init__()
        self.config = config
        self.spec = {k: f for k, f in spec.items() if k.startswith(IMAGE_PREFIX) or k == POINTS}
        self.cameras = [k for k in self.spec if k != POINTS]
        self._steps = observation_steps
        self._sizes: dict[str, tuple[int, int]] = {}
        for key in self.cameras:
            shape = self.spec[key].shape
            if len(shape) != 3 or shape[0] != 3:
                raise SpecMismatchError(f"{key!r} wants pictures of shape (3, height, width), RGB, got {shape}")
            crop = config.augment.crop
            if min(shape[1:]) <= crop:
                raise SpecMismatchError(
                    f"encoder.augment.crop wants less than {key!r} has pixels, {shape[1:]}, got {crop}"
                )
            self._sizes[key] = shape[1] - crop, shape[2] - crop
        if config.shared and len(set(self._sizes.values())) > 1:
            sizes = {k: self.spec[k].shape for k in self.cameras}
            raise SpecMismatchError(f"cameras that share a net want one size, got {sizes}")
        names = [self._name(k) for k in self.cameras]
        self.images, self.pools = nn.ModuleDict(), nn.ModuleDict()
        for name, key in zip(names[:1] if config.shared else names, self.cameras, strict=False):
            self.images[name] = net = config.image.build(self._sizes[key])
            with torch.no_grad():
                grid = net(torch.zeros(1, 3, *self._sizes[key])).shape[2:]
            self.pools[name] = self._pool(net.channels, (int(grid[0]), int(grid[1])))
        self.points = PointNet(config.points, config.features) if POINTS in self.spec else None
        self.points_normalizer = Normalizer(3)
        self.parts = [*names, *([CLOUD] if self.points is not None else [])]
        self.latent_dim = len(self.parts) * config.features
        self.bottleneck = Bottleneck(self.latent_dim) if config.kl_weight else None
        self.decoders = nn.ModuleDict()
        self.tell_state: nn.Module | None = None
        if config.reconstruction_weight:
            for name, key in zip(names, self.cameras, strict=True):
                self.decoders[name] = PictureDecoder(config.features, self._sizes[key])
            if self.points is not None:
                self.decoders[CLOUD] = PointDecoder(config.features)
            self.tell_state = nn.Linear(self.latent_dim, spec[STATE].shape[0]) if STATE in spec else None

    @staticmethod
    def wants(spec: ObservationSpec) -> bool:
        """Whether there is anything to encode."""
        return any(k.startswith(IMAGE_PREFIX) or k == POINTS for k in spec)

    @staticmethod
    def _name(key: str) -> str:
        return key.removeprefix(IMAGE_PREFIX).replace(".", "_")

    def _pool(self, channels: int, grid: tuple[int, int]) -> nn.Module:
        if self.config.pool == "keypoints":
            return Keypoints(channels, grid, self.config.keypoints, self.config.features)
        return Flatten(channels, grid, self.config.features)

    def draw(self, batch_size: int, generator: torch.Generator) -> EncoderDraw:
        """Draw what training on ``batch_size`` samples takes."""
        uniform_BU = torch.rand(batch_size, DRAWS * max(len(self.cameras), 1), generator=generator)
        normal_BOL = points_BP = None
        if self.bottleneck is not None:
            normal_BOL = torch.randn(batch_size, self._steps, self.latent_dim, generator=generator)
        count = self.config.points.train_points
        if self.points is not None and 0 < count < self.spec[POINTS].shape[0]:
            there = self.spec[POINTS].shape[0]
            points_BP = torch.rand(batch_size, there, generator=generator).argsort(1)[:, :count]
        return EncoderDraw(uniform_BU, normal_BOL, points_BP)

    def require_fit(self, observation: Observation) -> None:
        """Raise SpecMismatchError unless the observation has the cameras and the cloud that are encoded, in their shapes, and no others."""
        wanted = ", ".join(f"{k} {f.shape}" for k, f in self.spec.items())
        given = {IMAGE_PREFIX + k: v for k, v in observation.images.items()}
        if observation.points_BOP3 is not None:
            given[POINTS] = observation.points_BOP3
        for key in self.spec.keys() | given.keys():
            if key not in given:
                raise SpecMismatchError(f"the observation lacks {key!r}; the policy expects {wanted}")
            if key not in self.spec:
                raise SpecMismatchError(
                    f"the observation has {key!r}, which the policy does not know; it expects {wanted}"
                )
            found = tuple(given[key].shape[2:])
            if found != self.spec[key].shape:
                order = "; channels come first" if found[-1:] == (3,) and len(found) == 3 else ""
                raise SpecMismatchError(f"{key!r} has shape {found}, the policy expects {self.spec[key].shape}{order}")
            if key != POINTS and given[key].dtype != torch.uint8:
                raise SpecMismatchError(f"{key!r} is {given[key].dtype}, the policy expects uint8, 0 to 255")

    def forward(
        self, observation: Observation, draw: EncoderDraw | None = None, state_BOS: Tensor | None = None
    ) -> Encoded:
        """Encode histories.

        Args:
            observation: with the cameras and points of the spec.
            draw: augments and samples, in training (None: what is seen as it is, and the mean of the latents).
            state_BOS: the normalised state, which regularisation lets the features tell.

        Raises:
            SpecMismatchError: see ``require_fit``.
        """
        self.require_fit(observation)
        config, parts, seen = self.config, {}, {}
        device = next(self.parameters()).device.type
        low = torch.autocast(device, torch.bfloat16, enabled=self.training and config.bf16 and has_bf16(device))
        for index, key in enumerate(self.cameras):
            picture = observation.images[key.removeprefix(IMAGE_PREFIX)]
            if draw is None:
                picture = to_float(centre_crop(picture, config.augment.crop))
            else:
                picture = augment(picture, draw.uniform_BU[:, DRAWS * index : DRAWS * (index + 1)], config.augment)
            name = self._name(key)
            net = next(iter(self.images)) if config.shared else name
            seen[name] = picture.flatten(0, 1)
            with low:
                grid = self.images[net](seen[name])
                parts[name] = self.pools[net](grid)
        if self.points is not None:
            assert observation.points_BOP3 is not None
            cloud_BOP3 = self.points_normalizer.normalize(observation.points_BOP3)
            if draw is not None and draw.points_BP is not None:
                index_BOP3 = draw.points_BP[:, None, :, None].expand(-1, cloud_BOP3.shape[1], -1, 3)
                cloud_BOP3 = cloud_BOP3.gather(2, index_BOP3)
            seen[CLOUD] = cloud_BOP3.flatten(0, 1)
            with low:
                parts[CLOUD] = self.points(seen[CLOUD])
        rows = observation.batch_size
        features_BOL = torch.cat([parts[name].float() for name in self.parts], dim=1).unflatten(0, (rows, -1))
        return self._regularized(features_BOL, draw, seen, state_BOS)

    def _regularized(
        self, features_BOL: Tensor, draw: EncoderDraw | None, seen: dict[str, Tensor], state_BOS: Tensor | None
    ) -> Encoded:
        config, latent_BOL = self.config, features_BOL
        penalty_B = torch.zeros(len(features_BOL), device=features_BOL.device)
        if self.bottleneck is not None:
            latent_BOL, log_variance_BOL = self.bottleneck(features_BOL)
            penalty_B = penalty_B + config.kl_weight * gaussian_kl(latent_BOL, log_variance_BOL).mean(1)
            if draw is not None and draw.normal_BOL is not None:
                latent_BOL = latent_BOL + (0.5 * log_variance_BOL).exp() * draw.normal_BOL
        if draw is None or not (config.kl_weight or config.reconstruction_weight):
            return Encoded(latent_BOL)
        if config.reconstruction_weight:
            steps = latent_BOL.shape[1]
            each = dict(zip(self.parts, latent_BOL.flatten(0, 1).split(config.features, dim=1), strict=True))
            error_R = torch.zeros(len(features_BOL) * steps, device=features_BOL.device)
            for name, decoder in self.decoders.items():
                error_R = error_R + decoder.error(each[name], seen[name])  # type: ignore[operator]
            if self.tell_state is not None and state_BOS is not None:
                error_R = error_R + (self.tell_state(latent_BOL) - state_BOS).square().mean(-1).flatten()
            penalty_B = penalty_B + config.reconstruction_weight * error_R.unflatten(0, (-1, steps)).mean(1)
        return Encoded(latent_BOL, penalty_B)
