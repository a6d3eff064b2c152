"""Denoising chains: marginals by Monte Carlo, densities by finite differences, and a ratio of one before any update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from vla_rl.kernels import Grid, KernelConfig, MarginalKernel, SDEKernel, Transition, cps_std, ddim_std
from vla_rl.nets.mlp import MLPConfig
from vla_rl.nets.transformer import TransformerConfig
from vla_rl.nets.unet1d import UNet1DConfig
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.chain import log_ratio, sample_chain, step_log_prob, transition
from vla_rl.policies.diffusion import DiffusionConfig
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec, FeatureSpec

SPEC = PolicySpec(
    {"observation.state": FeatureSpec((3,))},
    ActionSpec(("x", "y"), ("m", "m"), (-1.0, -1.0), (1.0, 1.0), "delta", 20.0),
    "toy",
)
NETS = {
    "mlp": MLPConfig(width=32, depth=1, time_dim=8),
    "unet1d": UNet1DConfig(channels=(8, 16), time_dim=8),
    "transformer": TransformerConfig(width=16, depth=1, heads=2),
}
FLOW = FlowConfig(net=NETS["mlp"], chunk_steps=4, execute_steps=3, sample_steps=5)
DIFFUSION = DiffusionConfig(net=NETS["mlp"], chunk_steps=4, execute_steps=3, sample_steps=5)
KINDS = [(FLOW, kind) for kind in ("cps", "sde", "learned")] + [
    (DIFFUSION, kind) for kind in ("ddim", "ddpm", "learned")
]


def build(config: PolicyConfig, dtype: torch.dtype = torch.float32) -> ChunkPolicy:
    torch.manual_seed(0)
    return config.build(SPEC).eval().to(dtype)


def noise(count: int, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, 4, 2, generator=generator, dtype=dtype)


def flow_grid(steps: int) -> Grid:
    tau = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return Grid(tau, 1 - tau, tau[:-1])


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("config", "kind"), KINDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stored_chain_has_ratio_one_before_any_update(
    config: PolicyConfig, kind: str, net: str, dtype: torch.dtype
) -> None:
    policy = build(replace(config, net=NETS[net]), dtype)
    kernel = policy.make_kernel(KernelConfig(kind=kind)).to(dtype)  # type: ignore[arg-type]
    condition = noise(1, 64, dtype, 1)[0].flatten(1)[:, : policy.condition_dim].view(64, 2, 3)
    chain = sample_chain(policy, kernel, condition, noise(6, 64, dtype))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:40]  # other batches than when it was drawn
    for index, k in enumerate(kernel.trained):
        k_B = torch.full((40,), k)
        x, after = chain.x_BKHA[order, k], chain.x_BKHA[order, k + 1]
        new = step_log_prob(policy, kernel, condition[order], x, after, k_B)
        everything = torch.ones_like(new, dtype=torch.bool)
        for reduction in ("joint", "action_step", "mean"):
            ratio = log_ratio(new, chain.log_prob_BKH[order, index], everything, reduction, 2).exp()
            assert (ratio - 1).abs().max() < 1e-5


@pytest.mark.parametrize(("config", "kind"), KINDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_log_densities_are_those_of_the_drawn_noise(config: PolicyConfig, kind: str) -> None:
    policy = build(config, torch.float64)
    kernel = policy.make_kernel(KernelConfig(kind=kind)).double()  # type: ignore[arg-type]
    condition = torch.zeros(8, 2, 3, dtype=torch.float64)
    drawn = noise(6, 8, torch.float64)
    chain = sample_chain(policy, kernel, condition, drawn)
    for index, k in enumerate(kernel.trained):
        step = transition(policy, kernel, condition, chain.x_BKHA[:, k], torch.full((8,), k))
        by_hand = -0.5 * drawn[k + 1].square() - step.std_BHA.log() - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(chain.log_prob_BKH[:, index], by_hand[:, :3].sum(-1))


def test_a_density_is_the_slope_of_its_distribution_and_its_gradient_that_of_its_values() -> None:
    step = Transition(torch.full((1, 1, 1), 0.3, dtype=torch.float64), torch.full((1, 1, 1), 0.2, dtype=torch.float64))
    normal = torch.distributions.Normal(0.3, 0.2)
    width = 1e-5
    for x in (-0.2, 0.3, 0.61):
        at = torch.full((1, 1, 1), x, dtype=torch.float64)
        slope = (normal.cdf(at + width) - normal.cdf(at - width)) / (2 * width)
        torch.testing.assert_close(step.log_prob(at).exp(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("config", "kind"), KINDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_the_gradient_of_a_log_density_is_its_finite_difference(config: PolicyConfig, kind: str) -> None:
    policy = build(config, torch.float64)
    kernel = policy.make_kernel(KernelConfig(kind=kind)).double()  # type: ignore[arg-type]
    condition = torch.zeros(4, 2, 3, dtype=torch.float64)
    chain = sample_chain(policy, kernel, condition, noise(6, 4, torch.float64))
    weight = policy.net.leave[-1].bias  # type: ignore[union-attr, index]
    k_B = torch.tensor([1, 2, 3, 4])
    rows = torch.arange(4)

    def value() -> Tensor:
        x, after = chain.x_BKHA[rows, k_B], chain.x_BKHA[rows, k_B + 1]
        return step_log_prob(policy, kernel, condition, x, after, k_B).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    for entry in range(3):
        values = []
        for change in (1e-6, -1e-6):
            with torch.no_grad():
                weight[entry] += change
                values.append(float(value()))
                weight[entry] -= change
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient[entry]), rel=1e-4, abs=1e-6)


def perfect(kernel: MarginalKernel | SDEKernel, grid: Grid, scale: float, samples: int) -> list[Tensor]:
    """Run a chain whose head knows the truth: actions are N(0, scale^2), so both estimates are linear in x."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(samples, 1, 1, generator=generator, dtype=torch.float64)

    x = grid.signal[0] * scale * normal() + grid.noise[0] * normal()
    states = [x]
    for k in range(grid.steps):
        s, n = grid.signal[k], grid.noise[k]
        total = (s * scale) ** 2 + n**2
        # a draw from p(action | x), so that estimates have the joint law of (action, noise) given x
        mean, spread = s * scale**2 / total * x, (scale * n / total.sqrt())
        action = mean + spread * normal()
        epsilon = (x - s * action) / n
        k_B = torch.full((samples,), k)
        x = kernel.transition(x, action, epsilon, k_B, torch.zeros(samples, 1, 1)).sample(normal())
        states.append(x)
    return states


