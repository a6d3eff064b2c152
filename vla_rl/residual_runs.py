"""What both ways to learn a residual share: which scenes an order is of, and what a run that was cut goes on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from vla_rl.data.steps import Source
from vla_rl.inference.residual_controller import NoiseConfig
from vla_rl.inference.steps import Order
from vla_rl.runtime.checkpoints import keep_newest, load_tensors, newest, part, save_folder, verify_folder
from vla_rl.runtime.seeding import SELECTION_SCENES, derive_seed, numpy_generator

FOLDER = "checkpoints"
KEPT = 2


@dataclass
class Progress:
    """Where a run of the residual stage is: what a checkpoint keeps beside weights."""

    orders: int = 0
    env_steps: int = 0
    warm_steps: int = 0
    episodes: int = 0
    replayed: int = 0
    gradient_steps: int = 0
    selected_at: int = 0
    selection_env_steps: int = 0
    imitated: bool = False
    imitation_success: float | None = None
    rollbacks: int = 0
    alarms: int = 0
    actor_rate_share: float = 1.0
    best_at: int = 0
    best_successes: tuple[bool, ...] = ()
    base_successes: tuple[bool, ...] = ()
    seconds: dict[str, float] = field(default_factory=lambda: {"label": 0.0, "wait": 0.0, "learn": 0.0, "select": 0.0})

    @property
    def best_success(self) -> float:
        """Of the selection scenes, the share in which the best policy so far succeeded."""
        return sum(self.best_successes) / len(self.best_successes) if self.best_successes else 0.0


def make_order(number: int, source: Source, episodes: int, seed: int, noise: NoiseConfig) -> Order:
    """Order ``number`` of a run; its scenes, none of them a selection or test scene, and its draws follow from the run's seed."""
    rng = numpy_generator(seed, "residual scenes", number)
    scenes = tuple(int(s) for s in rng.choice(SELECTION_SCENES, episodes, replace=False))
    return Order(number, source, scenes, derive_seed(seed, "residual order", number), noise)


def save_training(out: Path, now: dict[str, Tensor], best: dict[str, Tensor], progress: Progress) -> None:
    """Leave a checkpoint of the nets as they are, the best ones, and how far the run is."""
    path = out / FOLDER / f"step-{progress.env_steps:08d}"
    if not path.exists():
        state = {f"now.{k}": v for k, v in now.items()} | {f"best.{k}": v for k, v in best.items()}
        meta = {"kind": "training", "progress": asdict(progress)}
        save_folder(path, tensors={"training": state}, texts={}, meta=meta)
    keep_newest(out / FOLDER, KEPT)


def load_training(out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Progress] | None:
    """Undo ``save_training``: now, best, progress of the newest checkpoint; None where there is none."""
    path = newest(out / FOLDER)
    if path is None:
        return None
    kept = verify_folder(path)["progress"]
    kept |= {name: tuple(kept[name]) for name in ("best_successes", "base_successes")}
    state = load_tensors(path, "training")
    return part(state, "now."), part(state, "best."), Progress(**kept)
