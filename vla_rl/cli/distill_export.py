"""Write a policy as others run it: an ONNX graph for onnxruntime, or a LeRobot policy folder, which LeRobot evaluates and trains on.

``eval``, ``bench latency`` and ``deploy`` take the graph's folder like any other. LeRobot reads its folder through the plug-in
``lerobot_policy_vla_rl``, which set-up installs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    out: folder of what is written
    format: onnx, or lerobot
    """

    policy: Path
    out: Path
    format: Literal["onnx", "lerobot"] = "onnx"


def run(config: Config) -> dict[str, Any]:
    """Export and compare; return how far graph and policy are apart, where there is a graph."""
    if config.format == "lerobot":
        from lerobot_policy_vla_rl.modeling_vla_rl import export_policy

        export_policy(config.policy, config.out)
        print(f"{config.out}: lerobot-eval --policy.path={config.out} --env.type=vla_rl --env.task=TASK")
        return {"format": "lerobot"}
    results = export_onnx(config.policy, config.out)
    print(
        f"{config.out}: {results['bytes'] / 2**20:.2f} MiB, differs from the policy by at most {results['largest_difference']:.1e}"
    )
    return results
