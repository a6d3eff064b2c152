"""Every file in configs/ is loaded and built."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import TOY_ACTION, TOY_OBSERVATION

from sim.experts.base import ExpertConfig, load_expert
from sim.task import load_task
from vla_rl.algos.ppo import PPOConfig
from vla_rl.cli.run import _stage
from vla_rl.kernels import KernelConfig
from vla_rl.pipeline import Experiment
from vla_rl.policies.base import PolicyConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.config import CONFIG_ROOT, decode, encode, expand_named, load_named, names_in, parse_options
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE, FeatureSpec


@pytest.mark.parametrize("name", names_in("task"))
def test_every_task_loads_and_has_an_expert(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.instruction
    assert len(load_expert(task).strategies) >= 2


@pytest.mark.parametrize("name", names_in("policy"))
def test_every_policy_builds(name: str) -> None:
    config = decode(PolicyConfig, load_named("policy", name))
    named = {**TOY_OBSERVATION, STATE: FeatureSpec((3,), ("x", "y", "z"))}  # a policy may be relative to them
    policy = config.build(PolicySpec(named, TOY_ACTION, "toy"))
    assert sum(p.numel() for p in policy.parameters()) > 0


@pytest.mark.parametrize("name", names_in("ppo"))
def test_every_surrogate_decodes(name: str) -> None:
    assert decode(PPOConfig, load_named("ppo", name)) != PPOConfig()


@pytest.mark.parametrize("name", names_in("kernel"))
def test_every_kernel_decodes_and_builds(name: str) -> None:
    policy = decode(PolicyConfig, load_named("policy", "flow_mlp")).build(
        PolicySpec(TOY_OBSERVATION, TOY_ACTION, "toy")
    )
    assert policy.make_kernel(decode(KernelConfig, load_named("kernel", name))).trained


@pytest.mark.parametrize("name", names_in("expert"))
def test_every_expert_config_decodes(name: str) -> None:
    config = decode(ExpertConfig, load_named("expert", name))
    assert decode(ExpertConfig, encode(config)) == config


@pytest.mark.parametrize("name", names_in("experiment"))
def test_every_experiment_names_stages_and_options_that_exist(name: str) -> None:
    experiment = Experiment.read(CONFIG_ROOT / "experiment" / f"{name}.yaml")
    load_task(experiment.task)
    for stage_name, options in experiment.stages.items():
        stage = _stage(options.get("command", stage_name))
        plain = {k: v for k, v in options.items() if k != "command"}
        filled = {**stage.stage_options(Path("folder"), experiment.task, Path("run")), **plain}
        decode(stage.module.Config, expand_named(filled, getattr(stage.module, "GROUPS", {})))


def test_no_config_file_lies_in_an_unknown_group() -> None:
    assert {p.parent.name for p in CONFIG_ROOT.rglob("*.yaml")} <= {
        "task",
        "policy",
        "robot",
        "experiment",
        "expert",
        "ppo",
        "kernel",
    }


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"type": "flow", "solver": "rk4"}, ("solver", "rk4", "midpoint")),
        ({"type": "flow", "sovler": "euler"}, ("sovler",)),
        ({"type": "flux"}, ("flux", "diffusion")),
        ({"type": "flow", "chunk_steps": "many"}, ("chunk_steps", "many")),
        ({"type": "flow", "execute_steps": 99}, ("execute_steps", "99", "16")),
        ({"type": "flow", "net": {"type": "rnn"}}, ("net.type", "rnn", "unet1d")),
        ({"type": "flow", "net": 3}, ("net", "3")),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(raw: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        decode(PolicyConfig, raw)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_option_of_several_values_is_followed_by_them() -> None:
    from vla_rl.cli.pretrain import Config

    options = parse_options(["--data", "a", "b", "--out", "c", "--seed", "3"], Config)
    assert options == {"data": ["a", "b"], "out": "c", "seed": 3}
    assert parse_options(["--data", "a", "--out", "c"], Config)["data"] == "a"
    with pytest.raises(UserError, match="options look like"):
        parse_options(["--out", "c", "d"], Config)
