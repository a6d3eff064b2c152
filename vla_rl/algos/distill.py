"""Distil a diffusion or flow policy into a student that jumps from noise to action.

Three losses. Consistency distillation at random noise times (arXiv 2303.01469, alg. 2; Consistency Policy, 2405.07503; RL-100's head,
2510.14830, eq. 15): where the student lands from x_k is where it lands from the teacher's next state, or where the teacher itself lands.
Paired noise: regression of the teacher's output from the same noise (what RL-100's code does). Shortcut (2410.12557; SnapFlow,
2604.05656): small steps are the teacher's, a large one is two halves of the student's own. The teacher is only ever read.

Differs: all happens on the line x = (1 - tau) noise + tau action, onto which a diffusion teacher's states are scaled, so that one student
serves both kinds; shortcut's small steps are the teacher's instead of the data's, which have less spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_rl.data.windows import WindowBatch
from vla_rl.policies.base import ChunkPolicy, Draw
from vla_rl.policies.flow import interpolate
from vla_rl.policies.path import LinearPath
from vla_rl.policies.student import StudentPolicy

Method = Literal["consistency", "paired", "shortcut"]
# where jumps of 1, 1/2 and 1/3 begin, and how far they go: shortcut's share of samples that are as deployed
DEPLOYED = ((0.0, 1.0), (0.0, 1 / 2), (1 / 2, 1 / 2), (0.0, 1 / 3), (1 / 3, 1 / 3), (2 / 3, 1 / 3))
FINE = 1024  # values of a random number of which another is made


@dataclass(frozen=True)
class DistillConfig:
    """What the student is taught.

    method: consistency, paired or shortcut
    target: of consistency and shortcut: the student itself without gradient, its moving average, or (consistency) the teacher's end
    teacher_steps: of its chain (0: as it samples); for consistency and shortcut they are the noise times, so that more may be better
    flow_share: share of shortcut's samples that are the teacher's small steps
    """

    method: Method = "paired"
    target: Literal["stop_gradient", "ema", "teacher"] = "stop_gradient"
    teacher_steps: int = 0
    flow_share: float = 0.5

    def __post_init__(self) -> None:
        if self.teacher_steps < 0:
            raise ValueError(f"teacher_steps wants a number >= 0 (0: as the teacher samples), got {self.teacher_steps}")
        if not 0 < self.flow_share < 1:
            raise ValueError(f"flow_share wants a share in (0, 1), got {self.flow_share}")
        if self.method == "shortcut" and self.target == "teacher":
            raise ValueError("the target of method shortcut wants to be stop_gradient or ema, got teacher")


def split(uniform_B: Float[Tensor, " B"], count: int) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Make of a uniform number in [0, 1) a uniform index below ``count`` and, independent of it, another uniform number."""
    index_B = (uniform_B * count).long().clamp_max(count - 1)
    return index_B, (uniform_B * count - index_B).clamp(0.0, 1.0)


def paired_error(
    student: StudentPolicy, path: LinearPath, condition_BOD: Tensor, x_BHA: Tensor, fixed_BH: Tensor
) -> Float[Tensor, "B H"]:
    """Squared distance of the student's jump from noise to where the teacher gets from the same noise."""
    start_B = torch.zeros(len(x_BHA), dtype=torch.long, device=x_BHA.device)
    target_BHA = path.end(x_BHA, start_B, condition_BOD, fixed_BH)
    tau_BH = fixed_BH.to(x_BHA.dtype)
    return (student.jump(x_BHA, tau_BH, 1 - tau_BH, condition_BOD) - target_BHA).square().mean(-1)


def consistency_error(
    student: StudentPolicy,
    average: StudentPolicy,
    path: LinearPath,
    config: DistillConfig,
    condition_BOD: Tensor,
    action_BHA: Tensor,
    draw: Draw,
) -> Float[Tensor, "B H"]:
    """Squared distance of where the student jumps from a random noise time to where it jumps from the teacher's next state."""
    fixed_BH = draw.prefix_BH
    tau_K1 = path.tau_K1.to(action_BHA.device)
    k_B, _ = split(draw.uniform_B, path.steps)
    tau_BH, next_BH = (torch.where(fixed_BH, 1.0, tau_K1[k][:, None]) for k in (k_B, k_B + 1))
    x_BHA = interpolate(draw.noise_BHA, action_BHA, tau_BH)
    with torch.no_grad():
        if config.target == "teacher":
            target_BHA = path.end(x_BHA, k_B, condition_BOD, fixed_BH)
        else:
            judge = average if config.target == "ema" else student
            next_BHA = path.step(x_BHA, k_B, condition_BOD, fixed_BH)
            target_BHA = judge.jump(next_BHA, next_BH, 1 - next_BH, condition_BOD)
    return (student.jump(x_BHA, tau_BH, 1 - tau_BH, condition_BOD) - target_BHA).square().mean(-1)


