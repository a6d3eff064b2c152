"""What a residual may change, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_rl.data.step_encoder import StepEncoder
from vla_rl.data.steps import StepContext
from vla_rl.nets.step_critics import EnsembleCriticConfig, StepCritic
from vla_rl.policies.residual import Composition, ResidualConfig, ResidualPolicy
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE, ActionSpec, FeatureSpec

ARM = ActionSpec(("dx", "dz", "gripper"), ("m", "m", "1"), (-0.05, -0.1, -1.0), (0.05, 0.3, 1.0), "delta", 20.0)
OBSERVATION = {STATE: FeatureSpec((4,))}


def composition(**options: object) -> Composition:
    return Composition(ResidualConfig(**options), ARM)  # type: ignore[arg-type]


def policy(**options: object) -> ResidualPolicy:
    torch.manual_seed(0)
    config = ResidualConfig(width=16, depth=1, critic=EnsembleCriticConfig(width=16, depth=1, members=3), **options)  # type: ignore[arg-type]
    return ResidualPolicy(config, StepEncoder(OBSERVATION, ARM, chunk_steps=4))


def steps(count: int, seed: int = 0) -> StepContext:
    generator = torch.Generator().manual_seed(seed)
    low_A, high_A = torch.tensor(ARM.low), torch.tensor(ARM.high)
    base_BA = low_A + (high_A - low_A) * torch.rand(count, 3, generator=generator)
    return StepContext({STATE: torch.randn(count, 4, generator=generator)}, base_BA, torch.arange(count) % 4)


@pytest.mark.parametrize("options", [{}, {"gripper": "scaled"}, {"gripper": "frozen"}, {"scales": {"dx": 0.0}}])
def test_a_residual_of_zero_is_the_base_to_the_bit(options: dict) -> None:
    base_BA = steps(200).base_BA
    assert torch.equal(composition(**options).compose(base_BA, torch.zeros_like(base_BA)), base_BA)


@pytest.mark.parametrize("gate", [True, False])
def test_a_fresh_residual_policy_is_the_base_to_the_bit(gate: bool) -> None:
    step = steps(100)
    assert torch.equal(policy(gate=gate).decide(step).action_BA, step.base_BA)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_what_was_executed_reads_back_as_the_residual_within_the_limits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = composition(gripper="scaled", scale=0.3)
    base_BA = steps(20, seed).base_BA
    residual_BA = 2 * torch.rand(20, 3, generator=generator) - 1
    action_BA = made.compose(base_BA, residual_BA)
    low_A, high_A = torch.tensor(ARM.low), torch.tensor(ARM.high)
    assert bool(((action_BA >= low_A) & (action_BA <= high_A)).all())
    inside = (action_BA > low_A) & (action_BA < high_A)
    torch.testing.assert_close(made.residual(base_BA, action_BA)[inside], residual_BA[inside], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.act(base_BA, residual_BA), action_BA)


def test_the_reach_is_a_share_of_half_the_range_for_each_dimension() -> None:
    made = composition(scale=0.2, scales={"dz": 0.5}, gripper="scaled")
    base_1A = torch.tensor([[0.0, 0.1, 0.0]])
    moved_1A = made.compose(base_1A, torch.ones(1, 3)) - base_1A
    torch.testing.assert_close(moved_1A, torch.tensor([[0.2 * 0.05, 0.5 * 0.2, 0.2 * 1.0]]))


def test_a_discrete_gripper_is_switched_or_left_alone() -> None:
    made = composition()
    base_BA = torch.tensor([[0.0, 0.0, 0.8], [0.0, 0.0, 0.8], [0.0, 0.0, 0.8], [0.0, 0.0, -0.3]])
    residual_BA = torch.tensor([[0.0, 0.0, -0.9], [0.0, 0.0, -0.4], [0.0, 0.0, 0.9], [0.0, 0.0, 0.9]])
    action_BA = made.compose(base_BA, residual_BA)
    torch.testing.assert_close(action_BA[:, 2], torch.tensor([-1.0, 0.8, 0.8, 1.0]))
    torch.testing.assert_close(made.residual(base_BA, action_BA)[:, 2], torch.tensor([-1.0, 0.0, 0.0, 1.0]))


def test_a_frozen_gripper_is_the_bases() -> None:
    base_BA = steps(50).base_BA
    moved_BA = composition(gripper="frozen").compose(base_BA, torch.ones_like(base_BA))
    assert torch.equal(moved_BA[:, 2], base_BA[:, 2])
    assert not torch.equal(moved_BA[:, 0], base_BA[:, 0])


def test_a_full_action_does_not_depend_on_the_base() -> None:
    made = composition(kind="full")
    residual_BA = torch.rand(30, 3) * 2 - 1
    a, b = steps(30, 1).base_BA, steps(30, 2).base_BA
    torch.testing.assert_close(made.compose(a, residual_BA), made.compose(b, residual_BA))
    torch.testing.assert_close(made.compose(a, made.residual(a, a)), a)


def test_the_gradient_goes_straight_through_limits_and_switches() -> None:
    base_BA = torch.tensor([[0.05, 0.3, 1.0]])  # at its upper limits: nothing more can be added
    residual_BA = torch.tensor([[0.7, 0.7, 0.7]], requires_grad=True)
    made = composition(scale=0.2)
    action_BA = made.act(base_BA, residual_BA)
    torch.testing.assert_close(action_BA.detach(), base_BA)
    action_BA.sum().backward()
    torch.testing.assert_close(residual_BA.grad, torch.tensor([[0.2 * 0.05, 0.2 * 0.2, 1.0]]))


class Preferring(StepCritic):
    """Says that an action's first dimension is worth what it is; the members agree on that, or not, and never on what a state is worth."""

    def __init__(self, at: int, spread: float) -> None:
        super().__init__()
        self.at, self.spread = at, spread

    def outputs(self, x_BD: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        value_B = x_BD[:, self.at]
        return torch.stack([5.0 + value_B * (1 + self.spread), -5.0 + value_B * (1 - self.spread)])[..., None]


@pytest.mark.parametrize(
    ("spread", "pessimism", "margin", "runs"),
    [(0.0, 1.0, 0.0, True), (2.0, 1.0, 0.0, False), (2.0, 0.0, 0.0, True), (0.0, 1.0, 0.02, False)],
)
def test_the_gate_runs_the_composed_action_only_where_its_lead_is_sure(
    spread: float, pessimism: float, margin: float, runs: bool
) -> None:
    step = StepContext({STATE: torch.zeros(1, 4)}, torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
    made = policy(pessimism=pessimism, margin=margin)
    made.critic = Preferring(made.encoder.context_dim, spread)
    with torch.no_grad():
        made.actor.net[-1].bias[0] = 1.0  # tanh(1) = 0.76 of a reach of 0.01
    choice = made.decide(step)
    assert bool(choice.composed_B) is runs
    assert (float(choice.action_BA[0, 0]) > 0) is runs
    with torch.no_grad():
        made.actor.net[-1].bias[0] = -1.0
    assert float(made.decide(step).action_BA[0, 0]) == 0.0


def test_the_ramp_holds_the_residual_back() -> None:
    made, step = policy(gate=False, gripper="scaled"), steps(1)
    step = StepContext(step.features, torch.zeros(1, 3), step.phase_B)
    with torch.no_grad():
        made.actor.net[-1].bias[:] = 0.5
    whole = made.decide(step).action_BA
    made.ramp.fill_(0.25)
    torch.testing.assert_close(made.decide(step).action_BA, 0.25 * whole)


def test_the_context_tells_the_places_in_a_chunk_apart() -> None:
    encoder = policy().encoder
    step = steps(1)
    seen = {tuple(encoder(StepContext(step.features, step.base_BA, torch.tensor([p])))[0].tolist()) for p in range(4)}
    assert len(seen) == 4


def test_without_a_base_that_varies_actions_are_told_apart_by_what_was_executed() -> None:
    encoder = policy().encoder
    step = steps(400)
    still = StepContext(step.features, torch.zeros_like(step.base_BA), step.phase_B)
    encoder.fit(still, step.base_BA)
    assert float(encoder.scaled(step.base_BA, still).abs().max()) < 5
    assert float(encoder.scaled(step.base_BA, still).std()) > 0.5


def test_absolute_actions_are_read_relative_to_the_state_of_the_same_names() -> None:
    spec = ActionSpec(("x", "y"), ("m", "m"), (-1.0, -1.0), (1.0, 1.0), "absolute", 20.0)
    encoder = StepEncoder({STATE: FeatureSpec((3,), ("y", "x", "z"))}, spec, chunk_steps=2)
    state_BS = torch.tensor([[0.2, 0.1, 9.0], [0.7, 0.5, 9.0]])
    step = StepContext({STATE: state_BS}, state_BS[:, [1, 0]] + 0.05, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(encoder.scaled(step.base_BA, step), torch.full((2, 2), 0.05))


def test_a_scale_for_a_dimension_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"dx, dz, gripper.*wrist"):
        composition(scales={"wrist": 0.1})
    with pytest.raises(ValueError, match=r"\(0, 2\], scales"):
        ResidualConfig(scale=0.0)
