"""Heads and nets: exactness at the true field, noise as an argument, padding, prefixes, round trips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TOY_ACTION, TOY_OBSERVATION, PlainNet

from vla_rl.algos.bc import BCConfig, BehaviourCloning, masked_mean
from vla_rl.data.normalizer import Normalizer
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.nets.base import NetConfig
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.checkpoint import load_policy, save_policy
from vla_rl.policies.diffusion import DiffusionConfig
from vla_rl.policies.flow import FlowConfig, interpolate
from vla_rl.policies.records import Draw, PolicySpec, Prefix
from vla_rl.runtime.checkpoints import MANIFEST
from vla_rl.runtime.errors import UserError
from vla_rl.types import FeatureSpec, Observation

NETS = {
    "mlp": {"width": 32, "depth": 1, "time_dim": 8},
    "unet1d": {"channels": [8, 16], "kernel": 3, "time_dim": 8},
    "transformer": {"width": 16, "depth": 1, "heads": 2},
}
HEADS = [
    {"type": "flow"},
    {"type": "flow", "solver": "midpoint"},
    {"type": "diffusion"},
    {"type": "diffusion", "prediction": "v", "eta": 0.5},
    {"type": "diffusion", "prediction": "sample", "sampler": "ddpm"},
]
SPEC = PolicySpec(TOY_OBSERVATION, TOY_ACTION, "toy")


def build(head: dict, net: str = "mlp", **options: object) -> ChunkPolicy:
    from vla_rl.runtime.config import decode

    raw = {"chunk_steps": 5, "execute_steps": 2, "net": {"type": net, **NETS[net]}, **head, **options}
    torch.manual_seed(0)
    policy = decode(PolicyConfig, raw).build(SPEC)
    torch.nn.init.normal_(policy.net.parameters().__next__(), std=0.3)
    return policy.eval()


def some_batch(policy: ChunkPolicy, batch: int = 4) -> tuple[WindowBatch, Draw]:
    generator = torch.Generator().manual_seed(1)
    steps = policy.config.observation_steps
    observation = Observation(
        torch.randn(batch, steps, 3, generator=generator), torch.randn(batch, steps, 4, generator=generator)
    )
    action = torch.rand(batch, policy.config.chunk_steps, 2, generator=generator) * 2 - 1
    is_pad = torch.arange(policy.config.chunk_steps).expand(batch, -1) >= torch.tensor([[5], [3], [1], [5]])[:batch]
    return WindowBatch(observation, action, is_pad), policy.draw(batch, generator)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(map(str, h.values())))
def test_every_head_over_every_net_samples_what_its_noise_says(head: dict, net: str) -> None:
    policy = build(head, net)
    batch, _ = some_batch(policy)
    noise = torch.randn(policy.noise_count, 4, 5, 2, generator=torch.Generator().manual_seed(2))
    first, second = policy.sample(batch.observation, noise), policy.sample(batch.observation, noise)
    assert torch.equal(first.action_BHA, second.action_BHA)
    assert not torch.allclose(first.action_BHA, policy.sample(batch.observation, noise + 0.1).action_BHA)
    assert first.execute_steps == 2
    assert torch.isfinite(first.action_BHA).all()


@pytest.mark.parametrize("net", NETS)
def test_every_net_reads_each_step_of_tau_and_all_of_its_inputs(net: str) -> None:
    policy = build({"type": "flow"}, net)
    x = torch.randn(2, 5, 2, requires_grad=True)
    tau = torch.full((2, 5), 0.3, requires_grad=True)
    condition = torch.randn(2, 2, 7, requires_grad=True)
    policy.net(x, tau, condition).square().sum().backward()
    for gradient in (x.grad, tau.grad, condition.grad):
        assert gradient is not None
        assert (gradient.abs().sum(dim=tuple(range(2, gradient.ndim))) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.net.parameters())


@pytest.mark.parametrize("net", NETS)
def test_every_net_treats_the_rows_of_a_batch_alone(net: str) -> None:
    policy = build({"type": "flow"}, net)
    x, tau, condition = torch.randn(3, 5, 2), torch.rand(3, 5), torch.randn(3, 2, 7)
    whole = policy.net(x, tau, condition)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(policy.net(x[order], tau[order], condition[order]), whole[order], atol=1e-5)
    assert torch.allclose(policy.net(x[:1], tau[:1], condition[:1]), whole[:1], atol=1e-5)


@pytest.mark.parametrize("tau_rows", [1, 6])
@pytest.mark.parametrize("net", NETS)
def test_a_condition_may_stand_for_several_rows_of_every_net(net: str, tau_rows: int) -> None:
    policy = build({"type": "flow"}, net)
    x, tau, condition = torch.randn(6, 5, 2), torch.rand(tau_rows, 5), torch.randn(2, 2, 7)
    given = policy.net.hidden(x, tau, condition.repeat_interleave(3, 0))
    torch.testing.assert_close(policy.net.hidden(x, tau, condition), given)
    torch.testing.assert_close(policy.net.hidden(x[:3], tau[:3], condition[:1]), given[:3])


@pytest.mark.parametrize("net", NETS)
def test_every_net_takes_single_steps(net: str) -> None:
    policy = build({"type": "flow"}, net, chunk_steps=1, execute_steps=1, observation_steps=1)
    observation = Observation(torch.randn(3, 1, 3), torch.randn(3, 1, 4))
    assert policy.sample(observation, torch.randn(1, 3, 1, 2)).action_BHA.shape == (3, 1, 2)


@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(map(str, h.values())))
def test_padding_does_not_move_the_loss(head: dict) -> None:
    policy = build(head)
    batch, draw = some_batch(policy)
    keep = ~batch.is_pad_BH

    class StepByStep(PlainNet):  # a net whose steps do not see one another
        def hidden(
            self, x: torch.Tensor, tau: torch.Tensor, condition: torch.Tensor, jump: None = None
        ) -> torch.Tensor:
            return torch.tanh(x + tau[..., None])

    policy.net = StepByStep()  # type: ignore[assignment]
    changed = dataclasses.replace(batch, action_BHA=torch.where(batch.is_pad_BH[..., None], 7.0, batch.action_BHA))
    total = int(keep.sum())
    assert masked_mean(policy.error(batch, draw), keep, total) == masked_mean(policy.error(changed, draw), keep, total)
    everything = torch.ones_like(keep)
    assert masked_mean(policy.error(batch, draw), everything, 20) != masked_mean(
        policy.error(changed, draw), everything, 20
    )


def test_the_true_velocity_has_no_error_and_carries_noise_to_the_action() -> None:
    for solver in ("euler", "midpoint"):
        policy = build({"type": "flow", "solver": solver, "sample_steps": 4})
        action = torch.rand(3, 5, 2) * 2 - 1
        noise = torch.randn(3, 5, 2)

        class TrueVelocity(PlainNet):
            def hidden(
                self, x: torch.Tensor, tau: torch.Tensor, condition: torch.Tensor, jump: None = None
            ) -> torch.Tensor:
                return action - noise  # noqa: B023

        policy.net = TrueVelocity()  # type: ignore[assignment]
        batch = WindowBatch(
            Observation(torch.zeros(3, 2, 3), torch.zeros(3, 2, 4)), action, torch.zeros(3, 5, dtype=torch.bool)
        )
        draw = Draw(noise, torch.rand(3), torch.zeros(3, 5, dtype=torch.bool))
        assert policy.error(batch, draw).abs().max() < 1e-10
        assert torch.allclose(policy.sample(batch.observation, noise[None]).action_BHA, action, atol=1e-5)


def test_midpoint_is_of_second_order() -> None:
    """D x / d tau = x has the solution e x(0): halving the step divides Euler's error by 2 and midpoint's by 4."""

    class Exponential(PlainNet):
        def hidden(
            self, x: torch.Tensor, tau: torch.Tensor, condition: torch.Tensor, jump: None = None
        ) -> torch.Tensor:
            return x

    errors = {}
    for solver in ("euler", "midpoint"):
        for steps in (20, 40):
            policy = build({"type": "flow", "solver": solver, "sample_steps": steps}).double()
            policy.net = Exponential()  # type: ignore[assignment]
            x = policy.generate(torch.zeros(1, 2, 7).double(), torch.ones(1, 1, 5, 2).double(), None).action_BHA
            errors[solver, steps] = float((x - torch.e).abs().max())
    assert errors["euler", 20] / errors["euler", 40] == pytest.approx(2, rel=0.1)
    assert errors["midpoint", 20] / errors["midpoint", 40] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_denoiser_that_knows_the_action_ends_at_it(prediction: str, sampler: str) -> None:
    policy = build({"type": "diffusion", "prediction": prediction, "sampler": sampler, "sample_steps": 10})
    assert isinstance(policy.config, DiffusionConfig)
    action = torch.rand(3, 5, 2) * 1.6 - 0.8
    alphas = policy.ddim.alphas_cumprod  # type: ignore[attr-defined]

    class Oracle(PlainNet):
        def hidden(
            self, x: torch.Tensor, tau: torch.Tensor, condition: torch.Tensor, jump: None = None
        ) -> torch.Tensor:
            t = ((1 - tau) * 100 - 1).round().long()
            a = alphas[t][..., None]
            epsilon = (x - a.sqrt() * action) / (1 - a).sqrt()
            return {"epsilon": epsilon, "sample": action, "v": a.sqrt() * epsilon - (1 - a).sqrt() * action}[prediction]

    policy.net = Oracle()  # type: ignore[assignment]
    noise = torch.randn(policy.noise_count, 3, 5, 2)
    sampled = policy.sample(Observation(torch.zeros(3, 2, 3), torch.zeros(3, 2, 4)), noise).action_BHA
    assert torch.allclose(sampled, action, atol=0.02)


def test_ddpm_steps_have_the_posterior_of_the_forward_process() -> None:
    """Mean and variance of q(x_{t-1} | x_t, x_0), eq. 7 of arXiv 2006.11239, from the schedule itself."""
    policy = build({"type": "diffusion", "sampler": "ddpm", "prediction": "sample", "sample_steps": 100})
    ddpm = policy.ddpm  # type: ignore[attr-defined]
    t = 60
    a, a_before = ddpm.alphas_cumprod[t], ddpm.alphas_cumprod[t - 1]
    beta = 1 - a / a_before
    x_0, x_t = torch.tensor([[[0.3]]]), torch.tensor([[[-0.7]]])
    mean = a_before.sqrt() * beta / (1 - a) * x_0 + (a / a_before).sqrt() * (1 - a_before) / (1 - a) * x_t
    assert torch.allclose(ddpm.step(x_0, t, x_t).prev_sample, mean, atol=1e-6)
    assert torch.allclose(ddpm.posterior_std(t), ((1 - a_before) / (1 - a) * beta).sqrt(), atol=1e-6)
    assert ddpm.posterior_std(0) == 0


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(map(str, h.values())))
def test_a_clean_prefix_is_kept_and_conditioned_on(head: dict, net: str) -> None:
    policy = build(head, net, max_prefix_steps=3)
    batch, _ = some_batch(policy)
    noise = torch.randn(policy.noise_count, 4, 5, 2)
    prefix = Prefix(batch.action_BHA, torch.full((4,), 2), torch.full((4,), 2))
    chunk = policy.sample(batch.observation, noise, prefix).action_BHA
    assert torch.allclose(chunk[:, :2], prefix.action_BHA[:, :2], atol=1e-6)
    other = policy.sample(
        batch.observation, noise, Prefix(-prefix.action_BHA, prefix.fixed_B, prefix.known_B)
    ).action_BHA
    assert not torch.allclose(chunk[:, 2:], other[:, 2:])
    draw = policy.draw(64, torch.Generator().manual_seed(0))
    assert set(draw.prefix_BH.sum(1).tolist()) == {0, 1, 2, 3}
    assert (draw.prefix_BH.int().diff(dim=1) <= 0).all()  # a prefix has no holes


def test_interpolation_ends() -> None:
    noise, action = torch.randn(2, 3, 1), torch.randn(2, 3, 1)
    assert torch.equal(interpolate(noise, action, torch.zeros(2, 3)), noise)
    assert torch.equal(interpolate(noise, action, torch.ones(2, 3)), action)


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2), min_size=1, max_size=20),
    st.sampled_from(["min_max", "mean_std", "quantile"]),
)
@settings(max_examples=50, deadline=None)
def test_unnormalize_undoes_normalize(rows: list[list[float]], mode: str) -> None:
    values = torch.tensor(rows)[:, None]
    fitted = Normalizer.fit(values, mode)  # type: ignore[arg-type]
    normalized = fitted.normalize(values)
    assert torch.allclose(fitted.unnormalize(normalized), values, atol=1e-2, rtol=1e-4)
    if mode == "min_max":
        assert normalized.abs().max() <= 1 + 1e-3


def test_quantiles_ignore_outliers() -> None:
    values = torch.linspace(-2, 4, 1001)[:, None, None].clone()
    values[:5], values[-5:] = -100.0, 100.0
    fitted = Normalizer.fit(values, "quantile")
    assert fitted.center_SD.item() == pytest.approx(1.0)
    assert fitted.scale_SD.item() == pytest.approx(3.0 * 0.98)


def test_a_constant_channel_is_not_blown_up() -> None:
    fitted = Normalizer.fit(torch.tensor([[[1.0, 0.0]], [[1.0 + 1e-6, 2.0]]]), "min_max")
    assert fitted.scale_SD[0, 0] == 1.0
    assert fitted.normalize(torch.tensor([[1.0, 2.0]])).abs().max() <= 1.0


@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(map(str, h.values())))
def test_a_saved_policy_gives_the_same_actions(tmp_path: Path, toy_set: Path, head: dict) -> None:
    policy = build(head)
    data = load_dataset(toy_set)
    policy.fit_normalizers(Windows(data, 2, 5))
    save_policy(policy, tmp_path / "policy", {"seed": 0})
    again = load_policy(tmp_path / "policy")
    batch = Windows(data, 2, 5).batch(torch.arange(6))
    noise = torch.randn(policy.noise_count, 6, 5, 2)
    assert torch.equal(
        policy.sample(batch.observation, noise).action_BHA, again.sample(batch.observation, noise).action_BHA
    )
    assert again.spec == policy.spec
    assert again.config == policy.config
    actions = data.columns["action"]
    assert policy.action_normalizer.normalize(actions).abs().max() <= 1 + 1e-5


def test_the_normaliser_of_actions_is_the_one_asked_for(toy_set: Path) -> None:
    windows = Windows(load_dataset(toy_set), 2, 5)
    for mode in ("min_max", "quantile"):
        policy = build({"type": "flow"}, action_normalizer=mode)
        policy.fit_normalizers(windows)
        action_BHA = windows.batch(torch.arange(len(windows))).action_BHA
        expected = Normalizer.fit(action_BHA.flatten(0, 1)[:, None], mode)  # type: ignore[arg-type]
        assert torch.equal(policy.action_normalizer.scale_SD, expected.scale_SD)
        assert policy.config.action_normalizer == mode


def test_relative_actions_are_relative_to_the_state_of_the_same_name(toy_set: Path) -> None:
    spec = dataclasses.replace(
        SPEC, observation_spec={**TOY_OBSERVATION, "observation.state": FeatureSpec((3,), ("q", "y", "x"))}
    )
    config = FlowConfig(net=MLPConfig(width=8, depth=1), chunk_steps=4, execute_steps=1, relative_actions=True)
    policy = config.build(spec).eval()
    windows = Windows(load_dataset(toy_set), 2, 4)
    policy.fit_normalizers(windows)
    batch = windows.batch(torch.arange(5))
    normalized = policy.normalize_action(batch.action_BHA, batch.observation)
    assert torch.allclose(policy.unnormalize_action(normalized, batch.observation), batch.action_BHA, atol=1e-5)
    assert normalized.abs().max() <= 1 + 1e-5
    # actions and states moved together look the same to the net
    moved = dataclasses.replace(
        batch.observation, state_BOS=batch.observation.state_BOS + torch.tensor([0.0, 2.0, 1.0])
    )
    assert torch.allclose(
        policy.normalize_action(batch.action_BHA + torch.tensor([1.0, 2.0]), moved), normalized, atol=1e-5
    )
    with pytest.raises(ValueError, match="relative_actions"):
        config.build(SPEC)
    learner = BehaviourCloning(policy.train(), BCConfig(batch_size=4, warmup_steps=1), Accelerator(cpu=True), 0)
    for _ in range(3):  # the average of weights leaves the indices of states as they are
        learner.update(windows)
    made = learner.averaged_policy.eval().unnormalize_action(normalized, batch.observation)
    assert torch.allclose(made, batch.action_BHA, atol=1e-5)


def test_one_changed_byte_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.yaml", "normalizers.safetensors"):
        folder = tmp_path / name
        save_policy(build({"type": "flow"}), folder, {})
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(bytes(content))
        with pytest.raises(UserError, match=rf"{name} is not what was written"):
            load_policy(folder)
        (folder / name).write_bytes(bytes(content[:-5]))
        with pytest.raises(UserError, match="damaged"):
            load_policy(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=rf"{name} is missing"):
            load_policy(folder)


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    save_policy(build({"type": "flow"}), tmp_path / "policy", {})
    manifest = tmp_path / "policy" / MANIFEST
    whole = manifest.read_bytes()
    for text in ("{", "[]", json.dumps({}), json.dumps({"files": {}, "meta": {"kind": "critic"}})):
        manifest.write_text(text)
        with pytest.raises(UserError):
            load_policy(tmp_path / "policy")
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        manifest.write_bytes(bytes(changed))
        try:
            same = json.loads(bytes(changed)) == json.loads(whole)  # white space may change
        except ValueError:
            same = False
        if not same:
            with pytest.raises(UserError):
                load_policy(tmp_path / "policy")


def test_every_registered_net_is_tested_here() -> None:
    assert set(NETS) == set(NetConfig.get_known_choices())
    heads = {h["type"] for h in HEADS} | {"student"}  # which has a file of tests of its own
    own = {
        name for name, c in PolicyConfig.get_known_choices().items() if c.__module__.startswith("vla_rl.")
    }  # not a test's plug-in
    assert heads == own
    assert isinstance(build({"type": "flow"}).config, FlowConfig)
