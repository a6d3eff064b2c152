"""Residual TD3: one step's losses against their equations, and the defects of the released code of ResFiT (resfit.md, 1.9)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vla_rl.algos import distributional_critic, ensemble_critic
from vla_rl.algos.guard import NonFiniteLossError
from vla_rl.algos.residual_td3 import ResidualTD3, ResidualTD3Config, correction_loss
from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import StepBatch, StepContext
from vla_rl.nets.step_critics import DistributionalCriticConfig, EnsembleCriticConfig, StepCriticConfig
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.types import STATE, ActionSpec, FeatureSpec

PLANE = ActionSpec(("x", "y"), ("m", "m"), (-1.0, -1.0), (1.0, 1.0), "delta", 20.0)
SMALL = EnsembleCriticConfig(width=16, depth=1, members=4)
DISTRIBUTIONAL = DistributionalCriticConfig(width=16, depth=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def algorithm(critic: StepCriticConfig = SMALL, seed: int = 0, td3: dict | None = None, **options: Any) -> ResidualTD3:
    torch.manual_seed(seed)
    encoder = StepEncoder({STATE: FeatureSpec((3,))}, PLANE, chunk_steps=4)
    policy = ResidualPolicy(ResidualConfig(width=16, depth=1, critic=critic, **options), encoder)
    return ResidualTD3(policy, ResidualTD3Config(**(td3 or {})))


def context(count: int, seed: int) -> StepContext:
    g = generator(seed)
    base_BA = 0.5 * torch.rand(count, 2, generator=g) - 0.25
    return StepContext({STATE: torch.randn(count, 3, generator=g)}, base_BA, torch.arange(count) % 4)


def batch(count: int = 32, seed: int = 0) -> StepBatch:
    now, following, g = context(count, seed), context(count, seed + 1), generator(seed + 2)
    action_BA = (now.base_BA + 0.2 * (2 * torch.rand(count, 2, generator=g) - 1)).clamp(-1, 1)
    reward_B = (torch.rand(count, generator=g) > 0.8).float()
    return StepBatch(
        now,
        action_BA,
        reward_B,
        0.97 * (1 - reward_B),
        following,
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(count, dtype=torch.bool),
    )


def critic_gradients(made: ResidualTD3, b: StepBatch, seed: int = 5) -> list[torch.Tensor]:
    policy = made.policy
    x_BD = policy.inputs(b.now, policy.encoder(b.now), b.action_BA)
    following = made.following(b.following, generator(seed))
    loss = ensemble_critic.td_loss(policy.critic, x_BD, following, b.reward_B, b.discount_B, (0.0, 1.0), generator())  # type: ignore[arg-type]
    return list(torch.autograd.grad(loss, list(policy.critic.parameters())))


def test_the_members_of_the_ensemble_learn_apart() -> None:
    """Defect 1: the square of the mean error couples the heads; here a change of one leaves the others' gradients as they are."""
    made, b = algorithm(), batch()
    before = critic_gradients(made, b)
    with torch.no_grad():
        for parameter in made.policy.critic.parameters():
            parameter[0] += 0.3
    after = critic_gradients(made, b)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x[1:], y[1:])
        assert not torch.allclose(x[0], y[0])


@pytest.mark.parametrize("critic", [SMALL, DISTRIBUTIONAL], ids=["ensemble", "dsac_t"])
def test_the_members_begin_apart_and_as_wide_as_linear_layers_do(critic: StepCriticConfig) -> None:
    """Defect 6: the heads' initialisation was called on what it does nothing to."""
    made = algorithm(critic)
    for layer in made.policy.critic.net.layers:
        weight = layer.weight.detach()
        assert float(weight.abs().max()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.15)
        assert not torch.allclose(weight[0], weight[1])


