"""Imitation: exact resume, processes, averaging, schedule, and that it learns."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel

from vla_rl.algos.bc import BCConfig, BehaviourCloning, ema_update, learning_rate_factor
from vla_rl.algos.guard import MOST_BAD_STEPS, NonFiniteLossError
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import Windows
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.checkpoint import load_policy
from vla_rl.policies.flow import FlowConfig
from vla_rl.pretrain import PretrainSettings, build_policy, pretrain, split_episodes
from vla_rl.runtime.checkpoints import load_tensors, newest
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.metrics import read_metrics

TINY = FlowConfig(net=MLPConfig(width=16, depth=1, time_dim=4), chunk_steps=4, execute_steps=2)


def settings(**changes: object) -> PretrainSettings:
    bc = BCConfig(steps=8, batch_size=8, warmup_steps=2)
    options: dict = {"policy": TINY, "bc": bc, "validate_every": 4, "checkpoint_every": 2, "validation_share": 0.2}
    return PretrainSettings(**{**options, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_policy(run).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_two_steps_resumed_and_two_more_are_four_steps(toy_set: Path) -> None:
    data = load_dataset(toy_set)
    windows = Windows(data, 2, 4)

    def fresh() -> BehaviourCloning:
        return BehaviourCloning(build_policy(Windows(data, 2, 4), TINY, 0), settings().bc, Accelerator(cpu=True), 0)

    straight, first, second = fresh(), fresh(), fresh()
    for _ in range(4):
        straight.update(windows)
    for _ in range(2):
        first.update(windows)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.update(windows)
    assert_same(straight.state_dict(), second.state_dict())


def test_a_run_cut_at_any_checkpoint_ends_as_the_whole_run(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain([toy_set], tmp_path / "whole", settings())
    update = BehaviourCloning.update
    for cut in (1, 3, 6):

        def failing(self: BehaviourCloning, *arguments: object, cut: int = cut) -> dict[str, float]:
            if self.step == cut:
                raise KeyboardInterrupt
            return update(self, *arguments)

        monkeypatch.setattr(BehaviourCloning, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            pretrain([toy_set], tmp_path / f"cut{cut}", settings())
        monkeypatch.setattr(BehaviourCloning, "update", update)
        pretrain([toy_set], tmp_path / f"cut{cut}", settings())
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / f"cut{cut}"))
        whole, again = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / f"cut{cut}")
        assert [m["step"] for m in whole] == [m["step"] for m in again]
        assert [m["validation/loss"] for m in whole] == [m["validation/loss"] for m in again]


def test_same_seed_same_weights_other_seed_other_weights(toy_set: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain([toy_set], tmp_path / name, settings(seed=seed))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.equal(weights(tmp_path / "a")["net.enter.weight"], weights(tmp_path / "c")["net.enter.weight"])


@pytest.mark.slow
def test_two_processes_have_the_losses_and_weights_of_one(toy_set: Path, tmp_path: Path) -> None:
    options = "--policy flow_mlp --policy.net.width 16 --policy.chunk-steps 4 --policy.execute-steps 2 --bc.steps 6 --bc.batch-size 8 "
    options += "--bc.warmup-steps 2 --validate-every 1 --checkpoint-every 3"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    for name, count in (("one", "1"), ("two", "2")):
        command = [*launch, "--num_processes", count, *(["--main_process_port", "0"] if count == "2" else [])]
        command += [
            "-m",
            "vla_rl.cli.main",
            "pretrain",
            "--data",
            str(toy_set),
            "--out",
            str(tmp_path / name),
            *options.split(),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [m["train/loss"] for m in two] == pytest.approx([m["train/loss"] for m in one], rel=1e-5)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_the_average_is_the_recursion_and_holds_buffers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    model.register_buffer("statistic", torch.zeros(()))
    average = AveragedModel(model, multi_avg_fn=ema_update(0.9), use_buffers=True)
    expected = None
    for n in range(6):
        with torch.no_grad():
            model.weight.add_(1.0)
            model.statistic.fill_(float(n))  # type: ignore[operator]
        average.update_parameters(model)
        decay = min(0.9, 1 - (1 + n) ** -0.75)
        now = torch.cat([model.weight.detach().flatten(), model.statistic.view(1)])  # type: ignore[operator]
        expected = now.clone() if expected is None else decay * expected + (1 - decay) * now
    held = torch.cat([average.module.weight.flatten(), average.module.statistic.view(1)])
    assert torch.allclose(held, expected, atol=1e-6)
    assert average.state_dict()["n_averaged"] == 6  # the counter is part of the state, so a resumed average goes on


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    config = BCConfig(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(s, config) for s in range(101)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(factors) == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_one_batch_can_be_learnt(toy_set: Path) -> None:
    data = load_dataset(toy_set)
    config = BCConfig(steps=300, batch_size=32, warmup_steps=10, learning_rate=3e-3)
    policy = FlowConfig(
        net=MLPConfig(width=64, depth=2, time_dim=8), chunk_steps=1, execute_steps=1, observation_steps=1
    )
    algorithm = BehaviourCloning(build_policy(Windows(data, 1, 1), policy, 0), config, Accelerator(cpu=True), 0)
    windows = Windows(data, 1, 1)
    for _ in range(300):
        algorithm.update(windows)
    batch = windows.batch(torch.arange(len(windows)))
    noise = torch.randn(1, len(windows), 1, 2, generator=torch.Generator().manual_seed(0))
    sampled = algorithm.averaged_policy.sample(batch.observation, noise).action_BHA
    assert (sampled - batch.action_BHA).abs().mean() < 0.25 * batch.action_BHA.std()


def test_losses_that_are_not_finite_are_dropped_and_after_several_training_stops(toy_set: Path) -> None:
    data = load_dataset(toy_set)
    algorithm = BehaviourCloning(build_policy(Windows(data, 2, 4), TINY, 0), settings().bc, Accelerator(cpu=True), 0)
    before = {k: v.clone() for k, v in algorithm.state_dict().items() if k != "step"}
    good = data.columns["action"].clone()

    def update() -> dict[str, float]:
        return algorithm.update(Windows(data, 2, 4))

    data.columns["action"][:] = math.inf
    assert math.isnan(update()["train/loss"])
    assert update()["train/dropped_steps"] == 2
    after = algorithm.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    data.columns["action"][:] = good
    assert math.isfinite(update()["train/loss"])
    data.columns["action"][:] = math.inf
    for _ in range(MOST_BAD_STEPS - 1):
        update()
    with pytest.raises(NonFiniteLossError, match=f"{MOST_BAD_STEPS} imitation steps in a row"):
        update()


def test_early_stop_keeps_the_policy(toy_set: Path, tmp_path: Path) -> None:
    bc = BCConfig(steps=400, batch_size=8, warmup_steps=1, learning_rate=0.3)
    results = pretrain([toy_set], tmp_path / "run", settings(bc=bc, validate_every=2, patience=3))
    assert results["gradient_steps"] < 400
    assert (tmp_path / "run" / "policy" / "manifest.json").exists()
    again = pretrain([toy_set], tmp_path / "run", settings(bc=bc, validate_every=2, patience=3))
    assert again["gradient_steps"] == results["gradient_steps"]


def test_a_run_of_other_settings_or_data_is_refused(toy_set: Path, make_set, tmp_path: Path) -> None:
    pretrain([toy_set], tmp_path / "run", settings())
    with pytest.raises(UserError, match="seed = 0, not 7"):
        pretrain([toy_set], tmp_path / "run", settings(seed=7))
    with pytest.raises(UserError, match="other data"):
        pretrain([make_set("other", [4, 4], seed=9)], tmp_path / "run", settings())


def test_a_checkpoint_with_a_changed_byte_is_not_resumed(toy_set: Path, tmp_path: Path) -> None:
    pretrain([toy_set], tmp_path / "run", settings())
    path = newest(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert int(load_tensors(path, "training")["step"]) == 8
    file = path / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged"):
        pretrain([toy_set], tmp_path / "run", settings())


def test_held_out_episodes_are_not_trained_on_and_failures_are_left_out(make_set) -> None:
    data = load_dataset(make_set("mixed", [4] * 10, successes=[True] * 6 + [False] * 4))
    training, validation = split_episodes(data, settings())
    assert not set(training) & set(validation)
    assert set(training) | set(validation) == set(range(6))
    everything = split_episodes(data, settings(successes_only=False))
    assert set(everything[0]) | set(everything[1]) == set(range(10))
    with pytest.raises(UserError, match="none of the 3 episodes succeeded"):
        split_episodes(load_dataset(make_set("failed", [4] * 3, successes=[False] * 3)), settings())
