"""PPO in the denoising chain: clipped surrogate over random (sample, denoising step) pairs.

RL-100 (arXiv 2510.14830) and DPPO (2409.00588): each step of the chain is a Gaussian inner action with the environment's advantage.
Differs from RL-100's code: one loss averaged over pairs instead of an optimiser step per denoising step (its samples go stale within
the pass); a stop and an optional penalty on the KL divergence; diagnostics per denoising step. Offline and online stages share it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_rl.algos.guard import GuardedOptimizer
from vla_rl.kernels import Kernel
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import Chain, log_ratio, step_log_prob

SMALLEST_SPREAD = 1e-6  # advantages that spread less, relative to their size, are all the same
LARGEST_LOG_RATIO = 20.0  # where a ratio is as good as infinite, and its exponential still a number


@dataclass(frozen=True)
class PPOConfig:
    """The surrogate and its optimisation.

    learning_rate: of Adam
    epochs: passes over the samples
    minibatch: pairs per gradient step
    pairs: denoising steps drawn per sample and epoch (0: all)
    clip: largest change of a ratio
    first_clip_share: clip of the chain's first step as a share of ``clip``; it grows geometrically from there
    inner_discount: of the advantage per denoising step between a step and the last one
    ratio: joint over executed steps and dimensions, per action_step, or the geometric mean over all
    kl_stop: mean KL divergence from the old policy (per pair, of the reduced ratio) that ends the epochs
    kl_penalty: weight of that divergence in the loss
    imitation_weight: weight of the imitation loss that is added, where the stage has demonstrations
    clip_norm: largest gradient norm
    advantage_clip: largest absolute normalised advantage
    """

    learning_rate: float = 7e-5
    epochs: int = 5
    minibatch: int = 2048
    pairs: int = 2
    clip: float = 0.2
    first_clip_share: float = 1.0
    inner_discount: float = 0.99
    ratio: Literal["joint", "action_step", "mean"] = "joint"
    kl_stop: float = 0.1
    kl_penalty: float = 0.0
    imitation_weight: float = 0.0
    clip_norm: float = 1.0
    advantage_clip: float = 5.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.minibatch) < 1 or self.pairs < 0:
            raise ValueError(
                f"epochs and minibatch want at least 1, pairs 0, got {self.epochs}, {self.minibatch}, {self.pairs}"
            )
        if not (self.learning_rate > 0 and 0 < self.clip < 1 and self.clip_norm > 0 and self.advantage_clip > 0):
            raise ValueError(
                "learning_rate, clip_norm and advantage_clip want positive numbers, clip one in (0, 1), got "
                f"{self.learning_rate}, {self.clip_norm}, {self.advantage_clip}, {self.clip}"
            )
        if not (0 < self.first_clip_share <= 1 and 0 < self.inner_discount <= 1):
            raise ValueError(
                f"first_clip_share and inner_discount want numbers in (0, 1], got {self.first_clip_share}, {self.inner_discount}"
            )
        if self.kl_stop <= 0 or self.kl_penalty < 0 or self.imitation_weight < 0:
            raise ValueError(
                "kl_stop wants a positive number, kl_penalty and imitation_weight numbers >= 0, got "
                f"{self.kl_stop}, {self.kl_penalty}, {self.imitation_weight}"
            )


@dataclass(frozen=True)
class Samples:
    """What the surrogate is averaged over: chains of the old policy, and what they were worth."""

    condition_BOD: Float[Tensor, "B O D"]
    chain: Chain
    advantage_B: Float[Tensor, " B"]
    executed_BH: Bool[Tensor, "B He"]


def normalize_advantage(advantage_B: Float[Tensor, " B"], limit: float) -> Float[Tensor, " B"] | None:
    """Zero mean, unit spread, clipped; None where all are the same, so that there is nothing to learn. NaN stays NaN."""
    spread = advantage_B.std(correction=0)
    if bool(spread <= SMALLEST_SPREAD * advantage_B.abs().max()):
        return None
    return ((advantage_B - advantage_B.mean()) / spread).clamp(-limit, limit)


def clip_of_steps(config: PPOConfig, count: int) -> Float[Tensor, " Kt"]:
    """Clip of each trained step, geometric from ``first_clip_share * clip`` to ``clip``; one step alone has all of it."""
    share = torch.linspace(0.0, 1.0, count) if count > 1 else torch.ones(1)
    return config.clip * config.first_clip_share ** (1 - share)


def surrogate(
    log_ratio_BR: Float[Tensor, "B R"], advantage_B: Float[Tensor, " B"], clip_B: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """min(r A, clip(r, 1 - clip, 1 + clip) A), averaged over the ratios of a sample."""
    ratio_BR = log_ratio_BR.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    limited_BR = torch.maximum(torch.minimum(ratio_BR, 1 + clip_B[:, None]), 1 - clip_B[:, None])
    return torch.minimum(ratio_BR * advantage_B[:, None], limited_BR * advantage_B[:, None]).mean(1)


def divergence(log_ratio_BR: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Estimate of KL(old, new) from a sample of old: r - 1 - log r, never negative."""
    held_BR = log_ratio_BR.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return (held_BR.exp() - 1 - held_BR).mean(1)