def test_the_critics_gradient_agrees_with_finite_differences() -> None:
    made, b = algorithm(), batch()
    made.policy.double(), made.target.double()
    b = doubled(b)
    policy = made.policy
    x_BD = policy.inputs(b.now, policy.encoder(b.now), b.action_BA)
    following = made.following(b.following, generator(5))

    def loss() -> torch.Tensor:
        return ensemble_critic.td_loss(
            policy.critic, x_BD, following, b.reward_B, b.discount_B, (0.0, 1.0), generator()
        )  # type: ignore[arg-type]

    weight = policy.critic.net.layers[1].weight
    found = torch.autograd.grad(loss(), weight)[0]
    with torch.no_grad():
        weight[2, 3, 0] += 1e-6
        up = loss()
        weight[2, 3, 0] -= 2e-6
        down = loss()
    assert float(found[2, 3, 0]) == pytest.approx(float((up - down) / 2e-6), rel=1e-4)


def doubled(b: StepBatch) -> StepBatch:
    def wide(c: StepContext) -> StepContext:
        return StepContext({k: v.double() for k, v in c.features.items()}, c.base_BA.double(), c.phase_B)

    return replace(
        b, now=wide(b.now), following=wide(b.following), action_BA=b.action_BA.double(), reward_B=b.reward_B.double()
    )


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 1.0), (0.2, 0.6)])
def test_the_target_stays_within_the_returns_there_can_be(lowest: float, highest: float) -> None:
    made, b = algorithm(), batch()
    policy = made.policy
    x_BD = policy.inputs(b.now, policy.encoder(b.now), torch.zeros_like(b.action_BA))
    for far in (50.0, -50.0):
        following = torch.full((2, 32, 1), far)
        loss = ensemble_critic.td_loss(
            policy.critic,
            x_BD,
            following,
            b.reward_B,
            b.discount_B,
            (lowest, highest),
            generator(),  # type: ignore[arg-type]
        )
        goal_B = torch.where(b.discount_B > 0, highest if far > 0 else lowest, b.reward_B.clamp(lowest, highest))
        torch.testing.assert_close(loss, (policy.critic(x_BD) - goal_B).square().mean())


def test_the_target_takes_the_lowest_of_a_random_subset() -> None:
    made, b = algorithm(), batch()
    said = torch.stack([torch.full((32, 1), v) for v in (0.7, 0.3)])
    x_BD = torch.zeros(32, made.policy.encoder.context_dim + 2)
    loss = ensemble_critic.td_loss(made.policy.critic, x_BD, said, b.reward_B, b.discount_B, (0.0, 1.0), generator())  # type: ignore[arg-type]
    goal_B = (b.reward_B + b.discount_B * 0.3).clamp(0, 1)
    torch.testing.assert_close(loss, (made.policy.critic(x_BD) - goal_B).square().mean())
    drawn = {tuple(sorted(made._choose(generator(s)).tolist())) for s in range(200)}
    assert drawn == {(i, j) for i in range(4) for j in range(i + 1, 4)}


