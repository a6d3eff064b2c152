"""The gate as a statistical test, and what it is fed: models, roll-outs in them, fitted Q evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import REACHING_OBSERVATION, TOY_ACTION, write_reaching_set

from vla_rl.algos.dynamics import (
    DynamicsConfig,
    DynamicsEnsemble,
    Prediction,
    bootstrap_rows,
    error_curve,
    trusted_horizon,
)
from vla_rl.algos.fqe import FQEConfig, fitted_q_evaluation
from vla_rl.algos.ope import Accepted, GateConfig, ModelEvaluator, Rejected, as_record, gate
from vla_rl.data.decisions import Decisions
from vla_rl.data.reader import load_dataset
from vla_rl.data.state_encoder import StateEncoder
from vla_rl.nets.mlp import MLPConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import Generated, PolicySpec
from vla_rl.types import Observation


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def estimates(
    gain: float, noise: float, seed: int, members: int = 5, starts: int = 100, between_members: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Base values that differ much between starts, and gains that differ little: what pairing is for."""
    draw = rng(seed)
    base = draw.normal(size=(1, starts)) + draw.normal(size=(members, 1))
    change = gain + noise * (draw.normal(size=(1, starts)) + draw.normal(size=(members, starts)))
    change = change + between_members * draw.normal(size=(members, 1))
    return torch.tensor(base + change), torch.tensor(np.broadcast_to(base, change.shape).copy())


def test_updates_that_change_nothing_pass_as_seldom_as_the_confidence_says() -> None:
    passed = [
        isinstance(gate(*estimates(0.0, 0.1, seed), GateConfig(confidence=0.95), rng(seed)), Accepted)
        for seed in range(200)
    ]
    assert np.mean(passed) < 0.09  # 5 %, and what 200 draws add


def test_models_that_judge_differently_make_the_gate_too_sure_but_not_much() -> None:
    """Five models are few to tell how much models differ: the worst case, which GateConfig states."""
    passed = [
        isinstance(
            gate(*estimates(0.0, 0.0, seed, between_members=0.1), GateConfig(confidence=0.95), rng(seed)), Accepted
        )
        for seed in range(400)
    ]
    assert np.mean(passed) == pytest.approx(0.11, abs=0.04)


