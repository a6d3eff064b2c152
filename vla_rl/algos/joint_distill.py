"""A student that learns while its teacher does: L_RL + lambda L_CD (RL-100, arXiv 2510.14830, eq. 16).

The student is a module of its own and the teacher is only read, so the sum falls apart: reinforcement learning goes its way as if there
were no student, and after each of its updates the student takes some steps towards what the policy is now, on the states and chunks that
the update was made of. lambda weighs the student's loss before its gradient is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from vla_rl.algos.bc import ema_update
from vla_rl.algos.distill import DistillConfig, distill_error, student_of
from vla_rl.algos.guard import GuardedOptimizer, load_optimizer_tensors, optimizer_tensors
from vla_rl.algos.ppo import Samples
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.path import LinearPath
from vla_rl.policies.student import StudentPolicy
from vla_rl.runtime.checkpoints import part
from vla_rl.runtime.seeding import torch_generator


@dataclass(frozen=True)
class JointDistillConfig:
    """The student beside reinforcement learning.

    weight: lambda (0: no student); the student's own AdamW is blind to it but where the gradient is clipped
    distill: what it is taught
    updates: gradient steps after each update of the policy
    warmup_updates: gradient steps after the first one
    batch_size: samples per step
    learning_rate: of AdamW
    clip_norm: largest gradient norm
    ema_decay: largest decay of the moving average that is deployed
    """

    weight: float = 0.0
    distill: DistillConfig = field(default_factory=DistillConfig)
    updates: int = 20
    warmup_updates: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    clip_norm: float = 1.0
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        if self.weight < 0 or self.warmup_updates < 0 or min(self.updates, self.batch_size) < 1:
            raise ValueError(
                "weight and warmup_updates of distillation want numbers >= 0, updates and batch_size at least 1, got "
                f"{self.weight}, {self.warmup_updates}, {self.updates}, {self.batch_size}"
            )
        if not (self.learning_rate > 0 and self.clip_norm > 0 and 0 <= self.ema_decay < 1):
            raise ValueError("learning_rate and clip_norm want positive numbers, ema_decay one in [0, 1)")


class JointStudent:
    """Follows a policy that changes; ``state_dict`` is what a checkpoint or a roll-back keeps."""

    def __init__(self, student: StudentPolicy, teacher: ChunkPolicy, config: JointDistillConfig, seed: int) -> None:
        """Set up.

        Args:
            student: learns.
            teacher: the policy in training.
            config: how.
            seed: of noise and batches, which are the student's own: the policy's draws are as without it.
        """
        self.student, self.config, self.seed = student, config, seed
        self.path = LinearPath(teacher, config.distill.teacher_steps)
        self.average = AveragedModel(student, multi_avg_fn=ema_update(config.ema_decay), use_buffers=True)
        optimizer = torch.optim.AdamW(student.net.parameters(), lr=config.learning_rate)
        self.optimizer = GuardedOptimizer(optimizer, config.clip_norm, "student")
        self.steps = 0

    @property
    def deployed(self) -> StudentPolicy:
        """The student with averaged weights."""
        return self.average.module  # type: ignore[return-value]

    def update(self, samples: Samples) -> dict[str, float]:
        """Take some steps on states and chunks of the policy; return the mean loss.

        Raises:
            NonFiniteLossError: several losses in a row were not finite.
        """
        config, teacher = self.config, self.path.policy
        count = config.updates if self.steps else config.warmup_updates + config.updates
        losses = []
        for _ in range(count):
            generator = torch_generator(self.seed, "student", self.steps)
            rows = torch.randint(0, len(samples.advantage_B), (config.batch_size,), generator=generator)
            draw = teacher.draw(config.batch_size, generator)
            condition_BOD, action_BHA = samples.condition_BOD[rows], samples.chain.chunk[rows]
            error_BH = distill_error(
                self.student, self.deployed, self.path, config.distill, condition_BOD, action_BHA, draw
            )
            loss = config.weight * error_BH[~draw.prefix_BH].mean()
            self.optimizer.step(loss)
            self.average.update_parameters(self.student)
            losses.append(float(loss.detach()))
            self.steps += 1
        return {"student/loss": sum(losses) / len(losses)}

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors."""
        state = {f"now.{k}": v for k, v in self.student.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        state |= optimizer_tensors(self.optimizer.optimizer, "optimizer.")
        return {k: v.clone() for k, v in state.items()} | {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``."""
        self.student.load_state_dict(part(state, "now."))
        self.average.load_state_dict(part(state, "average."))
        load_optimizer_tensors(self.optimizer.optimizer, state, "optimizer.")
        self.steps = int(state["steps"])


def joint_student(policy: ChunkPolicy, config: JointDistillConfig, seed: int) -> JointStudent | None:
    """The student of a policy in training, or None where none is wanted."""
    if not config.weight:
        return None
    student = student_of(policy, config.distill, None, 1, seed)
    return JointStudent(student, policy, config, seed)
