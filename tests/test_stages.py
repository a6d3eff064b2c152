"""The offline and online stages as programs: exact resume, rollback, fall-backs, and bad input that loses nothing."""

from __future__ import annotations

import json
import pydoc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import write_toy_set

from vla_rl.algos.bc import BCConfig
from vla_rl.algos.dynamics import DynamicsConfig, DynamicsEnsemble
from vla_rl.algos.fqe import FQEConfig
from vla_rl.algos.guard import NonFiniteLossError
from vla_rl.algos.iql import IQLConfig
from vla_rl.algos.likelihood import HeldOutLikelihood
from vla_rl.algos.ope import Accepted, GateConfig, Rejected, gate
from vla_rl.algos.ppo import PPOConfig
from vla_rl.algos.ppo_offline import OfflinePPO, OfflinePPOConfig, OfflineSurrogateConfig
from vla_rl.algos.ppo_online import OnlinePPO, OnlinePPOConfig
from vla_rl.algos.value import ValueConfig
from vla_rl.algos.weights import WeightingConfig
from vla_rl.bench_gate import ESTIMATES, GATE, GateBenchSettings, bench_gate, summarise
from vla_rl.cli.main import main
from vla_rl.data.decisions import Decisions, split_episodes
from vla_rl.data.reader import load_dataset, load_datasets
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.data.writer import EpisodeWriter
from vla_rl.evaluate import Arena
from vla_rl.improve import blindness, demonstration_loss
from vla_rl.kernels import KernelConfig
from vla_rl.offline import OfflineSettings, train_offline
from vla_rl.online import OnlineSettings, train_online
from vla_rl.policies.checkpoint import load_policy, save_policy
from vla_rl.preconditions import require_usable
from vla_rl.record import RolloutConfig
from vla_rl.report.build import write_report
from vla_rl.runtime.checkpoints import load_tensors, newest
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import read_json, write_json
from vla_rl.runtime.metrics import read_metrics
from vla_rl.types import FeatureSpec, SpecMismatchError


def offline(**changes: Any) -> OfflineSettings:
    options: dict[str, Any] = {
        "rounds": 2,
        "rollout": RolloutConfig(episodes=4, exploratory=0.5),
        "bc": BCConfig(steps=6, batch_size=16, warmup_steps=1),
        "critic": IQLConfig(steps=20, batch_size=32, width=8),
        "dynamics": DynamicsConfig(steps=10, batch_size=16, width=8, depth=1, members=2, largest_horizon=3),
        "gate": GateConfig(starts=8, smallest_coverage=0.0),
        "offline": OfflinePPOConfig(candidates=2, iterations=1, states=16, chains_per_state=2, decisions=2),
        "selection_scenes": 4,
    }
    return OfflineSettings(**{**options, **changes})


