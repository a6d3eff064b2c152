"""Shared fixtures; array shapes of all annotated signatures are checked while tests run."""

from __future__ import annotations

from jaxtyping import install_import_hook

install_import_hook("vla_rl", "beartype.beartype")

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from toys import write_toy_set  # noqa: E402

import sim  # noqa: E402, F401  (before any test imports MuJoCo, which reads MUJOCO_GL then)
from vla_rl.policies.base import discover_policies  # noqa: E402
from vla_rl.runtime.platform import set_offline, set_single_thread  # noqa: E402

set_single_thread()
set_offline()
discover_policies()
torch.set_num_threads(1)


@pytest.fixture
def toy_set(tmp_path: Path) -> Path:
    """A data set of five short episodes."""
    return write_toy_set(tmp_path / "toy", [7, 3, 12, 5, 9])


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """Write further data sets by name."""
    return lambda name, lengths, **options: write_toy_set(tmp_path / name, lengths, **options)