def shortcut_error(
    student: StudentPolicy,
    average: StudentPolicy,
    path: LinearPath,
    config: DistillConfig,
    condition_BOD: Tensor,
    action_BHA: Tensor,
    draw: Draw,
) -> Float[Tensor, "B H"]:
    """Squared error of the velocity of a jump: against the teacher's in small steps, else against the mean of the student's two halves."""
    fixed_BH, uniform_B = draw.prefix_BH, draw.uniform_B
    tau_K1 = path.tau_K1.to(action_BHA.device)
    small_B = uniform_B < config.flow_share
    rest_B = torch.where(
        small_B, uniform_B / config.flow_share, (uniform_B - config.flow_share) / (1 - config.flow_share)
    )
    k_B, _ = split(rest_B, path.steps)
    tau_B, step_B = _jumps(rest_B)
    tau_B = torch.where(small_B, tau_K1[k_B], tau_B)
    step_B = torch.where(small_B, tau_K1[k_B + 1] - tau_K1[k_B], step_B)
    tau_BH = torch.where(fixed_BH, 1.0, tau_B[:, None])
    step_BH = torch.where(fixed_BH, 0.0, step_B[:, None])
    x_BHA = interpolate(draw.noise_BHA, action_BHA, tau_BH)
    judge = average if config.target == "ema" else student
    with torch.no_grad():
        half_BH = step_BH / 2
        middle_BHA = judge.jump(x_BHA, tau_BH, half_BH, condition_BOD)
        end_BHA = judge.jump(middle_BHA, tau_BH + half_BH, half_BH, condition_BOD)
        teacher_BHA = path.step(x_BHA, k_B, condition_BOD, fixed_BH)
        landing_BHA = torch.where(small_B[:, None, None], teacher_BHA, end_BHA)
        length_BH1 = torch.where(fixed_BH, 1.0, step_B[:, None])[..., None]
        target_BHA = (landing_BHA - x_BHA) / length_BH1
    return (student.net(x_BHA, tau_BH, condition_BOD, step_BH) - target_BHA).square().mean(-1)


def _jumps(uniform_B: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
    """Where jumps begin and how far they go: half as deployed (in 1, 2 or 3), half anywhere."""
    any_B, rest_B = split(uniform_B, 2)
    table = torch.tensor(DEPLOYED, device=uniform_B.device)
    tau_B, step_B = table[split(rest_B, len(DEPLOYED))[0]].unbind(1)
    begin_B, share_B = split(rest_B, FINE)
    begin_B = begin_B / FINE
    anywhere_B = any_B == 1
    step_B = torch.where(anywhere_B, (1 - begin_B) * share_B.clamp_min(1 / FINE), step_B)
    return torch.where(anywhere_B, begin_B, tau_B), step_B


def distill_error(
    student: StudentPolicy,
    average: StudentPolicy,
    path: LinearPath,
    config: DistillConfig,
    condition_BOD: Float[Tensor, "B O D"],
    action_BHA: Float[Tensor, "B H A"],
    draw: Draw,
) -> Float[Tensor, "B H"]:
    """The loss of each action step before masking.

    Args:
        student: learns.
        average: its moving average.
        path: the teacher's chain.
        config: which loss.
        condition_BOD: what student and teacher see.
        action_BHA: in normalised units; only paired does without them, but for clean prefixes.
        draw: noise, noise time, prefix.
    """
    if config.method == "paired":
        x_BHA = torch.where(draw.prefix_BH[..., None], action_BHA, draw.noise_BHA)
        return paired_error(student, path, condition_BOD, x_BHA, draw.prefix_BH)
    loss = consistency_error if config.method == "consistency" else shortcut_error
    return loss(student, average, path, config, condition_BOD, action_BHA, draw)


def objective(teacher: ChunkPolicy, config: DistillConfig) -> Callable[..., Float[Tensor, "B H"]]:
    """The loss as imitation takes it: of (student, its average, batch, draw)."""
    path = LinearPath(teacher, config.teacher_steps)

    def error(student: StudentPolicy, average: StudentPolicy, batch: WindowBatch, draw: Draw) -> Tensor:
        condition_BOD = student.condition(batch.observation)
        action_BHA = student.normalize_action(batch.action_BHA, batch.observation)
        return distill_error(student, average, path, config, condition_BOD, action_BHA, draw)

    return error
