"""The loop of imitation: draw, step, validate, keep, leave a policy; may be killed at any instant and started again."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from vla_rl.algos.bc import BCConfig, BehaviourCloning
from vla_rl.data.windows import Windows
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.joint import JointPolicy, JointWindows
from vla_rl.policies.records import Draw
from vla_rl.runtime.checkpoints import keep_newest, load_tensors, newest, save_folder, verify_folder
from vla_rl.runtime.config import claim_folder
from vla_rl.runtime.files import write_json
from vla_rl.runtime.metrics import MetricsLog

if TYPE_CHECKING:
    from accelerate import Accelerator

# windows and how many are wanted of them (None: as many as there shall be) -> those that are learnt from, the random part of each
Pairing = Callable[[Windows, int | None], tuple[Windows, Draw]]


@dataclass(frozen=True)
class LoopConfig:
    """When is looked, and when is kept.

    validation_samples: windows in the validation loss
    validate_every: gradient steps between validations and log entries
    checkpoint_every: gradient steps between checkpoints
    patience: validations without a better loss before training stops (0: never)
    """

    validation_samples: int = 2048
    validate_every: int = 500
    checkpoint_every: int = 500
    patience: int = 0

    def __post_init__(self) -> None:
        if min(self.validate_every, self.checkpoint_every, self.validation_samples) < 1:
            raise ValueError("validate_every, checkpoint_every and validation_samples want at least 1")
        if self.patience < 0:
            raise ValueError(f"patience wants a number of validations >= 0 (0: never stop early), got {self.patience}")


@dataclass(frozen=True)
class Lesson:
    """What is taught to whom.

    policy: learns
    windows: of the training episodes
    held_out: of the others (None: there are none)
    episodes: number of training episodes
    leave: writes what was learnt into the run folder
    identity: everything that determines the weights
    weight_W: how often each window is drawn, up to a factor (None: all equally)
    objective: error that is trained on (None: the policy's own)
    pair: makes of windows those that are learnt from, and the random part of each (None: windows as they are, fresh draws)
    """

    policy: ChunkPolicy | JointPolicy
    windows: Windows | JointWindows
    held_out: Windows | JointWindows | None
    episodes: int
    leave: Callable[[Any, Path, int], None]
    identity: Mapping[str, Any] = field(default_factory=dict)
    weight_W: Tensor | None = None
    objective: Callable[..., Tensor] | None = None
    pair: Pairing | None = None


def teach(
    lesson: Lesson, out: Path, bc: BCConfig, loop: LoopConfig, seed: int, accelerator: Accelerator
) -> dict[str, Any]:
    """Train until the budget is spent; return what was done.

    Args:
        lesson: what is taught.
        out: run folder.
        bc: optimisation.
        loop: when is looked, and when is kept.
        seed: of all draws.
        accelerator: device, precision, processes.

    Raises:
        UserError: ``out`` holds a run of other settings.
    """
    first = accelerator.is_main_process
    windows, held_out, weight_W, number = lesson.windows, lesson.held_out, lesson.weight_W, len(lesson.windows)
    algorithm = BehaviourCloning(lesson.policy, bc, accelerator, seed, lesson.objective)
    if first:
        claim_folder(out, dict(lesson.identity))
    accelerator.wait_for_everyone()
    best = _resume(algorithm, out / "checkpoints")
    log = MetricsLog(out, algorithm.step) if first else None
    started, begun = time.monotonic(), algorithm.step
    draws: Draw | None = None
    held_draws: Draw | None = None
    if lesson.pair is not None and isinstance(windows, Windows):
        if algorithm.step < bc.steps:
            windows, draws = lesson.pair(windows, None)
        if isinstance(held_out, Windows):
            held_out, held_draws = lesson.pair(held_out, loop.validation_samples)

    def stopped_early() -> bool:
        return bool(loop.patience and best["bad"] >= loop.patience)

    bar = tqdm(
        total=bc.steps,
        initial=algorithm.step,
        desc="pretrain",
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 30,
        disable=not first,
    )
    losses: list[float] = []
    while algorithm.step < bc.steps and not stopped_early():
        metrics = algorithm.update(windows, weight_W, draws)
        if math.isfinite(metrics["train/loss"]):  # a step that was dropped says nothing
            losses.append(metrics["train/loss"])
        bar.update()
        step, last = algorithm.step, algorithm.step == bc.steps
        if (step % loop.validate_every == 0 or last) and first:
            metrics["train/loss"] = sum(losses) / max(len(losses), 1)
            losses = []
            if held_out is not None:
                loss = algorithm.validation_loss(held_out, loop.validation_samples, held_draws)
                metrics["validation/loss"] = loss
                improved = loss < best["loss"]
                best = {"loss": loss, "step": step, "bad": 0} if improved else {**best, "bad": best["bad"] + 1}
                bar.set_postfix(loss=f"{metrics['train/loss']:.4f}", validation=f"{loss:.4f}", refresh=False)
            if log:
                log.write(step, metrics)
        if loop.patience:
            best = _broadcast(best, accelerator)
        if (step % loop.checkpoint_every == 0 or last or stopped_early()) and first:
            _checkpoint(algorithm, out / "checkpoints", best)
    bar.close()
    if log:
        log.close()
    seconds = time.monotonic() - started
    if first:
        lesson.leave(algorithm.averaged_policy, out, algorithm.step)
    accelerator.wait_for_everyone()
    results = {
        "gradient_steps": algorithm.step,
        "episodes": lesson.episodes,
        "windows": number,
        "parameters": sum(p.numel() for p in algorithm.policy.parameters()),
        "validation_loss": None
        if held_out is None
        else algorithm.validation_loss(held_out, loop.validation_samples, held_draws),
        "best_validation_loss": best["loss"] if best["step"] else None,
        "best_validation_step": best["step"],
        "timing": {"seconds": seconds, "steps_per_s": (algorithm.step - begun) / seconds if seconds else 0.0},
    }
    if first:
        write_json(out / "results.json", results)
    return results


def _checkpoint(algorithm: BehaviourCloning, root: Path, best: dict[str, Any]) -> None:
    path = root / f"step-{algorithm.step:08d}"
    if not path.exists():
        save_folder(
            path, tensors={"training": algorithm.state_dict()}, texts={}, meta={"kind": "training", "best": best}
        )
    keep_newest(root, 2)


def _resume(algorithm: BehaviourCloning, root: Path) -> dict[str, Any]:
    """Load the newest checkpoint, if there is one; return the best validation so far."""
    path = newest(root)
    if path is None:
        return {"loss": 1e30, "step": 0, "bad": 0}
    meta = verify_folder(path)
    algorithm.load_state_dict(load_tensors(path, "training"))
    return dict(meta["best"])


def _broadcast(best: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([best])[0] if accelerator.num_processes > 1 else best