def test_stored_and_bootstrapped_actions_are_those_that_are_executed() -> None:
    """Defect 2: at the limits Q is asked about the clipped action, in the critic's loss, in the target and in the actor's."""
    made = algorithm(gate=False, scale=0.5, td3={"smoothing": 0.0})
    at_limit = StepContext({STATE: torch.zeros(4, 3)}, torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    asked: list[torch.Tensor] = []
    for policy in (made.policy, made.target):
        with torch.no_grad():
            policy.actor.net[-1].bias[:] = 3.0
        whole = policy.critic.outputs

        def heard(x_BD: torch.Tensor, chosen: torch.Tensor | None = None, whole: Callable = whole) -> torch.Tensor:
            asked.append(x_BD[:, -2:].detach().clone())
            return whole(x_BD, chosen)

        policy.critic.outputs = heard  # type: ignore[method-assign]
    b = replace(batch(4), now=at_limit, following=at_limit, action_BA=torch.ones(4, 2))
    made.update(b, generator())
    made.update(b, generator())
    assert len(asked) >= 5
    for action_BA in asked:
        torch.testing.assert_close(action_BA, torch.ones_like(action_BA))


def test_the_target_is_that_of_the_better_of_base_and_composed() -> None:
    made = algorithm(td3={"smoothing": 0.0}, pessimism=0.5, scale=1.0)
    with torch.no_grad():
        torch.nn.init.normal_(made.target.actor.net[-1].weight)
    step = context(64, 3)
    chosen = made._choose(generator(7))  # smoothing draws from the generator first
    g = generator(7)
    torch.randn(64, 2, generator=g)
    chosen = made._choose(g)
    policy = made.policy
    encoded = policy.encoder(step)
    action_BA = policy.composition.compose(step.base_BA, made.target.mean(encoded))
    composed = made.target.critic.outputs(policy.inputs(step, encoded, action_BA), chosen)
    still = made.target.critic.outputs(policy.inputs(step, encoded, step.base_BA), chosen)
    lead = (composed - still)[..., 0]
    better = lead.mean(0) - 0.5 * lead.std(0, correction=0) >= 0
    assert 0 < int(better.sum()) < 64
    wanted = torch.where(better[:, None], composed, still)
    torch.testing.assert_close(made.following(step, generator(7)), wanted)


def test_the_actor_climbs_q_and_the_penalty_draws_it_to_the_base() -> None:
    b = batch(64)
    sizes = {}
    for penalty in (0.0, 100.0):
        made = algorithm(td3={"actor_rate": 1e-2, "penalty": penalty}, gate=False, pessimism=0.0)
        torch.manual_seed(3)
        with torch.no_grad():
            made.policy.actor.net[-1].bias[:] = 0.3
        before = value(made, b)
        for _ in range(40):
            made.update_actor(b)
        sizes[penalty] = float(made.policy.mean(made.policy.encoder(b.now)).abs().mean().detach())
        if not penalty:
            assert value(made, b) > before
    assert sizes[100.0] < 0.1 < sizes[0.0]


@pytest.mark.parametrize("doubt", [0.0, 0.3])
def test_the_actors_gradient_is_that_of_its_loss(monkeypatch: pytest.MonkeyPatch, doubt: float) -> None:
    """The critic is passed backwards once; what comes out is the gradient of the loss as it is written down."""
    weights = {"value_weight": 3.0, "penalty": 0.2, "imitation_weight": 0.7, "imitation_doubt": doubt}
    made = algorithm(td3=weights, pessimism=0.5)
    policy, b = made.policy, replace(batch(), shown_B=torch.arange(32) % 2 == 0)
    with torch.no_grad():
        torch.nn.init.normal_(policy.actor.net[-1].weight, std=0.3)
    parameters = list(policy.actor.parameters())
    encoded = policy.encoder(b.now)
    raw_BA = policy.actor(encoded).tanh()
    action_BA = b.now.base_BA + policy.composition.scale_A * raw_BA
    composed_EBF, base_EBF = policy.compare(policy.critic, b.now, encoded, action_BA)
    lead_EB = (composed_EBF - base_EBF)[..., 0]
    q_B = composed_EBF[..., 0].mean(0).detach()
    shown_EB = policy.critic(policy.inputs(b.now, encoded, b.action_BA)).detach()
    behind_EB = composed_EBF[..., 0].detach() - shown_EB  # what a demonstration is worth less than the composed action
    better_B = b.shown_B & (behind_EB.mean(0) - doubt * behind_EB.std(0, correction=0) <= 0)
    preferred_B = b.shown_B & (shown_EB.mean(0) >= q_B)
    assert 0 < int(better_B.sum()) < 16
    # without doubt: what the members like better on the whole
    assert torch.equal(better_B, preferred_B) == (doubt == 0)
    wanted_BA = ((b.action_BA - b.now.base_BA) / policy.composition.scale_A).clamp(-1, 1)
    loss = -3.0 * (lead_EB.mean(0) - 0.5 * lead_EB.std(0, correction=0)).mean() / q_B.abs().mean()
    loss = loss + 0.2 * raw_BA.square().mean()
    loss = loss + 0.7 * ((raw_BA - wanted_BA).square().mean(1) * better_B).sum() / better_B.sum()
    wanted = torch.autograd.grad(loss, parameters)

    found: list[torch.Tensor] = []
    monkeypatch.setattr(
        made.actor_optimizer, "step", lambda total: found.extend(torch.autograd.grad(total, parameters))
    )
    made.update_actor(b)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_without_the_gate_the_target_composes_everywhere() -> None:
    made = algorithm(td3={"smoothing": 0.0}, pessimism=5.0)
    with torch.no_grad():
        torch.nn.init.normal_(made.target.actor.net[-1].weight)
    step, policy = context(64, 3), made.policy
    gated = made.following(step, generator(7))
    made.set_gated(gated=False)
    free = made.following(step, generator(7))
    encoded = policy.encoder(step)
    action_BA = policy.composition.compose(step.base_BA, made.target.mean(encoded))
    assert not torch.equal(gated, free)
    torch.testing.assert_close(free.mean(0), _subset(made, policy.inputs(step, encoded, action_BA)).mean(0))
    assert bool(policy.decide(step).composed_B.all())
    again = algorithm(pessimism=5.0)
    again.load_state_dict(made.state_dict())
    assert not again.policy.gated


def _subset(made: ResidualTD3, x_BD: torch.Tensor) -> torch.Tensor:
    g = generator(7)
    torch.randn(64, 2, generator=g)  # smoothing draws first
    return made.target.critic.outputs(x_BD, made._choose(g))


def value(made: ResidualTD3, b: StepBatch) -> float:
    policy = made.policy
    context_BD = policy.encoder(b.now)
    action_BA = policy.composition.compose(b.now.base_BA, policy.mean(context_BD))
    return float(policy.critic(policy.inputs(b.now, context_BD, action_BA)).mean().detach())


def test_the_actors_loss_does_not_move_the_critic() -> None:
    made, b = algorithm(), batch()
    before = copy.deepcopy(made.policy.critic.state_dict())
    made.update_actor(b)
    for name, tensor in made.policy.critic.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.requires_grad for p in made.policy.critic.parameters())


