"""Distil a diffusion or flow policy into a student that jumps from noise to action.

Three losses. Consistency distillation at random noise times (arXiv 2303.01469, alg. 2; Consistency Policy, 2405.07503; RL-100's head,
2510.14830, eq. 15): where the student lands from x_k is where it lands from the teacher's next state, or where the teacher itself lands.
Paired noise: regression of the teacher's output from the same noise (what RL-100's code does). Shortcut (2410.12557; SnapFlow,
2604.05656): small steps are the teacher's, a large one is two halves of the student's own. The teacher is only ever read.

Differs: all happens on the line x = (1 - tau) noise + tau action, onto which a diffusion teacher's states are scaled, so that one student
serves both kinds; shortcut's smallest steps are the teacher's instead of the data's, which have
more spread, and its noise times are the teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.nets.base import NetConfig
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.flow import interpolate
from vla_rl.policies.path import LinearPath
from vla_rl.policies.records import Draw
from vla_rl.policies.student import StudentConfig, StudentPolicy, make_student
from vla_rl.runtime.seeding import derive_seed, initial_weights, torch_generator
from vla_rl.types import ACTION, ENVIRONMENT_STATE, LATENT, STATE, Observation

ANSWERED_AT_ONCE = 1024  # rows; a number of its own, so that a run that goes on gets the same answers to the bit
Method = Literal["consistency", "paired", "shortcut"]


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
    student: StudentPolicy, condition_BOD: Tensor, x_BHA: Tensor, fixed_BH: Tensor, answer_BHA: Tensor
) -> Float[Tensor, "B H"]:
    """Squared distance of the student's jump from noise to where the teacher got from the same noise."""
    tau_BH = fixed_BH.to(x_BHA.dtype)
    return (student.jump(x_BHA, tau_BH, 1 - tau_BH, condition_BOD) - answer_BHA).square().mean(-1)


def _answer(path: LinearPath, condition_BOD: Tensor, x_BHA: Tensor, fixed_BH: Tensor) -> Tensor:
    """Where the teacher's whole chain ends."""
    start_B = torch.zeros(len(x_BHA), dtype=torch.long, device=x_BHA.device)
    return path.end(x_BHA, start_B, condition_BOD, fixed_BH)


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
    fixed_BH = draw.prefix_BH
    tau_K1 = path.tau_K1.to(action_BHA.device)
    small_B, from_B, until_B = _jumps(draw.uniform_B, path.steps, config.flow_share)
    middle_B = (from_B + until_B) // 2

    def at(k_B: Tensor) -> Tensor:
        return torch.where(fixed_BH, 1.0, tau_K1[k_B][:, None])

    tau_BH, step_BH = at(from_B), at(until_B) - at(from_B)
    x_BHA = interpolate(draw.noise_BHA, action_BHA, tau_BH)
    judge = average if config.target == "ema" else student
    with torch.no_grad():
        landing_BHA = x_BHA.clone()
        landing_BHA[small_B] = path.step(x_BHA[small_B], from_B[small_B], condition_BOD[small_B], fixed_BH[small_B])
        far_B = ~small_B
        middle_RHA = judge.jump(x_BHA[far_B], tau_BH[far_B], (at(middle_B) - tau_BH)[far_B], condition_BOD[far_B])
        landing_BHA[far_B] = judge.jump(
            middle_RHA, at(middle_B)[far_B], (at(until_B) - at(middle_B))[far_B], condition_BOD[far_B]
        )
        length_BH = torch.where(fixed_BH, 1.0, step_BH)
        target_BHA = (landing_BHA - x_BHA) / length_BH[..., None]
    return (student.net(x_BHA, tau_BH, condition_BOD, step_BH) - target_BHA).square().mean(-1)


