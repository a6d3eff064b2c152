"""High-fidelity feature search (TACO, arXiv 2512.02834, section 4.2): training features that look like those at test time.

Clean actions of the data are no input that the sampler ever sees. So for each window of the data the policy samples several chunks with
fresh noise, and the features of the one that lands nearest to the recorded chunk are kept: those of a sample the policy itself makes, at
the noise level at which candidates will be scored. Differs from TACO's code: padding does not count in the distance, nor do steps that
are never executed; the noise is not that of inference.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from vla_rl.data.windows import Windows
from vla_rl.inference.selectors import FeatureKind, features_of, repeat_rows
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.seeding import torch_generator

WINDOWS_AT_ONCE = 64


@dataclass(frozen=True)
class SearchConfig:
    """How thoroughly is searched.

    samples: chunks per window
    windows: of the data, drawn at random (0: all)
    seed: of noise and draw
    """

    samples: int = 16
    windows: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.windows < 0:
            raise ValueError(f"samples wants at least 1, windows a number >= 0, got {self.samples} and {self.windows}")


@dataclass(frozen=True)
class FoundFeatures:
    """Features of the nearest samples.

    window_W: which window each belongs to
    features_WF: of the sample that landed nearest
    nearest: mean root square distance of it from the recorded chunk, in normalised units
    first: of the first sample, for comparison
    """

    window_W: Int[Tensor, " W"]
    features_WF: Float[Tensor, "W F"]
    nearest: float
    first: float


@torch.no_grad()
def search_features(
    policy: ChunkPolicy, windows: Windows, config: SearchConfig, kind: FeatureKind, *, bar: bool = True
) -> FoundFeatures:
    """Sample around windows of the data and keep the nearest."""
    count, executed = config.samples, policy.config.execute_steps
    order = torch.randperm(len(windows), generator=torch_generator(config.seed, "feature windows"))
    window_W = order[: config.windows or len(order)].sort().values
    kept, nearest, first = [], 0.0, 0.0
    generator = torch_generator(config.seed, "feature noise")
    for rows in tqdm(
        window_W.split(WINDOWS_AT_ONCE), "features", disable=not bar, mininterval=1 if sys.stderr.isatty() else 30
    ):
        batch = windows.batch(rows)
        condition_BOD = repeat_rows(policy.condition(batch.observation), count)
        noise_KBHA = torch.randn(policy.noise_count, len(rows) * count, *policy.chunk_shape, generator=generator)
        made = policy.generate(condition_BOD, noise_KBHA, None)
        wanted_BHA = policy.normalize_action(batch.action_BHA, batch.observation)[:, None, :executed]
        keep_BH = ~batch.is_pad_BH[:, None, :executed]
        made_BNHA = made.action_BHA.unflatten(0, (-1, count))[:, :, :executed]
        square_BN = ((made_BNHA - wanted_BHA).square().mean(-1) * keep_BH).sum(-1) / keep_BH.sum(-1)
        best_B = square_BN.argmin(1)
        features_BF = features_of(policy, kind, condition_BOD, made)
        kept.append(features_BF.unflatten(0, (-1, count))[torch.arange(len(rows)), best_B])
        nearest += float(square_BN.min(1).values.sqrt().sum())
        first += float(square_BN[:, 0].sqrt().sum())
    return FoundFeatures(window_W, torch.cat(kept), nearest / len(window_W), first / len(window_W))
