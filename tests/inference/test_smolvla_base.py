"""SmolVLA as a base, built from a tiny language model's configuration on this machine: it sees, reads, and decides as LeRobot's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_rl.inference.bases import BaseSource
from vla_rl.inference.lerobot_base import lerobot_base, lerobot_folder
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec, FeatureSpec, Observation

S, A, SIDE = 5, 3, 32
IMAGE = "observation.images.top"
SPEC = PolicySpec(
    {"observation.state": FeatureSpec((S,)), IMAGE: FeatureSpec((3, SIDE, SIDE))},
    ActionSpec(("x", "y", "z"), ("m",) * A, (-9.0,) * A, (9.0,) * A, "delta", 20.0),
    "toy",
)
SPECIAL = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
}


def make_language_model(folder: Path) -> Path:
    """Configuration, tokenizer and processor of a vision-language model of some thousand weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
    )
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    words = ["<unk>", "<pad>", "<s>", "</s>", "<end_of_utterance>", *SPECIAL.values(), "push", "lift", "the", "block"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=SPECIAL,
    )
    fast.save_pretrained(folder)
    SmolVLMProcessor(SmolVLMImageProcessor(), fast, SmolVLMVideoProcessor(), chat_template="x").save_pretrained(folder)
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    SmolVLMConfig(
        vision_config={**tiny, "num_hidden_layers": 1, "image_size": 64, "patch_size": 16},
        text_config={
            **tiny,
            "model_type": "llama",
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": len(words),
        },
        scale_factor=2,
        image_token_id=words.index("<image>"),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    root = tmp_path_factory.mktemp("smolvla")
    language_model = make_language_model(root / "language_model")
    torch.manual_seed(3)
    config = make_policy_config(
        "smolvla",
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (S,)),
            IMAGE: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (A,))},
        device="cpu",
        vlm_model_name=str(language_model),
        num_vlm_layers=2,
        chunk_size=6,
        n_action_steps=4,
        num_steps=3,
        resize_imgs_with_padding=(64, 64),
    )
    policy = get_policy_class("smolvla")(config)
    stats = {
        "observation.state": {"mean": torch.full((S,), 2.0), "std": torch.full((S,), 3.0)},
        "action": {"mean": 0.1 * torch.arange(1.0, A + 1), "std": torch.full((A,), 0.5)},
    }
    for part in (policy, *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(root / "pretrained_model")
    return root / "pretrained_model"


def open_base(folder: Path, words: str = "push the block") -> BaseSource:
    found = lerobot_folder(folder)
    assert found is not None
    return lerobot_base(found, SPEC, words)


def seen(batch: int, level: int = 90) -> Observation:
    state = torch.randn(batch, 1, S, generator=torch.Generator().manual_seed(0))
    image = torch.full((batch, 1, 3, SIDE, SIDE), level, dtype=torch.uint8)
    image[..., : SIDE // 2] = 255 - level
    return Observation(state, None, {"top": image})


def decide(source: BaseSource, observation: Observation, scenes: list[int]) -> np.ndarray:
    base = source.open(len(scenes), 11)
    base.reset(list(range(len(scenes))), scenes)
    return base.chunk(observation, list(range(len(scenes))))


def test_it_decides_as_lerobot_does(folder: Path) -> None:
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    source, observation = open_base(folder), seen(1)
    assert source.spec.execute_steps == 4
    assert source.spec.observation_steps == 1
    ours_HA = decide(source, observation, [5])[0]
    policy = get_policy_class("smolvla").from_pretrained(str(folder)).eval()
    before, after = make_pre_post_processors(policy.config, str(folder))
    twin = source.open(1, 11)
    twin.reset([0], [5])
    batch = before(
        {
            "observation.state": observation.state_BOS[0, 0],
            IMAGE: observation.images["top"][0, 0].float() / 255,
            "task": "push the block",
        }
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**62, (), generator=twin._generator[0])))  # type: ignore[attr-defined]
        policy.reset()
        theirs_A = after(policy.select_action(batch))[0].numpy()
    np.testing.assert_allclose(ours_HA[0], theirs_A, atol=1e-5)


def test_pictures_and_words_count_and_rows_follow_from_their_scene(folder: Path) -> None:
    source = open_base(folder)
    first = decide(source, seen(1), [5])
    np.testing.assert_array_equal(first, decide(source, seen(1), [5]))
    assert not np.allclose(first, decide(source, seen(1, level=10), [5]))
    assert not np.allclose(first, decide(open_base(folder, "lift the block"), seen(1), [5]))
    together = decide(source, seen(2), [5, 6])
    np.testing.assert_array_equal(together[:1], first)
    twice = Observation(seen(2).state_BOS[:1].expand(2, -1, -1), None, seen(2).images)
    noisy = decide(source, twice, [5, 6])
    assert not np.allclose(noisy[0], noisy[1]), "each scene has its own noise"


def test_a_language_model_that_is_not_here_is_refused_without_a_download(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("nobody/has-this-model", "/no/such folder"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "vlm_model_name": name}))
        with pytest.raises(UserError, match=rf"vlm_model_name in .*config.json is '{name}', which is no folder"):
            open_base(tmp_path)
