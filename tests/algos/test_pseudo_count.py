"""Pseudo-counts: the identities that define them, on inputs where counts are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from vla_rl.algos.progress_head import ProgressHead
from vla_rl.algos.pseudo_count.base import CountConfig, PseudoCount, discover_counts
from vla_rl.algos.pseudo_count.coin_flipping import CoinFlipping, CoinFlippingConfig
from vla_rl.algos.pseudo_count.leverage import Leverage, LeverageConfig
from vla_rl.algos.pseudo_count.nearest import NearestConfig
from vla_rl.runtime.errors import UserError

discover_counts()
SMALL: dict[str, dict] = {
    "leverage": {"waves": 64},
    "coin_flipping": {"width": 32, "blocks": 1, "epochs": 40, "update_epochs": 40, "batch_size": 32},
    "nearest": {"neighbours": 4},
}


def build(name: str, features: int, **options: object) -> PseudoCount:
    return CountConfig.get_choice_class(name)(**{**SMALL[name], **options}).build(features)


def clusters(count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Many features around one place, and some far away."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=generator), torch.randn(20, 6, generator=generator) * 0.3 + 12.0


def one_hot(counts: list[int]) -> torch.Tensor:
    return torch.eye(len(counts)).repeat_interleave(torch.tensor(counts), 0)


def test_every_registered_estimator_is_tested_here() -> None:
    assert set(SMALL) == set(CountConfig.get_known_choices())


@pytest.mark.parametrize("name", SMALL)
def test_every_estimator_counts_what_it_has_seen_more_than_what_is_far_away(name: str) -> None:
    seen, far = clusters()
    count = build(name, 6)
    count.fit(seen)
    assert count.score(seen).median() > 2 * count.score(far).max()


@pytest.mark.parametrize("name", SMALL)
def test_an_update_raises_the_count_of_what_it_brings(name: str) -> None:
    seen, far = clusters()
    count = build(name, 6)
    count.fit(seen)
    before = count.score(far).mean()
    for _ in range(3):
        count.update(far)
    assert count.score(far).mean() > 1.5 * before


@pytest.mark.parametrize("name", ["leverage", "coin_flipping"])
def test_an_update_with_what_was_seen_before_raises_its_count_and_leaves_the_others_theirs(name: str) -> None:
    options = {"waves": 0} if name == "leverage" else {"coins": 512, "width": 64, "epochs": 100, "update_epochs": 60}
    count = build(name, 4, **options)
    count.fit(one_hot([40, 40, 40, 40]), standardize=False)
    before = count.score(torch.eye(4))
    for _ in range(3):
        count.update(one_hot([20, 0, 0, 0]))
    after = count.score(torch.eye(4))
    assert float(after[0] / before[0]) == pytest.approx(100 / 40, rel=0.2)
    torch.testing.assert_close(after[1:], before[1:], rtol=0.15, atol=0.0)


@pytest.mark.parametrize("name", SMALL)
def test_an_estimator_is_the_same_after_it_was_saved(name: str, tmp_path: Path) -> None:
    seen, far = clusters()
    count, again = build(name, 6), build(name, 6)
    count.fit(seen)
    safetensors.torch.save_file(count.state_dict(), tmp_path / "count.safetensors")
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "count.safetensors"))
    torch.testing.assert_close(again.score(far), count.score(far))


@pytest.mark.parametrize("name", SMALL)
def test_an_estimator_does_not_depend_on_the_unit_of_a_feature(name: str) -> None:
    seen, far = clusters()
    unit = torch.tensor([1.0, 10.0, 100.0, 0.1, 1.0, 1.0])
    first, second = build(name, 6), build(name, 6)
    first.fit(seen)
    second.fit(seen * unit)
    torch.testing.assert_close(first.score(far), second.score(far * unit), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_nothing_is_lost(name: str, bad: float) -> None:
    seen, far = clusters()
    count = build(name, 6)
    count.fit(seen)
    before = count.score(far)
    spoilt = far.clone()
    spoilt[3, 2] = bad
    for call in (count.fit, count.update, count.score):
        with pytest.raises(UserError, match="1 of 20 rows"):
            call(spoilt)
    assert torch.equal(count.score(far), before)


@pytest.mark.parametrize("name", SMALL)
def test_wrong_widths_and_questions_before_the_fit_are_refused(name: str) -> None:
    count = build(name, 6)
    with pytest.raises(UserError, match="before it was fitted"):
        count.score(torch.zeros(2, 6))
    with pytest.raises(UserError, match="6 numbers"):
        count.fit(torch.zeros(2, 5))
    with pytest.raises(UserError, match="at least one row"):
        count.fit(torch.zeros(0, 6))


# --- leverage ---------------------------------------------------------------------------------------------------------------------


def test_m_duplicates_read_exactly_m() -> None:
    """Eq. (4): phi' A^-1 phi = 1 / (m + lambda) for m copies of a unit feature, so 1 / score - lambda = m."""
    counts = [1, 2, 5, 17]
    for ridge in (0.1, 1.0, 10.0):
        count = build("leverage", 5, waves=0, ridge=ridge)
        count.fit(torch.cat([one_hot(counts), torch.zeros(25, 1)], 1), standardize=False)
        asked = torch.cat([torch.eye(4), torch.zeros(4, 1)], 1)
        torch.testing.assert_close(count.score(asked), torch.tensor(counts).float(), rtol=1e-4, atol=1e-4)
        novel = torch.eye(5)[4:]
        torch.testing.assert_close(count.score(novel), torch.zeros(1), atol=1e-4, rtol=0.0)


