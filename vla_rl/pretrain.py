"""The imitation stage: data sets in, a policy folder out; may be killed at any instant and started again."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from vla_rl.algos.bc import BCConfig, BehaviourCloning
from vla_rl.data.reader import EpisodeData, load_datasets
from vla_rl.data.windows import Windows
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.checkpoint import encode_policy, load_policy, resolve_policy, save_policy
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import Draw, PolicySpec, selected
from vla_rl.runtime.checkpoints import folder_digest, keep_newest, load_tensors, newest, save_folder, verify_folder
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import exclusive, sha256_text, write_json
from vla_rl.runtime.metrics import MetricsLog
from vla_rl.runtime.seeding import derive_seed, numpy_generator
from vla_rl.types import LATENT

if TYPE_CHECKING:
    from accelerate import Accelerator

# windows and how many are wanted of them (None: as many as there shall be) -> those that are learnt from, the random part of each
Pairing = Callable[[Windows, int | None], tuple[Windows, Draw]]


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that determines the weights, beside the data.

    policy: head and net
    bc: optimisation
    seed: of initial weights, split and all draws
    validation_share: share of episodes held out
    successes_only: train on successful episodes only
    validation_samples: windows in the validation loss
    validate_every: gradient steps between validations and log entries
    checkpoint_every: gradient steps between checkpoints
    patience: validations without a better loss before training stops (0: never)
    mixed_precision: bfloat16 where there is a GPU
    """

    policy: PolicyConfig = field(default_factory=FlowConfig)
    bc: BCConfig = field(default_factory=BCConfig)
    seed: int = 0
    validation_share: float = 0.05
    successes_only: bool = True
    validation_samples: int = 2048
    validate_every: int = 500
    checkpoint_every: int = 500
    patience: int = 0
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share wants a number in [0, 1), got {self.validation_share}")
        if min(self.validate_every, self.checkpoint_every, self.validation_samples) < 1:
            raise ValueError("validate_every, checkpoint_every and validation_samples want at least 1")
        if self.patience < 0:
            raise ValueError(f"patience wants a number of validations >= 0 (0: never stop early), got {self.patience}")


def split_episodes(data: EpisodeData, settings: PretrainSettings) -> tuple[list[int], list[int]]:
    """Episodes to train on and to validate on."""
    usable = list(range(data.num_episodes))
    if settings.successes_only and "success" in data.episodes:
        usable = [i for i in usable if bool(data.episodes["success"][i])]
        if not usable:
            raise UserError(
                f"none of the {data.num_episodes} episodes succeeded; train on all with --successes-only false"
            )
    if settings.patience and not settings.validation_share:
        raise UserError("patience wants held-out episodes: give a validation_share above 0")
    held = round(settings.validation_share * len(usable))
    if settings.validation_share > 0 and len(usable) > 1:
        held = max(held, 1)
    if held >= len(usable):
        raise UserError(
            f"validation_share {settings.validation_share} leaves none of the {len(usable)} usable episodes to train on"
        )
    order = numpy_generator(settings.seed, "split").permutation(len(usable))
    validation = sorted(usable[i] for i in order[:held])
    return sorted(set(usable) - set(validation)), validation


def build_policy(windows: Windows, config: PolicyConfig, seed: int, like: ChunkPolicy | None = None) -> ChunkPolicy:
    """Fresh weights from ``seed``, normalisers fitted on the data, specs taken from it.

    Args:
        windows: of the data.
        config: of the policy.
        seed: of the weights.
        like: a policy whose encoder is taken over, frozen, where it has one: the data are latents of it.
    """
    data = windows.data
    torch.manual_seed(derive_seed(seed, "weights"))
    if like is None or like.encoder is None:
        policy = config.build(PolicySpec(data.observation_spec, data.action_spec, data.task))
    else:
        policy = config.build(like.full_spec)
        assert policy.encoder is not None
        policy.encoder.load_state_dict(like.encoder.state_dict())
        policy.see_latents()
    policy.fit_normalizers(windows)
    if policy.encoder is not None and policy.encoder.words is not None:
        policy.encoder.words.learn(data.tasks)
    return policy


def pretrain(roots: list[Path], out: Path, settings: PretrainSettings) -> dict[str, Any]:
    """Train and leave ``out/policy``; return what was done.

    Raises:
        UserError: the data cannot be used, ``out`` holds a run of other settings, or another process works on it.
    """
    data = load_datasets(roots)
    spec = PolicySpec(data.observation_spec, data.action_spec, data.task)
    return imitate(data.seen(selected(spec, settings.policy.observations)), out, settings)