def online(**changes: Any) -> OnlineSettings:
    options: dict[str, Any] = {
        "env_steps": 4 * 4 * 8 * 5,
        "decisions": 4,
        "selection_scenes": 4,
        "select_every": 2,
        "online": OnlinePPOConfig(warmup_iterations=1),
        "ppo": PPOConfig(minibatch=32, epochs=2),
        "value": ValueConfig(width=8, minibatch=8),
    }
    return OnlineSettings(**{**options, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_policy(path).state_dict()


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few data rank at chance; the policy gradient is to run all the same."""
    for judged in ("states_at_chance", "actions_at_chance"):
        monkeypatch.setattr(f"vla_rl.algos.calibration.Calibration.{judged}", property(lambda self: False))


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Weights and moments that each offline update begins from."""
    found: list[dict[str, torch.Tensor]] = []
    update = OfflinePPO.update

    def watched(self: OfflinePPO, *arguments: Any) -> dict[str, float]:
        found.append(self.state_dict())
        return update(self, *arguments)

    monkeypatch.setattr(OfflinePPO, "update", watched)
    return found


def test_an_offline_run_cut_in_any_part_ends_as_the_whole_run(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: None
) -> None:
    train_offline([demos], policy, tmp_path / "whole", offline(), lambda: arena)
    places = {
        "vla_rl.record.EpisodeWriter.add": 6,  # within the second round's roll-outs
        "vla_rl.offline.train_critic": 1,
        "vla_rl.offline.imitate": 0,
        "vla_rl.improve.gate": 3,
        "vla_rl.offline.save_policy": 1,
        "vla_rl.offline.evaluate": 0,
    }
    for cut, calls in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(cut, _stop_after(calls, cut))
            with pytest.raises(KeyboardInterrupt):
                train_offline([demos], policy, tmp_path / cut, offline(), lambda: arena)
        train_offline([demos], policy, tmp_path / cut, offline(), lambda: arena)
        assert_same(tmp_path / "whole", tmp_path / cut)
        for number in (1, 2):
            logs = [(tmp_path / run / f"round-{number}" / "gate.jsonl").read_text() for run in ("whole", cut)]
            assert logs[0] == logs[1]
    results = read_json(tmp_path / "whole" / "results.json")
    assert [r["merged_episodes"] for r in results["rounds"]] == [16, 20]
    merged = load_datasets([demos, tmp_path / "whole" / "round-1" / "rollouts"])
    assert set(merged.episodes["provenance/source"]) == {"expert", "policy"}
    rolled = load_dataset(tmp_path / "whole" / "round-2" / "rollouts").episodes
    assert set(rolled["provenance/round"]) == {2}
    assert set(rolled["provenance/strategy"]) == {"exploratory", "deployed"}
    assert all(rolled["provenance/policy_hash"])


def _stop_after(calls: int, name: str) -> Callable[..., Any]:
    """The function of that name, which is interrupted once it has been called so often."""
    module, _, attribute = name.rpartition(".")
    owner: Any = pydoc.locate(module)
    original, left = getattr(owner, attribute), [calls]

    def stopping(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    return stopping


@pytest.mark.parametrize("passes", [True, False])
def test_a_rejected_update_leaves_no_trace_and_an_accepted_one_stays(
    demos: Path,
    policy: Path,
    arena: Arena,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trusting: None,
    starts: list[dict[str, torch.Tensor]],
    passes: bool,
) -> None:
    """Defect 10: the candidate was never rolled back."""
    decision = Accepted(1.0, 0.5) if passes else Rejected("a test", -1.0, -2.0)
    monkeypatch.setattr("vla_rl.improve.gate", lambda *_: decision)
    train_offline([demos], policy, tmp_path / "run", offline(rounds=1), lambda: arena)
    same = all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0] if k.startswith("policy."))
    moments = [k for k in starts[1] if k.startswith("optimizer.")]
    assert same is not passes
    assert bool(moments) is passes
    imitated, final = weights(tmp_path / "run/round-1/imitation"), weights(tmp_path / "run")
    assert all(torch.equal(imitated[k], final[k]) for k in final) is not passes
    lines = [json.loads(line) for line in (tmp_path / "run/round-1/gate.jsonl").read_text().splitlines()]
    assert [line["accepted"] for line in lines] == [passes, passes]
    assert {"estimate", "bound", "candidate", "horizon"} <= set(lines[0])


def test_undecided_updates_add_up_and_fall_together(
    demos: Path,
    policy: Path,
    arena: Arena,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trusting: None,
    starts: list[dict[str, torch.Tensor]],
) -> None:
    """Two small gains are accepted as one; what is rejected, or undecided at the end, falls back to the last accepted policy."""
    undecided, rejected = Rejected("noise", 0.1, -0.1, undecided=True), Rejected("worse", -1.0, -2.0)
    decisions = iter([undecided, Accepted(1.0, 0.5), undecided, rejected, undecided])
    compared: list[tuple[float, float]] = []

    def judge(candidate: torch.Tensor, base: torch.Tensor, *_: Any) -> Any:
        compared.append((float(candidate[0, 0]), float(base[0, 0])))
        return next(decisions)

    monkeypatch.setattr("vla_rl.improve.gate", judge)
    count = iter(range(10))
    monkeypatch.setattr(
        "vla_rl.improve.make_estimator", lambda *_: lambda policy: torch.full((2, 4), float(next(count)))
    )
    settings = offline(rounds=1)
    settings = replace(settings, offline=replace(settings.offline, candidates=5, iterations=1))
    results = train_offline([demos], policy, tmp_path / "run/offline", settings, lambda: arena)
    assert (results["accepted"], results["updates_kept"], results["candidates"]) == (1, 2, 5)

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

    assert compared == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
    assert not any(same(starts[i], starts[j]) for i, j in ((0, 1), (1, 2), (2, 3)))
    assert same(starts[4], starts[2])
    final = weights(tmp_path / "run/offline")
    assert same(final, {k.removeprefix("policy."): v for k, v in starts[2].items() if k.startswith("policy.")})
    lines = [json.loads(line) for line in (tmp_path / "run/offline/round-1/gate.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [False, True, False, False, False]
    assert [line.get("undecided") for line in lines] == [True, None, True, False, True]

    record = {
        "command": "offline",
        "results": results,
        "seconds": 1.0,
        "budget": {},
        "output": "a" * 64,
        "versions": {},
    }
    write_json(tmp_path / "run/manifest.json", {"experiment": "e", "task": "push_t", "stages": {"offline": record}})
    (tmp_path / "run/experiment.yaml").write_text("task: push_t")
    html = write_report(tmp_path / "run").read_text()
    for part in (
        "2 of 5 updates kept, in 1 steps",
        "undecided: noise",
        "rejected: worse",
        "rank correlation with returns",
    ):
        assert part in html, part


def test_without_the_gate_every_update_stays_and_the_log_says_what_it_would_have_said(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: None
) -> None:
    monkeypatch.setattr("vla_rl.improve.gate", lambda *_: Rejected("a test", -1.0, -2.0))
    train_offline([demos], policy, tmp_path / "run", offline(rounds=1, improve="ppo_ungated"), lambda: arena)
    lines = [json.loads(line) for line in (tmp_path / "run/round-1/gate.jsonl").read_text().splitlines()]
    assert [(line["accepted"], line["kept"]) for line in lines] == [(False, True), (False, True)]


@pytest.mark.parametrize("rises", [True, False])
def test_a_candidate_that_leaves_the_data_is_rolled_back(
    demos: Path,
    policy: Path,
    arena: Arena,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trusting: None,
    rises: bool,
) -> None:
    """Each update is compared with what it began from: the first may depart by 8 %, the second not by another 12 %, nor the third."""
    errors = iter([1.0, 1.08, 1.08 * 1.12, 1.12 * (1.08 if rises else 1.0)])
    monkeypatch.setattr(HeldOutLikelihood, "error", lambda *_: next(errors))
    if not rises:
        monkeypatch.setattr(
            "vla_rl.improve.gate",
            lambda candidate, base, config, rng, departure: Rejected("a test", 0.1, -0.1, undecided=departure < 0.1),
        )
    rise = iter(range(10))
    monkeypatch.setattr(
        "vla_rl.improve.make_estimator", lambda *_: lambda policy: torch.full((2, 4), float(next(rise)))
    )
    settings = offline(rounds=1)
    settings = replace(settings, offline=replace(settings.offline, candidates=3))
    train_offline([demos], policy, tmp_path / "run", settings, lambda: arena)
    lines = [json.loads(line) for line in (tmp_path / "run/round-1/gate.jsonl").read_text().splitlines()]
    assert [line["accepted"] for line in lines] == [rises, False, False]
    assert [line["departure"] for line in lines] == pytest.approx([0.08, 0.12, 0.12])


@pytest.mark.parametrize(
    ("knows_nothing_of", "asks_about_actions"), [("states", False), ("actions", True)], ids=["states", "actions"]
)
def test_a_critic_at_chance_is_not_followed(
    demos: Path,
    policy: Path,
    arena: Arena,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    trusting: None,
    knows_nothing_of: str,
    asks_about_actions: bool,
) -> None:
    """Defect 13, and the fall-back to advantage-weighted imitation; what counts is what the critic is asked about."""
    at_chance = f"vla_rl.algos.calibration.Calibration.{knows_nothing_of}_at_chance"
    monkeypatch.setattr(at_chance, property(lambda self: True))
    chosen: list[str] = []
    from vla_rl.offline import window_weights

    def watched(windows: Any, config: Any, *rest: Any) -> torch.Tensor:
        chosen.append(config.kind)
        return window_weights(windows, config, *rest)

    monkeypatch.setattr("vla_rl.offline.window_weights", watched)
    settings = offline(rounds=1)
    settings = replace(settings, weighting=replace(settings.weighting, kind="success"))
    if asks_about_actions:
        settings = replace(settings, offline=replace(settings.offline, decisions=1))
    results = train_offline([demos], policy, tmp_path / "run", settings, lambda: arena)
    assert chosen == ["advantage"]
    assert results["candidates"] == 0
    assert "at chance" in results["rounds"][0]["skipped_policy_gradient"]
    assert "no policy gradient" in capfd.readouterr().err
    assert not (tmp_path / "run/round-1/gate.jsonl").exists()


def test_a_loss_that_is_not_finite_ends_the_updates_with_the_last_good_weights(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: None
) -> None:
    def broken(self: OfflinePPO, *_: Any) -> dict[str, float]:
        with torch.no_grad():
            next(self.policy.net.parameters()).fill_(float("nan"))
        raise NonFiniteLossError("5 PPO steps in a row had a loss that is not finite")

    monkeypatch.setattr(OfflinePPO, "update", broken)
    train_offline([demos], policy, tmp_path / "run", offline(rounds=1), lambda: arena)
    imitated, final = weights(tmp_path / "run/round-1/imitation"), weights(tmp_path / "run")
    assert all(torch.equal(imitated[k], final[k]) for k in final)
    (line,) = (tmp_path / "run/round-1/gate.jsonl").read_text().splitlines()
    assert "not finite" in json.loads(line)["reason"]


def test_all_episodes_succeeded_is_said(demos: Path, tmp_path: Path, arena: Arena, policy: Path) -> None:
    good = tmp_path / "good"
    data = load_dataset(demos)
    writer = EpisodeWriter.open_or_create(
        good, action_spec=data.action_spec, observation_spec=data.observation_spec, task="push_t", recipe={}
    )
    for index in np.flatnonzero(data.episodes["success"]):
        writer.add(data.episode(int(index)))
    settings = offline(rounds=1, rollout=RolloutConfig(episodes=0))
    results = train_offline([good], policy, tmp_path / "run", settings, lambda: arena)
    assert "no failure to learn from" in results["rounds"][0]["skipped_policy_gradient"]


def test_nothing_succeeded_one_episode_and_other_data_are_refused(
    demos: Path, policy: Path, tmp_path: Path, arena: Arena, make_set: Callable[..., Path]
) -> None:
    data = load_dataset(demos)
    failed = tmp_path / "failed"
    writer = EpisodeWriter.open_or_create(
        failed, action_spec=data.action_spec, observation_spec=data.observation_spec, task="push_t", recipe={}
    )
    for index in np.flatnonzero(~data.episodes["success"])[:3]:
        writer.add(data.episode(int(index)))
    settings = offline(rounds=1, rollout=RolloutConfig(episodes=0))
    with pytest.raises(UserError, match="none of the 3 episodes succeeded"):
        train_offline([failed], policy, tmp_path / "run", settings, lambda: arena)
    anchored = replace(settings, ppo=replace(settings.ppo, imitation_weight=1.0))
    with pytest.raises(UserError, match="wants demonstrations that succeeded"):
        train_offline([failed], policy, tmp_path / "anchored", anchored, lambda: arena)
    assert not (tmp_path / "anchored").exists()
    one = tmp_path / "one"
    writer = EpisodeWriter.open_or_create(
        one, action_spec=data.action_spec, observation_spec=data.observation_spec, task="push_t", recipe={}
    )
    writer.add(data.episode(0))
    with pytest.raises(UserError, match="at least 2 episodes"):
        require_usable(load_dataset(one), load_policy(policy))
    with pytest.raises(SpecMismatchError, match="action spec of the policy and of the data differ"):
        require_usable(load_dataset(make_set("other", [5, 5])), load_policy(policy))


def test_a_normaliser_of_other_data_is_refused(demos: Path, policy: Path, tmp_path: Path) -> None:
    """Defect 15: the same data, seen through a normaliser that was fitted elsewhere."""
    other = load_policy(policy)
    other.observation_normalizer.center_SD += 3.0
    other.observation_normalizer.scale_SD *= 0.01
    save_policy(other, tmp_path / "other", {})
    with pytest.raises(UserError, match="normaliser was fitted on other data"):
        require_usable(load_dataset(demos), load_policy(tmp_path / "other"))
    require_usable(load_dataset(demos), load_policy(policy))


def test_data_without_rewards_are_refused(toy_set: Path) -> None:
    from vla_rl.data.decisions import Decisions

    data = load_dataset(toy_set)
    bare = replace(data, columns={k: v for k, v in data.columns.items() if k != "next.reward"})
    with pytest.raises(UserError, match=r"next\.reward"):
        Decisions(bare, 1, 2, 0.99)


def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture
) -> None:
    toy = write_toy_set(tmp_path / "toy", [5, 6])
    code = main(["offline", "--data", str(toy), "--policy", str(policy), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1
    assert "differ" in said[0]
    assert not (tmp_path / "run").exists()
    assert main(["online", "--policy", str(policy), "--out", str(tmp_path / "run"), "--ppo.clip", "2"]) == 2
    assert (
        main(["offline", "--data", str(toy), "--policy", str(policy), "--out", "x", "--rollout.episodes", "90000"]) == 2
    )


def test_an_online_run_cut_anywhere_ends_as_the_whole_run(
    policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_online(policy, tmp_path / "whole", online(), arena)
    update = OnlinePPO.update
    for cut in (1, 3, 4):

        def failing(self: OnlinePPO, *arguments: Any, cut: int = cut) -> dict[str, float]:
            if self.iteration == cut:
                raise KeyboardInterrupt
            return update(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(OnlinePPO, "update", failing)
            with pytest.raises(KeyboardInterrupt):
                train_online(policy, tmp_path / f"cut{cut}", online(), arena)
        again = train_online(policy, tmp_path / f"cut{cut}", online(), arena)
        for name in ("policy", "last"):
            assert_same(tmp_path / "whole" / name, tmp_path / f"cut{cut}" / name)
        for key in ("env_steps", "episodes", "selection_success", "best_iteration", "iterations", "rollbacks"):
            assert again[key] == whole[key], key
        steps = [m["step"] for m in read_metrics(tmp_path / f"cut{cut}")]
        assert steps == sorted(set(steps))


def test_a_worse_policy_is_rolled_back_weights_and_optimiser_and_all(
    policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The never-worse guard, with evaluations that say first good, then significantly worse."""
    said = iter([[True] * 20, [False] * 20, [True] * 10 + [False] * 10, [False] * 20, [False] * 20])

    def evaluate(*_: Any, **__: Any) -> dict[str, Any]:
        return {"env_steps": 1, "scenes": [{"success": s} for s in next(said)]}

    monkeypatch.setattr("vla_rl.online.evaluate", evaluate)
    settings = online(stop_at=1.0, env_steps=4 * 4 * 8 * 3, online=OnlinePPOConfig(warmup_iterations=0), select_every=1)
    monkeypatch.setattr("vla_rl.online._Progress.best_success", property(lambda self: 0.5))
    results = train_online(policy, tmp_path / "run", settings, arena)
    assert results["rollbacks"] >= 2
    assert results["best_iteration"] == 0
    best = weights(policy)
    for name in ("policy", "last"):
        found = weights(tmp_path / "run" / name)
        assert all(torch.equal(best[k], found[k]) for k in best)
    state = load_tensors(newest(tmp_path / "run" / "checkpoints"), "training")  # type: ignore[arg-type]
    assert float(state["now.learning_rate"]) < PPOConfig().learning_rate
    assert not [k for k in state if k.startswith("now.ppo_optimizer.") and state[k].abs().sum() > 0]


def test_of_equal_policies_the_later_one_is_kept(
    policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter([[True, False], [False, True], [False, False]])

    def evaluate(*_: Any, **__: Any) -> dict[str, Any]:
        return {"env_steps": 1, "scenes": [{"success": s} for s in next(said)]}

    monkeypatch.setattr("vla_rl.online.evaluate", evaluate)
    settings = online(env_steps=4 * 4 * 8 * 2, online=OnlinePPOConfig(warmup_iterations=0), select_every=1)
    results = train_online(policy, tmp_path / "run", settings, arena)
    assert (results["iterations"], results["best_iteration"]) == (2, 1)


def test_an_online_run_of_other_settings_is_refused(policy: Path, arena: Arena, tmp_path: Path) -> None:
    train_online(policy, tmp_path / "run", online(env_steps=1), arena)
    with pytest.raises(UserError, match="env_steps"):
        train_online(policy, tmp_path / "run", online(env_steps=2), arena)


def test_the_teacher_is_not_overwritten(policy: Path, arena: Arena, tmp_path: Path) -> None:
    """Defect 5: what a stage began with stays as it was."""
    before = {k: v.clone() for k, v in weights(policy).items()}
    train_online(policy, tmp_path / "run", online(), arena)
    after, last = weights(policy), weights(tmp_path / "run" / "last")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not all(torch.equal(before[k], last[k]) for k in before)
    assert load_policy(tmp_path / "run").config == load_policy(policy).config


def test_losses_that_are_not_finite_leave_the_best_policy_and_the_last_good_weights(
    policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = OnlinePPO.update

    def broken(self: OnlinePPO, *arguments: Any) -> dict[str, float]:
        if self.iteration == 2:
            raise NonFiniteLossError("5 PPO steps in a row had a loss that is not finite")
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OnlinePPO, "update", broken)
        with pytest.raises(NonFiniteLossError):
            train_online(policy, tmp_path / "run", online(), arena)
    for name in ("policy", "last"):
        assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run" / name).values())
    train_online(policy, tmp_path / "run", online(), arena)  # what was left does not stand in the way
    train_online(policy, tmp_path / "whole", online(), arena)
    assert_same(tmp_path / "run" / "policy", tmp_path / "whole" / "policy")


def test_the_bench_of_the_gate_counts_what_it_says_and_goes_on_where_it_was(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GateBenchSettings(
        scenes=4,
        critic=IQLConfig(steps=5, batch_size=16, width=8),
        dynamics=DynamicsConfig(steps=5, batch_size=16, width=8, depth=1, members=2, largest_horizon=2),
        gate=GateConfig(starts=4),
        fqe=FQEConfig(steps=2, batch_size=8, width=8, members=2),
        states=8,
        chains_per_state=2,
        learning_rates=(1e-5,),
        iterations=(1,),
        decisions=(1, 2),
        repeats=1,
        imitations=2,
        imitation_steps=2,
    )
    data = load_dataset(demos)
    whole = bench_gate(data, policy, tmp_path / "whole", settings, arena)
    assert whole["updates"] == 4
    with monkeypatch.context() as patch:
        patch.setattr("vla_rl.bench_gate.append_line", _stop_after(2, "vla_rl.bench_gate.append_line"))
        with pytest.raises(KeyboardInterrupt):
            bench_gate(data, policy, tmp_path / "cut", settings, arena)
    again = bench_gate(data, policy, tmp_path / "cut", settings, arena)
    assert json.dumps(again) == json.dumps(whole)


def test_the_summary_of_the_gate_is_that_of_a_table_made_by_hand() -> None:
    base = {"success": [True] * 5 + [False] * 5, "return": 0.5, "estimates": dict.fromkeys(ESTIMATES, -1.0)}

    def row(successes: int, accepted: bool) -> dict[str, Any]:
        return {
            "success": [True] * successes + [False] * (10 - successes),
            "return": successes / 10,
            "estimates": dict.fromkeys(ESTIMATES, (successes - 15) / 10),
            "accepted": dict.fromkeys(ESTIMATES, accepted),
        }

    found = summarise(base, [row(9, True), row(4, True), row(1, False), row(5, False)], largest_departure=0.05)
    assert (found["good"], found["harmful"], found["updates"]) == (1, 2, 4)
    assert (found["surely_good"], found["surely_harmful"]) == (1, 1)
    judged = found["likelihood"]
    assert (judged["precision"]["successes"], judged["precision"]["n"]) == (1, 2)
    assert (judged["harmful_kept_out"]["successes"], judged["harmful_kept_out"]["n"]) == (1, 2)
    assert judged["surely_harmful_kept_out"]["rate"] == 1.0
    assert judged["mean_gain_of_accepted"] == pytest.approx(0.15)
    assert judged["rank_correlation_with_return"]["rho"] == pytest.approx(1.0)
    assert found["departure"] == pytest.approx([-0.4, 0.1, 0.4, 0.0])
    assert (found[GATE]["accepted"], found[GATE]["precision"]["rate"]) == (1, 1.0)
    assert found[GATE]["harmful_kept_out"]["rate"] == 1.0
    assert found["return"]["accepted"] == 2
    policies = {name: found[name]["rank_correlation_with_return"]["policies"] for name in ("return", GATE)}
    assert policies == {"return": 5, GATE: 3}


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_every_estimate_judges_in_a_round(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, trusting: None, estimate: Any
) -> None:
    judge = replace(offline().gate, estimate=estimate)
    settings = offline(rounds=1, gate=judge, fqe=FQEConfig(steps=2, width=8, members=2))
    train_offline([demos], policy, tmp_path / "run", settings, lambda: arena)
    lines = [json.loads(line) for line in (tmp_path / "run/round-1/gate.jsonl").read_text().splitlines()]
    assert [line["estimator"] for line in lines] == [estimate] * 2
    assert all(np.isfinite(line["estimate"]) for line in lines)


def test_an_estimate_on_recorded_actions_falls_when_a_policy_leaves_them(demos: Path, policy: Path) -> None:
    """Defect 12: estimates that ask about actions nobody took rose while success went to zero."""
    data, made = load_dataset(demos), load_policy(policy)
    unseen = Decisions(data, 1, 8, 0.99, range(data.num_episodes))
    judge = HeldOutLikelihood(unseen, lambda seen: torch.zeros(seen.batch_size), 8, 0)
    before = judge.evaluate(made)
    assert torch.equal(before, judge.evaluate(made))
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    decision = gate(judge.evaluate(made), before, GateConfig(), np.random.default_rng(0))
    assert isinstance(decision, Rejected)
    assert judge.error(made) > -float(before.mean()) * 1.05


def test_imitation_before_a_gate_does_not_see_what_the_gate_judges_by(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: None
) -> None:
    drawn: list[torch.Tensor] = []
    windows_seen: list[Any] = []
    from vla_rl.offline import window_weights

    def watched(windows: Any, *rest: Any) -> torch.Tensor:
        drawn.append(window_weights(windows, *rest))
        windows_seen.append(windows)
        return drawn[-1]

    monkeypatch.setattr("vla_rl.offline.window_weights", watched)
    train_offline([demos], policy, tmp_path / "run", offline(rounds=1), lambda: arena)
    data = windows_seen[0].data
    _, held_out = split_episodes(data, offline().held_out, 1)
    episode_W = data.frame_episode()[windows_seen[0].frames_W]
    assert float(drawn[0][torch.isin(episode_W, torch.tensor(held_out))].sum()) == 0.0


def test_models_that_see_less_than_successes_take_judge_no_policy(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, trusting: None, capsys: pytest.CaptureFixture
) -> None:
    settings = offline(rounds=1, gate=GateConfig(starts=8, smallest_coverage=0.5))
    (round_,) = train_offline([demos], policy, tmp_path / "run", settings, lambda: arena)["rounds"]
    assert "trusted for 8 control steps, and 0 % of the successes" in round_["skipped_policy_gradient"]
    assert "no policy gradient, advantage-weighted imitation instead" in capsys.readouterr().err
    assert not (tmp_path / "run/round-1/gate.jsonl").exists()
    same = [weights(tmp_path / "run" / f"round-1/{p}") for p in ("policy", "imitation")]
    assert all(torch.equal(v, same[1][k]) for k, v in same[0].items())

    data = load_dataset(demos)
    known = Decisions(data, 1, 8, 0.99, split_episodes(data, 0.3, 0)[0])
    success_E = data.episodes["success"].to_numpy(bool)
    mine = [e for e in split_episodes(data, 0.3, 0)[0] if success_E[e]]
    lengths = np.sort((data.episode_to_E - data.episode_from_E)[mine].numpy())

    def said(horizon: int, **changes: Any) -> str | None:
        changed = replace(settings, **changes)
        return blindness(horizon, known, changed.offline.decisions, changed.gate)

    assert said(int(lengths[-1]) // 8 + 1) is None
    assert said(int(lengths[0]) // 8 - 1) is not None
    assert said(1, gate=GateConfig(estimate="likelihood")) is not None  # candidates are made in the models
    assert said(1, gate=GateConfig(estimate="likelihood"), offline=OfflinePPOConfig(decisions=1)) is None


def test_going_on_from_the_last_policy_keeps_its_normalisers(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path
) -> None:
    settings = offline(rounds=1, improve="none", retrain=False, weighting=WeightingConfig(kind="success"))
    train_offline([demos], policy, tmp_path / "on", settings, lambda: arena)
    train_offline([demos], policy, tmp_path / "fresh", replace(settings, retrain=True), lambda: arena)
    before, on, fresh = (
        weights(p)["observation_normalizer.center_SD"] for p in (policy, tmp_path / "on", tmp_path / "fresh")
    )
    assert torch.equal(before, on)
    assert not torch.equal(before, fresh)
    assert not (tmp_path / "on/round-1/critic").exists()  # nothing asks for it


def test_an_imitation_anchor_keeps_the_policy_near_the_demonstrations(demos: Path, policy: Path) -> None:
    data = load_dataset(demos)
    known = Decisions(data, 1, 8, 0.99)

    class Push:
        """A critic that wants actions ever further to the right, where no demonstration goes."""

        encoder = StateEncoder.fit(known)

        def update(self, batch: Any) -> dict[str, float]:
            return {}

        def value(self, observation: Any) -> torch.Tensor:
            return torch.zeros(observation.batch_size)

        def q_values(self, observation: Any, action_BHA: torch.Tensor) -> torch.Tensor:
            return action_BHA[:, :, 0].mean(1)[None]

    errors = []
    for weight in (0.0, 5.0):
        made = load_policy(policy)
        surrogate = OfflineSurrogateConfig(learning_rate=3e-3, imitation_weight=weight, kl_stop=1e9, minibatch=64)
        batches = OfflinePPOConfig(states=32, decisions=1)
        model = DynamicsEnsemble(Push.encoder, DynamicsConfig(width=8), torch.Generator())
        algorithm = OfflinePPO(made, made.make_kernel(KernelConfig()), Push(), batches, surrogate, model, 1)
        anchor = demonstration_loss(made, known)
        for number in range(8):
            algorithm.update(known, torch.Generator().manual_seed(number), anchor if weight else None)
        with torch.no_grad():
            errors.append(float(anchor(torch.Generator().manual_seed(99))))
    assert errors[1] < errors[0]


def test_the_best_of_several_and_the_noisy_policy_are_evaluated_on_the_command_line(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, trusting: None, capsys: pytest.CaptureFixture
) -> None:
    train_offline([demos], policy, tmp_path / "run", offline(rounds=1), lambda: arena)
    common = ["eval", str(tmp_path / "run"), "--episodes", "3", "--seed", "50000", "--max-episode-steps", "24"]
    critic = str(tmp_path / "run/round-1/critic")
    assert main([*common, "--critic", critic, "--candidates", "3", "--json", str(tmp_path / "best.json")]) == 0
    assert main([*common, "--explore", "--kernel.last-std", "0.3", "--json", str(tmp_path / "noisy.json")]) == 0
    assert main([*common, "--json", str(tmp_path / "plain.json")]) == 0
    lengths = [read_json(tmp_path / f"{name}.json")["env_steps"] for name in ("best", "noisy", "plain")]
    assert min(lengths) > 0
    assert main([*common, "--explore", "--critic", critic]) == 2
    assert main([*common, "--critic", str(tmp_path / "run/policy")]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["online", "--num-envs", "-1"],
        ["online", "--ppo.imitation-weight", "1"],
        ["online", "--kernel.trained-steps", "9"],
        ["online", "--kernel.kind", "ddim"],
        ["offline", "--held-out", "1.5"],
        ["offline", "--task", "nonsense"],
        ["offline", "--kernel.trained-steps", "9"],
        ["offline", "--gate.threshold", "-1"],
        ["bench train", "--num-envs", "0"],
        ["bench train", "--ppo.imitation-weight", "1"],
        ["bench gate", "--held-out", "0"],
        ["bench gate", "--repeats", "0", "--imitations", "0"],
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    words: list[str], demos: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = words[0].split()
    given = [*command, "--policy", str(policy), *words[1:]]
    if "train" not in command:
        given += ["--out", str(tmp_path / "run")]
    if command[0] == "offline" or command[-1] == "gate":
        given += ["--data", str(demos)]
    assert main(given) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("vla-rl:")]
    assert "Traceback" not in line
    assert not (tmp_path / "run/config.yaml").exists()  # nothing is claimed: the corrected command may go there


def test_states_of_another_size_and_scenes_of_tests_are_refused(
    demos: Path, policy: Path, tmp_path: Path, arena: Arena
) -> None:
    made, data = load_policy(policy), load_dataset(demos)
    spec = dict(data.observation_spec)
    key = next(iter(spec))
    with pytest.raises(SpecMismatchError, match="has shape"):
        require_usable(replace(data, observation_spec={**spec, key: FeatureSpec((9,))}), made)
    episodes = data.episodes.assign(**{"provenance/scene_seed": 100_007})
    with pytest.raises(UserError, match="scene 100007"):
        require_usable(replace(data, episodes=episodes), made)
