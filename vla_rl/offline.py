"""Iterated offline reinforcement learning: roll out, merge, judge, imitate, improve behind the gate, again.

Alg. 1 of RL-100 (arXiv 2510.14830), as a program. A round is a folder with an artefact per part, each whole or absent, so that a
killed run goes on with the part it was in: ``rollouts/`` (data set), ``critic/``, ``imitation/policy``, ``dynamics/``, ``gate.jsonl``,
``policy/``, ``results.json``.
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
from vla_rl.algos.critic import Calibration, Critic, calibrate
from vla_rl.algos.dynamics import DynamicsEnsemble
from vla_rl.algos.iql import IQL, IQLConfig
from vla_rl.algos.rewards import RewardConfig, shape_rewards
from vla_rl.algos.weights import WeightingConfig, window_weights
from vla_rl.data.decisions import Decisions
from vla_rl.data.episode import Episode, Provenance
from vla_rl.data.reader import PROVENANCE_PREFIX, EpisodeData, load_datasets
from vla_rl.data.windows import Windows
from vla_rl.data.writer import EpisodeWriter
from vla_rl.evaluate import Arena, evaluate
from vla_rl.improve import ImproveSettings, blindness, improve, train_critic, train_dynamics
from vla_rl.inference.controller import PolicyController
from vla_rl.inference.rollout import deal, rollout
from vla_rl.inference.selectors import NoisySampler
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy, save_policy
from vla_rl.pretrain import PretrainSettings, imitate
from vla_rl.runtime.checkpoints import folder_digest, verify_folder
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import exclusive, read_json, write_json
from vla_rl.runtime.seeding import SELECTION_SCENES, numpy_generator, torch_generator
from vla_rl.types import require_same_observation

BATCHES = 4  # scenes per slot between two writes of roll-outs
SCENE = PROVENANCE_PREFIX + "scene_seed"


@dataclass(frozen=True)
class RolloutConfig:
    """Roll-outs at the beginning of a round.

    episodes: how many (0: none, the data stay as they are)
    exploratory: share that runs with the kernel's noise; the others run as the policy is deployed
    first_scene: seed of the first scene of the first round, the others follow
    """

    episodes: int = 300
    exploratory: float = 0.2
    first_scene: int = 10_000

    def __post_init__(self) -> None:
        if self.episodes < 0 or not 0 <= self.exploratory <= 1 or self.first_scene < 0:
            raise ValueError(
                "episodes and first_scene want numbers >= 0, exploratory one in [0, 1], got "
                f"{self.episodes}, {self.first_scene}, {self.exploratory}"
            )


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
    demonstrations = load_datasets(demos)
    require_usable(demonstrations, load_policy(policy))
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
        summary = {
            "rounds": results,
            "env_steps": sum(r["env_steps"] for r in results),
            "episodes": sum(r["episodes"] for r in results),
            "accepted": sum(r["accepted"] for r in results),
            "candidates": sum(r["candidates"] for r in results),
        }
        write_json(out / "results.json", summary)
    return summary


def require_usable(data: EpisodeData, policy: ChunkPolicy) -> None:
    """Refuse data that reinforcement learning cannot use, or that are not this policy's.

    Raises:
        UserError: one episode, no record of rewards, successes or endings, scenes that are not for training, or states that the
            policy's normaliser was not fitted on.
        SpecMismatchError: actions or observations differ.
    """
    policy.spec.action_spec.require_equal(data.action_spec, mine="the policy", theirs="the data")
    require_same_observation(policy.spec.observation_spec, data.observation_spec, me="the policy", them="the data")
    if data.num_episodes < 2:
        raise UserError(
            f"reinforcement learning wants at least 2 episodes, one of them held out; got {data.num_episodes}"
        )
    if "success" not in data.episodes:
        raise UserError("reinforcement learning wants to know which episodes succeeded; the data do not say")
    scenes = data.episodes[SCENE].dropna() if SCENE in data.episodes else []
    if len(scenes) and max(scenes) >= SELECTION_SCENES:
        raise UserError(
            f"scenes from {SELECTION_SCENES} are for selection and tests, not for data; these data have scene {int(max(scenes))}"
        )
    Decisions(data, policy.config.observation_steps, policy.config.execute_steps, 1.0)  # rewards and endings are there
    policy.require_normalizer_fits(Windows(data, policy.config.observation_steps, policy.config.chunk_steps))


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
        steps = self._roll_out(policy)
        earlier = [self.folder.parent / f"round-{n}" / "rollouts" for n in range(1, self.number + 1)]
        data = load_datasets([*self.demos, *(p for p in earlier if p.exists())])
        require_usable(data, policy)
        training, held_out = split(data, self.settings.held_out, self.seed)
        reward_N = self._rewards(data)
        discount, config = self.settings.critic.discount, policy.config

        def decisions(episodes: list[int]) -> Decisions:
            return Decisions(data, config.observation_steps, config.execute_steps, discount, episodes, reward_N)

        known, unseen = decisions(training), decisions(held_out)
        critic, calibration, models, why_not = None, None, None, None
        if self.settings.improve != "none" or self.settings.weighting.kind == "advantage":
            critic = train_critic(known, self.settings.critic, self.folder, self.seed)
            calibration, models, why_not = self._judge(critic, known, unseen)
        imitated = self._imitate(data, policy, critic, reward_N, why_not, held_out if models is not None else [])
        summary = {
            "round": self.number,
            "episodes": self.settings.rollout.episodes,
            "env_steps": steps,
            "merged_episodes": data.num_episodes,
            "merged_success": float(data.episodes["success"].mean()),
            "calibration": calibration and asdict(calibration),
            "skipped_policy_gradient": why_not,
            "accepted": 0,
            "candidates": 0,
        }
        if critic is not None and models is not None:
            summary |= improve(imitated, critic, *models, known, unseen, self.settings, self.folder, self.seed)
        if not (self.folder / "policy").exists():
            save_policy(imitated, self.folder / "policy", {"data": data.digest, "round": self.number})
        if self.settings.selection_scenes:
            summary["selection"] = {
                "imitation": self._show(self.folder / "imitation" / "policy"),
                "policy": self._show(self.folder / "policy"),
            }
        write_json(self.folder / "results.json", summary)
        return summary

    def _roll_out(self, policy: ChunkPolicy) -> int:
        """Collect this round's episodes, in the order of their scenes; return control steps."""
        config, arena = self.settings.rollout, self.arena
        if not config.episodes:
            return 0
        arena.require_fit(policy, str(self.before))
        policy_hash = folder_digest(self.before)
        recipe = {"source": "policy", "round": self.number, "policy": policy_hash, "seed": self.seed, **encode(config)}
        writer = EpisodeWriter.open_or_create(
            self.folder / "rollouts",
            action_spec=arena.action_spec,
            observation_spec=arena.observation_spec,
            task=arena.task,
            recipe=recipe,
        )
        noisy = NoisySampler(policy, policy.make_kernel(self.settings.kernel))
        begin = config.first_scene + (self.number - 1) * config.episodes
        last = writer.last_scene
        done = 0 if last is None else last + 1 - begin
        explored = begin + round(config.episodes * config.exploratory)  # the first scenes of a round explore
        bar = tqdm(
            total=config.episodes,
            initial=done,
            desc=f"round {self.number}: roll out",
            unit="episode",
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        for chosen, sampler, strategy in (
            (range(begin, explored), noisy, "exploratory"),
            (range(explored, begin + config.episodes), None, "deployed"),
        ):
            batch = BATCHES * arena.env.num_envs
            for at in range(0, len(chosen), batch):
                dealt = deal(chosen[at : at + batch], arena.env.num_envs)  # each scene in its slot, also after a cut
                missing = [[scene for scene in slot if scene >= begin + done] for slot in dealt]
                found: dict[int, Episode] = {}
                controller = PolicyController(policy, arena.env.num_envs, self.seed, sampler)
                provenance: Provenance = {
                    "source": "policy",
                    "round": self.number,
                    "strategy": strategy,
                    "policy_hash": policy_hash,
                }
                rollout(
                    arena.env,
                    arena.action_spec,
                    arena.instruction,
                    controller,
                    missing,
                    found.__setitem__,
                    provenance=provenance,
                )
                for scene in sorted(found):
                    if "diverged" not in found[scene].provenance:
                        writer.add(found[scene])
                    bar.update()
        bar.close()
        return int(load_datasets([self.folder / "rollouts"]).num_frames)

    def _rewards(self, data: EpisodeData) -> Tensor | None:
        """Shaped rewards of all frames, or None for the recorded ones."""
        if self.settings.reward.plain:
            return None
        generator = torch_generator(self.seed, "rewards")
        episodes = [data.episode(i) for i in range(data.num_episodes)]
        shaped = shape_rewards(episodes, data.action_spec, self.settings.reward, generator)
        return torch.from_numpy(np.concatenate(shaped))

    def _judge(
        self, critic: IQL, known: Decisions, unseen: Decisions
    ) -> tuple[Calibration, tuple[DynamicsEnsemble, int] | None, str | None]:
        """How well the critic ranks; then models to improve in and the decisions they may be trusted for, or why there are none."""
        rng = numpy_generator(self.seed, "calibration")
        calibration = calibrate(critic, unseen, self.settings.calibration_samples, rng)
        success_E = known.data.episodes["success"].to_numpy(bool)
        if not success_E.any():
            raise UserError(f"none of the {len(success_E)} episodes succeeded; there is nothing to learn from")
        models, why = None, None
        if self.settings.improve == "none":
            pass
        elif success_E.all():
            why = f"all {len(success_E)} episodes succeeded, so that a critic has no failure to learn from"
        elif calibration.at_chance:
            why = f"the critic ranks at chance ({calibration})"
        else:
            trained = train_dynamics(known, unseen, critic.encoder, self.settings.dynamics, self.folder, self.seed)
            why = blindness(trained[1], known, self.settings)
            models = None if why else trained
        said = f"{why}; no policy gradient, advantage-weighted imitation instead" if why else str(calibration)
        tqdm.write(f"round {self.number}: {said}", sys.stderr)
        return calibration, models, why

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
        imitate(data, out, settings, weigh=weigh, initial=None if self.settings.retrain else self.before)
        return load_policy(out)

    def _show(self, path: Path) -> dict[str, Any]:
        scenes = range(SELECTION_SCENES, SELECTION_SCENES + self.settings.selection_scenes)
        result = evaluate(
            load_policy(path), self.arena, list(scenes), seed=self.settings.seed, name=str(path), bar=False
        )
        return {**result["success"], "mean_length": result["mean_length"]}


def split(data: EpisodeData, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Episodes to learn from and to be judged on; where it can be, both have successes and failures."""
    rng = numpy_generator(seed, "held out")
    success_E = data.episodes["success"].to_numpy(bool)
    held: list[int] = []
    for group in (np.flatnonzero(success_E), np.flatnonzero(~success_E)):
        count = min(max(round(share * len(group)), 1), len(group) - 1)  # none of a group of one
        held += rng.permutation(group)[: max(count, 0)].tolist()
    if not held:  # one success, one failure
        held = [int(rng.integers(data.num_episodes))]
    return sorted(set(range(data.num_episodes)) - set(held)), sorted(held)
