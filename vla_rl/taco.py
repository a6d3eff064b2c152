"""The selection stage: fit what picks among a policy's candidates on its training data, and see on selection scenes whether it helps.

The policy is not changed. What is left as ``policy`` is the selector with it if it won on the selection scenes, else the policy alone.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_rl.algos.feature_search import FoundFeatures, SearchConfig, search_features
from vla_rl.algos.iql import load_critic
from vla_rl.algos.progress_head import ProgressHead, progress_of
from vla_rl.algos.pseudo_count.base import CountConfig, PseudoCount
from vla_rl.algos.pseudo_count.coin_flipping import CoinFlippingConfig
from vla_rl.algos.pseudo_count.leverage import LeverageConfig
from vla_rl.data.reader import load_datasets
from vla_rl.data.windows import Windows
from vla_rl.evaluate import Arena, compare
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.perception import encoded
from vla_rl.inference.rules import SMALLEST_COUNT, SelectorConfig
from vla_rl.inference.selector_checkpoint import Selector, save_selector
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy
from vla_rl.preconditions import require_own, require_usable
from vla_rl.runtime.checkpoints import folder_digest, load_tensors, save_folder, verify_folder
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import copy_directory, exclusive, write_json


@dataclass(frozen=True)
class TacoSettings:
    """Everything that determines the selector, beside policy, data and task.

    search: features of the training data
    count: the pseudo-count
    select: how a chunk is picked
    successes_only: features of successful episodes only
    selection_scenes: on which it is seen whether it helps (0: it is taken as it is)
    seed: of the policy's noise there
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    count: CountConfig = field(default_factory=CoinFlippingConfig)
    select: SelectorConfig = field(default_factory=SelectorConfig)
    successes_only: bool = False
    selection_scenes: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.selection_scenes < 0:
            raise ValueError(f"selection_scenes wants a number >= 0, got {self.selection_scenes}")


def fit_selector(
    policy_path: Path,
    demonstrations: list[Path],
    out: Path,
    settings: TacoSettings,
    open_arena: Callable[[], Arena],
    critic: Path | None = None,
) -> dict[str, Any]:
    """Fit, compare, and leave ``out/selector``, the policy in ``out/base``, and what won in ``out/policy``; return what was done.

    Args:
        policy_path: a chunk policy.
        demonstrations: what it was trained on.
        out: run folder.
        settings: everything else.
        open_arena: opens the task, where selector and policy are compared.
        critic: folder of a critic of the offline stage, for rules that ask for Q.

    Raises:
        UserError: policy, critic or data cannot be used, or ``out`` holds a run of other settings.
    """
    policy = load_policy(policy_path)
    policy.see_latents()
    data = encoded(load_datasets(demonstrations), policy)
    (require_usable if settings.select.asks_progress else require_own)(data, policy)
    folder = resolve_policy(policy_path)
    if critic is not None and not settings.select.asks_q:
        raise UserError(f"rule {settings.select.rule} asks no critic; leave --critic out")
    judge = None if critic is None else load_critic(critic, policy)
    episodes = list(range(data.num_episodes))
    if settings.successes_only:
        if "success" not in data.episodes:
            raise UserError("the data do not say which episodes succeeded; leave --successes-only out")
        episodes = [i for i in episodes if bool(data.episodes["success"][i])]
        if not episodes:
            raise UserError(f"none of the {data.num_episodes} episodes succeeded; leave --successes-only out")
    windows = Windows(data, policy.config.observation_steps, policy.config.chunk_steps, episodes)
    # what is wrong with it is said before the work
    arena = open_arena().through(policy) if settings.selection_scenes else None
    with contextlib.closing(arena.env) if arena else contextlib.nullcontext(), exclusive(out):
        digests = {"policy": folder_digest(folder), "data": data.digest}
        claim_folder(out, {**encode(settings), **digests, "critic": critic and folder_digest(critic)})
        if not (out / "base").exists():
            copy_directory(folder, out / "base")
        results: dict[str, Any] = {"kept": True}
        count = progress = None
        levels: tuple[float, ...] = ()
        if settings.select.asks_count:
            found = _features(policy, windows, settings, out / "features")
            results |= {
                "windows": len(found.window_W),
                "nearest_distance": found.nearest,
                "first_distance": found.first,
            }
            count = settings.count.build(found.features_WF.shape[1])
            count.fit(found.features_WF)
            levels = own_levels(count, found.features_WF)
            if settings.select.asks_progress:
                progress = ProgressHead(found.features_WF.shape[1], LeverageConfig())
                progress.fit(found.features_WF, progress_of(windows, found.window_W))
        selector = Selector(settings.select, count, levels, progress, judge if settings.select.asks_q else None)
        sampler = selector.sampler(policy)  # what a rule lacks is missed before anything is written
        shutil.rmtree(out / "selector", ignore_errors=True)
        save_selector(selector, out / "base", "base", out / "selector", digests)
        if arena is not None:
            agents = {"first": PolicyAgent(policy), "selected": PolicyAgent(policy, sampler)}
            scenes = settings.selection_scenes
            paired, compared = compare(agents, arena, scenes, settings.seed, first="first", second="selected")
            results |= {**compared, "kept": paired.low > 0}
        shutil.rmtree(out / "policy", ignore_errors=True)
        copy_directory(out / "selector" if results["kept"] else folder, out / "policy")
        write_json(out / "results.json", results)
    return results


def _features(policy: ChunkPolicy, windows: Windows, settings: TacoSettings, path: Path) -> FoundFeatures:
    """Search, or read what an earlier run found."""
    if not path.exists():
        found = search_features(policy, windows, settings.search, settings.select.features)
        tensors = {"window_W": found.window_W, "features_WF": found.features_WF}
        meta = {"kind": "features", "nearest": found.nearest, "first": found.first}
        save_folder(path, tensors={"features": tensors}, texts={}, meta=meta)
    told: dict[str, Any] = verify_folder(path)
    kept = load_tensors(path, "features")
    return FoundFeatures(kept["window_W"], kept["features_WF"], told["nearest"], told["first"])


def own_levels(count: PseudoCount, features_NF: Tensor) -> tuple[float, ...]:
    """Percentiles 0 to 100 of the logarithm of the counts of what it was fitted on, each one's own place in it taken off."""
    counts_N = torch.cat([count.score(rows) for rows in features_NF.split(1024)]) - 1
    return tuple(counts_N.clamp_min(SMALLEST_COUNT).log().quantile(torch.linspace(0, 1, 101)).tolist())
