"""The distillation stage: a teacher in, a student out that needs one net call, behind a gate that compares them on the same scenes.

The student is a policy of its own; the teacher's files are only read. What the stage leaves as ``policy`` is the student if a paired
test on selection scenes bounds what it loses, and otherwise a copy of the teacher.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vla_rl.algos.bc import BCConfig
from vla_rl.algos.distill import AnsweredWindows, DistillConfig, answer_error, objective, student_of
from vla_rl.data.reader import load_datasets
from vla_rl.data.windows import Windows
from vla_rl.evaluate import Arena, compare
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.perception import encoded
from vla_rl.nets.base import NetConfig
from vla_rl.policies.checkpoint import load_policy, resolve_policy, save_policy
from vla_rl.policies.records import Draw
from vla_rl.preconditions import require_own
from vla_rl.pretrain import PretrainSettings, imitate
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import copy_directory, exclusive, write_json


@dataclass(frozen=True)
class RetentionConfig:
    """What the student may lose.

    selection_scenes: on which student and teacher are compared (0: the student is taken as it is)
    largest_loss: of success; the 95 % bound of the paired difference has to be above minus this
    """

    selection_scenes: int = 250
    largest_loss: float = 0.05

    def __post_init__(self) -> None:
        if self.selection_scenes < 0 or not 0 < self.largest_loss <= 1:
            raise ValueError(
                f"selection_scenes wants a number >= 0, largest_loss a share in (0, 1], got {self.selection_scenes}, "
                f"{self.largest_loss}"
            )


@dataclass(frozen=True)
class StudentBCConfig(BCConfig):
    """Optimisation with a student's defaults: its targets have no spread, so that it can learn fast."""

    batch_size: int = 256
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class DistillSettings:
    """Everything that determines the weights, beside teacher, data and task.

    distill: what the student is taught
    net: the student's (none: the teacher's, with its weights to begin with)
    sample_steps: jumps per chunk
    pairs: of method paired: observations with noises that the teacher answers once, before training (0: fresh ones in each step)
    between: share of the pairs whose observation lies between two of the data's, where a teacher answers as well (states only)
    bc: optimisation
    retention: what the student may lose
    seed: of all draws
    """

    distill: DistillConfig = field(default_factory=DistillConfig)
    net: NetConfig | None = None
    sample_steps: int = 1
    pairs: int = 262_144
    between: float = 0.5
    bc: StudentBCConfig = field(default_factory=StudentBCConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample_steps < 1 or self.pairs < 0 or not 0 <= self.between <= 1:
            raise ValueError(
                "sample_steps wants at least 1, pairs a number >= 0, between a share in [0, 1], got "
                f"{self.sample_steps}, {self.pairs} and {self.between}"
            )


def distill(
    teacher_path: Path,
    demonstrations: list[Path],
    out: Path,
    settings: DistillSettings,
    open_arena: Callable[[], Arena],
) -> dict[str, Any]:
    """Train the student and compare; leave it in ``out/student``, and it or the teacher in ``out/policy``; return what was done.

    Args:
        teacher_path: a diffusion or flow policy.
        demonstrations: data sets whose observations (and actions, but for method paired) the student is taught at.
        out: run folder.
        settings: everything else.
        open_arena: opens the task, where they are compared.

    Raises:
        UserError: teacher or data cannot be used, or ``out`` holds a run of other settings.
    """
    teacher = load_policy(teacher_path).requires_grad_(False)
    error = objective(teacher, settings.distill)  # what it refuses is refused before anything is begun
    teacher.see_latents()
    data = encoded(load_datasets(demonstrations), teacher)
    require_own(data, teacher)
    digest = folder_digest(resolve_policy(teacher_path))
    try:
        student = student_of(teacher, settings.distill, settings.net, settings.sample_steps, settings.seed)
    except ValueError as refused:
        raise UserError(str(refused)) from refused
    gate = settings.retention
    arena = open_arena() if gate.selection_scenes else None  # what is wrong with it is said before the training
    with contextlib.closing(arena.env) if arena else contextlib.nullcontext(), exclusive(out):
        claim_folder(out, {**encode(settings), "teacher": digest, "data": data.digest})
        fresh = out / "untaught"
        if not fresh.exists():
            save_policy(student, fresh, {"teacher": digest})
        config = load_policy(fresh).config
        training = PretrainSettings(policy=config, bc=settings.bc, seed=settings.seed, successes_only=False)
        if torch.cuda.is_available():
            teacher.cuda()
        answered = settings.distill.method == "paired" and settings.pairs > 0

        def pair(windows: Windows, count: int | None) -> tuple[Windows, Draw]:
            between = settings.between if count is None else 0.0  # held-out pairs are as the data are
            pairs = AnsweredWindows(windows, teacher, settings.distill, count or settings.pairs, settings.seed, between)
            return pairs, pairs.draw

        trained = imitate(
            data,
            out / "training",
            training,
            initial=fresh,
            objective=answer_error if answered else error,
            pair=pair if answered else None,
        )
        if not (out / "student").exists():
            copy_directory(out / "training" / "policy", out / "student")
        results: dict[str, Any] = {
            "method": settings.distill.method,
            "gradient_steps": trained["gradient_steps"],
            "parameters": trained["parameters"],
            "validation_loss": trained["validation_loss"],
            "kept": True,
            "timing": trained["timing"],
        }
        if arena is not None:
            agents = {
                "teacher": PolicyAgent(load_policy(teacher_path)),
                "student": PolicyAgent(load_policy(out / "student")),
            }
            scenes = gate.selection_scenes
            paired, compared = compare(agents, arena, scenes, settings.seed, first="teacher", second="student")
            results |= {**compared, "kept": paired.low > -gate.largest_loss}
        shutil.rmtree(out / "policy", ignore_errors=True)
        copy_directory(out / "student" if results["kept"] else resolve_policy(teacher_path), out / "policy")
        write_json(out / "results.json", results)
    return results
