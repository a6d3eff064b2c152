"""One-step students of diffusion and flow policies: a map from noise to action, and from any noisy action on the way.

All students live on the straight line x = (1 - tau) noise + tau action, whatever their teacher's schedule: a diffusion policy's state,
divided by signal + noise, lies on it too. Two kinds. A consistency function (arXiv 2303.01469) jumps from x_tau to the action; its boundary
condition, that it leaves the action at tau = 1 as it is, is built in by the scaling f = x + (1 - tau) net. A shortcut model (2410.12557)
jumps from any noise time that it knows to any later one, x + step * net, and so samples in 1, 2 or 3 steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vla_rl.data.windows import WindowBatch
from vla_rl.kernels import Grid, Kernel, KernelConfig
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.flow import hold_prefix, interpolate
from vla_rl.policies.records import Draw, Generated, PolicySpec, Prefix
from vla_rl.runtime.errors import UserError


@PolicyConfig.register_subclass("student")
@dataclass(frozen=True)
class StudentConfig(PolicyConfig):
    """How the student jumps.

    sample_steps: jumps per chunk; a consistency function goes back to noise between them, which takes fresh noise each time
    levels: noise times from 0 to 1 between which it is told to jump (shortcut); none: it always jumps to the action (consistency)
    """

    sample_steps: int = 1
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        most = len(self.levels) - 1 if self.levels else None
        if self.sample_steps < 1 or (most is not None and self.sample_steps > most):
            raise ValueError(
                f"sample_steps wants at least 1{f' and at most {most}' if most else ''}, got {self.sample_steps}"
            )
        if self.levels and (
            self.levels[0] != 0 or self.levels[-1] != 1 or list(self.levels) != sorted(set(self.levels))
        ):
            raise ValueError(f"levels want to rise from 0 to 1, got {self.levels}")

    def stops(self) -> list[float]:
        """Noise times at which a chunk stops on its way: evenly spaced, at levels that a shortcut knows."""
        count = self.sample_steps
        if not self.levels:
            return [k / count for k in range(count)] + [1.0]
        return [self.levels[round(k * (len(self.levels) - 1) / count)] for k in range(count + 1)]

    @property
    def told_jumps(self) -> bool:
        """See ``PolicyConfig``."""
        return bool(self.levels)

    def build(self, spec: PolicySpec) -> StudentPolicy:
        """Build the policy."""
        return StudentPolicy(self, spec)


class StudentPolicy(ChunkPolicy):
    """Jumps along the line from noise to action."""

    config: StudentConfig

    def jump(
        self,
        x_BHA: Float[Tensor, "B H A"],
        tau_BH: Float[Tensor, "B H"],
        step_BH: Float[Tensor, "B H"],
        condition_BOD: Float[Tensor, "B O D"],
    ) -> Float[Tensor, "B H A"]:
        """Where a step from tau leads; a step of zero leaves x as it is. A consistency function knows steps of 1 - tau only."""
        told_BH = step_BH if self.config.told_jumps else None
        return x_BHA + step_BH[..., None] * self.net(x_BHA, tau_BH, condition_BOD, told_BH)

    def denoising_error(self, batch: WindowBatch, draw: Draw, condition_BOD: Tensor) -> Float[Tensor, "B H"]:
        """Flow-matching error: what a shortcut model does without a teacher, for infinitely small steps.

        Raises:
            UserError: a consistency function has no error of its own; it has a teacher.
        """
        if not self.config.told_jumps:
            raise UserError("a student is trained by 'vla-rl distill' from a teacher, not by imitation")
        action_BHA = self.normalize_action(batch.action_BHA, batch.observation)
        tau_BH = torch.where(draw.prefix_BH, 1.0, draw.uniform_B[:, None])
        x_BHA = interpolate(draw.noise_BHA, action_BHA, tau_BH)
        velocity_BHA = self.net(x_BHA, tau_BH, condition_BOD, torch.zeros_like(tau_BH))
        return (velocity_BHA - (action_BHA - draw.noise_BHA)).square().mean(-1)

    def grid(self, steps: int = 0) -> Grid:
        """Raise: a student has no chain."""
        raise UserError("a student has no denoising chain to learn in; improve its teacher and distil again")

    def make_kernel(self, config: KernelConfig) -> Kernel:
        """Raise: a student has no chain."""
        self.grid()
        raise AssertionError

    def estimates(
        self, x_BHA: Tensor, output_BHA: Tensor, signal_B11: Tensor, noise_B11: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Raise: a student has no chain."""
        self.grid()
        raise AssertionError

    @property
    def noise_count(self) -> int:
        """Where it starts, and for a consistency function what it goes back to before each further jump."""
        return 1 if self.config.told_jumps else self.config.sample_steps

    def generate(self, condition_BOD: Tensor, noise_KBHA: Tensor, prefix: Prefix | None) -> Generated:
        """Jump from noise to action in ``sample_steps``."""
        x_BHA, fixed_BH = (noise_KBHA[0], None) if prefix is None else hold_prefix(noise_KBHA[0], prefix)
        clean_BHA, hidden = x_BHA, x_BHA
        told, stops = self.config.told_jumps, self.config.stops()
        for k, (tau, after) in enumerate(itertools.pairwise(stops)):
            if k and not told:
                x_BHA = torch.lerp(noise_KBHA[k], x_BHA, tau)
                x_BHA = x_BHA if fixed_BH is None else torch.where(fixed_BH[..., None], clean_BHA, x_BHA)
            step = (after if told else 1.0) - tau
            if fixed_BH is None:  # one row stands for all: this is the path whose latency counts
                tau_BH = torch.full_like(x_BHA[:1, :, 0], tau)
                hidden = self.net.hidden(x_BHA, tau_BH, condition_BOD, torch.full_like(tau_BH, step) if told else None)
                x_BHA = torch.add(x_BHA, self.net.output(hidden), alpha=step)
            else:
                tau_BH, step_BH = torch.where(fixed_BH, 1.0, tau), torch.where(fixed_BH, 0.0, step)
                hidden = self.net.hidden(x_BHA, tau_BH, condition_BOD, step_BH if told else None)
                x_BHA = x_BHA + step_BH[..., None] * self.net.output(hidden)
        return Generated(x_BHA, self.net.features(hidden))


def make_student(teacher: ChunkPolicy, config: StudentConfig) -> StudentPolicy:
    """A student with its teacher's normalisers, and with its weights where both have the same net (a warm start)."""
    student = config.build(teacher.full_spec)
    if student.encoder is not None and teacher.encoder is not None:
        student.encoder.load_state_dict(teacher.encoder.state_dict())
        if teacher.spec != teacher.full_spec:
            student.see_latents()
    student.observation_normalizer.load_state_dict(teacher.observation_normalizer.state_dict())
    student.action_normalizer.load_state_dict(teacher.action_normalizer.state_dict())
    if config.net == teacher.config.net:
        student.net.load_state_dict(
            teacher.net.state_dict(), strict=False
        )  # the jump's embedding, which is zero, is new
    return student