def test_real_gains_pass_and_losses_do_not() -> None:
    assert (
        np.mean([isinstance(gate(*estimates(0.05, 0.1, s), GateConfig(), rng(s)), Accepted) for s in range(50)]) > 0.9
    )
    for seed in range(50):
        decision = gate(*estimates(-0.05, 0.1, seed), GateConfig(), rng(seed))
        assert isinstance(decision, Rejected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shift", [-608.0, 0.0, 608.0])
def test_the_threshold_knows_no_size_of_values(scale: float, shift: float) -> None:
    """Defect 11: 5 % of a large value is out of reach, of a small one meaningless."""
    candidate, base = estimates(0.05, 0.1, 3)
    decision = gate(scale * (candidate + shift), scale * (base + shift), GateConfig(), rng())
    assert isinstance(decision, Accepted)
    assert decision.estimate == pytest.approx(scale * float((candidate - base).mean()), rel=1e-3)


def test_a_threshold_in_standard_errors_asks_for_more() -> None:
    candidate, base = estimates(0.06, 0.1, 1)
    assert isinstance(gate(candidate, base, GateConfig(), rng()), Accepted)
    strict = gate(candidate, base, GateConfig(threshold=20.0), rng())
    assert isinstance(strict, Rejected)
    assert "noise" in strict.reason


def test_small_gains_are_undecided_until_they_add_up() -> None:
    """Alone none passes; a tenth of the noise does not show, half of it does."""
    verdicts = [gate(*estimates(gain, 0.1, 6), GateConfig(), rng()) for gain in (0.005, 0.01, 0.05)]
    assert [isinstance(v, Rejected) and v.undecided for v in verdicts] == [True, True, False]
    assert isinstance(verdicts[2], Accepted)
    worse = gate(*estimates(-0.02, 0.1, 6), GateConfig(), rng())
    assert isinstance(worse, Rejected)
    assert not worse.undecided


def test_the_same_policy_never_passes() -> None:
    """Defect 10: on fresh random batches the maximum over time accepts noise."""
    _, base = estimates(0.0, 0.1, 0)
    decision = gate(base, base, GateConfig(), rng())
    assert decision == Rejected("the estimate does not rise", 0.0, 0.0)


def test_what_leaves_the_data_does_not_pass_whatever_is_promised() -> None:
    """Defect 12: estimates that ask about actions nobody took rise as a policy leaves the data."""
    candidate, base = estimates(0.5, 0.1, 1)
    config = GateConfig(largest_departure=0.05)
    for departure in (-0.2, 0.0, 0.05):
        assert isinstance(gate(candidate, base, config, rng(), departure), Accepted)
    for departure in (0.06, 1.0, float("inf"), float("nan")):
        decision = gate(candidate, base, config, rng(), departure)
        assert isinstance(decision, Rejected)
        assert "worse, allowed are 5 %" in decision.reason
        assert not decision.undecided


def test_an_estimate_that_is_not_finite_is_rejected_and_can_be_written() -> None:
    candidate, base = estimates(0.1, 0.1, 0)
    candidate[0, 0] = float("nan")
    decision = gate(candidate, base, GateConfig(), rng())
    assert isinstance(decision, Rejected)
    assert json.loads(json.dumps(as_record(decision, candidate=3)))["candidate"] == 3


CONFIG = FlowConfig(
    net=MLPConfig(width=32, depth=1, time_dim=8), observation_steps=1, chunk_steps=2, execute_steps=2, sample_steps=2
)


def reaching_policy(gain: float) -> ChunkPolicy:
    """A flow policy whose sampler is replaced by a proportional controller on the toy's state."""
    policy = CONFIG.build(PolicySpec(REACHING_OBSERVATION, TOY_ACTION, "reach"))

    def reach(condition: torch.Tensor, noise: torch.Tensor, prefix: None) -> Generated:
        return Generated(-gain * condition[:, -1:, :2].expand(-1, 2, -1) + 0.0 * noise[0], condition.flatten(1))

    policy.generate = reach  # type: ignore[method-assign, assignment]
    return policy.eval()


@pytest.fixture(scope="module")
def reaching(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decisions, Decisions]:
    root = write_reaching_set(tmp_path_factory.mktemp("data") / "reaching", episodes=120)
    data = load_dataset(root)
    return Decisions(data, 1, 2, 0.95, range(100)), Decisions(data, 1, 2, 0.95, range(100, 120))


def trained_model(known: Decisions, steps: int = 400, seed: int = 0) -> DynamicsEnsemble:
    generator = torch.Generator().manual_seed(seed)
    config = DynamicsConfig(width=64, depth=2, members=3, learning_rate=2e-3)
    model = DynamicsEnsemble(StateEncoder.fit(known), config, generator)
    model.fit_rewards(known)
    rows = bootstrap_rows(len(known), 3, generator)
    for _ in range(steps):
        model.update(known, rows.gather(1, torch.randint(0, len(known), (3, 128), generator=generator)))
    return model


@pytest.fixture(scope="module")
def model(reaching: tuple[Decisions, Decisions]) -> DynamicsEnsemble:
    return trained_model(reaching[0])


def test_members_are_independent_and_disagree_where_there_are_no_data(
    reaching: tuple[Decisions, Decisions], model: DynamicsEnsemble
) -> None:
    """Defect 19: members that are copies of each other agree everywhere."""
    known, _ = reaching
    weights = model.net.layers[0].weight
    assert not torch.allclose(weights[0], weights[1])
    batch = known.batch(torch.arange(200))
    state = model.encoder.encode(batch.observation)
    action = model.encoder.encode_action(batch.action_BHA)

    def spread(state: Tensor) -> float:
        return float(model.predict(state, action).mean_EBD.std(0).mean())

    assert spread(4 * state) > 1.5 * spread(state)


def test_the_error_curve_rises_and_ends_the_horizon(
    reaching: tuple[Decisions, Decisions], model: DynamicsEnsemble
) -> None:
    curve = error_curve(model, reaching[1], 6, 64, torch.Generator().manual_seed(0))
    untrained = error_curve(trained_model(reaching[0], 1), reaching[1], 6, 64, torch.Generator().manual_seed(0))
    assert float(curve[0]) < 0.05 < float(untrained[0])
    assert float(curve[-1]) > float(curve[0])
    assert trusted_horizon(torch.tensor([0.1, 0.2, 0.4, 0.1]), 0.3) == 2
    assert trusted_horizon(torch.tensor([0.9]), 0.3) == 1


def test_the_end_of_the_task_is_learned(reaching: tuple[Decisions, Decisions], model: DynamicsEnsemble) -> None:
    """Defect 18: the end was guessed from the task's name."""
    _, unseen = reaching
    batch = unseen.batch(torch.arange(len(unseen)))
    state, action = model.encoder.encode(batch.observation), model.encoder.encode_action(batch.action_BHA)
    end_B = torch.sigmoid(model.predict(state, action).end_logit_EB).mean(0)
    ended, going = end_B[batch.terminated_B], end_B[~batch.terminated_B]
    assert float(ended.mean()) > 5 * float(going.mean())
    assert float((ended[:, None] > going).float().mean()) > 0.9  # area under the curve


def test_models_promise_nothing_for_what_never_paid(
    reaching: tuple[Decisions, Decisions], model: DynamicsEnsemble
) -> None:
    """The world pays at the end alone, so whatever a policy does before it, the reward is the chance of the end."""
    known, _ = reaching
    batch = known.batch(torch.arange(300))
    state = model.encoder.encode(batch.observation)
    wild = 5 * torch.randn(300, model.encoder.action_dim, generator=torch.Generator().manual_seed(0))
    found = model.predict(state, wild)
    chance_EB = torch.sigmoid(found.end_logit_EB)
    assert known.outcomes[0][~known.outcomes[1]].abs().max() == 0.0
    assert bool((found.reward_EB <= 1.2 * chance_EB).all())
    assert bool((found.reward_EB >= 0.8 * 0.95 * chance_EB).all())


def test_rewards_that_differ_are_learned_for_each_outcome(tmp_path: Path) -> None:
    data = load_dataset(write_reaching_set(tmp_path / "set", 60))
    reward_N = data.columns["observation.state"][:, 0] + 3.0 * data.columns["next.reward"].float().flatten()
    known = Decisions(data, 1, 2, 0.95, None, reward_N)
    model = trained_model(known)
    batch = known.batch(torch.arange(len(known)))
    found = model.predict(model.encoder.encode(batch.observation), model.encoder.encode_action(batch.action_BHA))
    error = (found.reward_EB.mean(0) - batch.reward_B).square().mean() / batch.reward_B.var()
    assert float(error.detach()) < 0.2


class Nothing:
    """A critic that knows nothing: values after the horizon are zero."""

    def __init__(self, encoder: StateEncoder) -> None:
        self.encoder = encoder

    def update(self, batch: object) -> dict[str, float]:
        return {}

    def value(self, observation: Observation) -> Tensor:
        return torch.zeros(observation.batch_size)

    def q_values(self, observation: Observation, action_BHA: Tensor) -> Tensor:
        return torch.zeros(2, observation.batch_size)


def evaluator(model: DynamicsEnsemble, known: Decisions, **changes: object) -> ModelEvaluator:
    first = known.first()
    starts = known.observe(known.frames_W[first], known.episode_W[first])
    config = replace(GateConfig(), **changes)  # type: ignore[arg-type]
    return ModelEvaluator(model, Nothing(model.encoder), starts, 8, 0.95**2, (0.0, 1.0), config, 0)


def test_the_model_ranks_policies_as_the_world_does(
    reaching: tuple[Decisions, Decisions], model: DynamicsEnsemble
) -> None:
    known, _ = reaching
    judge = evaluator(model, known)
    values = [float(judge.evaluate(reaching_policy(gain)).mean()) for gain in (0.0, 0.15, 0.35)]
    assert values == sorted(values)
    decision = gate(judge.evaluate(reaching_policy(0.35)), judge.evaluate(reaching_policy(0.0)), GateConfig(), rng())
    assert isinstance(decision, Accepted)


def test_the_same_policy_has_the_same_value_to_the_bit(
    reaching: tuple[Decisions, Decisions], model: DynamicsEnsemble
) -> None:
    judge = evaluator(model, reaching[0])
    assert torch.equal(judge.evaluate(reaching_policy(0.5)), judge.evaluate(reaching_policy(0.5)))


class Ends(DynamicsEnsemble):
    """Pays 1 for every decision, and ends after the first."""

    logit = 50.0

    def predict(self, state: Tensor, action: Tensor) -> Prediction:
        found = super().predict(state, action)
        return replace(
            found,
            reward_EB=torch.ones_like(found.reward_EB),
            end_logit_EB=torch.full_like(found.end_logit_EB, self.logit),
        )


def test_nothing_is_earned_after_the_end(reaching: tuple[Decisions, Decisions]) -> None:
    """Defect 10: terminal states did not end a roll-out."""
    known, _ = reaching
    ends = Ends(StateEncoder.fit(known), DynamicsConfig(width=8, depth=1, members=2), torch.Generator())
    value = evaluator(ends, known).evaluate(reaching_policy(0.5))
    torch.testing.assert_close(value, torch.ones_like(value))
    ends.logit = -50.0
    goes_on = evaluator(ends, known).evaluate(reaching_policy(0.5))
    discount = 0.95**2
    torch.testing.assert_close(goes_on, torch.full_like(goes_on, (1 - discount**8) / (1 - discount)))


def test_disagreement_costs(reaching: tuple[Decisions, Decisions], model: DynamicsEnsemble) -> None:
    free = evaluator(model, reaching[0]).evaluate(reaching_policy(0.5))
    charged = evaluator(model, reaching[0], disagreement_penalty=1.0).evaluate(reaching_policy(0.5))
    assert bool((charged < free).all())


def test_fitted_q_evaluation_ranks_policies_as_the_world_does(reaching: tuple[Decisions, Decisions]) -> None:
    known, _ = reaching
    first = known.first()
    starts = known.observe(known.frames_W[first], known.episode_W[first])
    config = FQEConfig(steps=500, width=64, polyak=0.05, learning_rate=2e-3)
    encoder = StateEncoder.fit(known)
    values = [fitted_q_evaluation(reaching_policy(g), known, encoder, starts, config, 0).mean() for g in (0.0, 0.35)]
    assert values[1] > values[0]
    again = fitted_q_evaluation(reaching_policy(0.35), known, encoder, starts, config, 0).mean()
    assert torch.equal(again, values[1])


@pytest.mark.parametrize("options", [{"starts": 1}, {"confidence": 0.3}, {"disagreement_penalty": -1.0}])
def test_bad_gates_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GateConfig(**options)


def test_a_model_of_one_member_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="members"):
        DynamicsConfig(members=1)