@pytest.mark.parametrize("std_max", [10.0, 0.1])
@pytest.mark.parametrize("std_min", [1e-4, 0.15])
@pytest.mark.parametrize("kind", ["cps", "ddim"])
def test_a_clipped_std_keeps_the_marginals(kind: str, std_min: float, std_max: float) -> None:
    """RL-100's code clips the noise after the mean was formed, which shrinks the state to noise levels the net never saw."""
    if kind == "cps":
        grid = flow_grid(5)
    else:
        small = build(replace(DIFFUSION, sample_steps=5)).grid()
        grid = Grid(small.signal.double(), small.noise.double(), small.tau.double())
    config = KernelConfig(std_min=min(std_min, std_max), std_max=std_max, last_std=0.0, noise_scale=0.7)
    table = cps_std(grid, 0.7) if kind == "cps" else ddim_std(grid, 1.0)
    kernel = MarginalKernel(config, grid, table)
    samples, scale = 200_000, 0.5
    for k, x in enumerate(perfect(kernel, grid, scale, samples)):
        wanted = float(((grid.signal[k] * scale) ** 2 + grid.noise[k] ** 2).sqrt())
        assert float(x.std()) == pytest.approx(wanted, rel=0.01)
        assert abs(float(x.mean())) < 0.01


def test_the_sde_keeps_the_marginals_as_its_steps_shrink() -> None:
    def error(steps: int) -> float:
        grid = flow_grid(steps)
        kernel = SDEKernel(KernelConfig(std_min=1e-6, std_max=10.0, last_std=0.0, noise_scale=0.5), grid)
        states = perfect(kernel, grid, 0.5, 100_000)
        levels = ((grid.signal * 0.5) ** 2 + grid.noise**2).sqrt()
        return max(abs(float(x.std()) - float(w)) for x, w in zip(states, levels, strict=True))

    assert error(80) < 0.02
    assert error(80) < error(10)