def test_the_first_step_of_an_update_leaves_the_base_where_nothing_is_known() -> None:
    """Zero weights in the last layer: until the actor has moved, what is executed is the base's action to the bit."""
    made, b = algorithm(gate=False), batch()
    made.update(b, generator(), moves_actor=False)
    made.update(b, generator(), moves_actor=False)
    assert torch.equal(made.policy.decide(b.now).action_BA, b.now.base_BA)
    made.update(b, generator())
    made.update(b, generator())
    assert not torch.equal(made.policy.decide(b.now).action_BA, b.now.base_BA)


def test_corrections_are_targets_of_the_residual_within_its_reach() -> None:
    residual_BA = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.1, 0.1]])
    wanted_BA = torch.tensor([[0.5, 0.0], [4.0, 0.0], [9.0, 9.0]])
    human_B = torch.tensor([True, True, False])
    assert float(correction_loss(residual_BA, wanted_BA, human_B)) == pytest.approx((0.25 / 2 + 0.25 / 2) / 2)
    assert float(correction_loss(residual_BA, wanted_BA, torch.zeros(3, dtype=torch.bool))) == 0.0
    made = algorithm(gate=False, scale=0.2, td3={"actor_rate": 1e-2, "correction_weight": 100.0})
    b = batch(64)
    b = replace(b, action_BA=b.now.base_BA + torch.tensor([0.1, -0.3]), intervened_B=torch.ones(64, dtype=torch.bool))
    for _ in range(300):
        made.update_actor(b)
    mean_A = made.policy.mean(made.policy.encoder(b.now)).mean(0)
    torch.testing.assert_close(mean_A.detach(), torch.tensor([0.5, -1.0]), atol=0.1, rtol=0)


