"""One trunk for several kinds of robots: what is shared, how batches are dealt out, exact resume, and ordinary policies in the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import TOY_ACTION, toy_episode

from vla_rl import lesson as lesson_module
from vla_rl.algos.bc import BCConfig, BehaviourCloning
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import Windows
from vla_rl.data.writer import EpisodeWriter
from vla_rl.nets.transformer import TransformerConfig
from vla_rl.policies.checkpoint import load_policy
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.joint import OWN, JointPolicy, JointWindows, share
from vla_rl.policies.records import PolicySpec
from vla_rl.pretrain import PretrainSettings, pretrain
from vla_rl.types import ENVIRONMENT_STATE, STATE, ActionSpec, FeatureSpec

THREE = ActionSpec(("a", "b", "c"), ("m",) * 3, (-2.0,) * 3, (2.0,) * 3, "delta", 20.0)
FLOW = FlowConfig(
    net=TransformerConfig(width=16, depth=1, heads=2),
    observation_steps=1,
    chunk_steps=4,
    execute_steps=2,
    sample_steps=2,
)


def write(root: Path, spec: ActionSpec, task: str, seed: int, lengths: list[int]) -> Path:
    rng = np.random.default_rng(seed)
    writer = EpisodeWriter.open_or_create(
        root,
        action_spec=spec,
        observation_spec={STATE: FeatureSpec((3,)), ENVIRONMENT_STATE: FeatureSpec((4,))},
        task=task,
        recipe={"seed": seed},
    )
    for scene, length in enumerate(lengths):
        episode = toy_episode(rng, length, scene=scene)
        wide = np.concatenate([episode.action_TA, episode.action_TA[:, :1]], 1)[:, : spec.dim]
        writer.add(replace(episode, action_TA=wide, intended_TA=wide))
    return root


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "two", TOY_ACTION, "two", 0, [9, 12, 7]),
        write(tmp_path / "also_two", TOY_ACTION, "also_two", 1, [30, 40]),
        write(tmp_path / "three", THREE, "three", 2, [11, 6]),
    ]


def settings(**changes: Any) -> PretrainSettings:
    options: dict[str, Any] = {
        "policy": FLOW,
        "joint": True,
        "bc": BCConfig(steps=8, batch_size=16, warmup_steps=1),
        "validate_every": 4,
        "checkpoint_every": 4,
        "validation_samples": 32,
        "validation_share": 0.4,
    }
    return PretrainSettings(**{**options, **changes})


def policies() -> tuple[Any, Any]:
    observed = {STATE: FeatureSpec((3,)), ENVIRONMENT_STATE: FeatureSpec((4,))}
    return tuple(FLOW.build(PolicySpec(observed, spec, "t")) for spec in (TOY_ACTION, THREE))


def test_the_trunk_is_one_and_the_ends_are_each_ones_own() -> None:
    first, other = policies()
    assert share(first, other) > 1000
    mine, theirs = dict(first.named_parameters()), dict(other.named_parameters())
    for name, parameter in theirs.items():
        assert (parameter is mine[name]) != name.startswith(OWN), name
    assert theirs["net.leave.weight"].shape != mine["net.leave.weight"].shape
    joint = JointPolicy({"first": first, "other": other})
    assert len(list(joint.parameters())) == len({id(p) for p in [*mine.values(), *theirs.values()]})


def test_each_row_is_judged_by_its_own_policy_in_the_order_of_the_batch(roots: list[Path]) -> None:
    windows = [Windows(load_dataset(root), 1, 4) for root in (roots[0], roots[2])]
    first, other = policies()
    for policy, mine in zip((first, other), windows, strict=True):
        policy.fit_normalizers(mine)
    joint, both = JointPolicy({"a": first, "b": other}), JointWindows(windows)
    assert len(both) == len(windows[0]) + len(windows[1])
    index = torch.tensor([30, 2, 41, 0, 28, 5])
    batch, draw = both.batch(index), joint.draw(6, torch.Generator().manual_seed(0))
    error = joint(batch, draw)
    for row, number in enumerate(index.tolist()):
        member, own = (0, number) if number < len(windows[0]) else (1, number - len(windows[0]))
        alone = joint.policies()[member].error(
            windows[member].batch(torch.tensor([own])), draw.members[member].rows(slice(row, row + 1))
        )
        torch.testing.assert_close(error[row : row + 1], alone)
    assert torch.equal(batch.is_pad_BH, both.padding(index))


def test_every_set_is_drawn_from_equally_often(
    roots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = lesson_module.BehaviourCloning.update

    def watching(self: BehaviourCloning, windows: Any, weight_W: Any = None, draws: Any = None) -> Any:
        seen.append((windows, weight_W))
        return original(self, windows, weight_W, draws)

    monkeypatch.setattr(BehaviourCloning, "update", watching)
    pretrain(roots, tmp_path / "out", settings(validation_share=0.0, bc=BCConfig(steps=1, batch_size=4)))
    windows, weight_W = seen[0]
    lengths = [28, 70, 17]
    assert len(windows) == sum(lengths) == len(weight_W)
    for mine in weight_W.split(lengths):
        assert float(mine.sum()) == pytest.approx(1.0)


def test_it_leaves_ordinary_policies_and_a_cut_run_ends_as_the_whole_one(roots: list[Path], tmp_path: Path) -> None:
    whole = pretrain(roots, tmp_path / "whole", settings())
    assert whole["gradient_steps"] == 8
    assert whole["validation_loss"] is not None
    calls = 0

    class CutError(RuntimeError):
        pass

    original = BehaviourCloning.update

    def failing(self: BehaviourCloning, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise CutError
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BehaviourCloning, "update", failing)
        with pytest.raises(CutError):
            pretrain(roots, tmp_path / "cut", settings())
    pretrain(roots, tmp_path / "cut", settings())
    for task, dim in (("two", 2), ("three", 3)):
        one, other = load_policy(tmp_path / "whole" / task), load_policy(tmp_path / "cut" / task)
        assert one.spec.action_spec.dim == dim
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
    trunk = "net.decoder.layers.0.linear1.weight"
    both = [load_policy(tmp_path / "whole" / task).state_dict()[trunk] for task in ("two", "three")]
    assert torch.equal(*both), "one set of weights"