@pytest.mark.parametrize(
    "config",
    [FLOW, *(replace(DIFFUSION, prediction=p) for p in ("epsilon", "sample", "v"))],
    ids=lambda c: getattr(c, "prediction", "flow"),
)
def test_the_step_without_noise_is_what_the_policy_samples(config: PolicyConfig) -> None:
    policy = build(config)
    kernel = policy.make_kernel(KernelConfig())
    condition, start = torch.zeros(8, 2, 3), noise(1, 8)
    x = start[0]
    for k in range(kernel.steps):
        k_B = torch.full((8,), k)
        output = policy.net(x, kernel.tau_K[k_B][:, None].expand(8, 4), condition)
        x = kernel.deterministic_step(*policy.estimates(x, output, *kernel.levels(k_B)), k_B)
    torch.testing.assert_close(x, policy.generate(condition, start, None).action_BHA, atol=1e-5, rtol=1e-4)


def test_ddim_with_noise_is_that_of_diffusers() -> None:
    policy = build(replace(DIFFUSION, eta=0.6))
    kernel = policy.make_kernel(KernelConfig(kind="ddim", noise_scale=0.6, std_min=1e-9, std_max=10.0, last_std=1e-12))
    condition, drawn = torch.zeros(8, 2, 3), noise(6, 8)
    chain = sample_chain(policy, kernel, condition, drawn)
    torch.testing.assert_close(chain.chunk, policy.generate(condition, drawn, None).action_BHA, atol=1e-4, rtol=1e-3)


def test_ddpm_is_the_posterior_of_diffusers() -> None:
    config = replace(DIFFUSION, sampler="ddpm")
    policy = build(config)
    kernel = policy.make_kernel(KernelConfig(kind="ddpm", std_min=1e-9, std_max=10.0, last_std=1e-12))
    condition, drawn = torch.zeros(8, 2, 3), noise(6, 8)
    chain = sample_chain(policy, kernel, condition, drawn)
    assert isinstance(policy.ddpm, DDPMScheduler)  # type: ignore[attr-defined]
    torch.testing.assert_close(chain.chunk, policy.generate(condition, drawn, None).action_BHA, atol=1e-3, rtol=1e-2)


def test_the_grid_ends_at_a_clean_action_whose_noise_is_what_is_asked_for() -> None:
    """Defect 22 of the public code: a clamped timestep leaves .02 of noise on the last step, named nowhere."""
    for config in (FLOW, DIFFUSION):
        policy = build(config)
        grid = policy.grid()
        assert (float(grid.signal[-1]), float(grid.noise[-1])) == (1.0, 0.0)
        torch.testing.assert_close(
            grid.signal.square()[1:-1] if config is DIFFUSION else grid.signal[1:-1],
            (1 - grid.noise.square() if config is DIFFUSION else 1 - grid.noise)[1:-1],
        )
        kernel = policy.make_kernel(KernelConfig(last_std=0.07))
        step = transition(policy, kernel, torch.zeros(2, 2, 3), noise(1, 2)[0], torch.full((2,), kernel.steps - 1))
        assert step.std_BHA.unique().tolist() == pytest.approx([0.07])