def test_imitation_draws_the_actor_to_demonstrations_that_succeeded_and_leaves_the_critic() -> None:
    made, b = algorithm(scale=0.2), batch(64)
    move_BA = torch.where((torch.arange(64) % 2 == 0)[:, None], torch.tensor([0.1, -0.3]), torch.tensor([-0.2, 0.2]))
    b = replace(b, action_BA=b.now.base_BA + move_BA, shown_B=torch.arange(64) % 2 == 0)  # the others failed
    critic = [p.clone() for p in made.policy.critic.parameters()]
    made.imitate(lambda: b, 500)
    mean_BA = made.policy.mean(made.policy.encoder(b.now)).detach()
    torch.testing.assert_close(mean_BA[b.shown_B], torch.tensor([0.5, -1.0]).expand(32, 2), atol=0.15, rtol=0)
    for now, before in zip(made.policy.critic.parameters(), critic, strict=True):
        assert torch.equal(now, before)
    for target, live in zip(made.target.actor.parameters(), made.policy.actor.parameters(), strict=True):
        assert torch.equal(target, live)


def test_the_anchor_learns_realised_returns() -> None:
    made, b = algorithm(), batch(64)
    return_B = torch.rand(64, generator=generator(9))
    first = made.anchor(b, return_B, generator())["critic/anchor_loss"]
    for _ in range(300):
        last = made.anchor(b, return_B, generator())["critic/anchor_loss"]
    assert last < 0.2 * first


