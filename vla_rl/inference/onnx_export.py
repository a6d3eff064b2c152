"""A policy as an ONNX graph, and onnxruntime in its place: normalised observation and noise in, normalised actions out.

The whole of ``ChunkPolicy.generate`` is in the graph; the normalisers are those of the policy beside it. The features of the last
layer are a second output, so that a selector works on it too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.nets.base import repeat_to
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy
from vla_rl.policies.records import Generated, Prefix
from vla_rl.policies.student import StudentPolicy
from vla_rl.runtime.checkpoints import folder_digest, save_folder, verify_folder
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import write_directory
from vla_rl.types import ActionChunk, Observation

KIND = "onnx"
GRAPH = "model.onnx"
SOURCE = "source"  # the policy, beside its graph
OPSET = 18
LARGEST_DIFFERENCE = 1e-5  # in normalised units
LARGEST_OF_CHAIN = 1e-4  # of a policy whose steps multiply what its first ones round


class _Whole(nn.Module):
    """Condition and noise to normalised chunk and features."""

    def __init__(self, policy: ChunkPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, condition: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        made = self.policy.generate(condition, noise, None)
        return made.action_BHA, made.features_BF


def export_onnx(source: Path, out: Path) -> dict[str, Any]:
    """Write a policy folder's graph and a copy of the policy into a new folder; return how far the two are apart.

    Raises:
        UserError: no chunk policy there, ``out`` exists, or the graph gives another output than the policy.
    """
    policy = load_policy(source)
    if out.exists():
        raise UserError(f"{out} exists; choose another --out, or remove it")

    def fill(folder: Path) -> None:
        folder.rmdir()
        meta = {"kind": KIND, "source": folder_digest(resolve_policy(source))}
        save_folder(folder, tensors={}, texts={}, files={GRAPH: graph(policy)}, meta=meta)
        shutil.copytree(resolve_policy(source), folder / SOURCE)
        found.append(_apart(policy, OnnxPolicy(folder)))
        largest = LARGEST_DIFFERENCE if isinstance(policy, StudentPolicy) else LARGEST_OF_CHAIN
        if not found[0] <= largest:
            raise UserError(f"the graph's output is {found[0]:.2g} away from the policy's, more than {largest:g}")

    found: list[float] = []
    write_directory(out, fill)
    size = (out / GRAPH).stat().st_size
    return {"largest_difference": found[0], "bytes": size, "policy": folder_digest(out / SOURCE)}


def _apart(policy: ChunkPolicy, sampler: OnnxPolicy) -> float:
    """The largest difference of a graph's actions from the policy's, in normalised units."""
    generator = torch.Generator().manual_seed(0)
    apart = 0.0
    for batch in (1, 7):
        condition_BOD = torch.randn(batch, *policy.condition_shape, generator=generator)
        noise_KBHA = torch.randn(policy.noise_count, batch, *policy.chunk_shape, generator=generator)
        with torch.no_grad():
            wanted = policy.generate(condition_BOD, noise_KBHA, None).action_BHA
        made = sampler.generate(condition_BOD, noise_KBHA, None).action_BHA
        apart = max(apart, float((made - wanted).abs().max()))
    return apart


def graph(policy: ChunkPolicy) -> bytes:
    """The serialised graph, for any number of rows; raises UserError for a policy that torch cannot write as one."""
    condition_BOD = torch.zeros(2, *policy.condition_shape)
    noise_KBHA = torch.zeros(policy.noise_count, 2, *policy.chunk_shape)
    rows = torch.export.Dim("B")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's, about names of axes
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                _Whole(policy.eval()),
                (condition_BOD, noise_KBHA),
                dynamo=True,
                input_names=["condition", "noise"],
                output_names=["action", "features"],
                dynamic_shapes={"condition": {0: rows}, "noise": {1: rows}},
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as refused:
            why = " ".join(str(refused.__cause__ or refused).split())[:160]
            raise UserError(f"torch cannot write this {type(policy).__name__} as a graph: {why}") from refused
        finally:
            logging.disable(logging.NOTSET)
    assert program is not None
    return program.model_proto.SerializeToString()


class OnnxPolicy:
    """Draws chunks as the policy beside it, by onnxruntime: a ``Sampler``."""

    takes_prefix = False

    def __init__(self, folder: Path) -> None:
        """Load; raises UserError for a damaged folder, or where onnxruntime cannot read the graph."""
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        meta: dict[str, Any] = verify_folder(folder)
        if meta.get("kind") != KIND:
            raise UserError(f"{folder} holds no ONNX graph; 'vla-rl distill export' writes one")
        if folder_digest(folder / SOURCE) != meta.get("source"):
            raise UserError(f"the policy in {folder / SOURCE} is not the one that the graph beside it was made from")
        self.policy = load_policy(folder / SOURCE)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors alone
        providers = [
            p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in onnxruntime.get_available_providers()
        ]
        try:
            self._session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=providers)
        except (
            errors.Fail,
            errors.InvalidArgument,
            errors.InvalidGraph,
            errors.InvalidProtobuf,
            errors.NotImplemented,
            errors.RuntimeException,
        ) as error:
            raise UserError(
                f"onnxruntime cannot read {folder / GRAPH}: {' '.join(str(error).split())[:160]}"
            ) from error
        self.noise_count, self.own_noise_count = self.policy.noise_count, 0

    def generate(self, condition_BOD: Tensor, noise_KBHA: Tensor, prefix: Prefix | None) -> Generated:
        """As ``ChunkPolicy.generate``; a graph knows no prefix."""
        if prefix is not None:
            raise UserError("an ONNX graph samples whole chunks; with method rtc or rtc_prefix take the policy itself")
        fed: Mapping[str, np.ndarray] = {
            "condition": repeat_to(condition_BOD, noise_KBHA[0]).numpy(force=True),
            "noise": noise_KBHA.numpy(force=True),
        }
        action_BHA, features_BF = (torch.from_numpy(x).to(noise_KBHA.device) for x in self._session.run(None, fed))
        return Generated(action_BHA, features_BF)

    @torch.no_grad()
    def __call__(self, observation: Observation, noise_KBHA: Tensor, prefix: Prefix | None = None) -> ActionChunk:
        """See ``Sampler``."""
        policy = self.policy
        made = self.generate(policy.condition(observation), noise_KBHA, prefix)
        action_BHA = policy.unnormalize_action(made.action_BHA, observation)
        return ActionChunk(action_BHA, policy.config.execute_steps, policy.spec.action_spec)
