"""Success and reward where nobody knows them, from a learned classifier of observations: at work, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

from vla_rl.algos.success import Fitted, SuccessClassifier, SuccessConfig
from vla_rl.runtime.checkpoints import load_tensors, save_folder, verify_folder
from vla_rl.runtime.config import decode, encode
from vla_rl.runtime.errors import UserError
from vla_rl.types import FeatureSpec, ObservationSpec

KIND = "success classifier"
IN_A_ROW = 2  # observations that have to say so, for one may be noise


class LearnedJudge:
    """Reward 1 and success where the classifier has said so twice in a row."""

    def __init__(self, model: SuccessClassifier) -> None:
        self.model = model.eval()
        self._row = 0

    def __call__(self, features: Mapping[str, np.ndarray]) -> tuple[float, bool]:
        """Reward and success of the next observation, by feature, without batch."""
        rows = {name: torch.from_numpy(np.array(features[name]))[None] for name in self.model.features}
        self._row = self._row + 1 if float(self.model(rows)[0]) > float(self.model.threshold) else 0
        success = self._row >= IN_A_ROW
        if success:
            self._row = 0  # the episode ends with it
        return float(success), success


def save_judge(path: Path, model: SuccessClassifier, config: SuccessConfig, fitted: Fitted, digest: str) -> None:
    """Write a classifier's folder; ``digest`` is of the data it was trained on."""
    texts = {
        "config.yaml": yaml.safe_dump(encode(config)),
        "features.yaml": yaml.safe_dump({k: f.to_dict() for k, f in model.features.items()}, sort_keys=False),
    }
    meta = {"kind": KIND, "data": digest, **asdict(fitted)}
    save_folder(path, tensors={"model": model.state_dict()}, texts=texts, meta=meta)


def load_judge(path: Path, observation_spec: ObservationSpec, robot: str) -> LearnedJudge:
    """Read a classifier for a robot.

    Raises:
        UserError: there is none, or it looks at features that the robot has not, or has in another shape.
    """
    meta = verify_folder(path)
    if meta.get("kind") != KIND:
        raise UserError(f"{path} holds no {KIND}; 'vla-rl robot judge' makes one")
    features = {
        name: FeatureSpec.from_dict(raw) for name, raw in yaml.safe_load((path / "features.yaml").read_text()).items()
    }
    for name, spec in features.items():
        there = observation_spec.get(name)
        if there is None or there.shape != spec.shape:
            raise UserError(
                f"the judge {path} looks at {name!r} of shape {spec.shape}, robot {robot!r} has {None if there is None else there.shape}"
            )
    model = SuccessClassifier(features, decode(SuccessConfig, yaml.safe_load((path / "config.yaml").read_text())))
    model.load_state_dict(load_tensors(path, "model"))
    return LearnedJudge(model)