@pytest.mark.parametrize("critic", [SMALL, DISTRIBUTIONAL], ids=["ensemble", "dsac_t"])
def test_two_steps_resumed_and_two_more_are_four(critic: StepCriticConfig) -> None:
    def run(made: ResidualTD3, first: int, last: int) -> ResidualTD3:
        for step in range(first, last):
            made.update(batch(seed=10 * step), generator(step))
        return made

    whole = run(algorithm(critic), 0, 6)
    half = run(algorithm(critic), 0, 3)
    resumed = algorithm(critic, seed=1)
    resumed.load_state_dict({k: v.clone() for k, v in half.state_dict().items()})
    run(resumed, 3, 6)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_targets_follow_by_their_share_of_the_new_weights() -> None:
    made, b = algorithm(td3={"polyak": 0.1, "actor_every": 1}, gate=False), batch()
    for _ in range(3):
        before = {k: v.clone() for k, v in made.target.state_dict().items()}
        made.update(b, generator())
        live, moved = made.policy.state_dict(), 0
        for name, target in made.target.state_dict().items():
            if name.startswith(("actor.", "critic.")):
                torch.testing.assert_close(target, before[name] + 0.1 * (live[name] - before[name]))
                moved += int(not torch.equal(target, before[name]))
        assert moved > 4


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_targets_residual_is_smoothed_by_clipped_noise(smoothing: float) -> None:
    made = algorithm(gate=False, scale=0.5, td3={"smoothing": smoothing})
    step = StepContext({STATE: torch.zeros(4000, 3)}, torch.zeros(4000, 2), torch.zeros(4000, dtype=torch.long))
    asked: list[torch.Tensor] = []
    whole = made.target.critic.outputs

    def heard(x_BD: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        asked.append(x_BD[:, -2:])
        return whole(x_BD, chosen)

    made.target.critic.outputs = heard  # type: ignore[method-assign]
    made.following(step, generator())
    noise_BA = asked[0] / 0.5  # the actor says zero yet, and actions are not scaled yet
    assert float(noise_BA.abs().max()) == pytest.approx(2 * smoothing, abs=1e-6)
    assert float(noise_BA.std()) == pytest.approx(0.88**0.5 * smoothing, rel=0.05)  # of a normal cut at twice its own


def test_a_roll_back_takes_the_actor_and_leaves_the_critic() -> None:
    made, best = algorithm(td3={"actor_every": 1}), {}
    for step in range(6):
        if step == 3:
            best = made.state_dict()
        made.update(batch(seed=10 * step), generator(step))
    made.set_gated(gated=False)
    now = made.state_dict()
    made.roll_back(best)
    after = made.state_dict()
    assert after.keys() == now.keys()
    taken = {k for k in now if not torch.equal(now[k], best[k]) and torch.equal(after[k], best[k])}
    left = {k for k in now if not torch.equal(now[k], best[k]) and torch.equal(after[k], now[k])}
    assert {k.split(".")[0] + "." + k.split(".")[1] for k in taken if not k.startswith("actor_opt")} == {
        "policy.actor",
        "target.actor",
        "policy.gated",
        "target.gated",
    }
    assert any(k.startswith("actor_optimizer.") for k in taken)
    assert {"updates"} < {k for k in left}
    assert all(k.startswith(("policy.critic.", "target.critic.", "critic_optimizer.", "updates")) for k in left)
    assert len(taken) + len(left) == sum(not torch.equal(now[k], best[k]) for k in now)


def test_the_distributional_loss_has_the_gradient_of_the_paper() -> None:
    """Eq. 23 of arXiv 2310.05858, written out for each member with the twin of the lower mean."""
    made, b = algorithm(DISTRIBUTIONAL), batch()
    critic = made.policy.critic
    x_BD = torch.randn(32, made.policy.encoder.context_dim + 2, generator=generator(4))
    following = 0.3 * torch.randn(2, 32, 2, generator=generator(6))
    mean, std = critic.distribution(critic.outputs(x_BD))  # type: ignore[operator]
    mean, std = mean.detach().requires_grad_(), std.detach().requires_grad_()
    outputs = critic.outputs

    critic.outputs = lambda x, chosen=None: torch.stack([mean, inverse_softplus(std - 0.01)], dim=-1)  # type: ignore[assignment]
    loss = distributional_critic.td_loss(critic, x_BD, following, b.reward_B, b.discount_B, (0.0, 1.0), generator(8))  # type: ignore[arg-type]
    slope_mean, slope_std = torch.autograd.grad(loss, [mean, std])
    critic.outputs = outputs  # type: ignore[method-assign]
    next_mean, next_std = critic.distribution(following)  # type: ignore[operator]
    low = next_mean.argmin(0)
    rows = torch.arange(32)
    q, s = next_mean[low, rows], next_std[low, rows]
    sample = q + s * torch.randn(32, generator=generator(8))
    goal = (b.reward_B + b.discount_B * q).clamp(0, 1)
    sigma = std.detach()
    omega = sigma.square().mean(1, keepdim=True) + 0.1
    bound = 3.0 * sigma.mean(1, keepdim=True)
    target = torch.maximum(torch.minimum(b.reward_B + b.discount_B * sample, mean + bound), mean - bound)
    wanted_mean = -omega * (goal - mean) / (sigma.square() + 0.1) / mean.numel()
    wanted_std = -omega * ((target - mean).square() - sigma.square()) / (sigma**3 + 0.1) / mean.numel()
    torch.testing.assert_close(slope_mean, wanted_mean.detach())
    torch.testing.assert_close(slope_std, wanted_std.detach())


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return x + torch.log(-torch.expm1(-x))


def test_a_batch_with_nan_touches_no_weight_and_stops_after_several() -> None:
    made, b = algorithm(), batch()
    bad = replace(b, reward_B=torch.full_like(b.reward_B, torch.nan))
    before = {k: v.clone() for k, v in made.policy.state_dict().items()}
    for _ in range(4):
        made.update(bad, generator(), moves_actor=False)
    with pytest.raises(NonFiniteLossError, match="critic steps in a row"):
        made.update(bad, generator(), moves_actor=False)
    for name, tensor in made.policy.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_steps": 0}, "n_steps"),
        ({"discount": 1.5}, "discount"),
        ({"return_lowest": 2.0}, "return_lowest"),
        ({"penalty": -1.0}, "penalty wants a number >= 0, got -1.0"),
        ({"actor_rate": 0.0}, "actor_rate"),
    ],
)
def test_bad_settings_name_themselves(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ResidualTD3Config(**options)
