"""Read other formats: robomimic HDF5 and Diffusion Policy zarr, episode by episode.

Layouts: robomimic ``data/demo_i/{obs/*, actions, rewards, dones}`` with attributes ``data.attrs["env_args"]``;
Diffusion Policy ``data/{action, state, ...}`` with ``meta/episode_ends``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import zarr

from vla_rl.data.episode import Episode
from vla_rl.runtime.errors import UserError
from vla_rl.types import ENVIRONMENT_STATE, STATE, ActionMode, ActionSpec, FeatureSpec, ObservationSpec

Format = Literal["robomimic", "diffusion_policy"]
# proprioception and objects in robomimic's low-dimensional sets, in robosuite's names
ROBOMIMIC_STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
ROBOMIMIC_OBJECT = ("object",)
_ROBOSUITE_OUTPUT_MAX = (0.05, 0.05, 0.05, 0.5, 0.5, 0.5, 1.0)  # of OSC_POSE, where env_args says nothing else


@dataclass(frozen=True)
class Source:
    """An opened file: what its episodes look like, and the episodes."""

    action_spec: ActionSpec
    observation_spec: ObservationSpec
    task: str
    count: int
    episodes: Iterator[Episode]


def open_source(path: Path, kind: Format, *, control_hz: float, instruction: str, start: int = 0) -> Source:
    """Open a file for import.

    Args:
        path: HDF5 file or zarr folder.
        kind: its layout.
        control_hz: rate of the recording where the file does not say.
        instruction: task in words.
        start: episodes to skip, when an import goes on.

    Raises:
        UserError: the file is missing or of another layout.
    """
    if not path.exists():
        raise UserError(f"no file {str(path)!r}")
    if kind == "robomimic":
        return _robomimic(path, control_hz, instruction, start)
    return _diffusion_policy(path, control_hz, instruction, start)


def _spec(
    dim: int, names: tuple[str, ...] | None, limits: np.ndarray, units: tuple[str, ...], mode: ActionMode, hz: float
) -> ActionSpec:
    return ActionSpec(
        names=names or tuple(f"action_{i}" for i in range(dim)),
        units=units,
        low=tuple(float(v) for v in limits[0]),
        high=tuple(float(v) for v in limits[1]),
        mode=mode,
        control_hz=hz,
    )


def _robomimic(path: Path, control_hz: float, instruction: str, start: int) -> Source:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is no HDF5 file: {error}") from error
    if "data" not in file or not len(file["data"]):
        raise UserError(f"{path} is no robomimic file: it has no group 'data' with demonstrations, only {list(file)}")
    group = file["data"]
    names = sorted(group, key=lambda n: int(n.split("_")[-1]) if n.split("_")[-1].isdigit() else 0)
    first = group[names[0]]
    for wanted in ("obs", "actions"):
        if wanted not in first:
            raise UserError(f"{path}: {names[0]} lacks {wanted!r}; it has {list(first)}")
    environment = json.loads(group.attrs["env_args"]) if "env_args" in group.attrs else {}
    arguments = environment.get("env_kwargs", {})
    hz = float(arguments.get("control_freq", control_hz))
    dim = first["actions"].shape[1]
    if dim == len(_ROBOSUITE_OUTPUT_MAX) and "env_name" in environment:
        scale_A = _output_max(arguments)
        spec = _spec(
            dim,
            ("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
            np.stack([-scale_A, scale_A]),
            ("m",) * 3 + ("rad",) * 3 + ("1",),
            "delta",
            hz,
        )
    else:
        scale_A = np.ones(dim)
        spec = _spec(dim, None, np.stack([-scale_A, scale_A]), ("1",) * dim, "delta", hz)
    parts = {STATE: ROBOMIMIC_STATE, ENVIRONMENT_STATE: ROBOMIMIC_OBJECT}
    parts = {feature: tuple(k for k in keys if k in first["obs"]) for feature, keys in parts.items()}
    if not parts[STATE]:
        raise UserError(
            f"{path}: no robot state among the observations {list(first['obs'])}; wanted {list(ROBOMIMIC_STATE)}"
        )
    parts = {feature: keys for feature, keys in parts.items() if keys}
    observation_spec = {f: FeatureSpec((sum(_width(first["obs"][k]) for k in keys),)) for f, keys in parts.items()}

    def episodes() -> Iterator[Episode]:
        with file:
            for name in names[start:]:
                demo = group[name]
                yield _robomimic_episode(demo, name, parts, scale_A, instruction)

    return Source(spec, observation_spec, environment.get("env_name", path.stem), len(names), episodes())


def _width(column: Any) -> int:
    return int(np.prod(column.shape[1:]))


def _output_max(arguments: dict[str, Any]) -> np.ndarray:
    """Metres and radians of an action of 1: ``output_max`` of the controller, plus the gripper."""
    config = arguments.get("controller_configs", {})
    part = config.get("body_parts", {}).get("right", config)
    scale = part.get("output_max")
    return np.asarray([*scale, 1.0] if scale else _ROBOSUITE_OUTPUT_MAX, np.float64)


def _robomimic_episode(
    demo: Any, name: str, parts: dict[str, tuple[str, ...]], scale_A: np.ndarray, instruction: str
) -> Episode:
    action_TA = (np.asarray(demo["actions"]) * scale_A).astype(np.float32)
    length = len(action_TA)
    observations = {}
    for feature, keys in parts.items():
        now = np.concatenate([np.asarray(demo["obs"][k], np.float32).reshape(length, -1) for k in keys], axis=1)
        if "next_obs" in demo and all(k in demo["next_obs"] for k in keys):
            last = np.concatenate(
                [np.asarray(demo["next_obs"][k][-1], np.float32).reshape(1, -1) for k in keys], axis=1
            )
        else:
            last = now[-1:]  # the file does not hold the observation after the last action
        observations[feature] = np.concatenate([now, last])
    reward_T = np.asarray(demo["rewards"], np.float32) if "rewards" in demo else np.zeros(length, np.float32)
    success = bool((reward_T > 0).any())
    return Episode(
        observations,
        action_TA,
        action_TA,
        reward_T,
        reward_T > 0,
        success,
        not success,
        instruction,
        {"source": "import", "origin": name},
    )


def _diffusion_policy(path: Path, control_hz: float, instruction: str, start: int) -> Source:
    try:
        root = zarr.open_group(path, mode="r")
        ends = np.asarray(root["meta/episode_ends"], np.int64)
        action = np.asarray(root["data/action"], np.float32)
        state = np.asarray(root["data/state"], np.float32)
    except (KeyError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{path} is no Diffusion Policy zarr (data/action, data/state, meta/episode_ends): {error}"
        ) from error
    if not len(ends) or ends[-1] != len(action) or len(state) != len(action):
        raise UserError(
            f"{path}: episode_ends says {ends[-1] if len(ends) else 0} frames, there are {len(action)} actions and {len(state)} states"
        )
    margin_A = np.maximum(action.max(0) - action.min(0), 1e-6) * 1e-3
    limits = np.stack([action.min(0) - margin_A, action.max(0) + margin_A])
    dim = action.shape[1]
    spec = _spec(dim, None, limits, ("1",) * dim, "absolute", control_hz)
    starts = np.concatenate([[0], ends[:-1]])

    def episodes() -> Iterator[Episode]:
        for number in range(start, len(ends)):
            rows = slice(int(starts[number]), int(ends[number]))
            length = rows.stop - rows.start
            zeros_T = np.zeros(length, np.float32)
            observed = np.concatenate([state[rows], state[rows][-1:]]).reshape(length + 1, -1)
            provenance = {"source": "import", "origin": f"episode_{number}"}
            # the format keeps demonstrations, without rewards: they are taken for successes
            success_T = np.arange(length) == length - 1
            yield Episode(
                {STATE: observed},
                action[rows],
                action[rows],
                zeros_T + success_T,
                success_T,
                True,
                False,
                instruction,
                provenance,
            )

    return Source(spec, {STATE: FeatureSpec((_width(state),))}, path.stem, len(ends), episodes())
