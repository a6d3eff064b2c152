"""How pictures, point clouds and instructions are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vla_rl.encoders.augment import AugmentConfig
from vla_rl.encoders.base import ImageEncoderConfig
from vla_rl.encoders.cnn import CNNConfig
from vla_rl.encoders.point_net import PointNetConfig
from vla_rl.encoders.resampler import ResamplerConfig


@dataclass(frozen=True)
class EncoderConfig:
    """How pictures, point clouds and instructions are read.

    image: net of the pictures
    shared: one net for all cameras, in place of one each
    pool: keypoints (where things are), flatten (the whole grid), or tokens (queries that read all cameras' patches and the instruction,
        for nets that attend to them)
    keypoints: maps of pool keypoints
    resampler: queries of pool tokens
    features: numbers that each camera, the cloud and the instruction is reduced to; of pool tokens, of each token
    points: net of point clouds
    language: read the instruction; it modulates the net of the pictures (FiLM), and is a part of what is seen
    word_noise: standard deviation of noise on the instruction's embedding in training, whose length is one
    augment: of pictures, in training
    kl_weight: of the information bottleneck (0: none)
    reconstruction_weight: of reconstructing what was seen from the features (0: none)
    bf16: train the nets of pictures and points in bfloat16, where the processor has instructions for it
    """

    image: ImageEncoderConfig = field(default_factory=CNNConfig)
    shared: bool = False
    pool: Literal["keypoints", "flatten", "tokens"] = "flatten"
    keypoints: int = 32
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    features: int = 64
    points: PointNetConfig = field(default_factory=PointNetConfig)
    language: bool = False
    word_noise: float = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    kl_weight: float = 0.0
    reconstruction_weight: float = 0.0
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.features < 1 or self.keypoints < 1:
            raise ValueError(f"features and keypoints want at least 1, got {self.features} and {self.keypoints}")
        if self.pool == "tokens" and self.features % self.resampler.heads:
            raise ValueError(
                f"features want a multiple of resampler.heads = {self.resampler.heads}, got {self.features}"
            )
        if min(self.kl_weight, self.reconstruction_weight, self.word_noise) < 0:
            raise ValueError(
                "kl_weight, reconstruction_weight and word_noise want numbers >= 0, got "
                f"{self.kl_weight}, {self.reconstruction_weight} and {self.word_noise}"
            )
