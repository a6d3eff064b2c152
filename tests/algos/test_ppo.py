"""PPO in the chain: the surrogate by hand, its credit and its clips, what a step raises, and what never touches a weight."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vla_rl.algos.guard import (
    MOST_BAD_STEPS,
    GuardedOptimizer,
    NonFiniteLossError,
    load_optimizer_tensors,
    optimizer_tensors,
)
from vla_rl.algos.ppo import (
    ChainPPO,
    PPOConfig,
    Samples,
    clip_of_steps,
    divergence,
    draw_pairs,
    normalize_advantage,
    pair_log_ratio,
    surrogate,
)
from vla_rl.algos.value import ValueConfig, ValueFunction, value_loss
from vla_rl.kernels import Kernel, KernelConfig
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import Chain, log_ratio, sample_chain
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.types import ActionSpec, FeatureSpec

SPEC = PolicySpec(
    {"observation.state": FeatureSpec((3,))},
    ActionSpec(("x", "y"), ("m", "m"), (-1.0, -1.0), (1.0, 1.0), "delta", 20.0),
    "toy",
)
POLICY = FlowConfig(net=MLPConfig(width=16, depth=1, time_dim=4), chunk_steps=4, execute_steps=3, sample_steps=4)


def tuned(**changes: Any) -> PPOConfig:
    """Settings of these tests, whatever the defaults are."""
    options = {
        "learning_rate": 1e-4,
        "epochs": 5,
        "minibatch": 1024,
        "pairs": 1,
        "kl_stop": 0.05,
        "inner_discount": 0.99,
    }
    return PPOConfig(**{**options, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(kernel: KernelConfig | None = None) -> tuple[ChunkPolicy, Kernel]:
    torch.manual_seed(0)
    policy = POLICY.build(SPEC).eval()
    return policy, policy.make_kernel(kernel or KernelConfig())


def draw(policy: ChunkPolicy, kernel: Kernel, count: int = 64, seed: int = 1) -> Samples:
    """Chains of the policy as it is; what moves right is good."""
    condition = torch.randn(count, 2, 3, generator=generator(seed))
    noise = torch.randn(kernel.steps + 1, count, 4, 2, generator=generator(seed + 1))
    chain = sample_chain(policy, kernel, condition, noise)
    advantage = chain.chunk[:, :3, 0].mean(1)
    return Samples(condition, chain, advantage, torch.ones(count, 3, dtype=torch.bool))


def weights(*modules: nn.Module) -> list[Tensor]:
    return [v.clone() for m in modules for v in m.state_dict().values()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def mean_log_ratio(policy: ChunkPolicy, kernel: Kernel, samples: Samples) -> Tensor:
    """Of each sample, over all trained steps."""
    count, steps = len(samples.advantage_B), len(kernel.trained)
    rows = torch.arange(count).repeat_interleave(steps)
    with torch.no_grad():
        found = pair_log_ratio(policy, kernel, samples, rows, torch.arange(steps).repeat(count), "joint")
    return found.view(count, steps).mean(1)


# --- the parts


def test_one_trained_step_has_all_of_the_clip() -> None:
    """DPPO v0.6 divides nothing by nothing here, and every clip is NaN."""
    assert clip_of_steps(tuned(clip=0.3, first_clip_share=0.01), 1).tolist() == pytest.approx([0.3])


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_clips_grow_by_one_factor_between_exact_ends(count: int, share: float) -> None:
    clip_K = clip_of_steps(tuned(clip=0.2, first_clip_share=share), count).double()
    assert clip_K.shape == (count,)
    assert float(clip_K[0]) == pytest.approx(0.2 * share, rel=1e-6)
    assert float(clip_K[-1]) == pytest.approx(0.2, rel=1e-6)
    assert (clip_K.diff() >= 0).all()
    factor_K = clip_K[1:] / clip_K[:-1]
    torch.testing.assert_close(factor_K, torch.full_like(factor_K, share ** (-1 / (count - 1))), rtol=1e-5, atol=0)


def test_the_surrogate_is_the_papers() -> None:
    log_ratio_BR = 0.5 * torch.randn(200, 3, generator=generator(), dtype=torch.float64)
    advantage_B = torch.randn(200, generator=generator(1), dtype=torch.float64)
    clip_B = 0.05 + 0.3 * torch.rand(200, generator=generator(2), dtype=torch.float64)
    found_B = surrogate(log_ratio_BR, advantage_B, clip_B)
    for b in range(200):
        terms = []
        for r in range(3):
            ratio, a, c = math.exp(log_ratio_BR[b, r]), float(advantage_B[b]), float(clip_B[b])
            terms.append(min(ratio * a, min(max(ratio, 1 - c), 1 + c) * a))
        assert float(found_B[b]) == pytest.approx(sum(terms) / 3)


def test_the_surrogates_gradient_is_its_finite_difference() -> None:
    log_ratio_BR = (0.5 * torch.randn(60, 2, generator=generator(), dtype=torch.float64)).requires_grad_()
    advantage_B = torch.randn(60, generator=generator(1), dtype=torch.float64)
    clip_B = 0.05 + 0.3 * torch.rand(60, generator=generator(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: surrogate(x, advantage_B, clip_B), log_ratio_BR)


def slope(log_r: float, advantage: float, clip: float = 0.2) -> float:
    x = torch.tensor([[log_r]], requires_grad=True)
    surrogate(x, torch.tensor([advantage]), torch.tensor([clip])).sum().backward()
    assert x.grad is not None
    return float(x.grad)


@pytest.mark.parametrize("size", [0.3, 5.0, 80.0])
def test_only_a_move_that_went_far_enough_in_its_own_direction_is_let_go(size: float) -> None:
    assert slope(size, 1.0) == 0.0
    assert slope(-size, -1.0) == 0.0
    assert slope(-size, 1.0) == pytest.approx(math.exp(-size))  # the wrong way: pulled back
    assert slope(0.3, -1.0) == pytest.approx(-math.exp(0.3))
    assert slope(0.1, 1.0) == pytest.approx(math.exp(0.1))
    assert slope(0.0, -2.0) == pytest.approx(-2.0)  # where both branches are equal they share one gradient


def test_a_ratio_beyond_what_a_float_holds_is_clipped_too() -> None:
    assert slope(100.0, 1.0) == 0.0  # exp(100) is infinite in float32, and 0 * infinity is no number


def test_a_divergence_is_never_negative_and_zero_at_equality_only() -> None:
    log_ratio_BR = 0.5 * torch.randn(500, 3, generator=generator(), dtype=torch.float64)
    assert (divergence(log_ratio_BR) > 0).all()
    zero_BR = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    found_B = divergence(zero_BR)
    assert found_B.tolist() == [0.0] * 4
    (gradient,) = torch.autograd.grad(found_B.sum(), zero_BR)
    assert not gradient.any()


def test_the_mean_divergence_is_that_of_two_gaussians() -> None:
    x = torch.randn(400_000, 1, generator=generator(), dtype=torch.float64)
    shift = 0.4
    log_ratio_BR = -0.5 * (x - shift).square() + 0.5 * x.square()
    assert float(divergence(log_ratio_BR).mean()) == pytest.approx(shift**2 / 2, rel=0.02)


@pytest.mark.parametrize(("per_sample", "count"), [(1, 1), (2, 2), (5, 5), (9, 5), (0, 5)])
def test_each_sample_is_drawn_with_so_many_different_steps(per_sample: int, count: int) -> None:
    sample_P, step_P = draw_pairs(40, 5, per_sample, generator())
    pairs = list(zip(sample_P.tolist(), step_P.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 40 * count
    assert torch.bincount(sample_P, minlength=40).tolist() == [count] * 40
    assert set(step_P.tolist()) <= set(range(5))
    assert sample_P.tolist() != sorted(sample_P.tolist())  # minibatches mix samples


def test_steps_are_drawn_evenly_and_anew_by_the_generator_alone() -> None:
    shared = generator()
    first, second = draw_pairs(20_000, 4, 1, shared), draw_pairs(20_000, 4, 1, shared)
    share_K = torch.bincount(first[1], minlength=4) / 20_000
    torch.testing.assert_close(share_K, torch.full((4,), 0.25), atol=0.015, rtol=0)
    assert not torch.equal(first[1], second[1])  # DPPO v0.6 draws its permutation once for all epochs
    torch.manual_seed(7)
    again = draw_pairs(20_000, 4, 1, generator())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_advantages_are_of_zero_mean_and_unit_spread_whatever_their_unit() -> None:
    advantage_B = torch.randn(500, generator=generator())
    found_B = normalize_advantage(advantage_B, 100.0)
    assert found_B is not None
    assert float(found_B.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(found_B.square().mean()) == pytest.approx(1.0, rel=1e-5)
    other_B = normalize_advantage(37.0 * advantage_B - 5.0, 100.0)
    assert other_B is not None
    torch.testing.assert_close(other_B, found_B, atol=1e-4, rtol=1e-4)


def test_one_advantage_far_from_the_others_is_clipped() -> None:
    advantage_B = torch.zeros(1000)
    advantage_B[3] = 1e6
    found_B = normalize_advantage(advantage_B, 5.0)
    assert found_B is not None
    assert float(found_B.max()) == 5.0
    assert float(found_B.min()) > -0.1


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -100.1, 333.333, 1e6 + 0.1])
@pytest.mark.parametrize("count", [7, 4096])
def test_advantages_that_are_all_the_same_teach_nothing(value: float, count: int) -> None:
    assert normalize_advantage(torch.full((count,), value), 5.0) is None  # rounding of the mean is no spread


def random_ratio_parts() -> tuple[Tensor, Tensor, Tensor]:
    new_BH, old_BH = torch.randn(2, 30, 4, generator=generator(), dtype=torch.float64)
    length_B1 = torch.randint(0, 5, (30, 1), generator=generator(1))
    return new_BH, old_BH, torch.arange(4) < length_B1


def test_reductions_of_a_log_ratio() -> None:
    new_BH, old_BH, executed_BH = random_ratio_parts()
    joint = log_ratio(new_BH, old_BH, executed_BH, "joint", 2)
    mean = log_ratio(new_BH, old_BH, executed_BH, "mean", 2)
    each = log_ratio(new_BH, old_BH, executed_BH, "action_step", 2)
    assert (joint.shape, mean.shape, each.shape) == ((30, 1), (30, 1), (30, 4))
    for b in range(30):
        parts = [float(new_BH[b, h] - old_BH[b, h]) for h in range(4) if executed_BH[b, h]]
        assert float(joint[b]) == pytest.approx(sum(parts))
        assert float(mean[b]) == pytest.approx(sum(parts) / (2 * len(parts)) if parts else 0.0)
        assert each[b, : len(parts)].tolist() == pytest.approx(parts)
        assert not each[b, len(parts) :].any()


@pytest.mark.parametrize("reduction", ["joint", "action_step", "mean"])
def test_steps_that_did_not_run_move_no_ratio_and_get_no_gradient(reduction: str) -> None:
    new_BH, old_BH, executed_BH = random_ratio_parts()
    changed_BH = torch.where(executed_BH, new_BH, 100 * new_BH - 3)
    before, after = (log_ratio(n, old_BH, executed_BH, reduction, 2) for n in (new_BH, changed_BH))
    assert torch.equal(before, after)
    new_BH.requires_grad_()
    (gradient_BH,) = torch.autograd.grad(log_ratio(new_BH, old_BH, executed_BH, reduction, 2).sum(), new_BH)
    assert torch.equal(gradient_BH != 0, executed_BH)


@pytest.mark.parametrize("kernel", [KernelConfig(), KernelConfig(trained_steps=2), KernelConfig(kind="learned")])
@pytest.mark.parametrize("reduction", ["joint", "action_step", "mean"])
def test_pairs_have_ratio_one_before_any_update(kernel: KernelConfig, reduction: str) -> None:
    policy, made = build(kernel)
    samples = draw(policy, made)
    sample_P, step_P = draw_pairs(64, len(made.trained), 0, generator())
    found = pair_log_ratio(policy, made, samples, sample_P, step_P, reduction)
    assert found.detach().abs().max() < 1e-5


# --- the update


@pytest.mark.parametrize("kind", ["cps", "sde", "learned"])
@pytest.mark.parametrize("reduction", ["joint", "action_step", "mean"])
def test_good_chains_become_likelier_and_bad_ones_less_so(kind: str, reduction: str) -> None:
    policy, kernel = build(KernelConfig(kind=kind))  # type: ignore[arg-type]
    samples = draw(policy, kernel, 256)
    ppo = ChainPPO(policy, kernel, tuned(epochs=2, minibatch=256, pairs=0, learning_rate=1e-4, ratio=reduction))
    ppo.update(samples, generator())
    moved_B = mean_log_ratio(policy, kernel, samples)
    good_B = samples.advantage_B > samples.advantage_B.mean()
    assert moved_B[good_B].mean() > 0
    assert moved_B[~good_B].mean() < 0


def gradients(ppo: ChainPPO) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in ppo.optimizer.parameters]


@pytest.mark.parametrize("kernel", [KernelConfig(), KernelConfig(last_std=0.0), KernelConfig(trained_steps=3)])
def test_the_first_gradient_is_that_of_discounted_log_densities(kernel: KernelConfig) -> None:
    """At ratio one the surrogate's slope is advantage times that of the log-density, less for each step before the last."""
    policy, made = build(kernel)
    samples = draw(policy, made)
    discount = 0.6
    config = tuned(epochs=1, pairs=0, inner_discount=discount, clip_norm=1e6)
    advantage_B = normalize_advantage(samples.advantage_B, config.advantage_clip)
    assert advantage_B is not None
    parameters = list(policy.net.parameters())
    wanted = [torch.zeros_like(p) for p in parameters]
    for index, k in enumerate(made.trained):
        log_ratio_B1 = pair_log_ratio(policy, made, samples, torch.arange(64), torch.full((64,), index), "joint")
        gain = (advantage_B * log_ratio_B1[:, 0]).mean() / len(made.trained)
        for total, part in zip(wanted, torch.autograd.grad(gain, parameters), strict=True):
            total -= discount ** (POLICY.sample_steps - 1 - k) * part
    ppo = ChainPPO(policy, made, config)
    ppo.update(samples, generator())
    for found, expected in zip(gradients(ppo), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_early_steps_count_less_under_an_inner_discount() -> None:
    """With a discount of next to nothing only the last step is left."""
    policy, kernel = build()
    samples = draw(policy, kernel)
    spoilt = replace(samples, chain=Chain(samples.chain.x_BKHA.clone(), samples.chain.log_prob_BKH))
    spoilt.chain.x_BKHA[:, :3] = 7.0  # states of the early steps, and so all of their gradient
    found = []
    for given in (samples, spoilt):
        config = tuned(epochs=1, pairs=0, inner_discount=1e-9, clip_norm=1e6, clip=0.99)
        ppo = ChainPPO(copy.deepcopy(policy), kernel, config)
        ppo.update(given, generator())
        found.append(torch.cat([g.flatten() for g in gradients(ppo)]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)
    assert float(found[0].norm()) > 1e-2


def test_padding_does_not_move_an_update() -> None:
    policy, kernel = build()
    samples = draw(policy, kernel)
    executed_BH = torch.arange(3) < torch.randint(1, 4, (64, 1), generator=generator())
    ended = []
    for change in (0.0, 5.0):
        mine = copy.deepcopy(policy)
        log_prob = samples.chain.log_prob_BKH + change * ~executed_BH[:, None]
        given = replace(samples, chain=Chain(samples.chain.x_BKHA, log_prob), executed_BH=executed_BH)
        ChainPPO(mine, kernel, tuned(epochs=2, minibatch=16)).update(given, generator())
        ended.append(weights(mine))
    assert same(*ended)


def test_the_same_generator_gives_the_same_weights() -> None:
    ended = []
    for seed in (0, 0, 1):
        policy, kernel = build()
        ChainPPO(policy, kernel, tuned(epochs=2, minibatch=16)).update(draw(policy, kernel), generator(seed))
        ended.append(weights(policy))
    assert same(ended[0], ended[1])
    assert not same(ended[0], ended[2])


@pytest.mark.parametrize("value", [0.0, 0.1, -100.1])
def test_flat_advantages_change_no_weight_and_say_so(value: float) -> None:
    policy, kernel = build()
    samples = replace(draw(policy, kernel), advantage_B=torch.full((64,), value))
    before = weights(policy, kernel)
    metrics = ChainPPO(policy, kernel, tuned()).update(samples, generator())
    assert same(before, weights(policy, kernel))
    assert metrics["ppo/skipped_flat_advantage"] == 1.0
    assert metrics["ppo/gradient_steps"] == 0.0


def test_a_policy_that_moved_far_enough_ends_the_epochs() -> None:
    ran, divergences = [], []
    for stop in (1e-4, 1e9):
        policy, kernel = build()
        config = tuned(epochs=6, minibatch=32, learning_rate=3e-3, kl_stop=stop)
        metrics = ChainPPO(policy, kernel, config).update(draw(policy, kernel), generator())
        ran.append(metrics["ppo/epochs"])
        divergences.append(metrics["ppo/kl"])
        assert metrics["ppo/gradient_steps"] == 2 * metrics["ppo/epochs"]
    assert ran[0] < 6
    assert ran[1] == 6
    assert divergences[0] > 1e-4  # what ended it
    assert divergences[0] < divergences[1]


def test_a_penalty_on_the_divergence_holds_the_policy_near() -> None:
    found = []
    for penalty in (0.0, 30.0):
        policy, kernel = build()
        config = tuned(epochs=6, minibatch=128, learning_rate=1e-3, kl_stop=1e9, kl_penalty=penalty, clip=0.9, pairs=0)
        metrics = ChainPPO(policy, kernel, config).update(draw(policy, kernel), generator())
        found.append(metrics["ppo/kl"])
    assert found[1] < 0.5 * found[0]


def test_a_weak_clip_lets_the_policy_go_further() -> None:
    moved = []
    for clip in (0.02, 0.9):
        policy, kernel = build()
        samples = draw(policy, kernel)
        config = tuned(epochs=10, minibatch=128, learning_rate=1e-3, kl_stop=1e9, clip=clip, pairs=0)
        ChainPPO(policy, kernel, config).update(samples, generator())
        moved.append(float(mean_log_ratio(policy, kernel, samples).abs().mean()))
    assert moved[0] < 0.7 * moved[1]


def test_diagnostics_are_those_of_the_trained_steps() -> None:
    policy, kernel = build(KernelConfig(trained_steps=2))
    metrics = ChainPPO(policy, kernel, tuned(minibatch=16)).update(draw(policy, kernel), generator())
    assert {n for n in metrics if n.startswith("ppo_step_")} == {
        f"ppo_step_{k}/{name}" for k, name in itertools.product((2, 3), ("kl", "clipped"))
    }
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["ppo/dropped_steps"] == 0.0


def test_imitation_adds_its_gradient_with_its_weight() -> None:
    found = []
    for weight in (0.0, 0.5, 2.0):
        policy, kernel = build()

        def imitation(_: torch.Generator, policy: ChunkPolicy = policy) -> Tensor:
            return policy.net.leave[-1].bias.sum()  # type: ignore[union-attr, index, operator]

        config = tuned(epochs=1, pairs=0, imitation_weight=weight, clip_norm=1e6)
        ppo = ChainPPO(policy, kernel, config)
        ppo.update(draw(policy, kernel), generator(), imitation)
        assert ppo.policy.net.leave[-1].bias.grad is not None  # type: ignore[union-attr, index]
        found.append(ppo.policy.net.leave[-1].bias.grad.clone())  # type: ignore[union-attr, index]
    torch.testing.assert_close(found[1] - found[0], torch.full((8,), 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[2] - found[0], torch.full((8,), 2.0), atol=1e-4, rtol=0)


# --- bad numbers


def spoil_advantage(policy: ChunkPolicy, samples: Samples) -> Samples:
    advantage_B = samples.advantage_B.clone()
    advantage_B[5] = math.nan
    return replace(samples, advantage_B=advantage_B)


def spoil_weights(policy: ChunkPolicy, samples: Samples) -> Samples:
    with torch.no_grad():
        policy.net.leave[-1].bias[0] = math.nan  # type: ignore[union-attr, index, operator]
    return samples


def spoil_density(policy: ChunkPolicy, samples: Samples) -> Samples:
    return replace(samples, chain=Chain(samples.chain.x_BKHA, samples.chain.log_prob_BKH * math.nan))


def assert_nan_safe(before: list[Tensor], after: list[Tensor]) -> None:
    assert all(torch.allclose(a, b, atol=0, rtol=0, equal_nan=True) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("spoil", [spoil_advantage, spoil_weights, spoil_density])
def test_a_bad_number_drops_the_step_and_is_counted_until_it_is_too_much(
    spoil: Callable[[ChunkPolicy, Samples], Samples],
) -> None:
    policy, kernel = build()
    ppo = ChainPPO(policy, kernel, tuned(epochs=1, pairs=1, minibatch=64))  # one step per update
    samples = spoil(policy, draw(policy, kernel))
    before = weights(policy, kernel)
    for number in range(1, MOST_BAD_STEPS):
        metrics = ppo.update(samples, generator())
        assert metrics.get("ppo/dropped_steps") == number
        assert "ppo/skipped_flat_advantage" not in metrics
    with pytest.raises(NonFiniteLossError, match="PPO"):
        ppo.update(samples, generator())
    assert_nan_safe(before, weights(policy, kernel))
    assert not ppo.optimizer.optimizer.state_dict()["state"]


def test_an_update_goes_on_after_a_dropped_step() -> None:
    policy, kernel = build()
    ppo = ChainPPO(policy, kernel, tuned(epochs=1, minibatch=64))
    samples = draw(policy, kernel)
    before = weights(policy)
    ppo.update(spoil_density(policy, samples), generator())
    assert same(before, weights(policy))
    metrics = ppo.update(samples, generator())
    assert not same(before, weights(policy))
    assert all(torch.isfinite(w).all() for w in weights(policy))
    assert metrics["ppo/dropped_steps"] == 1.0


# --- the learning rate


def test_the_rate_moves_towards_the_target_within_its_bounds() -> None:
    ppo = ChainPPO(*build(), tuned(learning_rate=1e-3))
    target, factor = 0.01, 4.0

    def after(kl: float, times: int = 1) -> float:
        for _ in range(times):
            ppo.adapt(kl, target, factor)
        return ppo.learning_rate

    assert after(0.01) == after(0.019) == after(0.0051) == 1e-3  # near enough
    assert after(0.021) == pytest.approx(1e-3 / 1.5)
    assert after(0.004) == pytest.approx(1e-3)
    assert after(0.004) == pytest.approx(1.5e-3)
    assert after(1.0, 50) == pytest.approx(1e-3 / factor)
    assert after(0.0, 50) == pytest.approx(1e-3 * factor)
    assert after(math.nan) == pytest.approx(1e-3 * factor)


@pytest.mark.parametrize("share", [0.1, 0.2, 1.0, 4.0])
def test_a_divergence_too_large_never_raises_the_rate_and_one_too_small_never_lowers_it(share: float) -> None:
    """A roll-back halves the rate, so that it may stand below its bound."""
    ppo = ChainPPO(*build(), tuned(learning_rate=1e-3))
    ppo.learning_rate = share * 1e-3
    ppo.adapt(1.0, 0.01, 4.0)
    assert ppo.learning_rate <= share * 1e-3
    ppo.learning_rate = share * 1e-3
    ppo.adapt(0.0, 0.01, 4.0)
    assert ppo.learning_rate >= share * 1e-3


def test_the_adapted_rate_is_the_one_that_is_used() -> None:
    moved = []
    for rate in (1e-3, 1e-5):
        policy, kernel = build()
        before = weights(policy)
        ppo = ChainPPO(policy, kernel, tuned(learning_rate=1e-3, epochs=1))
        ppo.learning_rate = rate
        ppo.update(draw(policy, kernel), generator())
        moved.append(max(float((a - b).abs().max()) for a, b in zip(before, weights(policy), strict=True)))
    assert moved[0] == pytest.approx(1e-3, rel=0.05)  # Adam's first step
    assert moved[1] == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, "epochs"),
        ({"pairs": -1}, "pairs"),
        ({"clip": 1.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"first_clip_share": 0.0}, "first_clip_share"),
        ({"inner_discount": 1.5}, "inner_discount"),
        ({"kl_stop": 0.0}, "kl_stop"),
        ({"kl_penalty": -1.0}, "kl_penalty"),
    ],
)
def test_bad_settings_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PPOConfig(**options)


# --- the guard


def guarded(clip_norm: float = 1.0) -> tuple[nn.Linear, GuardedOptimizer]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return net, GuardedOptimizer(torch.optim.AdamW(net.parameters(), lr=0.01), clip_norm, "toy")


def test_a_good_step_is_the_optimisers_own_with_its_gradient_clipped() -> None:
    net, optimizer = guarded(clip_norm=0.5)
    plain = copy.deepcopy(net)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for scale in (10.0, 1e-3):
        norm = optimizer.step(scale * net(torch.ones(4, 3)).square().sum())
        adam.zero_grad()
        (scale * plain(torch.ones(4, 3)).square().sum()).backward()
        whole = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
        assert norm == pytest.approx(whole, rel=1e-5)  # before it was clipped
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
        assert same(weights(net), weights(plain))
    assert optimizer.dropped == 0


def bad_losses(net: nn.Linear) -> dict[str, Tensor]:
    output = net(torch.ones(4, 3)).sum()
    return {
        "nan": output * math.nan,
        "infinite": output + math.inf,
        "infinite slope": (output - output.detach()).abs().sqrt(),
    }


@pytest.mark.parametrize("name", ["nan", "infinite", "infinite slope"])
def test_a_bad_step_touches_neither_weights_nor_moments(name: str) -> None:
    net, optimizer = guarded()
    optimizer.step(net(torch.ones(4, 3)).square().sum())
    before = weights(net) + list(optimizer_tensors(optimizer.optimizer, "").values())
    before = [v.clone() for v in before]
    assert math.isnan(optimizer.step(bad_losses(net)[name]))
    assert same(before, weights(net) + list(optimizer_tensors(optimizer.optimizer, "").values()))
    assert optimizer.dropped == 1


def test_only_bad_steps_in_a_row_stop_training() -> None:
    net, optimizer = guarded()
    for _ in range(3):
        for _ in range(MOST_BAD_STEPS - 1):
            optimizer.step(bad_losses(net)["nan"])
        optimizer.step(net(torch.ones(4, 3)).sum())
    for _ in range(MOST_BAD_STEPS - 1):
        optimizer.step(bad_losses(net)["infinite slope"])
    before = weights(net)
    with pytest.raises(NonFiniteLossError, match=f"{MOST_BAD_STEPS} toy steps in a row"):
        optimizer.step(bad_losses(net)["nan"])
    assert same(before, weights(net))
    assert optimizer.dropped == 4 * (MOST_BAD_STEPS - 1) + 1


def test_the_rate_of_all_groups_is_set() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": one.parameters(), "lr": 1.0}, {"params": two.parameters(), "lr": 2.0}]
    optimizer = GuardedOptimizer(torch.optim.SGD(groups), 1.0, "toy")
    optimizer.set_learning_rate(0.25)
    assert [g["lr"] for g in optimizer.optimizer.param_groups] == [0.25, 0.25]
    assert len(list(optimizer.parameters)) == 4


def test_moments_as_tensors_bring_an_optimiser_back() -> None:
    def steps(net: nn.Linear, optimizer: GuardedOptimizer, inputs: Tensor) -> None:
        for x in inputs:
            optimizer.step(net(x).square().sum())

    inputs = torch.randn(6, 5, 3, generator=generator())
    net, optimizer = guarded()
    steps(net, optimizer, inputs[:3])
    kept = {k: v.clone() for k, v in optimizer_tensors(optimizer.optimizer, "mine.").items()}
    assert all(k.startswith("mine.") for k in kept)
    other, fresh = guarded()
    other.load_state_dict(net.state_dict())
    load_optimizer_tensors(fresh.optimizer, kept | {"another.0.step": torch.tensor(99.0)}, "mine.")
    again = optimizer_tensors(fresh.optimizer, "mine.")
    assert again.keys() == kept.keys()
    assert same(list(again.values()), list(kept.values()))
    held = [v.clone() for v in kept.values()]
    steps(net, optimizer, inputs[3:])
    steps(other, fresh, inputs[3:])
    assert same(weights(net), weights(other))
    assert same(held, list(kept.values()))  # what was loaded is a copy


def test_moments_of_a_fresh_optimiser_clear_those_of_a_used_one() -> None:
    net, optimizer = guarded()
    optimizer.step(net(torch.ones(4, 3)).sum())
    load_optimizer_tensors(optimizer.optimizer, {}, "mine.")
    assert not optimizer.optimizer.state_dict()["state"]


# --- the value function


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_the_value_loss_is_that_of_ppo2(clip: float) -> None:
    value_EB = torch.randn(2, 50, generator=generator())
    target_B, old_B = torch.randn(2, 50, generator=generator(1))
    terms = []
    for e, b in itertools.product(range(2), range(50)):
        value, target, old = float(value_EB[e, b]), float(target_B[b]), float(old_B[b])
        error = (value - target) ** 2
        if clip:
            error = max(error, (old + min(max(value - old, -clip), clip) - target) ** 2)
        terms.append(error)
    assert float(value_loss(value_EB, target_B, old_B, clip)) == pytest.approx(0.5 * sum(terms) / 100, rel=1e-5)


def test_a_value_that_moved_far_enough_towards_its_target_is_let_go() -> None:
    def gradient(value: float, old: float, target: float) -> float:
        v = torch.tensor([[value]], requires_grad=True)
        value_loss(v, torch.tensor([target]), torch.tensor([old]), 0.2).backward()
        assert v.grad is not None
        return float(v.grad)

    assert gradient(0.5, 0.0, 1.0) == 0.0
    assert gradient(0.1, 0.0, 1.0) == pytest.approx(-0.9)
    assert gradient(-0.5, 0.0, 1.0) == pytest.approx(-1.5)  # the wrong way: pulled back with all of its error


def test_members_fit_the_returns_and_their_mean_explains_them() -> None:
    torch.manual_seed(0)
    config = ValueConfig(width=32, members=3, epochs=60, minibatch=64, learning_rate=3e-3)
    value = ValueFunction(6, config)
    condition_BOD = torch.randn(256, 2, 3, generator=generator())
    target_B = condition_BOD[:, 0, 0] - 0.5 * condition_BOD[:, 1, 2]
    first = value.update(condition_BOD, target_B, generator(1))
    second = value.update(condition_BOD, target_B, generator(2))
    assert first["value/explained_variance"] < 0.5
    assert second["value/explained_variance"] > 0.95
    torch.testing.assert_close(value.value(condition_BOD), value.net(condition_BOD.flatten(1)).mean(0)[:, 0])
    by_hand = 1 - float((target_B - value.value(condition_BOD)).var() / target_B.var())
    assert value.update(condition_BOD, target_B, generator(3))["value/explained_variance"] == pytest.approx(
        by_hand, abs=1e-4
    )


def test_targets_that_are_no_numbers_leave_the_value_function_as_it_was() -> None:
    torch.manual_seed(0)
    value = ValueFunction(6, ValueConfig(width=8, epochs=MOST_BAD_STEPS))
    before = weights(value.net)
    with pytest.raises(NonFiniteLossError, match="value"):
        value.update(torch.zeros(8, 2, 3), torch.full((8,), math.nan), generator())
    assert same(before, weights(value.net))
