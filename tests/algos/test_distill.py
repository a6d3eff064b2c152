"""Students: exact where the teacher's flow is straight or known, warm starts, boundaries, and who is changed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TOY_ACTION, TOY_OBSERVATION, PlainNet

from vla_rl.algos.distill import (
    AnsweredWindows,
    DistillConfig,
    LinearPath,
    _jumps,
    answer_error,
    distill_error,
    objective,
    split,
    student_of,
)
from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.nets.base import NetConfig
from vla_rl.nets.mlp import MLPConfig
from vla_rl.nets.transformer import TransformerConfig
from vla_rl.nets.unet1d import UNet1DConfig
from vla_rl.policies.base import ChunkPolicy, PolicyConfig
from vla_rl.policies.diffusion import DiffusionConfig
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.path import GuidanceConfig, guided_chunk, soft_mask
from vla_rl.policies.records import Draw, PolicySpec, Prefix
from vla_rl.policies.student import StudentConfig
from vla_rl.runtime.errors import UserError
from vla_rl.types import Observation

NETS: list[NetConfig] = [
    MLPConfig(width=16, depth=1, time_dim=8),
    TransformerConfig(width=16, depth=1, heads=2),
    UNet1DConfig(channels=(8, 16), kernel=3, time_dim=8),
]
METHODS = [
    DistillConfig("paired"),
    DistillConfig("consistency"),
    DistillConfig("consistency", "ema"),
    DistillConfig("consistency", "teacher"),
    DistillConfig("shortcut"),
    DistillConfig("shortcut", "ema"),
]
TEACHERS: list[PolicyConfig] = [
    FlowConfig(net=NETS[0], chunk_steps=4, execute_steps=2, sample_steps=5),
    *(
        DiffusionConfig(net=NETS[0], chunk_steps=4, execute_steps=2, sample_steps=5, prediction=p)  # type: ignore[arg-type]
        for p in ("epsilon", "sample", "v")
    ),
]
LEVELS = tuple(k / 6 for k in range(7))
SPEC = PolicySpec(TOY_OBSERVATION, TOY_ACTION, "toy")


def teacher_of(config: PolicyConfig) -> ChunkPolicy:
    torch.manual_seed(0)
    return config.build(SPEC).requires_grad_(False).eval()


def ids(config: object) -> str:
    return "-".join(str(v) for v in vars(config).values() if isinstance(v, str)) or type(config).__name__


def inputs(batch: int = 6, prefix: int = 0) -> tuple[Tensor, Tensor, Draw]:
    generator = torch.Generator().manual_seed(1)
    condition = torch.randn(batch, 2, 7, generator=generator)
    action = torch.rand(batch, 4, 2, generator=generator) * 2 - 1
    fixed = torch.arange(4).expand(batch, 4) < prefix
    draw = Draw(torch.randn(batch, 4, 2, generator=generator), torch.rand(batch, generator=generator), fixed)
    return condition, action, draw


@pytest.mark.parametrize("config", TEACHERS, ids=ids)
def test_the_path_on_the_line_ends_where_the_policy_samples(config: PolicyConfig) -> None:
    teacher = teacher_of(config)
    condition, action, draw = inputs()
    made = teacher.generate(condition, draw.noise_BHA[None], None).action_BHA
    path = LinearPath(teacher)
    start = torch.zeros(6, dtype=torch.long)
    free = torch.zeros(6, 4, dtype=torch.bool)
    torch.testing.assert_close(path.end(draw.noise_BHA, start, condition, free), made, atol=1e-3, rtol=1e-3)
    prefix = Prefix(action, torch.full((6,), 2), torch.full((6,), 2))
    held = torch.where(prefix.mask()[..., None], action, draw.noise_BHA)
    made = teacher.generate(condition, draw.noise_BHA[None], prefix).action_BHA
    torch.testing.assert_close(path.end(held, start, condition, prefix.mask()), made, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("levels", [(), (0.0, 0.5, 1.0)])
def test_a_step_of_zero_leaves_the_action_as_it_is(levels: tuple[float, ...]) -> None:
    student = StudentConfig(net=NETS[0], chunk_steps=4, execute_steps=2, levels=levels).build(SPEC)
    condition, action, _ = inputs()
    ones = torch.ones(6, 4)
    assert torch.equal(student.jump(action, ones, 0 * ones, condition), action)


@pytest.mark.parametrize("net", NETS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("method", ["paired", "shortcut"])
def test_a_warm_start_samples_as_the_teacher_in_one_step(net: NetConfig, method: str) -> None:
    """The jump's embedding begins at zero."""
    teacher = teacher_of(FlowConfig(net=net, chunk_steps=4, execute_steps=2, sample_steps=1))
    student = student_of(teacher, DistillConfig(method), None, 1, 0)  # type: ignore[arg-type]
    condition, _, draw = inputs()
    wanted = teacher.generate(condition, draw.noise_BHA[None], None)
    made = student.generate(condition, draw.noise_BHA[None], None)
    torch.testing.assert_close(made.action_BHA, wanted.action_BHA)
    torch.testing.assert_close(made.features_BF, wanted.features_BF)