def test_random_waves_are_unit_vectors_whose_products_are_the_gaussian_kernel() -> None:
    count = build("leverage", 3, waves=1500, bandwidth=0.7)
    assert isinstance(count, Leverage)
    count.fit(torch.randn(4, 3), standardize=False)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    phi = count.represent(x)
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(5))
    wanted = (-(torch.cdist(x, x) / count.bandwidth).square() / 2).exp()
    torch.testing.assert_close(phi @ phi.T, wanted, atol=0.1, rtol=0.0)


def test_leverage_is_the_coin_flipping_networks_expectation_for_a_linear_head() -> None:
    """Eq. (4) by Monte Carlo over coins and priors: ridge regression of random signs, pulled to weights of variance 1 / lambda."""
    generator = torch.Generator().manual_seed(1)
    phi, asked, ridge, coins = (
        torch.randn(12, 4, generator=generator),
        torch.randn(6, 4, generator=generator),
        0.7,
        200_000,
    )
    signs = torch.randint(0, 2, (12, coins), generator=generator) * 2.0 - 1
    prior = torch.randn(4, coins, generator=generator) / ridge**0.5
    weight = torch.linalg.solve(phi.T @ phi + ridge * torch.eye(4), phi.T @ signs + ridge * prior)
    read_out = (asked @ weight).square().mean(1)
    count = build("leverage", 4, waves=0, ridge=ridge)
    count.fit(phi, standardize=False)
    torch.testing.assert_close(1 / (count.score(asked) + ridge), read_out, rtol=0.02, atol=0.0)


def test_forgetting_undoes_an_update_and_an_update_is_a_fit_on_all() -> None:
    seen, far = clusters()
    count, whole = build("leverage", 6), build("leverage", 6)
    assert isinstance(count, Leverage)
    count.fit(seen)
    before = count.score(far)
    count.update(far)
    assert not torch.allclose(count.score(far), before)
    count.forget(far)
    torch.testing.assert_close(count.score(far), before, rtol=1e-4, atol=1e-4)
    first = build("leverage", 6, waves=0)
    first.fit(seen[:100], standardize=False)
    first.update(seen[100:])
    whole = build("leverage", 6, waves=0)
    whole.fit(seen, standardize=False)
    torch.testing.assert_close(first.score(far), whole.score(far), rtol=1e-4, atol=1e-4)


# --- coin flipping ----------------------------------------------------------------------------------------------------------------


def converged(counts: list[int], coins: int, *, prior: bool, seed: int = 0) -> torch.Tensor:
    """A linear net on one-hot inputs, trained until nothing changes: its counts."""
    config = CoinFlippingConfig(
        seed=seed, coins=coins, blocks=0, prior=prior, epochs=800, batch_size=4096, learning_rate=0.05
    )
    net = config.build(len(counts) + 1)
    net.fit(torch.cat([one_hot(counts), torch.zeros(sum(counts), 1)], 1), standardize=False)
    return net.score(torch.eye(len(counts) + 1))


def test_a_network_trained_to_convergence_reads_one_over_m() -> None:
    """Eq. (1): what is left of m random signs has mean square 1 / m; its spread over d coins is sqrt(2 / d)."""
    counts = [1, 2, 5, 20]
    read = converged(counts, 4000, prior=False)[:4]
    torch.testing.assert_close(read, torch.tensor(counts).float(), rtol=0.12, atol=0.0)


def test_the_prior_makes_what_was_never_seen_read_about_one() -> None:
    """Without it a linear net is 0 there, which is an endless count."""
    config = CoinFlippingConfig(coins=2000, blocks=0, epochs=200, batch_size=4096, learning_rate=0.05)
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(500, 8, generator=generator) * torch.tensor([1.0] * 4 + [0.0] * 4)
    novel = torch.randn(50, 8, generator=generator) * torch.tensor([0.0] * 4 + [1.0] * 4)
    with_prior = config.build(8)
    with_prior.fit(seen, standardize=False)
    assert with_prior.score(novel).median() < 4
    assert with_prior.score(seen).median() > 20


def test_more_coins_read_steadier() -> None:
    """The relative spread of the read-out over seeds falls as sqrt(2 / d)."""
    spread = {}
    for coins in (20, 320):
        read = torch.stack([1 / converged([1, 4], coins, prior=False, seed=s)[1] for s in range(12)])
        spread[coins] = float(read.std() / read.mean())
    assert spread[20] == pytest.approx((2 / 20) ** 0.5, rel=0.6)
    assert spread[320] < 0.5 * spread[20]


def test_the_prior_is_normalised_on_the_data_and_never_trained() -> None:
    seen, _ = clusters()
    count = build("coin_flipping", 6)
    assert isinstance(count, CoinFlipping)
    before = {k: v.clone() for k, v in count.prior.state_dict().items()}
    count.fit(seen)
    said = (count.prior(count.standardized(seen)) - count.prior_mean_C) / count.prior_spread_C
    torch.testing.assert_close(said.square().mean(0), torch.ones(128), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in count.prior.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(count.prior.parameters(), count.net.parameters(), strict=True))


# --- nearest, progress ------------------------------------------------------------------------------------------------------------


def test_the_nearest_copies_are_counted() -> None:
    counts = [1, 3, 6]
    count = NearestConfig(neighbours=8).build(3)
    count.fit(one_hot(counts) * 100, standardize=False)
    count.width.fill_(1.0)
    torch.testing.assert_close(count.score(torch.eye(3) * 100), torch.tensor(counts).float(), atol=1e-4, rtol=0.0)


def test_progress_of_features_is_what_followed_them() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.rand(600, 2, generator=generator) * 4
    progress = (features[:, 0] / 4).sin()
    head = ProgressHead(2, LeverageConfig(waves=128, ridge=0.01))
    head.fit(features[:500], progress[:500])
    assert (head(features[500:]) - progress[500:]).abs().mean() < 0.02
