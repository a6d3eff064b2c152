"""Returns over decisions of several lengths: against sums written out, and no credit over the end of an episode."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_rl.algos.returns import generalized_advantage

SEEDS = st.integers(0, 10_000)
SHARES = st.sampled_from([0.0, 0.3, 0.95, 1.0])


@dataclass(frozen=True)
class Decided:
    """T decisions of N slots; values are free of each other, as those of a net are."""

    reward: Tensor
    steps: Tensor
    terminated: Tensor
    ended: Tensor
    value: Tensor
    next_value: Tensor

    def advantage(self, discount: float, gae_lambda: float) -> Tensor:
        return generalized_advantage(
            self.reward, self.steps, self.terminated, self.ended, self.value, self.next_value, discount, gae_lambda
        )


def draw(seed: int, count: int = 9, slots: int = 3) -> Decided:
    rng = np.random.default_rng(seed)
    ended = rng.random((count, slots)) < 0.3
    ended[-1] = True
    terminated = ended & (rng.random((count, slots)) < 0.5)

    def normal() -> Tensor:
        return torch.from_numpy(rng.normal(size=(count, slots)))

    steps = torch.from_numpy(rng.integers(1, 9, (count, slots)))
    return Decided(normal(), steps, torch.from_numpy(terminated), torch.from_numpy(ended), normal(), normal())


def consistent(decided: Decided) -> Decided:
    """Inside an episode, the value after a decision is that of the next one."""
    following = torch.cat([decided.value[1:], decided.next_value[-1:]])
    return replace(decided, next_value=torch.where(decided.ended, decided.next_value, following))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, count=st.integers(1, 12), discount=st.sampled_from([0.5, 0.99, 1.0]), gae_lambda=SHARES)
def test_advantages_are_the_sum_of_errors_written_out(
    seed: int, count: int, discount: float, gae_lambda: float
) -> None:
    decided = draw(seed, count, 2)
    found = decided.advantage(discount, gae_lambda)
    for n in range(2):
        for t in range(count):
            total, weight = 0.0, 1.0
            for u in range(t, count):
                reach = discount ** int(decided.steps[u, n])
                after = 0.0 if decided.terminated[u, n] else reach * float(decided.next_value[u, n])
                total += weight * (float(decided.reward[u, n]) + after - float(decided.value[u, n]))
                if decided.ended[u, n]:
                    break
                weight *= reach * gae_lambda
            assert float(found[t, n]) == pytest.approx(total, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, discount=st.sampled_from([0.9, 1.0]))
def test_with_lambda_one_it_is_the_return_minus_the_value(seed: int, discount: float) -> None:
    decided = consistent(draw(seed))
    found = decided.advantage(discount, 1.0)
    count, slots = found.shape
    for n in range(slots):
        for t in range(count):
            end = next(u for u in range(t, count) if decided.ended[u, n])
            elapsed, returned = 0, 0.0
            for u in range(t, end + 1):
                returned += discount**elapsed * float(decided.reward[u, n])
                elapsed += int(decided.steps[u, n])
            if not decided.terminated[end, n]:  # a time-out: what would have followed is what the value says
                returned += discount**elapsed * float(decided.next_value[end, n])
            assert float(found[t, n]) == pytest.approx(returned - float(decided.value[t, n]), abs=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_with_lambda_zero_it_is_the_error_of_one_decision(seed: int) -> None:
    decided = draw(seed)
    after = torch.where(decided.terminated, 0.0, 0.9**decided.steps * decided.next_value)
    torch.testing.assert_close(decided.advantage(0.9, 0.0), decided.reward + after - decided.value)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, gae_lambda=SHARES)
def test_a_time_out_takes_the_true_next_value_and_a_termination_none(seed: int, gae_lambda: float) -> None:
    """Defect 9 of RL-100's code: chunks make every time-out a terminal state."""
    decided = draw(seed)
    before = decided.advantage(0.9, gae_lambda)
    raised = replace(decided, next_value=decided.next_value + 1000.0 * decided.terminated)
    assert torch.equal(raised.advantage(0.9, gae_lambda), before)
    timeout = decided.ended & ~decided.terminated
    raised = replace(decided, next_value=decided.next_value + 1.0 * timeout)
    moved = raised.advantage(0.9, gae_lambda) - before
    torch.testing.assert_close(moved[timeout], (0.9**decided.steps)[timeout].double(), atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, gae_lambda=SHARES)
def test_no_credit_flows_over_the_end_of_an_episode(seed: int, gae_lambda: float) -> None:
    decided = draw(seed)
    rng = np.random.default_rng(seed + 1)
    end = int(rng.integers(0, len(decided.reward) - 1))
    decided.ended[end] = True
    after = (torch.arange(len(decided.reward)) > end)[:, None]

    def change(x: Tensor) -> Tensor:
        return torch.where(after, x + 100.0, x)

    other = replace(
        decided,
        reward=change(decided.reward),
        value=change(decided.value),
        next_value=change(decided.next_value),
        steps=torch.where(after, 1, decided.steps),
        terminated=decided.terminated & ~after,
    )
    one, two = decided.advantage(0.99, gae_lambda), other.advantage(0.99, gae_lambda)
    assert torch.equal(one[: end + 1], two[: end + 1])
    assert not torch.equal(one[end + 1 :], two[end + 1 :])


def test_inside_an_episode_credit_does_flow_back() -> None:
    decided = replace(
        draw(0), ended=torch.zeros(9, 3, dtype=torch.bool), terminated=torch.zeros(9, 3, dtype=torch.bool)
    )
    raised = replace(decided, reward=decided.reward + (torch.arange(9) == 8)[:, None])
    moved = raised.advantage(0.9, 0.5) - decided.advantage(0.9, 0.5)
    for t in range(9):
        wanted = 0.9 ** decided.steps[t:8].sum(0).double() * 0.5 ** (8 - t)
        torch.testing.assert_close(moved[t], wanted, atol=1e-9, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_slots_do_not_know_of_each_other(seed: int) -> None:
    decided = draw(seed, slots=5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    fields = {k: v[:, order] for k, v in vars(decided).items()}
    assert torch.equal(Decided(**fields).advantage(0.97, 0.9), decided.advantage(0.97, 0.9)[:, order])


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, chunk=st.integers(1, 5), timeout=st.booleans())
def test_a_decision_is_worth_the_control_steps_that_it_really_ran(seed: int, chunk: int, timeout: bool) -> None:
    """With lambda one it makes no difference how an episode is cut into decisions, whose last is as long as what is left."""
    rng = np.random.default_rng(seed)
    length, discount = int(rng.integers(1, 14)), 0.9
    reward, value = rng.normal(size=length), rng.normal(size=length + 1)

    def advantage(per_decision: int) -> np.ndarray:
        starts = list(range(0, length, per_decision))
        stops = [min(s + per_decision, length) for s in starts]
        inside = [sum(discount ** (i - a) * reward[i] for i in range(a, b)) for a, b in zip(starts, stops, strict=True)]

        def column(values: object, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype)[:, None]

        last = np.array(stops) == length
        found = generalized_advantage(
            column(inside),
            column(np.subtract(stops, starts), torch.long),
            column(last & (not timeout), torch.bool),
            column(last, torch.bool),
            column(value[starts]),
            column(value[stops]),
            discount,
            1.0,
        )
        return found[:, 0].numpy()

    np.testing.assert_allclose(advantage(chunk), advantage(1)[::chunk], atol=1e-6)