@pytest.mark.parametrize("net", NETS, ids=lambda n: type(n).__name__)
def test_every_net_reads_the_jump_once_it_was_taught(net: NetConfig) -> None:
    student = StudentConfig(net=net, chunk_steps=4, execute_steps=2, levels=LEVELS).build(SPEC)
    torch.nn.init.normal_(student.net.time.jump[2].weight)  # type: ignore[union-attr, index]
    condition, action, _ = inputs()
    tau = torch.full((6, 4), 0.25)
    near, far = (student.net(action, tau, condition, torch.full((6, 4), step)) for step in (0.1, 0.7))
    assert not torch.allclose(near, far, atol=1e-3)


def test_a_student_may_be_smaller_than_its_teacher_and_shares_its_normalisers() -> None:
    teacher = teacher_of(TEACHERS[0])
    teacher.action_normalizer.load_state_dict(
        {k: v + 0.5 for k, v in teacher.action_normalizer.state_dict().items()}, strict=True
    )
    student = student_of(teacher, DistillConfig(), MLPConfig(width=8, depth=1, time_dim=4), 1, 0)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    for key, value in teacher.action_normalizer.state_dict().items():
        assert torch.equal(student.action_normalizer.state_dict()[key], value)


class Straight(PlainNet):
    """The velocity field of one action: straight lines."""

    def __init__(self, condition: Tensor, noise: Tensor, action: Tensor) -> None:
        super().__init__()
        self.condition, self.velocity = condition.flatten(1), action - noise

    def hidden(self, x: Tensor, tau: Tensor, condition: Tensor, jump: Tensor | None = None) -> Tensor:
        return self.velocity[
            torch.cdist(condition.flatten(1), self.condition).argmin(1)
        ]  # rows come in any number and order


@pytest.mark.parametrize("config", METHODS, ids=ids)
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_true_straight_flow_has_no_error(config: DistillConfig, prefix: int) -> None:
    teacher = teacher_of(TEACHERS[0])
    condition, action, draw = inputs(prefix=prefix)
    student = student_of(teacher, config, None, 1, 0)
    teacher.net = student.net = Straight(condition, draw.noise_BHA, action)
    error = distill_error(student, student, LinearPath(teacher), config, condition, action, draw)
    assert error[~draw.prefix_BH].abs().max() < 1e-10


class Exponential(PlainNet):
    """d x / d tau = x."""

    def hidden(self, x: Tensor, tau: Tensor, condition: Tensor, jump: Tensor | None = None) -> Tensor:
        return x


class ExponentialMap(PlainNet):
    """Its exact flow map: mean velocity of a jump, or of the jump to the end."""

    def hidden(self, x: Tensor, tau: Tensor, condition: Tensor, jump: Tensor | None = None) -> Tensor:
        step = (1 - tau if jump is None else jump)[..., None].double().clamp_min(1e-9)
        return (x * torch.expm1(step) / step).to(x.dtype)


