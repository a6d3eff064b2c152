"""The residual stage: TD3 on the residual of a frozen base, off-policy, never worse than the base (ResFiT, arXiv 2509.19301).

Warm-up: the base alone, then with noise; the critic regresses the returns, then learns by temporal differences; the actor imitates
demonstrations, which is undone where it is surely worse than the base. After that, order by order: hand in the next one with the
weights that there are, learn from what is there (so many updates per environment step), take the episodes. All draws follow from
(seed, order), so that a run that was cut goes on as if it had not been, and who collects does not matter. Every so many steps the
composed policy is judged as it will be deployed on selection scenes, in a sequential paired test against the best so far: what is surely
worse has its actor rolled back to the best's. The base itself is the first best; only what is surely better takes its place.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vla_rl.actors import Team
from vla_rl.algos.guard import NonFiniteLossError
from vla_rl.algos.residual_td3 import ResidualTD3
from vla_rl.data.reader import EpisodeData
from vla_rl.data.replay import Replay
from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import Source, StepBatch
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.inference.checkpoint import save_residual
from vla_rl.inference.perception import encoded
from vla_rl.inference.residual_controller import ResidualAgent
from vla_rl.inference.steps import label_demonstrations
from vla_rl.policies.residual import ResidualPolicy
from vla_rl.residual_checks import (
    alarms,
    corrections,
    evidence,
    judge,
    keep_base,
    newest_episodes,
    require_demonstrations,
    require_known_returns,
    shown_steps,
    takes_the_place,
)
from vla_rl.residual_runs import Progress, load_training, make_order, save_training
from vla_rl.residual_settings import ResidualSettings
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.files import exclusive, write_json
from vla_rl.runtime.metrics import MetricsLog
from vla_rl.runtime.seeding import derive_seed, initial_weights, torch_generator
from vla_rl.statistics import as_dict, paired_difference

LONGEST_EPISODE = 10_000  # steps, where the task does not say
CHECKPOINT_S = 60.0  # between checkpoints, at the end of an order
RATE_AFTER_ROLLBACK = 0.5  # of the actor's learning rate: the step that was too far is not taken again


def train_residual(
    demonstrations: EpisodeData | None,
    base: BaseSource,
    out: Path,
    settings: ResidualSettings,
    arena: Arena,
    make_team: Callable[[], Team],
) -> dict[str, Any]:
    """Run the stage: leave the best residual in ``out/policy``, the last in ``out/last``; return what was done.

    Args:
        demonstrations: episodes that half of each batch comes from (None: none).
        base: what is corrected; one of this project's policies is kept in ``out/base``.
        out: run folder.
        settings: everything else.
        arena: where it is judged; its number of environments is part of what determines the weights.
        make_team: makes who collects.

    Raises:
        UserError: data or base cannot be used, or ``out`` holds a run of other settings.
        SpecMismatchError: base, data and task disagree on actions or observations.
        NonFiniteLossError: several losses in a row were not finite; after the warm-up the best residual is left all the same.
    """
    arena = arena.through(base.policy)
    arena.require_fit(base.spec.policy, base.reference)
    if demonstrations is not None:
        demonstrations = demonstrations if base.policy is None else encoded(demonstrations, base.policy)
        require_demonstrations(demonstrations, base)
    with exclusive(out):
        data = "none" if demonstrations is None else demonstrations.digest
        claim_folder(out, {**encode(settings), "data": data, "policy": base.digest, **arena.identity()})
        beside, team = keep_base(base, out), make_team()
        try:
            return _Run(demonstrations, base, beside, out, settings, arena, team).run()
        finally:
            team.close()


class _Run:
    def __init__(
        self,
        demonstrations: EpisodeData | None,
        base: BaseSource,
        beside: BaseSource,
        out: Path,
        settings: ResidualSettings,
        arena: Arena,
        team: Team,
    ) -> None:
        self.beside = beside
        self.base, self.out, self.settings, self.arena, self.team = base, out, settings, arena, team
        self.progress = Progress()
        spec = base.spec.policy
        most = settings.base_episodes + settings.noise_episodes + settings.order_episodes  # beyond the budget
        longest = int(arena.recipe.get("max_episode_steps", LONGEST_EPISODE))
        # at worst a final observation beside each step; files are sparse
        capacity = 2 * (settings.env_steps + most * longest)
        self.replay = Replay.open(out / "replay", spec.observation_spec, spec.action_spec.dim, capacity)
        with initial_weights(derive_seed(settings.seed, "residual weights")):
            encoder = StepEncoder(spec.observation_spec, spec.action_spec, base.spec.execute_steps)
            self.algorithm = ResidualTD3(ResidualPolicy(settings.residual, encoder), settings.td3)
        self.best = self.algorithm.state_dict()
        self._resume()
        self.demos = self._label(demonstrations)

    def _label(self, demonstrations: EpisodeData | None) -> Replay | None:
        if demonstrations is None:
            return None
        started = time.monotonic()
        labelled = label_demonstrations(demonstrations, self.base, self.settings.label_copies, self.settings.seed)
        spec = self.base.spec.policy
        rows = sum(steps.length + 1 for steps in labelled)
        demos = Replay.open(None, spec.observation_spec, spec.action_spec.dim, rows)
        for steps in labelled:
            demos.add(steps, "demonstration")
        if self.settings.only_interventions:
            demos.draw_only(shown_steps(labelled))
        self.progress.seconds["label"] += time.monotonic() - started
        return demos

    def run(self) -> dict[str, Any]:
        """Warm up, then learn until the budget is spent or the goal reached."""
        settings, progress = self.settings, self.progress
        self.log = MetricsLog(self.out, progress.env_steps)
        self.bar = tqdm(
            total=settings.env_steps,
            initial=progress.env_steps,
            desc=f"residual {self.arena.task}",
            unit="step",
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        if not progress.base_successes:
            self._warm_up()
        metrics: dict[str, float] = {}
        kept_at = time.monotonic()
        while progress.env_steps < settings.env_steps and progress.best_success < settings.stop_at:
            self._submit("policy", settings.order_episodes)
            wanted = int(settings.updates_per_step * (progress.env_steps - progress.warm_steps))
            try:
                metrics = self._learn(settings.warmup_updates + wanted - self.algorithm.updates) or metrics
            except NonFiniteLossError:
                self._finish()
                raise
            self._take()
            due = self._actor_learns and progress.env_steps - progress.selected_at >= settings.select_every
            due |= progress.env_steps >= settings.env_steps
            if due:
                metrics |= newest_episodes(self.replay, self.algorithm.policy, settings.td3)
                for words in alarms(metrics):
                    progress.alarms += 1
                    tqdm.write(f"alarm at {progress.env_steps} steps: {words}", file=sys.stderr)
                metrics |= self._select()
                metrics["selection/best"] = progress.best_success
                self.log.write(progress.env_steps, metrics)
            if due or time.monotonic() - kept_at >= CHECKPOINT_S:
                self._checkpoint()
                kept_at = time.monotonic()
        self.bar.close()
        self.log.close()
        return self._finish()

    def _warm_up(self) -> None:
        """The base alone and with noise, its value by their returns and by temporal differences, and how often it succeeds."""
        settings, progress = self.settings, self.progress
        self.replay.keep(0)
        self._submit("base", settings.base_episodes)
        self._take()
        if settings.noise_episodes:
            self._submit("noise", settings.noise_episodes)
            self._take()
        progress.warm_steps = progress.selected_at = progress.env_steps
        seen = [self.replay, *([self.demos] if self.demos else [])]
        everything = self._join([r.gather(torch.arange(r.transitions), 1, 1.0) for r in seen])
        self.algorithm.policy.encoder.fit(everything.now, everything.action_BA)
        self.algorithm.settle()
        returns = [replay.returns(settings.td3.discount) for replay in seen]
        require_known_returns(torch.cat(returns), settings.td3)
        generator = torch_generator(settings.seed, "anchor")
        started = time.monotonic()
        return_N = returns[0]  # of roll-outs alone: demonstrators do better in the same states
        for _ in range(settings.anchor_updates):
            index_B = self.replay.draw(settings.td3.batch_size, generator)
            batch = self.replay.gather(index_B, 1, settings.td3.discount)
            self.algorithm.anchor(batch, return_N[index_B], generator)
            progress.gradient_steps += 1
        self.algorithm.settle()
        for _ in range(settings.warmup_updates):
            self.algorithm.update(self._batch(generator), generator, moves_actor=False)
            progress.gradient_steps += 1
        progress.seconds["learn"] += time.monotonic() - started
        self._set_reach()
        progress.base_successes = progress.best_successes = self._judge()
        self.best = self.algorithm.state_dict()
        best = progress.best_success
        self.log.write(progress.env_steps, {"selection/success": best, "selection/best": best})
        if self.demos is not None and settings.imitation_updates:
            self._imitate(self.demos)
        self._checkpoint()

    def _imitate(self, demos: Replay) -> None:
        """Begin from what demonstrations say of the residual, unless that is worse than the base."""
        progress, settings = self.progress, self.settings
        started = time.monotonic()
        generator = torch_generator(settings.seed, "imitation")
        metrics = self.algorithm.imitate(
            lambda: demos.gather(demos.draw(settings.td3.batch_size, generator), 1, 1.0), settings.imitation_updates
        )
        progress.seconds["learn"] += time.monotonic() - started
        progress.gradient_steps += settings.imitation_updates
        progress.imitated = True
        self._set_reach()
        metrics |= self._select()
        progress.actor_rate_share = 1.0  # this step was not too far for learning, but for imitation
        progress.imitation_success = metrics["selection/success"]
        self.log.write(progress.env_steps, metrics | {"selection/best": progress.best_success})

    def _submit(self, source: Source, episodes: int) -> None:
        settings = self.settings
        left = 1 - self._share_done() * (1 - settings.last_noise_share)
        noise = replace(settings.noise, std=settings.noise.std * left)
        order = make_order(self.progress.orders, source, episodes, settings.seed, noise)
        self.source = source
        self.team.submit(order, self.algorithm.policy)

    def _take(self) -> None:
        """Wait for the episodes and keep them."""
        progress = self.progress
        started = time.monotonic()
        episodes = self.team.result()
        progress.seconds["wait"] += time.monotonic() - started
        for steps in episodes:
            self.replay.add(steps, self.source)
        gained = sum(steps.length for steps in episodes)
        progress.orders += 1
        progress.episodes += len(episodes)
        progress.replayed = len(self.replay.episodes)
        progress.env_steps += gained
        self._set_reach()
        self.bar.update(gained)
        recent = [e["success"] for e in self.replay.episodes[-50:]]
        self.bar.set_postfix(
            success=f"{sum(recent) / max(len(recent), 1):.2f}", best=f"{progress.best_success:.2f}", refresh=False
        )

    @property
    def _actor_learns(self) -> bool:
        return self.progress.env_steps - self.progress.warm_steps >= self.settings.actor_from

    def _share_done(self) -> float:
        return min(self.progress.env_steps / self.settings.env_steps, 1.0)

    def _set_reach(self) -> None:
        steps = self.progress.env_steps - self.progress.warm_steps
        full = self.progress.imitated or not self.settings.ramp_steps
        self.algorithm.set_ramp(1.0 if full else min(steps / self.settings.ramp_steps, 1.0))

    def _draw(self, generator: torch.Generator) -> list[tuple[Replay, Tensor]]:
        settings, done = self.settings, self._share_done()
        share = settings.demonstration_share + done * (settings.last_demonstration_share - settings.demonstration_share)
        size = settings.td3.batch_size
        shown = round(share * size) if self.demos is not None else 0
        parts = [(self.replay, self.replay.draw(size - shown, generator))] if size > shown else []
        if self.demos is not None and shown:
            parts.append((self.demos, self.demos.draw(shown, generator)))
        return parts

    @staticmethod
    def _join(parts: list[StepBatch]) -> StepBatch:
        return parts[0] if len(parts) == 1 else StepBatch.cat(*parts)

    def _batch(self, generator: torch.Generator) -> StepBatch:
        td3 = self.settings.td3
        return self._join([r.gather(index, td3.n_steps, td3.discount) for r, index in self._draw(generator)])

    def _learn(self, updates: int) -> dict[str, float]:
        """Make so many updates; return the means of what they say."""
        progress = self.progress
        started = time.monotonic()
        generator = torch_generator(self.settings.seed, "learn", progress.orders)
        left = 1 - self._share_done() * (1 - self.settings.last_rate_share)
        self.algorithm.set_actor_rate(progress.actor_rate_share * left)
        sums: dict[str, list[float]] = {}
        for _ in range(updates):
            batch = self._batch(generator)
            for name, value in self.algorithm.update(batch, generator, moves_actor=self._actor_learns).items():
                sums.setdefault(name, []).append(value)
            progress.gradient_steps += 1
        progress.seconds["learn"] += time.monotonic() - started
        return {name: math.fsum(values) / len(values) for name, values in sums.items()}

    def _judge(self, rival: tuple[bool, ...] = ()) -> tuple[bool, ...]:
        settings, progress = self.settings, self.progress
        started = time.monotonic()
        agent = ResidualAgent(self.base, copy.deepcopy(self.algorithm.policy))
        scenes, seed, doubt = settings.selection_scenes, settings.seed, settings.worse_evidence
        judged = judge(agent, self.arena, scenes, seed, self.team.collect, rival, doubt)
        progress.selection_env_steps += judged.env_steps
        progress.seconds["select"] += time.monotonic() - started
        return judged.successes

    def _select(self) -> dict[str, float]:
        """Judge, with the gate and without; keep the best, roll back what is worse. Return what was judged.

        A policy that goes without and is as good as the best is not judged with the gate again.
        """
        progress, settings = self.progress, self.settings
        progress.selected_at = progress.env_steps
        best = progress.best_successes
        successes = self._judge(best)
        first = bool(self.algorithm.policy.gated)
        open_question = first or sum(successes) < sum(best)
        if settings.residual.gate and settings.residual.kind == "residual" and open_question:  # IBRL is its gate
            self.algorithm.set_gated(gated=not first)
            others = self._judge(max(best, successes, key=sum))
            if sum(others) > sum(successes):
                successes = others
            else:
                self.algorithm.set_gated(gated=first)
        gated = float(self.algorithm.policy.gated)  # a roll-back brings the best's
        if evidence(best, successes) >= settings.worse_evidence:
            self.algorithm.roll_back(self.best)
            progress.rollbacks += 1
            progress.imitated &= progress.best_at > 0  # the base, the first best, has no residual yet
            progress.actor_rate_share *= RATE_AFTER_ROLLBACK
        elif takes_the_place(best, successes, settings.worse_evidence, of_base=not progress.best_at):
            self.best = self.algorithm.state_dict()
            progress.best_successes, progress.best_at = successes, progress.env_steps
        self._set_reach()
        return {"selection/success": sum(successes) / len(successes), "selection/gated": gated}

    def _checkpoint(self) -> None:
        save_training(self.out, self.algorithm.state_dict(), self.best, self.progress)

    def _resume(self) -> None:
        found = load_training(self.out)
        if found is None:
            return
        now, self.best, self.progress = found
        self.algorithm.load_state_dict(now)
        self.replay.keep(self.progress.replayed)

    def _corrections(self) -> dict[str, Any] | None:
        copies = min(self.settings.label_copies, self.base.spec.execute_steps)
        shown = [(self.demos, copies)] if self.demos else []
        return corrections(self.algorithm.policy, [(self.replay, 1), *shown])

    def _finish(self) -> dict[str, Any]:
        """Leave the best residual and the last one, and say what it cost."""
        progress, settings = self.progress, self.settings
        last = self.algorithm.state_dict()
        for name, state, at in (("last", last, progress.env_steps), ("policy", self.best, progress.best_at)):
            shutil.rmtree(self.out / name, ignore_errors=True)  # what a run that stopped early left
            self.algorithm.load_state_dict(state)
            save_residual(self.algorithm.policy, self.beside, self.out / name, {"env_steps": at, "seed": settings.seed})
        self.algorithm.load_state_dict(last)
        seconds = progress.seconds
        results = {
            "env_steps": progress.env_steps,
            "warmup_env_steps": progress.warm_steps,
            "episodes": progress.episodes,
            "gradient_steps": progress.gradient_steps,
            "selection_env_steps": progress.selection_env_steps,
            "selection_success": progress.best_success,
            "selection_scenes": len(progress.best_successes),
            "imitation_selection_success": progress.imitation_success,
            "base_selection_success": sum(progress.base_successes) / len(progress.base_successes),
            "against_base": as_dict(paired_difference(progress.base_successes, progress.best_successes)),
            "best_env_steps": progress.best_at,
            "rollbacks": progress.rollbacks,
            "alarms": progress.alarms,
            "corrections": self._corrections(),
            "timing": {"seconds": sum(seconds.values()), **{f"{k}_seconds": v for k, v in seconds.items()}},
        }
        write_json(self.out / "results.json", results)
        return results
