"""Imitation pre-training: the policy's denoising error on windows of demonstrations (stage 1 of arXiv 2510.14830).

AdamW, linear warm-up and cosine decay, exponential moving average of parameters and buffers. Differs from the paper: gradients are clipped;
every draw depends on (seed, step) alone, so that a run can be cut anywhere and so that several processes draw the same global
batch and take their rows of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vla_rl.algos.guard import BadSteps, load_optimizer_tensors, optimizer_tensors
from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.joint import JointBatch, JointDraw, JointPolicy, JointWindows
from vla_rl.policies.records import Draw
from vla_rl.runtime.checkpoints import part
from vla_rl.runtime.seeding import torch_generator


@dataclass(frozen=True)
class BCConfig:
    """Optimisation.

    steps: gradient steps
    batch_size: windows per step, over all processes
    learning_rate: of AdamW after warm-up
    weight_decay: of AdamW
    warmup_steps: linear warm-up
    clip_norm: largest gradient norm
    ema_decay: largest decay of the moving average; it warms up as 1 - (1 + n) ** -0.75
    """

    steps: int = 10_000
    batch_size: int = 128
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    clip_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size want at least 1, got {self.steps} and {self.batch_size}")
        if not self.learning_rate > 0 or self.weight_decay < 0 or not self.clip_norm > 0 or self.warmup_steps < 0:
            raise ValueError(
                "learning_rate and clip_norm want positive numbers, weight_decay and warmup_steps numbers >= 0, got "
                f"{self.learning_rate}, {self.clip_norm}, {self.weight_decay}, {self.warmup_steps}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay wants a number in [0, 1), got {self.ema_decay}")


def masked_mean(error_BH: Float[Tensor, "B H"], keep_BH: Bool[Tensor, "B H"], total: int) -> Float[Tensor, ""]:
    """Sum of the errors that are kept, over ``total`` (their number in the global batch)."""
    return (error_BH * keep_BH).sum() / total


def learning_rate_factor(step: int, config: BCConfig) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def ema_update(largest_decay: float) -> Any:
    """Averaging rule for ``AveragedModel``: decay min(largest, 1 - (1 + n) ** -0.75) after n updates."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():  # buffers of indices: they come in a group of their own
            torch._foreach_copy_(averaged, current)
            return
        decay = min(largest_decay, 1 - (1 + float(count)) ** -0.75)
        torch._foreach_lerp_(averaged, current, 1 - decay)

    return update


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory (policies with one trunk) as tensors of their own: a file of tensors knows no sharing."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        twice = tensor.numel() > 0 and tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        found[name] = tensor.clone() if twice else tensor
    return found


class BehaviourCloning:
    """One gradient step per ``update``; everything it needs to go on is in ``state_dict``."""

    def __init__(
        self,
        policy: ChunkPolicy | JointPolicy,
        config: BCConfig,
        accelerator: Any,
        seed: int,
        objective: Callable[..., Tensor] | None = None,
    ) -> None:
        """Set up.

        Args:
            policy: with fitted normalisers.
            config: optimisation.
            accelerator: ``accelerate.Accelerator``: device, precision, processes.
            seed: of all draws.
            objective: error of each action step of (policy, average, batch, draw) (None: the policy's own).
        """
        self.config = config
        self.accelerator = accelerator
        self.seed = seed
        self.step = 0
        self.bad = BadSteps("imitation")
        policy = policy.to(accelerator.device)
        self.ema = AveragedModel(policy, multi_avg_fn=ema_update(config.ema_decay), use_buffers=True)
        self.ema.eval()  # what it is asked is how good it is: nothing is augmented or regularised
        optimizer = torch.optim.AdamW(
            [p for p in policy.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.95, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.policy = policy
        self._objective = None if objective is None else functools.partial(objective, average=self.averaged_policy)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(policy, optimizer)

    def update(
        self, windows: Windows | JointWindows, weight_W: Float[Tensor, " W"] | None = None, draws: Draw | None = None
    ) -> dict[str, float]:
        """Take one step on a batch drawn from ``windows``; return its metrics.

        Args:
            windows: to draw from.
            weight_W: how often each is drawn, up to a factor (None: all equally). A weight on the loss would have the same mean.
            draws: the random part that goes with each window (None: a fresh one in each step).

        Raises:
            NonFiniteLossError: several steps in a row had a loss or gradient that is not finite; none of them touched the weights.
        """
        generator = torch_generator(self.seed, "bc", self.step)
        if weight_W is None:
            window_B = torch.randint(0, len(windows), (self.config.batch_size,), generator=generator)
        else:
            window_B = torch.multinomial(weight_W, self.config.batch_size, replacement=True, generator=generator)
        size = self.config.batch_size
        draw: Draw | JointDraw = self.policy.draw(size, generator) if draws is None else draws.rows(window_B)
        total = int((~windows.padding(window_B) & ~draw.prefix_BH).sum())
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        batch: WindowBatch | JointBatch = windows.batch(window_B[mine]).to(self.accelerator.device)
        draw = draw.rows(mine).to(self.accelerator.device)

        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor(self.step, self.config)
        with self.accelerator.autocast():
            error_BH = self.model(batch, draw, self._objective)
        keep_BH = ~batch.is_pad_BH & ~draw.prefix_BH
        # gradients are averaged over processes, so each process counts its share of the global sum that often
        loss = masked_mean(error_BH.float(), keep_BH, total) * self.accelerator.num_processes
        value = self.accelerator.reduce(loss.detach(), "mean").item()
        norm = math.nan
        if math.isfinite(value):
            self.optimizer.zero_grad()
            self.accelerator.backward(loss)
            norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.clip_norm))
        good = math.isfinite(norm)
        if good:
            self.optimizer.step()
            self.ema.update_parameters(self.policy)
        self.step += 1
        self.bad.count(bad=not good)
        return {
            "train/loss": value if good else math.nan,
            "train/gradient_norm": norm,
            "train/dropped_steps": float(self.bad.dropped),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    @property
    def averaged_policy(self) -> Any:
        """The policy with averaged weights, of the kind of the one that learns."""
        return self.ema.module

    @torch.no_grad()
    def validation_loss(self, windows: Windows | JointWindows, samples: int, draws: Draw | None = None) -> float:
        """Error of the averaged policy on ``samples`` windows and draws that are the same at each call."""
        generator = torch_generator(self.seed, "bc", "validation")
        window_B = torch.randint(0, len(windows), (samples,), generator=generator)
        draw: Draw | JointDraw = self.policy.draw(samples, generator) if draws is None else draws.rows(window_B)
        total, error = 0.0, 0.0
        for rows in torch.arange(samples).split(self.config.batch_size):
            batch: WindowBatch | JointBatch = windows.batch(window_B[rows]).to(self.accelerator.device)
            part = draw.rows(rows).to(self.accelerator.device)
            keep_BH = ~batch.is_pad_BH & ~part.prefix_BH
            error += (self.averaged_policy(batch, part, self._objective) * keep_BH).sum().item()
            total += keep_BH.sum().item()
        return error / total

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors: weights, average, optimiser moments, step."""
        state = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        state = _apart(state)
        return state | optimizer_tensors(self.optimizer, "optimizer.") | {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``."""
        self.policy.load_state_dict(part(state, "policy."))
        self.ema.load_state_dict(part(state, "ema."))
        load_optimizer_tensors(self.optimizer, state, "optimizer.")
        self.step = int(state["step"])
