"""Residual PPO against its equations, and on a world whose best residual is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from vla_rl.algos.residual_ppo import ResidualPPO, ResidualPPOConfig, log_prob, surrogate_loss
from vla_rl.algos.value import ValueConfig
from vla_rl.data.episode import Episode
from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import StepEpisode
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.types import STATE, ActionSpec, FeatureSpec

PLANE = ActionSpec(("x", "y"), ("m", "m"), (-1.0, -1.0), (1.0, 1.0), "delta", 20.0)
WANTED = np.array([0.3, -0.2])  # of the residual, everywhere


def algorithm(seed: int = 0) -> ResidualPPO:
    torch.manual_seed(seed)
    encoder = StepEncoder({STATE: FeatureSpec((2,))}, PLANE, chunk_steps=2)
    policy = ResidualPolicy(ResidualConfig(width=16, depth=1, scale=0.5, gate=False), encoder)
    return ResidualPPO(
        policy, ResidualPPOConfig(learning_rate=3e-3, minibatch=64, value=ValueConfig(width=16, minibatch=64))
    )


def episodes(made: ResidualPPO, count: int, seed: int, length: int = 10) -> list[StepEpisode]:
    """Episodes of the policy with its noise; every step pays for being near the wanted residual."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        state = rng.normal(size=(length + 1, 2)).astype(np.float32)
        base = (0.1 * rng.normal(size=(length + 1, 2))).astype(np.float32)
        phase = np.arange(length + 1) % 2
        residual = 0.2 * rng.normal(size=(length, 2)) + mean(made, state, base, phase)[:-1]
        action = np.clip(base[:-1] + 0.5 * np.clip(residual, -1, 1), -1, 1).astype(np.float32)
        done = (action - base[:-1]) / 0.5
        reward = -np.square(done - WANTED).sum(1).astype(np.float32)
        episode = Episode({STATE: state}, action, action, reward, np.zeros(length, bool), False, True, "near")
        found.append(StepEpisode(episode, base, phase, residual.astype(np.float32)))
    return found


def mean(made: ResidualPPO, state: np.ndarray, base: np.ndarray, phase: np.ndarray) -> np.ndarray:
    from vla_rl.data.steps import StepContext

    with torch.no_grad():
        seen = StepContext({STATE: torch.from_numpy(state)}, torch.from_numpy(base), torch.from_numpy(phase))
        return made.policy.mean(made.policy.encoder(seen)).numpy()


def test_the_likelihood_is_that_of_a_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    wanted = stats.norm.logpdf(x.numpy(), m.numpy(), 0.3).sum(1)
    np.testing.assert_allclose(log_prob(x, m, 0.3), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted"), [(1.5, 1.0, -1.2), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)]
)
def test_the_surrogate_is_clipped_on_the_side_that_pays(ratio: float, advantage: float, wanted: float) -> None:
    loss = surrogate_loss(torch.tensor([ratio]), torch.tensor([advantage]), 0.2)
    assert float(loss) == pytest.approx(wanted)


def test_it_finds_the_residual_that_pays() -> None:
    made = algorithm()
    for order in range(40):
        metrics = made.update(episodes(made, 16, order), torch.Generator().manual_seed(order))
        assert metrics["ppo/kl"] < math.inf
    found = np.concatenate(
        [mean(made, s.episode.observations[STATE], s.base_TA, s.phase_T) for s in episodes(made, 8, 99)]
    )
    np.testing.assert_allclose(found.mean(0), WANTED, atol=0.07)


def test_what_is_scored_is_the_draw_not_what_was_executed() -> None:
    made = algorithm()
    steps = episodes(made, 1, 0)[0]
    drawn = np.full((steps.length, 2), 3.0, np.float32)  # far beyond what limits let through
    _, scored, *_ = made._judge(replace(steps, residual_TA=drawn))
    np.testing.assert_array_equal(scored.numpy(), drawn)


def test_two_orders_resumed_and_two_more_are_four() -> None:
    def run(made: ResidualPPO, orders: range) -> ResidualPPO:
        for order in orders:
            made.update(episodes(made, 4, order), torch.Generator().manual_seed(order))
        return made

    whole = run(algorithm(), range(4))
    half = run(algorithm(), range(2))
    resumed = algorithm(seed=1)
    resumed.load_state_dict({k: v.clone() for k, v in half.state_dict().items()})
    run(resumed, range(2, 4))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_time_out_goes_on_from_the_final_observation_and_an_end_does_not() -> None:
    made = algorithm()
    with torch.no_grad():
        for layer in made.value.net.layers:
            layer.bias.fill_(1.0)
    steps = episodes(made, 1, 0, length=1)[0]
    ended = replace(steps, episode=replace(steps.episode, terminated=True, truncated=False))
    (*_, target_timeout), (*_, target_end) = made._judge(steps), made._judge(ended)
    assert float(target_end) == pytest.approx(float(steps.episode.reward_T[0]), abs=1e-5)
    assert abs(float(target_timeout - target_end)) > 0.1


def test_bad_settings_name_themselves() -> None:
    with pytest.raises(ValueError, match="std"):
        ResidualPPOConfig(std=0.0)
    with pytest.raises(ValueError, match="discount"):
        ResidualPPOConfig(discount=2.0)
