"""Save a residual beside its base, and load whatever a folder holds as something that acts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_rl.data.step_encoder import StepEncoder
from vla_rl.inference import onnx_export, selector_checkpoint
from vla_rl.inference.bases import BaseSource, FindBase
from vla_rl.inference.controller import Agent, PolicyAgent
from vla_rl.inference.residual_controller import ResidualAgent
from vla_rl.policies import checkpoint
from vla_rl.policies.records import PolicySpec
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.runtime.checkpoints import load_tensors, save_folder, verify_folder
from vla_rl.runtime.config import decode, encode, read_yaml, write_yaml
from vla_rl.runtime.errors import UserError

KIND = "residual"


def save_residual(policy: ResidualPolicy, base: BaseSource, path: Path, meta: Mapping[str, Any]) -> None:
    """Write a residual into a new folder.

    Args:
        policy: the residual.
        base: what it corrects; a relative reference is read from the folder that holds ``path``.
        path: the folder.
        meta: plain data kept in the manifest.
    """
    described = {
        "residual": encode(policy.config),
        "base": {
            "reference": base.reference,
            "digest": base.digest,
            "observation_steps": base.spec.observation_steps,
            "execute_steps": base.spec.execute_steps,
        },
        "spec": base.spec.policy.to_dict(),
    }
    tensors = {"model": policy.state_dict()}
    save_folder(path, tensors=tensors, texts={"config.yaml": write_yaml(described)}, meta={"kind": KIND, **meta})


def spec_of(path: Path) -> PolicySpec:
    """What a policy, residual or selector was made for; raises UserError where there is none."""
    path = checkpoint.resolve_policy(path)
    kind = verify_folder(path).get("kind")
    if kind == onnx_export.KIND:
        return spec_of(path / onnx_export.SOURCE)
    if kind not in (KIND, checkpoint.KIND, selector_checkpoint.KIND):
        raise UserError(f"{path} holds no policy")
    return PolicySpec.from_dict(read_yaml(path / "config.yaml")["spec"])


def load_agent(path: Path, find_base: FindBase) -> Agent:
    """Load a policy, a residual with its base, or a selector with its policy, as it is deployed.

    Raises:
        UserError: nothing there, it is damaged, or the base is another one than the residual was trained on.
        SpecMismatchError: base and residual disagree on actions or chunks.
    """
    path = checkpoint.resolve_policy(path)
    kind = verify_folder(path).get("kind")
    if kind == KIND:
        return load_residual(path, find_base)
    if kind == onnx_export.KIND:
        graph = onnx_export.OnnxPolicy(path)
        return PolicyAgent(graph.policy, graph)
    if kind == selector_checkpoint.KIND:
        policy, selector = selector_checkpoint.load_selector(path)
        return PolicyAgent(policy, selector.sampler(policy))
    return PolicyAgent(checkpoint.load_policy(path))


def load_residual(path: Path, find_base: FindBase) -> ResidualAgent:
    """Load a residual with its base; raises as ``load_agent``."""
    raw = read_yaml(path / "config.yaml")
    there = raw["base"]["reference"]
    beside = path.parent / there
    base = find_base(str(beside) if beside.exists() else there)
    if base.digest != raw["base"]["digest"]:
        raise UserError(
            f"the residual in {path} was trained on a base with the hash {raw['base']['digest'][:12]}, and {base.reference} has "
            f"{base.digest[:12]}; give back the base it knows, or train a residual on this one"
        )
    spec = PolicySpec.from_dict(raw["spec"])
    encoder = StepEncoder(spec.observation_spec, spec.action_spec, raw["base"]["execute_steps"])
    policy = ResidualPolicy(decode(ResidualConfig, raw["residual"]), encoder)
    try:
        policy.load_state_dict(load_tensors(path, "model"))
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit its config: {' '.join(str(error).split())[:200]}") from error
    return ResidualAgent(base, policy.eval())
