"""Write a policy, say a student, as an ONNX graph that onnxruntime runs; the folder can be used wherever a policy folder can.

What is written is run at once and compared with the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.cli.common import CommandConfig
from vla_rl.inference.onnx_export import export_onnx
from vla_rl.policies.base import discover_policies

EXAMPLE = "vla-rl distill export runs/can/student --out runs/can/student_onnx"
POSITIONALS = ("policy",)
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl distill export``.

    policy: folder of a chunk policy
    out: folder to write
    """

    policy: Path
    out: Path


def run(config: Config) -> dict[str, Any]:
    """Export; return how far graph and policy are apart."""
    results = export_onnx(config.policy, config.out)
    print(
        f"{config.out}: {results['bytes'] / 2**20:.2f} MiB, differs from the policy by at most {results['largest_difference']:.1e}"
    )
    return results