def test_a_last_step_without_noise_has_no_likelihood() -> None:
    """Defect 3: a sample that is the mean, under a density of its own, makes every ratio at most one."""
    policy = build(FLOW)
    kernel = policy.make_kernel(KernelConfig(last_std=0.0))
    assert kernel.trained == (0, 1, 2, 3)
    chain = sample_chain(policy, kernel, torch.zeros(4, 2, 3), noise(6, 4))
    assert chain.log_prob_BKH.shape == (4, 4, 3)


def test_only_the_steps_that_are_trained_are_noisy() -> None:
    policy = build(FLOW)
    kernel = policy.make_kernel(KernelConfig(trained_steps=2))
    assert kernel.trained == (3, 4)
    one, two = noise(6, 4, seed=1), noise(6, 4, seed=2)
    two[0] = one[0]
    chains = [sample_chain(policy, kernel, torch.zeros(4, 2, 3), n) for n in (one, two)]
    torch.testing.assert_close(chains[0].x_BKHA[:, :4], chains[1].x_BKHA[:, :4])
    assert not torch.equal(chains[0].x_BKHA[:, 4], chains[1].x_BKHA[:, 4])


def test_learned_noise_stays_in_its_range_and_has_a_gradient() -> None:
    policy = build(FLOW)
    kernel = policy.make_kernel(KernelConfig(kind="learned", std_min=0.1, std_max=0.24, last_std=0.12))
    with torch.no_grad():
        kernel.net[2].weight.normal_(0, 50.0)  # type: ignore[union-attr, index, operator]
    condition = noise(1, 64)[0].flatten(1)[:, :6].view(64, 2, 3)
    for k in range(5):
        step = transition(policy, kernel, condition, noise(1, 64)[0], torch.full((64,), k))
        assert float(step.std_BHA.detach().min()) >= 0.1 - 1e-6
        assert float(step.std_BHA.max()) <= (0.12 if k == 4 else 0.24) + 1e-6
    step.log_prob(torch.zeros(64, 4, 2)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in kernel.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"std_min": 0.0}, "std_min"),
        ({"std_min": 0.5, "std_max": 0.1}, "std_min"),
        ({"noise_scale": 1.5}, "noise_scale"),
        ({"last_std": -1.0}, "last_std"),
    ],
)
def test_bad_kernels_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KernelConfig(**options)


def test_a_kernel_of_the_other_head_is_refused() -> None:
    with pytest.raises(UserError, match="cps, sde or learned"):
        build(FLOW).make_kernel(KernelConfig(kind="ddim"))
    with pytest.raises(UserError, match="ddim, ddpm or learned"):
        build(DIFFUSION).make_kernel(KernelConfig(kind="cps"))
    with pytest.raises(UserError, match="divisor of train_steps"):
        build(replace(DIFFUSION, sample_steps=7)).make_kernel(KernelConfig())
    with pytest.raises(UserError, match="euler"):
        build(replace(FLOW, solver="midpoint")).make_kernel(KernelConfig())
    with pytest.raises(ValueError, match="trained_steps"):
        build(FLOW).make_kernel(KernelConfig(trained_steps=6))
    with pytest.raises(ValueError, match="no step"):
        build(FLOW).make_kernel(KernelConfig(trained_steps=1, last_std=0.0))


def test_joint_ratios_saturate_where_mean_ratios_do_not() -> None:
    """Defect 4: over 16 x 7 dimensions a small shift moves every joint ratio beyond its clip."""
    steps, dims, shift = 16, 7, 0.02
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(500, steps, dims)
    std = torch.full_like(mean, 0.1)
    drawn = std * torch.randn(mean.shape, generator=generator)
    old, new = (Transition(m, std).log_prob(drawn).sum(-1) for m in (mean, mean + shift))
    everything = torch.ones(500, steps, dtype=torch.bool)

    def beyond(reduction: str, clip: float) -> float:
        return float(((log_ratio(new, old, everything, reduction, dims).exp() - 1).abs() > clip).float().mean())

    assert beyond("joint", 0.2) > 0.9
    assert beyond("mean", 0.2) == 0.0
    assert beyond("action_step", 0.2) < beyond("joint", 0.2)