def imitate(
    data: EpisodeData,
    out: Path,
    settings: PretrainSettings,
    *,
    weigh: Callable[[Windows], Tensor] | None = None,
    initial: Path | None = None,
    objective: Callable[..., Tensor] | None = None,
    pair: Pairing | None = None,
    like: ChunkPolicy | None = None,
) -> dict[str, Any]:
    """Train on episodes in memory and leave ``out/policy``; return what was done.

    Args:
        data: all episodes.
        out: run folder.
        settings: everything else that determines the weights.
        weigh: says how often each window is drawn, up to a factor (None: all equally).
        initial: policy to go on from, with its normalisers (None: fresh weights, normalisers fitted on the data).
        objective: error that is trained on, of (policy, average, batch, draw) (None: the policy's own).
        pair: makes of windows those that are learnt from, and the random part of each (None: windows as they are, fresh draws).
        like: of fresh weights, the policy whose encoder made the latents that the data hold (None: the data hold none).

    Raises:
        UserError: as ``pretrain``.
    """
    from accelerate import Accelerator

    cuda = torch.cuda.is_available()
    precision = "bf16" if settings.mixed_precision and cuda else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=not cuda)
    with exclusive(out) if accelerator.is_main_process else contextlib.nullcontext():
        return _train(data, out, settings, accelerator, weigh, initial, objective, pair, like)


def _train(
    data: EpisodeData,
    out: Path,
    settings: PretrainSettings,
    accelerator: Accelerator,
    weigh: Callable[[Windows], Tensor] | None,
    initial: Path | None,
    objective: Callable[..., Tensor] | None,
    pair: Pairing | None,
    like: ChunkPolicy | None,
) -> dict[str, Any]:
    first = accelerator.is_main_process
    resolved = {
        "data": data.digest,
        "policy": encode_policy(settings.policy),
        **{k: v for k, v in encode(settings).items() if k != "policy"},
    }
    if initial is not None:
        resolved["initial"] = folder_digest(resolve_policy(initial))
    training, validation = split_episodes(data, settings)
    steps, chunk = settings.policy.observation_steps, settings.policy.chunk_steps
    windows = Windows(data, steps, chunk, training)
    held_out = Windows(data, steps, chunk, validation) if validation else None
    weight_W = None if weigh is None else weigh(windows)
    if weight_W is not None:
        resolved["weights"] = sha256_text(str(weight_W.numpy().tobytes()))
    number = len(windows)
    if initial is None:
        policy = build_policy(windows, settings.policy, settings.seed, like)
    else:
        policy = load_policy(initial).train()
        if LATENT in data.observation_spec:
            policy.see_latents()
    algorithm = BehaviourCloning(policy, settings.bc, accelerator, settings.seed, objective)
    if first:
        claim_folder(out, resolved)
    accelerator.wait_for_everyone()
    best = _resume(algorithm, out / "checkpoints")
    log = MetricsLog(out, algorithm.step) if first else None
    started, begun = time.monotonic(), algorithm.step
    draws: Draw | None = None
    held_draws: Draw | None = None
    if pair is not None and algorithm.step < settings.bc.steps:
        windows, draws = pair(windows, None)
    if pair is not None and held_out is not None:
        held_out, held_draws = pair(held_out, settings.validation_samples)

    def stopped_early() -> bool:
        return bool(settings.patience and best["bad"] >= settings.patience)

    bar = tqdm(
        total=settings.bc.steps,
        initial=algorithm.step,
        desc="pretrain",
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 30,
        disable=not first,
    )
    losses: list[float] = []
    while algorithm.step < settings.bc.steps and not stopped_early():
        metrics = algorithm.update(windows, weight_W, draws)
        if math.isfinite(metrics["train/loss"]):  # a step that was dropped says nothing
            losses.append(metrics["train/loss"])
        bar.update()
        step, last = algorithm.step, algorithm.step == settings.bc.steps
        if (step % settings.validate_every == 0 or last) and first:
            metrics["train/loss"] = sum(losses) / max(len(losses), 1)
            losses = []
            if held_out is not None:
                loss = algorithm.validation_loss(held_out, settings.validation_samples, held_draws)
                metrics["validation/loss"] = loss
                improved = loss < best["loss"]
                best = {"loss": loss, "step": step, "bad": 0} if improved else {**best, "bad": best["bad"] + 1}
                bar.set_postfix(loss=f"{metrics['train/loss']:.4f}", validation=f"{loss:.4f}", refresh=False)
            if log:
                log.write(step, metrics)
        if settings.patience:
            best = _broadcast(best, accelerator)
        if (step % settings.checkpoint_every == 0 or last or stopped_early()) and first:
            _checkpoint(algorithm, out / "checkpoints", best)
    bar.close()
    if log:
        log.close()
    seconds = time.monotonic() - started
    if first and not (out / "policy").exists():
        meta = {"data": data.digest, "seed": settings.seed, "steps": algorithm.step}
        save_policy(algorithm.averaged_policy, out / "policy", meta)
    accelerator.wait_for_everyone()
    results = {
        "gradient_steps": algorithm.step,
        "episodes": len(training),
        "windows": number,
        "parameters": sum(p.numel() for p in algorithm.policy.parameters()),
        "validation_loss": None
        if held_out is None
        else algorithm.validation_loss(held_out, settings.validation_samples, held_draws),
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
