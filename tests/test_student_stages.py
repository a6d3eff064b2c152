"""Distillation and selection as programs: exact resume, gates, who is changed, what is refused; graphs that say what the policy says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import reaching_policy

from vla_rl import evaluate as evaluate_module
from vla_rl import taco as taco_stage
from vla_rl.algos.bc import BCConfig
from vla_rl.algos.distill import DistillConfig
from vla_rl.algos.dynamics import DynamicsConfig
from vla_rl.algos.feature_search import SearchConfig, search_features
from vla_rl.algos.iql import IQLConfig
from vla_rl.algos.joint_distill import JointDistillConfig, joint_student
from vla_rl.algos.ope import GateConfig
from vla_rl.algos.ppo import PPOConfig, Samples
from vla_rl.algos.ppo_offline import OfflinePPOConfig
from vla_rl.algos.ppo_online import OnlinePPO, OnlinePPOConfig
from vla_rl.algos.pseudo_count.coin_flipping import CoinFlippingConfig
from vla_rl.algos.pseudo_count.leverage import LeverageConfig
from vla_rl.algos.value import ValueConfig
from vla_rl.cli.bench_selection import decompose
from vla_rl.cli.main import main
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.distill import DistillSettings, RetentionConfig, StudentBCConfig, distill
from vla_rl.evaluate import Arena, evaluate
from vla_rl.inference import selectors
from vla_rl.inference.checkpoint import load_agent, spec_of
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.onnx_export import OnnxPolicy, export_onnx
from vla_rl.inference.rules import SelectorConfig, consensus, constrained, first, highest, log_count
from vla_rl.inference.selectors import Candidates, PlainSampler, SelectingSampler
from vla_rl.kernels import KernelConfig
from vla_rl.nets.mlp import MLPConfig
from vla_rl.offline import OfflineSettings, train_offline
from vla_rl.online import OnlineSettings, train_online
from vla_rl.policies.base import PolicyConfig
from vla_rl.policies.chain import sample_chain
from vla_rl.policies.checkpoint import load_policy, save_policy
from vla_rl.policies.diffusion import DiffusionConfig
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.path import guided_chunk
from vla_rl.policies.records import Prefix
from vla_rl.policies.student import StudentPolicy
from vla_rl.record import RolloutConfig
from vla_rl.report.build import write_report
from vla_rl.runtime.checkpoints import folder_digest, load_tensors
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_tree
from vla_rl.taco import TacoSettings, fit_selector
from vla_rl.types import Observation


def lessons(**changes: Any) -> DistillSettings:
    options: dict[str, Any] = {
        "pairs": 64,
        "bc": StudentBCConfig(steps=8, batch_size=16, warmup_steps=1),
        "retention": RetentionConfig(selection_scenes=4),
    }
    return DistillSettings(**{**options, **changes})


def selection(**changes: Any) -> TacoSettings:
    options: dict[str, Any] = {
        "search": SearchConfig(samples=3, windows=64),
        "count": LeverageConfig(waves=16),
        "select": SelectorConfig(candidates=4),
        "selection_scenes": 4,
    }
    return TacoSettings(**{**options, **changes})


def no_base(reference: str) -> Any:
    raise AssertionError(reference)


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# --- distillation -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["paired", "consistency", "shortcut"])
def test_the_stage_leaves_a_student_beside_a_teacher_that_is_as_it_was(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, method: Any
) -> None:
    before = sha256_tree(policy)
    settings = lessons(distill=DistillConfig(method))
    results = distill(policy, [demos], tmp_path / "run", settings, lambda: arena)
    assert sha256_tree(policy) == before
    student = load_policy(tmp_path / "run/student")
    assert isinstance(student, StudentPolicy)
    assert student.config.told_jumps == (method == "shortcut")
    assert results["kept"] == (results["paired"]["low"] > -0.05)
    left = load_policy(tmp_path / "run")
    assert isinstance(left, StudentPolicy) == results["kept"]
    for key, value in load_policy(policy).action_normalizer.state_dict().items():
        assert torch.equal(student.action_normalizer.state_dict()[key], value)


def test_a_cut_run_ends_as_the_whole_one(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(policy, [demos], tmp_path / "whole", lessons(), lambda: arena)
    for cut in ("vla_rl.distill.imitate", "vla_rl.distill.compare", "vla_rl.distill.copy_directory"):
        with monkeypatch.context() as patch:
            patch.setattr(cut, stop)
            with pytest.raises(KeyboardInterrupt):
                distill(policy, [demos], tmp_path / cut, lessons(), lambda: arena)
        distill(policy, [demos], tmp_path / cut, lessons(), lambda: arena)
        whole, mended = (load_tensors(tmp_path / run / "student", "model") for run in ("whole", cut))
        assert all(torch.equal(whole[k], mended[k]) for k in whole)
    with pytest.raises(UserError, match=r"other settings|holds a run"):
        distill(policy, [demos], tmp_path / "whole", lessons(seed=1), lambda: arena)


@pytest.mark.parametrize(("lost", "kept"), [(0, True), (1, True), (12, False)])
def test_a_student_that_loses_too_much_is_not_kept(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, kept: bool
) -> None:
    def staged(agent: PolicyAgent, arena: Arena, scenes: list[int], **_: Any) -> dict[str, Any]:
        of_student = isinstance(agent.policy, StudentPolicy)
        return {"scenes": [{"success": not (of_student and i < lost)} for i in range(len(scenes))]}

    monkeypatch.setattr(evaluate_module, "evaluate", staged)
    settings = lessons(retention=RetentionConfig(selection_scenes=100))
    results = distill(policy, [demos], tmp_path / "run", settings, lambda: arena)
    assert results["kept"] is kept
    digests = [folder_digest(tmp_path / "run" / name) for name in ("student", "policy")]
    assert (digests[0] == digests[1]) is kept
    assert (folder_digest(tmp_path / "run/policy") == folder_digest(policy / "policy")) is not kept


def test_the_report_says_what_was_compared_and_kept_and_draws_the_training_inside_a_stage(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path
) -> None:
    results = distill(policy, [demos], tmp_path / "student", lessons(), lambda: arena)
    record = {"command": "distill", "seconds": 1.0, "budget": {}, "output": "0" * 64, "versions": {}}
    refused = {**results, "kept": False, "paired": {**results["paired"], "difference": -0.25, "low": -0.5, "high": 0.0}}
    stages = {"student": {**record, "results": results}, "other": {**record, "results": refused}}
    (tmp_path / "manifest.json").write_text(json.dumps({"experiment": "x", "task": "push_t", "stages": stages}))
    (tmp_path / "experiment.yaml").write_text("task: push_t")
    html = write_report(tmp_path).read_text()
    assert html.count("95 % interval") == 4
    assert "-25.0 (-50.0 to +0.0)" in html
    assert '<td class="bad-text">no</td>' in html
    assert "<!-- train/loss -->" in html


def test_a_student_is_evaluated_and_refused_as_a_teacher_on_the_command_line(
    demos: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["distill", "--teacher", str(policy), "--data", str(demos), "--retention.selection-scenes", "0"]
    given += ["--bc.steps", "3", "--bc.batch-size", "8", "--net.type", "mlp", "--net.width", "16", "--net.depth", "1"]
    assert main([*given, "--out", str(tmp_path / "run"), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["gradient_steps"] == 3
    common = ["--episodes", "2", "--seed", "50000", "--max-episode-steps", "8"]
    assert main(["eval", str(tmp_path / "run"), *common]) == 0
    capsys.readouterr()
    given[2] = str(tmp_path / "run")
    assert main([*given, "--out", str(tmp_path / "again")]) == 2
    assert "no denoising chain" in capsys.readouterr().err
    assert (
        main(["distill", "--teacher", str(policy), "--data", str(demos), "--out", "x", "--distill.method", "wish"]) == 2
    )
    assert "consistency, paired, shortcut" in capsys.readouterr().err
    given[2] = str(policy)
    out = ["--out", str(tmp_path / "short"), "--distill.method", "shortcut"]
    assert main([*given, *out, "--sample-steps", "20"]) == 2
    assert "at most" in capsys.readouterr().err
    assert main([*given, *out, "--sample-steps", "2"]) == 0  # nothing was claimed by the one that was refused


# --- selection --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["taco", "constrained", "consensus", "first"])
def test_a_fitted_selector_is_deployed_from_its_folder_as_it_was_fitted(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, rule: Any
) -> None:
    settings = selection(select=SelectorConfig(rule, candidates=4))
    results = fit_selector(policy, [demos], tmp_path / "run", settings, lambda: arena)
    if rule in ("taco", "constrained"):
        assert results["nearest_distance"] < results["first_distance"]
    assert (tmp_path / "run/features").exists() == (
        rule in ("taco", "constrained")
    )  # not searched for what asks for none
    assert spec_of(tmp_path / "run/selector").task == "push_t"
    (tmp_path / "moved").mkdir()
    for name in ("selector", "base"):  # the two travel together
        (tmp_path / "run" / name).rename(tmp_path / "moved" / name)
    agent = load_agent(tmp_path / "moved/selector", no_base)
    scenes = list(range(50_000, 50_004))
    again = evaluate(agent, arena, scenes, seed=0, name="selector", bar=False)
    assert sum(s["success"] for s in again["scenes"]) == results["selected"]["successes"]
    if rule == "first":
        assert results["paired"]["difference"] == 0
        assert results["kept"] is False


@pytest.mark.parametrize(("gained", "kept"), [(0, False), (2, False), (12, True)])
def test_a_selector_takes_the_policys_place_only_where_it_is_surely_better(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gained: int, kept: bool
) -> None:
    def staged(agent: PolicyAgent, arena: Arena, scenes: list[int], *, name: str, **_: Any) -> dict[str, Any]:
        return {"scenes": [{"success": i < 20 + gained * (name == "selected")} for i in range(len(scenes))]}

    monkeypatch.setattr(evaluate_module, "evaluate", staged)
    settings = selection(select=SelectorConfig("consensus", candidates=4), selection_scenes=100)
    assert fit_selector(policy, [demos], tmp_path / "run", settings, lambda: arena)["kept"] is kept
    left = folder_digest(tmp_path / "run/policy")
    assert (left == folder_digest(tmp_path / "run/selector")) is kept
    assert (left == folder_digest(policy / "policy")) is not kept


def test_what_cannot_be_compared_or_used_is_refused_before_the_work(
    demos: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_arena() -> Arena:
        raise UserError("no task 'typo'")

    monkeypatch.setattr("vla_rl.distill.imitate", stop)
    monkeypatch.setattr("vla_rl.taco._features", stop)
    with pytest.raises(UserError, match="typo"):
        distill(policy, [demos], tmp_path / "run", lessons(), no_arena)
    with pytest.raises(UserError, match="typo"):
        fit_selector(policy, [demos], tmp_path / "run", selection(), no_arena)
    with pytest.raises(UserError, match="rule taco asks no critic"):
        fit_selector(policy, [demos], tmp_path / "run", selection(), no_arena, critic=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_selector_of_another_policy_is_refused(demos: Path, policy: Path, arena: Arena, tmp_path: Path) -> None:
    fit_selector(policy, [demos], tmp_path / "run", selection(selection_scenes=0), lambda: arena)
    distill(policy, [demos], tmp_path / "other", lessons(retention=RetentionConfig(0)), lambda: arena)
    (tmp_path / "run/base").rename(tmp_path / "kept")
    (tmp_path / "other/student").rename(tmp_path / "run/base")
    with pytest.raises(UserError, match="was fitted on a policy with the hash"):
        load_agent(tmp_path / "run/selector", no_base)


def test_features_are_searched_once_and_a_cut_run_goes_on(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = selection(count=CoinFlippingConfig(width=16, blocks=1, epochs=2, batch_size=32))
    fit_selector(policy, [demos], tmp_path / "whole", settings, lambda: arena)
    with monkeypatch.context() as patch:
        patch.setattr(taco_stage, "save_selector", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_selector(policy, [demos], tmp_path / "cut", settings, lambda: arena)
    monkeypatch.setattr(taco_stage, "search_features", stop)
    fit_selector(policy, [demos], tmp_path / "cut", settings, lambda: arena)
    whole, mended = (load_tensors(tmp_path / run / "selector", "selector") for run in ("whole", "cut"))
    assert all(torch.equal(whole[k], mended[k]) for k in whole)


def test_rules_that_lack_a_part_and_no_candidates_are_refused(
    demos: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [
        "taco",
        "--policy",
        str(policy),
        "--data",
        str(demos),
        "--out",
        str(tmp_path / "run"),
        "--search.windows",
        "8",
    ]
    given += ["--search.samples", "2", "--selection-scenes", "0"]
    for words, said in (
        (["--select.rule", "q"], "wants a critic"),
        (["--select.candidates", "0"], "candidates wants at least 1, got 0"),
        (["--count.type", "wish"], "count.type wants one of"),
        (["--select.percentile", "120"], "percentile wants a number in [0, 100]"),
    ):
        assert main([*given, *words]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("vla-rl:")]
        assert said in line, line
    assert not (tmp_path / "run/selector").exists()
    short = ["collect", "--task", "push_t", "--episodes", "2", "--max-episode-steps", "10"]
    failed = str(tmp_path / "failed")
    assert main([*short, "--workers", "1", "--out", failed]) == 0
    capsys.readouterr()
    assert main(["taco", "--policy", str(policy), "--data", failed, "--out", "x", "--successes-only", "true"]) == 2
    assert "none of the 2 episodes succeeded" in capsys.readouterr().err


def test_the_search_keeps_the_sample_nearest_to_the_data_and_padding_does_not_count(demos: Path, policy: Path) -> None:
    made, data = load_policy(policy), load_dataset(demos)
    windows = Windows(data, made.config.observation_steps, made.config.chunk_steps)
    config = SearchConfig(samples=6, windows=40)
    found = search_features(made, windows, config, "clean", bar=False)
    assert found.nearest < 0.8 * found.first
    assert found.features_WF.shape == (40, made.net.feature_dim)

    class Spoilt(Windows):
        """Its padding holds something else."""

        def batch(self, window_B: Tensor) -> WindowBatch:
            batch = super().batch(window_B)
            spoilt_B.append(batch.is_pad_BH[:, : made.config.execute_steps].any(1))
            action = torch.where(batch.is_pad_BH[..., None], batch.action_BHA + 9.0, batch.action_BHA)
            return replace(batch, action_BHA=action)

    spoilt_B: list[Tensor] = []
    ends = torch.cat([torch.arange(end - 3, end) for end in data.episode_to_E.tolist()])
    config = SearchConfig(samples=6)
    kept = []
    for kind in (Windows, Spoilt):
        windows = kind(data, made.config.observation_steps, made.config.chunk_steps)
        windows.frames_W = ends
        kept.append(search_features(made, windows, config, "clean", bar=False).features_WF)
    assert torch.cat(spoilt_B).any()
    assert torch.equal(kept[0], kept[1])


# --- rules ------------------------------------------------------------------------------------------------------------------------


def candidates(actions: list[list[float]], features: list[list[float]] | None = None) -> Candidates:
    """Two observations with some candidates of one action step each."""
    action = torch.tensor(actions)[:, :, None, None]
    feature = torch.tensor(features if features is not None else actions)[..., None]
    return Candidates(reaching_policy(4), Observation(torch.zeros(action.shape[0], 1, 2)), action, feature)


def by_feature(seen: Candidates) -> Tensor:
    return seen.features_BNF[..., 0]


def by_action(seen: Candidates) -> Tensor:
    return seen.chunk_BNHA[:, :, 0, 0]


def test_first_highest_and_the_margin_of_abstention() -> None:
    seen = candidates([[0.5, 0.6, 0.1], [0.2, 0.3, 0.9]])
    assert first(seen).tolist() == [0, 0]
    assert highest(by_action)(seen).tolist() == [1, 2]
    assert highest(by_action, 0.2)(seen).tolist() == [0, 2]
    assert highest(by_action, 1.0)(seen).tolist() == [0, 0]
    equal = candidates(
        [[0.5] * 32, [0.2, *[0.3] * 31]]
    )  # what is no better than the policy's own candidate does not take its place
    assert highest(by_action)(equal).tolist() == [0, 1]


def test_the_objective_decides_among_what_was_seen_often_enough() -> None:
    seen = candidates([[0.1, 0.9, 0.5], [0.3, 0.9, 0.8]], [[5.0, 1.0, 5.0], [1.0, 2.0, 3.0]])
    assert constrained(by_feature, 4.0, by_action)(seen).tolist() == [
        2,
        2,
    ]  # in the second row none is: the most seen one
    assert constrained(by_feature, 0.0, by_action)(seen).tolist() == [1, 1]
    assert constrained(by_feature, 4.0, by_action, margin=0.5)(seen).tolist() == [0, 2]
    assert constrained(by_feature, 3.0, by_action, margin=9.0)(seen).tolist() == [
        0,
        2,
    ]  # candidate 0 is itself not seen enough


def test_consensus_weighs_neighbours_by_a_kernel_as_wide_as_the_typical_distance() -> None:
    generator = torch.Generator().manual_seed(3)
    seen = candidates(torch.randn(50, 9, generator=generator).tolist())
    place_BN = seen.chunk_BNHA[:, :, : seen.policy.config.execute_steps].flatten(2)
    apart_BNN = (place_BN[:, :, None] - place_BN[:, None]).norm(dim=-1)
    width_B11 = apart_BNN.flatten(1).median(1).values[:, None, None]
    density_BN = torch.exp(-((apart_BNN / width_B11) ** 2)).sum(2).log()
    best_B = density_BN.argmax(1)
    assert consensus()(seen).equal(best_B)
    assert len(best_B.unique()) > 4
    lead_B = density_BN.max(1).values - density_BN[:, 0]
    margin = float(lead_B.median())
    assert consensus(margin)(seen).equal(torch.where(lead_B > margin, best_B, 0))


def test_consensus_is_where_most_others_are() -> None:
    assert consensus()(candidates([[0.0, 0.5, 0.51, 0.49, 2.0], [1.0, -1.0, -1.0, 0.2, 0.3]])).tolist()[0] in (1, 2, 3)


def test_counts_that_are_the_same_are_ranked_by_none(policy: Path) -> None:
    count = LeverageConfig(waves=8).build(1)
    count.fit(torch.randn(50, 1))
    assert highest(log_count(count))(candidates([[0.3, 0.3, 0.3]])).tolist() == [0]


def test_candidates_from_one_encoding_are_those_of_as_many_policies(policy: Path) -> None:
    """Encoded once and drawn in one pass, each candidate is what the policy makes of its noise; the first is the policy's own."""
    made = load_policy(policy)
    generator = torch.Generator().manual_seed(0)
    spec, steps = made.spec.observation_spec, made.config.observation_steps
    observation = Observation.from_features(
        {k: torch.randn(3, steps, *f.shape, generator=generator) for k, f in spec.items()}
    )
    encoded: list[int] = []
    condition = made.condition
    made.condition = lambda seen: encoded.append(seen.batch_size) or condition(seen)  # type: ignore[method-assign, func-returns-value]
    for picked in range(4):
        sampler = SelectingSampler(made, 4, lambda seen, n=picked: torch.full((3,), n))  # type: ignore[misc]
        noise = torch.randn(sampler.noise_count, 3, *made.chunk_shape, generator=torch.Generator().manual_seed(1))
        encoded.clear()
        chunk = sampler(observation, noise).action_BHA
        assert encoded == [3]
        torch.testing.assert_close(
            chunk, made.sample(observation, noise[picked : picked + 1]).action_BHA, atol=1e-5, rtol=1e-4
        )
    prefix = Prefix(torch.zeros(3, *made.chunk_shape), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    held = sampler(observation, noise, prefix).action_BHA
    torch.testing.assert_close(held[2, :2], torch.zeros(2, made.chunk_shape[1]), atol=1e-5, rtol=0.0)


def test_a_selector_that_always_abstains_is_the_policy_in_every_scene(policy: Path, arena: Arena) -> None:
    """The further candidates' noise is not taken from the policy's own."""
    made = load_policy(policy)
    scenes = list(range(50_000, 50_006))
    plain, picked = (
        evaluate(PolicyAgent(made, sampler), arena, scenes, seed=3, name="x", bar=False)["scenes"]
        for sampler in (PlainSampler(made), SelectingSampler(made, 5, first))
    )
    for a, b in zip(plain, picked, strict=True):
        assert a["max_coverage"] == pytest.approx(b["max_coverage"], abs=1e-3)


# --- graphs -----------------------------------------------------------------------------------------------------------------------


def test_a_graph_says_what_the_student_says_for_any_number_of_rows(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = lessons(retention=RetentionConfig(0), distill=DistillConfig("shortcut"), sample_steps=2)
    distill(policy, [demos], tmp_path / "run", settings, lambda: arena)
    student = load_policy(tmp_path / "run/student")
    assert export_onnx(tmp_path / "run/student", tmp_path / "graph")["largest_difference"] < 1e-5
    sampler = OnnxPolicy(tmp_path / "graph")
    generator = torch.Generator().manual_seed(0)
    spec, steps = student.spec.observation_spec, student.config.observation_steps
    for rows in (1, 2, 9):
        observation = Observation.from_features(
            {k: torch.randn(rows, steps, *f.shape, generator=generator) for k, f in spec.items()}
        )
        noise = torch.randn(student.noise_count, rows, *student.chunk_shape, generator=generator)
        made, wanted = sampler(observation, noise).action_BHA, student.sample(observation, noise).action_BHA
        assert np.abs(made.numpy() - wanted.numpy()).max() < 1e-5
        inside = student.condition(observation)
        with torch.no_grad():
            features = student.generate(inside, noise, None).features_BF
        torch.testing.assert_close(sampler.generate(inside, noise, None).features_BF, features, atol=1e-4, rtol=1e-4)
    agent = load_agent(tmp_path / "graph", no_base)
    assert evaluate(agent, arena, [50_000, 50_001], seed=0, name="graph", bar=False)["episodes"] == 2
    assert main(["distill", "export", str(tmp_path / "run/student"), "--out", str(tmp_path / "graph")]) == 2
    assert "exists" in capsys.readouterr().err
    with pytest.raises(UserError, match="whole chunks"):
        sampler(observation, noise, Prefix(made, torch.ones(9, dtype=torch.long), torch.ones(9, dtype=torch.long)))
    (tmp_path / "graph/source").rename(tmp_path / "aside")
    shutil.copytree(tmp_path / "run/untaught", tmp_path / "graph/source")
    with pytest.raises(UserError, match="is not the one that the graph beside it was made from"):
        OnnxPolicy(tmp_path / "graph")
    shutil.rmtree(tmp_path / "graph/source")
    (tmp_path / "aside").rename(tmp_path / "graph/source")
    OnnxPolicy(tmp_path / "graph")
    graph = tmp_path / "graph/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        OnnxPolicy(tmp_path / "graph")


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (DiffusionConfig(net=MLPConfig(width=16, depth=1), sample_steps=3), True),
        (DiffusionConfig(net=MLPConfig(width=16, depth=1), sample_steps=3, sampler="ddpm"), False),
        (FlowConfig(net=MLPConfig(width=16, depth=1), sample_steps=3), True),
    ],
    ids=["ddim", "ddpm", "flow"],
)
def test_a_policy_is_written_as_a_graph_or_refused_in_a_line_and_measured_without(
    config: PolicyConfig, written: bool, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    spec = load_policy(policy).spec
    save_policy(config.build(spec), tmp_path / "policy", {})
    export = ["distill", "export", str(tmp_path / "policy"), "--out", str(tmp_path / "graph")]
    assert main(export) == (0 if written else 2)
    assert (tmp_path / "graph").exists() is written
    assert written or "torch cannot write this DiffusionPolicy as a graph" in capsys.readouterr().err
    given = ["bench", "latency", str(tmp_path / "policy"), "--selectors", "[first]", "--calls", "2"]
    assert main([*given, "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert [r["backend"] for r in results["rows"]] == (["eager", "onnx"] if written else ["eager"])
    assert [r["backend"] for r in results["refused"]] == ([] if written else ["onnx"])


# --- beside reinforcement learning ------------------------------------------------------------------------------------------------

BESIDE = JointDistillConfig(weight=1.0, updates=2, warmup_updates=3, batch_size=16)


def online(**changes: Any) -> OnlineSettings:
    options: dict[str, Any] = {
        "env_steps": 4 * 4 * 8 * 4,
        "decisions": 4,
        "selection_scenes": 4,
        "select_every": 2,
        "online": OnlinePPOConfig(warmup_iterations=1),
        "ppo": PPOConfig(minibatch=32, epochs=1),
        "value": ValueConfig(width=8, minibatch=8),
    }
    return OnlineSettings(**{**options, **changes})


def same(a: Path, b: Path) -> bool:
    first, second = (load_policy(path).state_dict() for path in (a, b))
    return all(torch.equal(first[k], second[k]) for k in first)


def test_a_student_beside_online_learning_changes_nothing_of_it_and_survives_a_cut(
    policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_online(policy, tmp_path / "alone", online(), arena)
    results = train_online(policy, tmp_path / "whole", online(student=BESIDE), arena)
    for name in ("policy", "last"):
        assert same(tmp_path / "alone" / name, tmp_path / "whole" / name)
    assert isinstance(load_policy(tmp_path / "whole/student"), StudentPolicy)
    assert results["student"]["student"]["n"] == 4
    update = OnlinePPO.update

    def failing(self: OnlinePPO, *arguments: Any) -> dict[str, float]:
        if self.iteration == 3:
            raise KeyboardInterrupt
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OnlinePPO, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            train_online(policy, tmp_path / "cut", online(student=BESIDE), arena)
    train_online(policy, tmp_path / "cut", online(student=BESIDE), arena)
    assert same(tmp_path / "whole/student", tmp_path / "cut/student")


def test_a_student_beside_learning_moves_towards_the_policy_and_is_rolled_back_with_it(policy: Path) -> None:
    teacher = load_policy(policy)
    joint = joint_student(teacher, replace(BESIDE, updates=40, warmup_updates=0, batch_size=64), 0)
    assert joint is not None
    assert joint_student(teacher, JointDistillConfig(), 0) is None
    generator = torch.Generator().manual_seed(0)
    kernel = teacher.make_kernel(KernelConfig())
    steps, width = teacher.config.observation_steps, teacher.condition_dim // teacher.config.observation_steps
    condition = torch.randn(64, steps, width, generator=generator)
    chain = sample_chain(
        teacher, kernel, condition, torch.randn(kernel.steps + 1, 64, *teacher.chunk_shape, generator=generator)
    )
    executed = torch.ones(64, teacher.config.execute_steps, dtype=torch.bool)
    samples = Samples(condition, chain, torch.randn(64, generator=generator), executed)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    losses, kept = [], None
    for _ in range(4):
        losses.append(joint.update(samples)["student/loss"])
        kept = joint.state_dict() if kept is None else kept
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    now = joint.update(samples)["student/loss"]
    assert kept is not None
    joint.load_state_dict(kept)
    assert joint.update(samples)["student/loss"] == losses[1]
    assert now != losses[1]


def test_a_student_beside_offline_learning_is_left_and_its_success_shown(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for judged in ("states_at_chance", "actions_at_chance"):
        monkeypatch.setattr(f"vla_rl.algos.calibration.Calibration.{judged}", property(lambda self: False))
    options: dict[str, Any] = {
        "rounds": 1,
        "rollout": RolloutConfig(episodes=4, exploratory=0.5),
        "bc": BCConfig(steps=6, batch_size=16, warmup_steps=1),
        "critic": IQLConfig(steps=20, batch_size=32, width=8),
        "dynamics": DynamicsConfig(steps=10, batch_size=16, width=8, depth=1, members=2, largest_horizon=3),
        "gate": GateConfig(starts=8, smallest_coverage=0.0),
        "offline": OfflinePPOConfig(candidates=2, iterations=1, states=16, chains_per_state=2, decisions=2),
        "selection_scenes": 4,
    }
    train_offline([demos], policy, tmp_path / "alone", OfflineSettings(**options), lambda: arena)
    results = train_offline(
        [demos], policy, tmp_path / "run", OfflineSettings(**options, student=BESIDE), lambda: arena
    )
    assert same(tmp_path / "alone/policy", tmp_path / "run/policy")
    assert isinstance(load_policy(tmp_path / "run/student"), StudentPolicy)
    assert results["rounds"][0]["selection"]["student"]["n"] == 4


def test_the_outcomes_variance_falls_apart_into_noise_and_scenes() -> None:
    rng = np.random.default_rng(0)
    chance_N = rng.choice([0.0, 0.3, 1.0], 4000)
    first_KN = rng.random((16, 4000)) < chance_N
    found = decompose(first_KN, first_KN[:1])
    for few in (first_KN[:2], first_KN[:4], first_KN):  # few seeds say the same on average
        said = decompose(few, first_KN[:1])
        assert said["noise_variance"] == pytest.approx((chance_N * (1 - chance_N)).mean(), abs=0.01)
        assert said["scene_variance"] == pytest.approx(chance_N.var(), abs=0.01)
    assert found["decided_by_noise"] == pytest.approx((chance_N == 0.3).mean(), abs=0.01)
    assert found["oracle"]["rate"] == pytest.approx((chance_N > 0).mean(), abs=0.01)
    assert found["paired"]["difference"] == 0
    assert found["regret_of_first"] == pytest.approx(found["oracle"]["rate"] - first_KN.mean())


def test_benches_of_selection_and_delay_go_on_where_they_were(
    demos: Path, policy: Path, arena: Arena, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fit_selector(policy, [demos], tmp_path / "run", selection(selection_scenes=0), lambda: arena)
    common = ["--episodes", "3", "--seed", "50000", "--max-episode-steps", "12", "--num-envs", "3"]
    given = [
        "bench",
        "selection",
        str(tmp_path / "run/selector"),
        "--noise-seeds",
        "2",
        "--out",
        str(tmp_path / "s"),
        *common,
    ]
    assert main([*given, "--json", str(tmp_path / "a.json")]) == 0
    assert main([*given, "--json", str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert main(["bench", "selection", str(policy), "--out", str(tmp_path / "t"), *common]) == 2
    assert "holds no selector" in capsys.readouterr().err
    given = [
        "bench",
        "delay",
        str(policy),
        "--delays-s",
        "[0,0.2]",
        "--methods",
        "[synchronous,rtc]",
        "--out",
        str(tmp_path / "d"),
    ]
    assert main([*given, *common, "--json", str(tmp_path / "delay.json")]) == 0
    rows = json.loads((tmp_path / "delay.json").read_text())["rows"]
    assert [(r["method"], r["delay_s"]) for r in rows] == [
        ("synchronous", 0.0),
        ("synchronous", 0.2),
        ("rtc", 0.0),
        ("rtc", 0.2),
    ]
    assert (tmp_path / "d/success_against_delay.png").stat().st_size > 5000
    given[4], given[6], given[8] = "[0,1.0]", "[asynchronous,rtc_prefix]", str(tmp_path / "e")
    assert main([*given, *common, "--json", str(tmp_path / "delay.json")]) == 0
    found = json.loads((tmp_path / "delay.json").read_text())
    assert [(r["method"], r["delay_s"]) for r in found["rows"]] == [("asynchronous", 0.0)]
    refused = [(r["method"], r["delay_s"]) for r in found["refused"]]
    assert refused == [("asynchronous", 1.0), ("rtc_prefix", 0.0), ("rtc_prefix", 1.0)]
    assert capsys.readouterr().out.count("not measured") == 3
    given[6] = "[rtc_prefix]"
    assert main([*given, *common]) == 2
    assert main([*given, *common, "--methods", "[rtc_prefix]"]) == 2
    assert "max-prefix-steps" in capsys.readouterr().err


@pytest.mark.slow
def test_latency_is_measured_of_every_backend_and_selector_and_the_loop_runs_by_every_method(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        "bench",
        "latency",
        str(policy),
        "--calls",
        "3",
        "--candidates",
        "[1,4]",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main([*given, "--backends", "[eager,onnx]"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {r["backend"] for r in rows} == {"eager", "onnx"}
    labels = {r["selector"] for r in rows}
    assert labels == {"first", "q", "leverage", "coin_flipping", "nearest", "constrained", "consensus"}
    assert all(0 < r["p50_ms"] <= r["p99_ms"] <= r["max_ms"] for r in rows)
    assert main(["bench", "latency", str(policy), "--selectors", "[wish]"]) == 2
    assert "wish" in capsys.readouterr().err
    assert main(["bench", "loop", str(policy), "--seconds", "0.3", "--json", str(tmp_path / "loop.json")]) == 0
    loop = json.loads((tmp_path / "loop.json").read_text())
    assert loop["steps"] == 30
    assert loop["failures"] == 0
    assert loop["chunks"] > 0
    given = ["bench", "loop", str(policy), "--seconds", "0.3", "--json", str(tmp_path / "every.json")]
    assert (
        main([*given, "--execution.execute-steps", "1"]) == 0
    )  # one option does not undo the others' defaults: it goes on meanwhile
    assert json.loads((tmp_path / "every.json").read_text())["late_actions"] > 0
    guided = []
    monkeypatch.setattr(selectors, "guided_chunk", lambda *a: guided.append(a) or guided_chunk(*a))
    assert main(["bench", "loop", str(policy), "--seconds", "0.3", "--execution.method", "rtc"]) == 0
    assert any(prefix.fixed_B.any() for _, _, _, prefix, _ in guided)  # chunks go on from what runs
    capsys.readouterr()
    for words, said in (
        (["bench", "loop", str(policy), "--execution.method", "rtc_prefix"], "max-prefix-steps"),
        (["bench", "loop", str(policy), "--seconds", "inf"], "inf"),
        (["bench", "loop", str(policy), "--spin-s", "0.01"], "pace"),
        (["bench", "loop", str(policy), "--priority", "1"], "2 to 99"),
        (["bench", "latency", "--backends", "[onnx]"], "backends"),
        (["bench", "delay", str(policy), "--out", "x", "--delays-s", "[inf]"], "delay"),
        (["bench", "delay", str(policy), "--out", "x", "--jitter-s", "-1"], "jitter_s"),
        (["bench", "delay", str(policy), "--out", "x", "--execute-steps", "-1"], "execute_steps"),
        (["bench", "delay", str(policy), "--out", "x", "--delays-s", "[nan]"], "delay"),
    ):
        assert main(words) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("vla-rl:")]
        assert said in line, line
