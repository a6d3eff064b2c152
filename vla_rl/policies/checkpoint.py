"""Save a policy as a folder and build it again: weights, normalisers, config, specs, hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vla_rl.policies.base import ChunkPolicy, PolicyConfig, discover_policies
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.checkpoints import load_tensors, save_folder, verify_folder
from vla_rl.runtime.config import decode, encode, read_yaml, write_yaml
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import read_json

KIND = "policy"
PHRASES = "phrases.json"  # instructions that the policy has met, beside their embeddings
_NORMALIZERS = ("observation_normalizer.", "action_normalizer.")


def save_policy(policy: ChunkPolicy, path: Path, meta: Mapping[str, Any]) -> None:
    """Write ``config.yaml``, weights, normalisers, the instructions it has met, and the manifest into a new folder."""
    state = policy.state_dict()
    tensors = {
        "model": {k: v for k, v in state.items() if not k.startswith(_NORMALIZERS)},
        "normalizers": {k: v for k, v in state.items() if k.startswith(_NORMALIZERS)},
    }
    texts = {"config.yaml": write_yaml({"policy": encode_policy(policy.config), "spec": policy.full_spec.to_dict()})}
    words = policy.encoder.words if policy.encoder is not None else None
    if words is not None and words.phrases:
        texts[PHRASES] = json.dumps(list(words.phrases), ensure_ascii=False)
        tensors["phrases"] = {"embedding": torch.stack(list(words.phrases.values()))}
    save_folder(path, tensors=tensors, texts=texts, meta={"kind": KIND, **meta})


def encode_policy(config: PolicyConfig) -> dict[str, Any]:
    """A policy's config as plain data, with the names of its choices."""
    return {"type": type(config).get_choice_name(type(config)), **encode(config)}


def resolve_policy(path: Path) -> Path:
    """Accept a policy folder or the run folder of a training that ended with one."""
    return path / "policy" if (path / "policy" / "manifest.json").exists() else path


def load_policy(path: Path, device: str = "cpu") -> ChunkPolicy:
    """Build the policy that a folder holds, in evaluation mode.

    Raises:
        UserError: no policy there, or it is damaged.
    """
    discover_policies()
    path = resolve_policy(path)
    meta = verify_folder(path)
    if meta.get("kind") != KIND:
        raise UserError(f"{path} holds a checkpoint of kind {meta.get('kind')!r}, not a policy")
    raw = read_yaml(path / "config.yaml")
    policy = decode(PolicyConfig, raw["policy"]).build(PolicySpec.from_dict(raw["spec"]))
    state = load_tensors(path, "model") | load_tensors(path, "normalizers")
    try:
        policy.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit its config: {' '.join(str(error).split())[:200]}") from error
    if policy.encoder is not None and policy.encoder.words is not None and (path / PHRASES).exists():
        embedded = load_tensors(path, "phrases")["embedding"]
        policy.encoder.words.recall(dict(zip(read_json(path / PHRASES), embedded, strict=True)))
    return policy.to(torch.device(device)).eval()
