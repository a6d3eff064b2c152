"""Generators derived from a seed and a purpose, so that every draw can be repeated without its history."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def initial_weights(source: int | torch.Generator) -> Iterator[None]:
    """Build nets whose weights follow from a seed (or the next draw of a generator); global state is as before afterwards."""
    seed = source if isinstance(source, int) else int(torch.randint(2**31, (1,), generator=source))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
