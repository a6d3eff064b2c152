"""Learn from recorded episodes when the task is done, as the reward of a robot that cannot tell.

For --judge of deploy, residual, online and actor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vla_rl.algos.success import SuccessConfig, fit_success
from vla_rl.cli.common import CommandConfig, settings_of
from vla_rl.data.reader import load_datasets
from vla_rl.inference.success import save_judge
from vla_rl.runtime.errors import UserError

EXAMPLE = "vla-rl robot judge --data runs/lift/robot/episodes --out runs/lift/judge --features observation.state"


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig, SuccessConfig):
    """Options of ``vla-rl robot judge``.

    data: folder of episodes whose successes are recorded, or a list of several
    out: folder for the classifier, which must not exist
    features: that it looks at (none: all with one axis)
    """

    data: list[Path]
    out: Path
    features: tuple[str, ...] = ()


def run(config: Config) -> dict[str, Any]:
    """Train; return how well it does on episodes that were held out."""
    if config.out.exists():
        raise UserError(f"{config.out} exists; choose another --out, or remove it")
    data = load_datasets(config.data)
    names = config.features or tuple(k for k, f in data.observation_spec.items() if len(f.shape) == 1)
    if not names:
        raise UserError(f"the data have no feature with one axis; there are {', '.join(data.observation_spec)}")
    settings = settings_of(SuccessConfig, config)
    model, fitted = fit_success(data, names, settings)
    save_judge(config.out, model, settings, fitted, data.digest)
    print(
        f"{config.out}: of {fitted.held_out} episodes held out, {100 * fitted.recall:.0f} % of the successes are seen, "
        f"{100 * fitted.wrong:.1f} % of the rest is taken for one, at a threshold of {float(model.threshold):.2f}"
    )
    return {"features": list(names), "threshold": float(model.threshold), **asdict(fitted)}
