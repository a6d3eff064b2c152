"""Generators derived from a seed and a purpose, so that every draw can be repeated without its history."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

# seeds of scenes: training below 50,000, selection from there, tests from 100,000 (docs/data.md)
TRAINING_SCENES = 0
SELECTION_SCENES = 50_000
TEST_SCENES = 100_000


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose; the same on every machine and in every process."""
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))