def draw_pairs(samples: int, steps: int, per_sample: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shuffled pairs (sample, index of a trained step): ``per_sample`` different steps of each sample, or all (0)."""
    count = min(per_sample or steps, steps)
    step_BS = torch.rand(samples, steps, generator=generator).argsort(1)[:, :count]
    sample_BS = torch.arange(samples)[:, None].expand_as(step_BS)
    order = torch.randperm(step_BS.numel(), generator=generator)
    return sample_BS.reshape(-1)[order], step_BS.reshape(-1)[order]


def pair_log_ratio(
    policy: ChunkPolicy,
    kernel: Kernel,
    samples: Samples,
    sample_P: Int[Tensor, " P"],
    step_P: Int[Tensor, " P"],
    reduction: str,
) -> Float[Tensor, "P R"]:
    """Log-ratio of the policy as it is now to the one that drew the chains."""
    k_P = torch.tensor(kernel.trained)[step_P]
    chain = samples.chain
    new_PH = step_log_prob(
        policy,
        kernel,
        samples.condition_BOD[sample_P],
        chain.x_BKHA[sample_P, k_P],
        chain.x_BKHA[sample_P, k_P + 1],
        k_P,
    )
    old_PH = chain.log_prob_BKH[sample_P, step_P]
    return log_ratio(new_PH, old_PH, samples.executed_BH[sample_P], reduction, policy.spec.action_spec.dim)


class ChainPPO:
    """Improves a policy on samples of its own; the optimiser outlives the batches."""

    def __init__(self, policy: ChunkPolicy, kernel: Kernel, config: PPOConfig) -> None:
        self.policy = policy
        self.kernel = kernel
        self.config = config
        parameters = [*policy.net.parameters(), *kernel.parameters()]
        self.optimizer = GuardedOptimizer(
            torch.optim.AdamW(parameters, lr=config.learning_rate, eps=1e-5, weight_decay=0.0), config.clip_norm, "PPO"
        )
        self.learning_rate = config.learning_rate
        self.rate_share = 1.0  # of it that is used

    def update(
        self,
        samples: Samples,
        generator: torch.Generator,
        imitation_loss: Callable[[torch.Generator], Tensor] | None = None,
    ) -> dict[str, float]:
        """Take the epochs' gradient steps, or fewer where the policy has moved far enough; return what happened.

        Args:
            samples: with advantages as they are; they are normalised here.
            generator: of the pairs.
            imitation_loss: on a batch of demonstrations, added with ``imitation_weight``.

        Raises:
            NonFiniteLossError: several losses in a row were not finite.
        """
        config, kernel = self.config, self.kernel
        advantage_B = normalize_advantage(samples.advantage_B, config.advantage_clip)
        if advantage_B is None:
            return {"ppo/skipped_flat_advantage": 1.0, "ppo/gradient_steps": 0.0}
        self.optimizer.set_learning_rate(self.learning_rate * self.rate_share)
        clip_K = clip_of_steps(config, len(kernel.trained))
        distance_K = torch.tensor([kernel.steps - 1 - k for k in kernel.trained])
        credit_K = config.inner_discount**distance_K
        seen: dict[str, list[float]] = defaultdict(list)
        by_step: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
        for _ in range(config.epochs):
            sample_P, step_P = draw_pairs(len(advantage_B), len(kernel.trained), config.pairs, generator)
            divergences = []
            for rows in torch.arange(len(sample_P)).split(config.minibatch):
                sample_M, step_M = sample_P[rows], step_P[rows]
                log_ratio_MR = pair_log_ratio(self.policy, kernel, samples, sample_M, step_M, config.ratio)
                clip_M = clip_K[step_M]
                gain_M = surrogate(log_ratio_MR, advantage_B[sample_M] * credit_K[step_M], clip_M)
                kl_M = divergence(log_ratio_MR)
                loss = -gain_M.mean() + config.kl_penalty * kl_M.mean()
                if imitation_loss is not None and config.imitation_weight:
                    loss = loss + config.imitation_weight * imitation_loss(generator)
                norm = self.optimizer.step(loss)
                if math.isnan(norm):
                    continue  # dropped; it says nothing of the policy
                kl_M = kl_M.detach()
                with torch.no_grad():
                    clipped_M = ((log_ratio_MR.exp() - 1).abs() > clip_M[:, None]).float().mean(1)
                divergences.append(kl_M.mean().item())
                seen["ppo/loss"].append(loss.item())
                seen["ppo/gradient_norm"].append(norm)
                for index in step_M.unique().tolist():
                    mine_M = step_M == index
                    by_step[index].append(
                        (float(kl_M[mine_M].sum()), float(clipped_M[mine_M].sum()), int(mine_M.sum()))
                    )
            seen["ppo/kl"].append(sum(divergences) / len(divergences) if divergences else math.nan)
            if seen["ppo/kl"][-1] > config.kl_stop:
                break
        metrics = {name: sum(values) / len(values) for name, values in seen.items() if name != "ppo/kl"}
        metrics |= {"ppo/kl": seen["ppo/kl"][-1], "ppo/epochs": float(len(seen["ppo/kl"]))}
        metrics |= {
            "ppo/gradient_steps": float(len(seen["ppo/loss"])),
            "ppo/dropped_steps": float(self.optimizer.dropped),
        }
        for index, parts in sorted(by_step.items()):
            count = sum(n for _, _, n in parts)
            metrics[f"ppo_step_{kernel.trained[index]}/kl"] = sum(kl for kl, _, _ in parts) / count
            metrics[f"ppo_step_{kernel.trained[index]}/clipped"] = sum(c for _, c, _ in parts) / count
        return metrics

    def adapt(self, kl: float, target: float, largest_factor: float) -> None:
        """Move the learning rate towards a target divergence: two thirds of it when twice as far, half more when half as far."""
        base = self.config.learning_rate
        if kl > 2 * target:
            self.learning_rate = max(self.learning_rate / 1.5, min(base / largest_factor, self.learning_rate))
        elif kl < target / 2:
            self.learning_rate = min(self.learning_rate * 1.5, max(base * largest_factor, self.learning_rate))