def _jumps(uniform_B: Float[Tensor, " B"], steps: int, small_share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which jumps are the teacher's steps, and between which of its states they go: the others have any length of two steps and more."""
    small_B = uniform_B < small_share
    rest_B = torch.where(small_B, uniform_B / small_share, (uniform_B - small_share) / (1 - small_share))
    if steps == 1:
        return torch.ones_like(small_B), torch.zeros_like(small_B).long(), torch.ones_like(small_B).long()
    length_B, other_B = split(rest_B, steps - 1)
    length_B = torch.where(small_B, 1, length_B + 2)
    from_B = (torch.where(small_B, rest_B, other_B) * (steps + 1 - length_B)).long().clamp(max=steps - length_B)
    return small_B, from_B, from_B + length_B


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
        answer_BHA = _answer(path, condition_BOD, x_BHA, draw.prefix_BH)
        return paired_error(student, condition_BOD, x_BHA, draw.prefix_BH, answer_BHA)
    loss = consistency_error if config.method == "consistency" else shortcut_error
    return loss(student, average, path, config, condition_BOD, action_BHA, draw)


class AnsweredWindows(Windows):
    """Windows drawn once, whose actions are where the teacher's chain ends from a noise drawn for each: pairs to regress on.

    A chain costs several times what a step of the student does, so pairs that are answered once and used in many steps save most
    of the time that method paired would take (reflow, arXiv 2209.03003, trains on such a set too). A teacher answers anywhere, not only
    where data are: some observations lie at a random place on the line between those of two windows, as a student that has only seen
    the states of demonstrations goes its own ways beside them.
    """

    def __init__(
        self, windows: Windows, teacher: ChunkPolicy, config: DistillConfig, count: int, seed: int, between: float = 0.0
    ) -> None:
        """Draw and answer.

        Args:
            windows: to draw from.
            teacher: answers.
            config: how many steps its chain has.
            count: number of pairs.
            seed: of windows and noises.
            between: share of the pairs (of those without a prefix) whose observation is no window's own.
        """
        self.__dict__.update(windows.__dict__)
        generator = torch_generator(seed, "answers")
        self._others = copy.copy(windows)
        for part in (self, self._others):
            part.frames_W = windows.frames_W[torch.randint(0, len(windows), (count,), generator=generator)]
        self.draw = teacher.draw(count, generator)
        place_W, lot_W = torch.rand(2, count, generator=generator)
        whole_W = ~self.draw.prefix_BH.any(1)  # a prefix goes with the state it was recorded in
        self._place_W = place_W * (whole_W & (lot_W < between))
        path, device = LinearPath(teacher, config.teacher_steps), teacher.action_normalizer.scale_SD.device
        self.answer_WHA = torch.zeros(count, *teacher.chunk_shape)
        for rows in torch.arange(count).split(ANSWERED_AT_ONCE):
            observation, draw = self._observe(rows).to(device), self.draw.rows(rows).to(device)
            known_BHA, _ = self.gather(ACTION, rows, self._future_H)
            action_BHA = teacher.normalize_action(known_BHA.to(device), observation)
            x_BHA = torch.where(draw.prefix_BH[..., None], action_BHA, draw.noise_BHA)
            end_BHA = _answer(path, teacher.condition(observation), x_BHA, draw.prefix_BH)
            self.answer_WHA[rows] = teacher.unnormalize_action(end_BHA, observation).cpu()

    def batch(self, window_B: Int[Tensor, " B"]) -> WindowBatch:
        """See ``Windows``; the actions are the teacher's."""
        return WindowBatch(self._observe(window_B), self.answer_WHA[window_B], self.padding(window_B))

    def _observe(self, window_B: Int[Tensor, " B"]) -> Observation:
        features = {}
        for key in self.data.observation_spec:
            features[key], _ = self.gather(key, window_B, self._history_O)
            if key in (STATE, ENVIRONMENT_STATE, LATENT):
                other_BOD, _ = self._others.gather(key, window_B, self._history_O)
                features[key] = features[key].lerp(other_BOD, self._place_W[window_B, None, None])
        return Observation.from_features(features, self.instructions(window_B))


def answer_error(
    student: StudentPolicy, average: StudentPolicy, batch: WindowBatch, draw: Draw
) -> Float[Tensor, "B H"]:
    """``paired_error`` on what the teacher has answered, which the batch of ``AnsweredWindows`` holds."""
    answer_BHA = student.normalize_action(batch.action_BHA, batch.observation)
    x_BHA = torch.where(draw.prefix_BH[..., None], answer_BHA, draw.noise_BHA)
    return paired_error(student, student.condition(batch.observation), x_BHA, draw.prefix_BH, answer_BHA)


def objective(teacher: ChunkPolicy, config: DistillConfig) -> Callable[..., Float[Tensor, "B H"]]:
    """The loss as imitation takes it: of (student, its average, batch, draw)."""
    path = LinearPath(teacher, config.teacher_steps)

    def error(student: StudentPolicy, average: StudentPolicy, batch: WindowBatch, draw: Draw) -> Tensor:
        condition_BOD = student.condition(batch.observation)
        action_BHA = student.normalize_action(batch.action_BHA, batch.observation)
        return distill_error(student, average, path, config, condition_BOD, action_BHA, draw)

    return error


def student_of(
    teacher: ChunkPolicy, config: DistillConfig, net: NetConfig | None, steps: int, seed: int
) -> StudentPolicy:
    """A student before its first lesson, for a method."""
    shared = {f.name: getattr(teacher.config, f.name) for f in fields(PolicyConfig)}
    shared["net"] = net or teacher.config.net
    levels = tuple(LinearPath(teacher, config.teacher_steps).tau_K1.tolist()) if config.method == "shortcut" else ()
    student_config = StudentConfig(**shared, sample_steps=steps, levels=(0.0, *levels[1:]) if levels else ())
    with initial_weights(derive_seed(seed, "student weights")):
        return make_student(teacher, student_config)
