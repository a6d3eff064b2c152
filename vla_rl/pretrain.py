"""The imitation stage: data sets in, a policy folder out; may be killed at any instant and started again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vla_rl.algos.bc import BCConfig
from vla_rl.data.reader import EpisodeData, load_dataset, load_datasets
from vla_rl.data.windows import Windows
from vla_rl.lesson import Lesson, LoopConfig, Pairing, teach
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.checkpoint import encode_policy, load_policy, resolve_policy, save_policy
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.joint import JointPolicy, JointWindows
from vla_rl.policies.records import PolicySpec, selected
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import exclusive, sha256_text
from vla_rl.runtime.seeding import derive_seed, numpy_generator
from vla_rl.types import LATENT

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class PretrainSettings(LoopConfig):
    """Everything that determines the weights, beside the data.

    policy: head and net
    bc: optimisation
    seed: of initial weights, split and all draws
    validation_share: share of episodes held out
    successes_only: train on successful episodes only
    joint: the data sets are of several kinds of robots, whose policies share a trunk; each leaves its own, TASK/policy
    mixed_precision: bfloat16 where there is a GPU
    """

    policy: PolicyConfig = field(default_factory=FlowConfig)
    bc: BCConfig = field(default_factory=BCConfig)
    seed: int = 0
    validation_share: float = 0.05
    successes_only: bool = True
    joint: bool = False
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share wants a number in [0, 1), got {self.validation_share}")

    @property
    def loop(self) -> LoopConfig:
        """When is looked, and when is kept."""
        return LoopConfig(self.validation_samples, self.validate_every, self.checkpoint_every, self.patience)


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
    if settings.joint:
        return imitate_jointly(roots, out, settings)
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
    identity = _identity(data.digest, settings)
    if initial is not None:
        identity["initial"] = folder_digest(resolve_policy(initial))
    windows, held_out, episodes = _windows(data, settings)
    weight_W = None if weigh is None else weigh(windows)
    if weight_W is not None:
        identity["weights"] = sha256_text(str(weight_W.numpy().tobytes()))
    if initial is None:
        policy = build_policy(windows, settings.policy, settings.seed, like)
    else:
        policy = load_policy(initial).train()
        if LATENT in data.observation_spec:
            policy.see_latents()

    def leave(learnt: ChunkPolicy, out: Path, step: int) -> None:
        _leave(learnt, out, {"data": data.digest, "seed": settings.seed, "steps": step})

    lesson = Lesson(policy, windows, held_out, episodes, leave, identity, weight_W, objective, pair)
    return teach(lesson, out, settings.bc, settings.loop, settings.seed, accelerator)


def _identity(digest: str, settings: PretrainSettings) -> dict[str, Any]:
    """Everything that determines the weights."""
    others = {k: v for k, v in encode(settings).items() if k != "policy"}
    return {"data": digest, "policy": encode_policy(settings.policy), **others}


def _windows(data: EpisodeData, settings: PretrainSettings) -> tuple[Windows, Windows | None, int]:
    """Windows to train on, those to validate on, and the number of training episodes."""
    training, validation = split_episodes(data, settings)
    steps, chunk = settings.policy.observation_steps, settings.policy.chunk_steps
    held_out = Windows(data, steps, chunk, validation) if validation else None
    return Windows(data, steps, chunk, training), held_out, len(training)


def _leave(policy: ChunkPolicy, out: Path, meta: dict[str, Any]) -> None:
    if not (out / "policy").exists():
        save_policy(policy, out / "policy", meta)


def imitate_jointly(roots: list[Path], out: Path, settings: PretrainSettings) -> dict[str, Any]:
    """Train one trunk on the data sets of several kinds of robots; leave a policy for each, ``out/TASK/policy``, by its first set's task.

    Every data set is drawn from equally often. ``relative_actions`` is for those robots whose actions are absolute.

    Args:
        roots: data sets; those of one robot, with the same observations, share all of a policy.
        out: run folder.
        settings: everything else that determines the weights.

    Raises:
        UserError: as ``pretrain``.
    """
    from accelerate import Accelerator

    groups: dict[str, list[Path]] = {}
    for root in roots:
        found = load_dataset(root)
        spec = selected(PolicySpec(found.observation_spec, found.action_spec, ""), settings.policy.observations)
        kind = json.dumps([found.action_spec.to_dict(), {k: f.to_dict() for k, f in spec.items()}], sort_keys=True)
        groups.setdefault(kind, []).append(root)
    members: dict[str, ChunkPolicy] = {}
    training, held, weights, digests, episodes = [], [], [], [], 0
    for mine in groups.values():
        data = load_datasets(mine)
        data = data.seen(
            selected(PolicySpec(data.observation_spec, data.action_spec, ""), settings.policy.observations)
        )
        windows, held_out, count = _windows(data, settings)
        absolute = data.action_spec.mode == "absolute"
        mine_config = replace(settings.policy, relative_actions=settings.policy.relative_actions and absolute)
        members[data.task] = build_policy(windows, mine_config, settings.seed)
        ends = torch.tensor([load_dataset(root).num_frames for root in mine]).cumsum(0)
        set_W = torch.bucketize(windows.frames_W, ends, right=True)
        weights.append(1.0 / torch.bincount(set_W, minlength=len(mine)).float()[set_W])
        training.append(windows)
        held += [held_out] if held_out is not None else []
        digests.append(data.digest)
        episodes += count
    policy = JointPolicy(members)
    digest = sha256_text("".join(digests))

    def leave(learnt: JointPolicy, out: Path, step: int) -> None:
        for name, member in zip(members, learnt.policies(), strict=True):
            _leave(member, out / name, {"data": digest, "seed": settings.seed, "steps": step})

    joint_held = JointWindows(held) if len(held) == len(training) else None
    lesson = Lesson(
        policy, JointWindows(training), joint_held, episodes, leave, _identity(digest, settings), torch.cat(weights)
    )
    with exclusive(out):
        return teach(
            lesson, out, settings.bc, settings.loop, settings.seed, Accelerator(cpu=not torch.cuda.is_available())
        )
