"""Iterated offline reinforcement learning: roll out, merge, judge, imitate, improve behind the gate, again.

Alg. 1 of RL-100 (arXiv 2510.14830), as a program. A round is a folder with an artefact per part, each whole or absent, so that a
killed run goes on with the part it was in: ``rollouts/`` (data set), ``critic/``, ``imitation/policy``, ``dynamics/``, ``policy/`` (and
``gate.jsonl``, begun anew with it), ``results.json``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vla_rl.algos.bc import BCConfig
from vla_rl.algos.calibration import Calibration, calibrate, own_episodes
from vla_rl.algos.critic import Critic
from vla_rl.algos.dynamics import DynamicsEnsemble
from vla_rl.algos.iql import IQL, IQLConfig
from vla_rl.algos.rewards import RewardConfig, shape_rewards
from vla_rl.algos.weights import WeightingConfig, is_demonstration, window_weights
from vla_rl.data.decisions import Decisions, split_episodes
from vla_rl.data.reader import EpisodeData, load_datasets
from vla_rl.data.windows import Windows
from vla_rl.evaluate import Arena, evaluate
from vla_rl.improve import (
    NO_ANCHOR,
    ImproveSettings,
    asks_about_actions,
    blindness,
    improve,
    train_critic,
    train_dynamics,
)
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.perception import encoded
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy, save_policy
from vla_rl.preconditions import require_usable
from vla_rl.pretrain import PretrainSettings, imitate
from vla_rl.record import RolloutConfig, roll_out
from vla_rl.runtime.checkpoints import folder_digest, verify_folder
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import copy_directory, exclusive, read_json, write_json
from vla_rl.runtime.seeding import SELECTION_SCENES, torch_generator


@dataclass(frozen=True)
class OfflineSettings(ImproveSettings):
    """Everything that determines the weights, beside data, policy and task.

    rounds: M
    seed: of all draws
    retrain: imitation starts from fresh weights and normalisers each round, or goes on from the last policy's
    held_out: share of the episodes that critic and model are judged on
    calibration_samples: held-out decisions that the critic's ranking is judged on
    selection_scenes: scenes on which each round's policies are shown to the reader (0: none); no decision hangs on them
    rollout: what is collected
    weighting: what imitation draws
    bc: imitation
    reward: what learning sees
    critic: Q and V
    """

    rounds: int = 2
    seed: int = 0
    retrain: bool = True
    held_out: float = 0.15
    calibration_samples: int = 4096
    selection_scenes: int = 100
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    bc: BCConfig = field(default_factory=BCConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    critic: IQLConfig = field(default_factory=IQLConfig)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.selection_scenes < 0 or self.calibration_samples < 2:
            raise ValueError("rounds wants at least 1, selection_scenes 0, calibration_samples 2")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out wants a share in (0, 1), got {self.held_out}")
        last = self.rollout.first_scene + self.rounds * self.rollout.episodes
        if last > SELECTION_SCENES:
            raise ValueError(
                f"scenes from {SELECTION_SCENES} are for selection and tests, not for data; got scenes up to {last - 1}"
            )


def train_offline(
    demos: list[Path], policy: Path, out: Path, settings: OfflineSettings, open_arena: Callable[[], Arena]
) -> dict[str, Any]:
    """Run the rounds and leave the last one's policy in ``out/policy``; return what was done.

    Args:
        demos: data sets to begin with.
        policy: imitation policy to begin with.
        out: run folder.
        settings: everything else.
        open_arena: opens the task, where the policy is rolled out.

    Raises:
        UserError: data or policy cannot be used, or ``out`` holds a run of other settings.
    """
    start = load_policy(policy)
    start.see_latents()
    demonstrations = encoded(load_datasets(demos), start)
    require_usable(demonstrations, start)
    start.make_kernel(settings.kernel)  # what it refuses is refused before anything is begun
    success_E = torch.tensor(demonstrations.episodes["success"].to_numpy(bool))
    if settings.ppo.imitation_weight and not (success_E & is_demonstration(demonstrations)).any():
        raise UserError(NO_ANCHOR)
    arena = open_arena()
    with contextlib.closing(arena.env), exclusive(out):
        digest = folder_digest(resolve_policy(policy))
        claim_folder(out, {**encode(settings), "data": demonstrations.digest, "policy": digest, **arena.identity()})
        results, current = [], resolve_policy(policy)
        for number in range(1, settings.rounds + 1):
            folder = out / f"round-{number}"
            results.append(_Round(number, folder, demos, current, settings, arena).run())
            current = folder / "policy"
        if not (out / "policy").exists():
            save_policy(load_policy(current), out / "policy", {**verify_folder(current), "kind": "policy"})
        if (current.parent / "student").exists() and not (out / "student").exists():
            copy_directory(current.parent / "student", out / "student")
        summary = {
            "rounds": results,
            "env_steps": sum(r["env_steps"] for r in results),
            "episodes": sum(r["episodes"] for r in results),
            "accepted": sum(r["accepted"] for r in results),
            "updates_kept": sum(r["updates_kept"] for r in results),
            "candidates": sum(r["candidates"] for r in results),
        }
        write_json(out / "results.json", summary)
    return summary


@dataclass(frozen=True)
class _Verdict:
    """What critic and models are good for in a round.

    critic: of the round, or None where nothing asks for one
    calibration: how well it ranks
    model: models to improve in, or None where the policy gradient is left out
    horizon: decisions that the models may be trusted for
    why_not: why the policy gradient is left out, or None
    """

    critic: IQL | None = None
    calibration: Calibration | None = None
    model: DynamicsEnsemble | None = None
    horizon: int = 0
    why_not: str | None = None


class _Round:
    """One round; each part is skipped where its artefact is there."""

    def __init__(
        self, number: int, folder: Path, demos: list[Path], policy: Path, settings: OfflineSettings, arena: Arena
    ) -> None:
        self.number, self.folder, self.demos, self.before = number, folder, demos, policy
        self.settings, self.arena = settings, arena
        self.seed = settings.seed * 1000 + number

    def run(self) -> dict[str, Any]:
        """Do what is missing; return what happened."""
        done = self.folder / "results.json"
        if done.exists():
            return read_json(done)
        self.folder.mkdir(parents=True, exist_ok=True)
        policy = load_policy(self.before)
        steps = roll_out(
            policy,
            self.before,
            self.arena,
            self.settings.rollout,
            self.settings.kernel,
            self.folder,
            self.number,
            self.seed,
        )
        earlier = [self.folder.parent / f"round-{n}" / "rollouts" for n in range(1, self.number + 1)]
        policy.see_latents()  # what was rolled out holds pictures; the rest of the round reads what the frozen encoder makes of them
        data = encoded(load_datasets([*self.demos, *(p for p in earlier if p.exists())]), policy)
        require_usable(data, policy)
        training, held_out = split_episodes(data, self.settings.held_out, self.seed)
        reward_N = self._rewards(data)
        discount, config = self.settings.critic.discount, policy.config

        def decisions(episodes: list[int]) -> Decisions:
            return Decisions(data, config.observation_steps, config.execute_steps, discount, episodes, reward_N)

        known, unseen = decisions(training), decisions(held_out)
        verdict = self._judge(policy, known, unseen)
        critic, model, why_not = verdict.critic, verdict.model, verdict.why_not
        imitated = self._imitate(data, policy, critic, reward_N, why_not, held_out if model is not None else [])
        summary = {
            "round": self.number,
            "episodes": self.settings.rollout.episodes,
            "env_steps": steps,
            "merged_episodes": data.num_episodes,
            "merged_success": float(data.episodes["success"].mean()),
            "calibration": verdict.calibration and asdict(verdict.calibration),
            "skipped_policy_gradient": why_not,
            "accepted": 0,
            "updates_kept": 0,
            "candidates": 0,
        }
        if critic is not None and model is not None:
            horizon = verdict.horizon
            summary |= improve(imitated, critic, model, horizon, known, unseen, self.settings, self.folder, self.seed)
        if not (self.folder / "policy").exists():
            save_policy(imitated, self.folder / "policy", {"data": data.digest, "round": self.number})
        if self.settings.selection_scenes:
            imitation = self._show(self.folder / "imitation" / "policy")
            improved = self._show(self.folder / "policy") if summary["accepted"] else imitation
            shown = {"imitation": imitation, "policy": improved}
            if (self.folder / "student").exists():
                shown["student"] = self._show(self.folder / "student")
            summary["selection"] = shown
        write_json(self.folder / "results.json", summary)
        return summary

    def _rewards(self, data: EpisodeData) -> Tensor | None:
        """Shaped rewards of all frames, or None for the recorded ones."""
        if self.settings.reward.plain:
            return None
        generator = torch_generator(self.seed, "rewards")
        episodes = [data.episode(i) for i in range(data.num_episodes)]
        shaped = shape_rewards(episodes, data.action_spec, self.settings.reward, generator)
        return torch.from_numpy(np.concatenate(shaped))

    def _judge(self, policy: ChunkPolicy, known: Decisions, unseen: Decisions) -> _Verdict:
        """Train a critic where one is asked for, see how well it ranks, and train models where something can come of it."""
        settings, seed = self.settings, self.seed
        if settings.improve == "none" and settings.weighting.kind != "advantage":
            return _Verdict()
        success_E = known.data.episodes["success"].to_numpy(bool)
        if not success_E.any():
            raise UserError(f"none of the {len(success_E)} episodes succeeded; there is nothing to learn from")
        critic = train_critic(known, settings.critic, self.folder, seed)
        own_E = own_episodes(known.data, folder_digest(self.before))
        calibration = calibrate(critic, policy, unseen, own_E, settings.calibration_samples, seed)
        model, horizon, why_not = None, 0, None
        if settings.improve != "none":
            if success_E.all():
                why_not = f"all {len(success_E)} episodes succeeded, so that a critic has no failure to learn from"
            elif calibration.actions_at_chance if asks_about_actions(settings) else calibration.states_at_chance:
                why_not = f"the critic ranks at chance ({calibration})"
            else:
                model, horizon = train_dynamics(known, unseen, critic.encoder, settings.dynamics, self.folder, seed)
                why_not = blindness(horizon, known, settings.offline.decisions, settings.gate)
        said = f"{why_not}; no policy gradient, advantage-weighted imitation instead" if why_not else str(calibration)
        tqdm.write(f"round {self.number}: {said}", sys.stderr)
        return _Verdict(critic, calibration, None if why_not else model, horizon, why_not)

    def _imitate(
        self,
        data: EpisodeData,
        policy: ChunkPolicy,
        critic: Critic | None,
        reward_N: Tensor | None,
        why_not: str | None,
        leave_out: list[int],
    ) -> ChunkPolicy:
        """Imitation of the merged data, weighted; by advantage where the policy gradient is skipped.

        Where a gate follows, it does not see the episodes that the gate judges by: they are left out.
        """
        weighting = self.settings.weighting
        if why_not:
            weighting = replace(weighting, kind="advantage")

        def weigh(windows: Windows) -> Tensor:
            if critic is None or weighting.kind != "advantage":
                return window_weights(windows, weighting, None, leave_out)
            config, discount = policy.config, self.settings.critic.discount
            frames = Decisions(data, config.observation_steps, config.execute_steps, discount, None, reward_N)
            return window_weights(
                windows, weighting, frames.frame_advantage(critic.value, weighting.gae_lambda), leave_out
            )

        settings = PretrainSettings(
            policy=policy.config, bc=self.settings.bc, seed=self.seed, successes_only=False, validation_share=0.02
        )
        out = self.folder / "imitation"
        imitate(data, out, settings, weigh=weigh, initial=None if self.settings.retrain else self.before, like=policy)
        imitated = load_policy(out)
        imitated.see_latents()
        return imitated

    def _show(self, path: Path) -> dict[str, Any]:
        scenes = range(SELECTION_SCENES, SELECTION_SCENES + self.settings.selection_scenes)
        result = evaluate(
            PolicyAgent(load_policy(path)), self.arena, list(scenes), seed=self.settings.seed, name=str(path), bar=False
        )
        return {**result["success"], "mean_length": result["mean_length"]}