@pytest.mark.parametrize("config", METHODS, ids=ids)
def test_the_exact_flow_map_of_a_curved_flow_has_an_error_of_the_teachers_steps_only(config: DistillConfig) -> None:
    """The teacher takes Euler's steps: with ten times as many, the loss falls about a hundredfold (squared error of first order)."""
    condition, action, draw = inputs(400)
    errors = []
    for steps in (10, 100):
        teacher = teacher_of(TEACHERS[0])
        student = student_of(teacher, config, None, 1, 0)
        teacher.net, student.net = Exponential(), ExponentialMap()
        path = LinearPath(teacher, steps)
        errors.append(float(distill_error(student, student, path, config, condition, action, draw).mean()))
    assert errors[1] < errors[0] / 30
    assert errors[0] > 1e-6


@pytest.mark.parametrize("config", METHODS, ids=ids)
@pytest.mark.parametrize("teacher_config", TEACHERS, ids=ids)
def test_a_lesson_moves_the_student_only_and_towards_the_teacher(
    config: DistillConfig, teacher_config: PolicyConfig
) -> None:
    teacher = teacher_of(teacher_config)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = student_of(teacher, config, MLPConfig(width=32, depth=1, time_dim=8), 1, 0)
    error = objective(teacher, config)
    generator = torch.Generator().manual_seed(3)
    observation = Observation(torch.randn(64, 2, 3, generator=generator), torch.randn(64, 2, 4, generator=generator))
    batch = WindowBatch(observation, torch.rand(64, 4, 2) * 2 - 1, torch.zeros(64, 4, dtype=torch.bool))
    optimizer = torch.optim.Adam(student.net.parameters(), lr=3e-3)
    noise = torch.randn(1, 64, 4, 2, generator=generator)
    fixed = teacher.draw(64, generator)

    def distance() -> float:
        if config.method != "paired":  # of an untrained teacher, whose states are not those of noised actions
            return float(error(student, average=student, batch=batch, draw=fixed).mean())
        condition = teacher.condition(observation)
        wanted = teacher.generate(condition, noise, None).action_BHA
        return float((student.generate(condition, noise, None).action_BHA - wanted).square().mean())

    first = distance()
    for _ in range(150):
        loss = error(student, average=student, batch=batch, draw=teacher.draw(64, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < 0.5 * first
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("config", TEACHERS, ids=ids)
def test_answers_are_what_the_teacher_samples_from_the_same_noise_and_prefix(
    config: PolicyConfig, toy_set: Path
) -> None:
    config = replace(config, max_prefix_steps=2)
    windows = Windows(load_dataset(toy_set), config.observation_steps, config.chunk_steps)
    teacher = teacher_of(config)
    teacher.fit_normalizers(windows)
    answered = AnsweredWindows(windows, teacher, DistillConfig(), 300, 3)
    everything = torch.arange(300)
    batch, known = answered.batch(everything), Windows.batch(answered, everything)
    assert answered.draw.prefix_BH.sum(1).unique().tolist() == [0, 1, 2]
    prefix = Prefix(known.action_BHA, *[answered.draw.prefix_BH.sum(1)] * 2)
    sampled = teacher.sample(known.observation, answered.draw.noise_BHA[None], prefix).action_BHA
    # a diffusion chain begins with a trace of signal, which an untrained net may blow up
    share, close = (1.0, 1e-5) if isinstance(config, FlowConfig) else (0.99, 2e-3)
    assert (batch.action_BHA - sampled).abs().flatten().quantile(share) < close
    assert torch.equal(answered.padding(everything), known.is_pad_BH)
    assert torch.equal(batch.is_pad_BH, known.is_pad_BH)
    frames = [tuple(row) for row in batch.observation.state_BOS.flatten(1).tolist()]
    drawn = {tuple(row) for row in windows.batch(torch.arange(len(windows))).observation.state_BOS.flatten(1).tolist()}
    assert set(frames) == drawn  # every window is among so many
    again = AnsweredWindows(windows, teacher, DistillConfig(), 300, 3)
    assert torch.equal(again.answer_WHA, answered.answer_WHA)
    other = AnsweredWindows(windows, teacher, DistillConfig(), 300, 4)
    assert not torch.equal(other.frames_W, answered.frames_W)


def test_observations_between_two_windows_are_answered_as_what_they_are(toy_set: Path) -> None:
    config = TEACHERS[0]
    windows = Windows(load_dataset(toy_set), config.observation_steps, config.chunk_steps)
    teacher = teacher_of(config)
    teacher.fit_normalizers(windows)
    answered = AnsweredWindows(windows, teacher, DistillConfig(), 2000, 0, between=0.25)
    rows = torch.arange(2000)
    batch, own = answered.batch(rows), Windows.batch(answered, rows)
    made = teacher.sample(batch.observation, answered.draw.noise_BHA[None]).action_BHA
    torch.testing.assert_close(batch.action_BHA, made, atol=1e-5, rtol=1e-5)
    moved = (batch.observation.state_BOS != own.observation.state_BOS).flatten(1).any(1)
    assert float(moved.float().mean()) == pytest.approx(0.25, abs=0.04)
    here, there = (
        torch.cat([o.state_BOS.flatten(1), o.environment_state_BOS.flatten(1)], 1)
        for o in (own.observation, batch.observation)
    )
    known = windows.batch(torch.arange(len(windows))).observation
    points = torch.cat([known.state_BOS.flatten(1), known.environment_state_BOS.flatten(1)], 1)
    step = there[moved] - here[moved]
    way = points[None] - here[moved][:, None]  # to every window: one of them lies straight on
    along = torch.cosine_similarity(step[:, None], way, dim=2).max(1)
    longer = way.norm(dim=2).gather(1, along.indices[:, None]).squeeze(1) >= step.norm(dim=1) - 1e-5
    assert (along.values[step.norm(dim=1) > 1e-2] > 0.999).all()
    assert longer.all()


def test_a_student_that_jumps_where_the_teacher_ends_has_no_error_on_its_answers(toy_set: Path) -> None:
    config = replace(TEACHERS[0], max_prefix_steps=2, sample_steps=1)
    windows = Windows(load_dataset(toy_set), config.observation_steps, config.chunk_steps)
    teacher = teacher_of(config)
    teacher.fit_normalizers(windows)
    answered = AnsweredWindows(windows, teacher, DistillConfig(), 64, 0)
    student = student_of(teacher, DistillConfig(), None, 1, 0)  # the same net: in one step, the teacher itself
    rows = torch.arange(64)
    error = answer_error(student, student, answered.batch(rows), answered.draw)
    assert error.max() < 1e-9
    shifted = answer_error(student, student, answered.batch(rows), answered.draw.rows(rows.roll(1)))
    assert shifted.max() > 1e-3  # each answer has its own noise


def test_a_shortcut_student_takes_one_two_or_three_steps_to_the_same_place() -> None:
    for steps in (1, 2, 3):
        student = StudentConfig(net=NETS[0], chunk_steps=4, execute_steps=2, levels=LEVELS, sample_steps=steps).build(
            SPEC
        )
        student.net = ExponentialMap()
        condition, _, draw = inputs()
        made = student.generate(condition, draw.noise_BHA[None], None).action_BHA
        torch.testing.assert_close(made, math.e * draw.noise_BHA, atol=1e-5, rtol=1e-4)


def test_a_consistency_student_goes_back_to_noise_between_its_jumps() -> None:
    student = StudentConfig(net=NETS[0], chunk_steps=4, execute_steps=2, sample_steps=2).build(SPEC)
    assert student.noise_count == 2
    student.net = ExponentialMap()
    condition, _, _ = inputs()
    noise = torch.randn(2, 6, 4, 2)
    middle = 0.5 * noise[1] + 0.5 * math.e * noise[0]
    made = student.generate(condition, noise, None).action_BHA
    torch.testing.assert_close(made, math.e**0.5 * middle, atol=1e-5, rtol=1e-4)


def test_a_student_keeps_a_prefix() -> None:
    for config in (StudentConfig, lambda **o: StudentConfig(levels=LEVELS, **o)):
        student = config(net=NETS[0], chunk_steps=4, execute_steps=2, sample_steps=2).build(SPEC)
        condition, action, _ = inputs()
        prefix = Prefix(action, torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([0, 1, 2, 3, 4, 4]))
        made = student.generate(condition, torch.randn(student.noise_count, 6, 4, 2), prefix).action_BHA
        assert torch.equal(made[prefix.mask()], action[prefix.mask()])
        assert not torch.equal(made[~prefix.mask()], action[~prefix.mask()])


def test_splitting_a_uniform_number_gives_two_that_are_uniform_and_independent() -> None:
    index, rest = split(torch.rand(200_000, generator=torch.Generator().manual_seed(0)), 7)
    assert index.bincount().float().div(len(index)).sub(1 / 7).abs().max() < 0.005
    assert all(abs(float(rest[index == i].mean()) - 0.5) < 0.01 for i in range(7))
    assert float(rest.min()) >= 0
    assert float(rest.max()) <= 1


def test_jumps_of_every_length_are_practised_and_the_shortest_are_the_teachers() -> None:
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 10):
        small, begin, end = _jumps(uniform, steps, 0.4)
        assert torch.equal(end - begin == 1, small)
        assert begin.min() == 0
        assert end.max() == steps
        assert set(map(tuple, torch.stack([begin, end], 1).unique(dim=0).tolist())) == {
            (i, j) for i in range(steps) for j in range(i + 1, steps + 1)
        }
    assert float(small.float().mean()) == pytest.approx(0.4, abs=0.01)


def test_what_cannot_be_distilled_or_chained_is_refused_in_one_line() -> None:
    student = StudentConfig(net=NETS[0], chunk_steps=4, execute_steps=2).build(SPEC)
    with pytest.raises(UserError, match="no denoising chain"):
        objective(student, DistillConfig())
    _, action, draw = inputs()
    batch = WindowBatch(Observation(torch.zeros(6, 2, 3), torch.zeros(6, 2, 4)), action, draw.prefix_BH)
    with pytest.raises(UserError, match="vla-rl distill"):
        student.error(batch, draw)
    with pytest.raises(ValueError, match="stop_gradient or ema"):
        DistillConfig("shortcut", "teacher")
    with pytest.raises(UserError, match="divisor of train_steps"):
        objective(teacher_of(TEACHERS[1]), DistillConfig(teacher_steps=7))


# --- guidance ---------------------------------------------------------------------------------------------------------------------


def test_the_soft_mask_is_one_then_falls_then_is_zero() -> None:
    mask = soft_mask(torch.tensor([2, 0, 3]), torch.tensor([6, 0, 3]), 8)
    assert mask[0, :2].tolist() == [1, 1]
    assert (mask[0, 2:6].diff() < 0).all()
    assert 0 < mask[0, 5] < mask[0, 2] < 1
    assert mask[0, 6:].tolist() == [0, 0]
    assert mask[1].tolist() == [0] * 8
    assert mask[2].tolist() == [1] * 3 + [0] * 5
    # eq. 5 of arXiv 2506.07339: c (e^c - 1) / (e - 1) with c = (known - i) / (known - fixed + 1)
    wanted = [c * (math.exp(c) - 1) / (math.e - 1) for c in (4 / 5, 3 / 5, 2 / 5, 1 / 5)]
    torch.testing.assert_close(mask[0, 2:6], torch.tensor(wanted))


class Pulling(PlainNet):
    """Velocity of a linear flow: d x / d tau = -x / 2."""

    def hidden(self, x: Tensor, tau: Tensor, condition: Tensor, jump: Tensor | None = None) -> Tensor:
        return -0.5 * x


@pytest.mark.parametrize("spread", [1.0, 0.5])
@pytest.mark.parametrize("jacobian", ["exact", "identity"])
def test_guidance_is_the_papers_worked_out_for_a_linear_flow(jacobian: str, spread: float) -> None:
    """Eq. 1 to 4: v + min(beta, (1 - tau) / (tau r^2)) J' W (Y - A), where A = x + (1 - tau) v has the Jacobian 1 - (1 - tau) / 2."""
    teacher = teacher_of(FlowConfig(net=NETS[0], chunk_steps=4, execute_steps=2, sample_steps=4))
    teacher.net = Pulling()
    condition, action, draw = inputs()
    prefix = Prefix(action, torch.full((6,), 1), torch.full((6,), 3))
    config = GuidanceConfig(jacobian=jacobian, largest_weight=6.0, spread=spread)  # type: ignore[arg-type]
    made = guided_chunk(teacher, condition, draw.noise_BHA[None], prefix, config).action_BHA
    weight = soft_mask(prefix.fixed_B, prefix.known_B, 4)[..., None]
    x, strengths = draw.noise_BHA, []
    for k in range(4):
        tau = k / 4
        velocity = -0.5 * x
        slope = 1 - (1 - tau) / 2 if jacobian == "exact" else 1.0
        missing = weight * (action - (x + (1 - tau) * velocity))
        if tau == 0:
            strengths.append(6.0)
        else:
            r_square = (1 - tau) ** 2 * spread**2 / ((1 - tau) ** 2 + tau**2 * spread**2)
            strengths.append(min(6.0, (1 - tau) / (tau * r_square)))
        x = x + (velocity + strengths[-1] * slope * missing) / 4
    assert len(set(strengths)) > 1
    torch.testing.assert_close(made[:, 1:], x[:, 1:], atol=1e-5, rtol=1e-4)
    assert torch.equal(made[:, :1], action[:, :1])


@pytest.mark.parametrize("jacobian", ["exact", "identity"])
@pytest.mark.parametrize("config", TEACHERS, ids=ids)
def test_guidance_goes_on_from_what_is_decided_and_without_it_is_the_policy(
    config: PolicyConfig, jacobian: str
) -> None:
    teacher = teacher_of(config)
    condition, action, draw = inputs()
    noise = draw.noise_BHA[None]
    plain = teacher.generate(condition, noise, None).action_BHA
    nothing = Prefix(action, torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long))
    guidance = GuidanceConfig(jacobian=jacobian)  # type: ignore[arg-type]
    torch.testing.assert_close(
        guided_chunk(teacher, condition, noise, nothing, guidance).action_BHA, plain, atol=1e-3, rtol=1e-3
    )
    wanted = 0.5 * action
    decided = Prefix(wanted, torch.full((6,), 1), torch.full((6,), 4))
    made = guided_chunk(teacher, condition, noise, decided, guidance).action_BHA
    assert torch.equal(made[:, 0], wanted[:, 0])
    if jacobian == "exact" and getattr(config, "prediction", "") == "sample":
        return  # a net without training that predicts the action hardly depends on x: nothing to pull
    assert (made[:, 1] - wanted[:, 1]).abs().mean() < 0.7 * (plain[:, 1] - wanted[:, 1]).abs().mean()


def test_the_exact_jacobian_is_that_of_finite_differences() -> None:
    """The pull on x is W (Y - a) times d a / d x, which identity leaves out."""
    teacher = teacher_of(TEACHERS[0]).double()
    condition, action, draw = (t.double() if isinstance(t, Tensor) else t for t in inputs(1))
    assert isinstance(condition, Tensor)
    assert isinstance(action, Tensor)
    assert isinstance(draw, Draw)
    path, k, free = LinearPath(teacher), torch.tensor([2]), torch.zeros(1, 4, dtype=torch.bool)
    x = draw.noise_BHA.double().requires_grad_(True)
    missing = torch.rand(1, 4, 2, dtype=torch.float64)
    estimate = path.estimate(x, k, condition, free)[1]
    (pull,) = torch.autograd.grad(estimate, x, missing)
    direction, step = torch.randn(1, 4, 2, dtype=torch.float64), 1e-6
    ahead, behind = (path.estimate(x.detach() + s * step * direction, k, condition, free)[1] for s in (1, -1))
    numeric = ((ahead - behind) / (2 * step) * missing).sum()
    torch.testing.assert_close((pull * direction).sum(), numeric, rtol=1e-4, atol=1e-6)
