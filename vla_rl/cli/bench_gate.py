"""Judge the OPE gate: many candidate updates of one policy, what each estimator says of them, and the truth on the same scenes.

Killed at any time, the same command goes on with the candidate it was at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.bench_gate import ESTIMATES, GATE, GateBenchSettings, bench_gate
from vla_rl.cli.common import TaskOptions, open_arena_of, settings_of
from vla_rl.data.reader import load_datasets
from vla_rl.policies.base import discover_policies
from vla_rl.policies.checkpoint import resolve_policy
from vla_rl.runtime.checkpoints import folder_digest
from vla_rl.runtime.config import claim_folder, encode
from vla_rl.runtime.files import exclusive
from vla_rl.statistics import Proportion

EXAMPLE = (
    "vla-rl bench gate --data runs/demos runs/rollouts --policy runs/pretrain --out runs/gate --json results/gate.json"
)
GROUPS = {"kernel": "kernel"}
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, GateBenchSettings):
    """Options of ``vla-rl bench gate``.

    data: data sets with demonstrations and roll-outs of the policy
    policy: folder of the policy that is updated
    out: folder for what is trained
    num_envs: environments in parallel (0: 4 in threads for robosuite, 16 in turn for other tasks)
    """

    data: list[Path]
    policy: Path
    out: Path
    num_envs: int = 0


def run(config: Config) -> dict[str, Any]:
    """Judge; print a table and return the numbers."""
    settings = settings_of(GateBenchSettings, config)
    data = load_datasets(config.data)
    with exclusive(config.out):
        arena = open_arena_of(config, config.policy, config.num_envs)
        digest = folder_digest(resolve_policy(config.policy))
        try:
            claim_folder(config.out, {**encode(settings), "data": data.digest, "policy": digest, **arena.identity()})
            results = bench_gate(data, config.policy, config.out, settings, arena)
        finally:
            arena.env.close()
    print(
        f"{results['updates']} updates of a policy of success {results['base_success']:.3f}: {results['good']} good, "
        f"{results['harmful']} harmful, mean gain if all are kept {100 * results['mean_gain_if_all_are_kept']:+.1f} points"
    )
    for name in (*ESTIMATES, GATE):
        judged = results[name]
        precision, kept_out = (judged[k] and Proportion(**judged[k]) for k in ("precision", "harmful_kept_out"))
        print(f"{name}: {judged['accepted']} accepted; precision {precision}; harmful kept out {kept_out}")
        if rho := judged["rank_correlation_with_return"]:
            interval = f"{rho['low']:.2f} to {rho['high']:.2f}"
            print(
                f"  rank correlation with the true return over {rho['policies']} policies {rho['rho']:.2f} ({interval})"
            )
    return results
