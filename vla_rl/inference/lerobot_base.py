"""A policy folder of LeRobot's as a base: ACT, Diffusion, SmolVLA and whatever else LeRobot loads (0.4).

Its own processors normalise what it reads and undo what it gives; nothing is looked up on the network. A LeRobot policy says nothing of
units, rates and limits of its actions: they are taken to be the task's.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from draccus.utils import DraccusException
from safetensors import SafetensorError
from torch import Tensor

from vla_rl.inference.base_policy import BaseSpec, Leftover
from vla_rl.inference.bases import BaseSource
from vla_rl.policies.records import PolicySpec
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import sha256_tree
from vla_rl.runtime.seeding import torch_generator
from vla_rl.types import ENVIRONMENT_STATE, IMAGE_PREFIX, STATE, Observation, SpecMismatchError

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PROCESSORS = "policy_preprocessor.json", "policy_postprocessor.json"
INSIDE = "pretrained_model"  # where LeRobot's checkpoints keep the policy


def lerobot_folder(path: Path) -> Path | None:
    """The folder of a LeRobot policy at ``path`` or inside it, if there is one."""
    for folder in (path, path / INSIDE):
        try:
            raw = json.loads((folder / CONFIG).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(raw, dict) and "type" in raw and "output_features" in raw:
            return folder
    return None


class LeRobotBase:
    """See ``BasePolicy``. Rows of a policy that draws noise are decided one by one, each from its own episode's seed."""

    def __init__(
        self,
        policy: PreTrainedPolicy,
        processors: tuple[Any, Any],
        spec: BaseSpec,
        instruction: str,
        slots: int,
        seed: int,
    ) -> None:
        """Set up.

        Args:
            policy: decides.
            processors: before and after it.
            spec: what it is used for.
            instruction: the task in words, for policies that read them.
            slots: environments of the batch.
            seed: of the noise.
        """
        self.spec = spec
        self._policy, self._instruction, self._seed = policy, instruction, seed
        self._before, self._after = processors
        self._generator = [torch_generator(seed, "unused") for _ in range(slots)]
        self._draws: bool | None = None  # whether it draws noise; the first chunk tells

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        """See ``BasePolicy``."""
        for env_id, scene_seed in zip(env_ids, scene_seeds, strict=True):
            self._generator[env_id] = torch_generator(self._seed, "policy", scene_seed)

    def chunk(
        self, observation: Observation, env_ids: Sequence[int], leftovers: Mapping[int, Leftover] | None = None
    ) -> np.ndarray:
        """See ``BasePolicy``."""
        rows = list(env_ids)
        with torch.random.fork_rng(devices=[]):
            if not self._draws:
                before = torch.get_rng_state()
                found = self._ask(observation, list(range(observation.batch_size)))[rows]  # one batch size, one result
                self._draws = not torch.equal(before, torch.get_rng_state())
            if self._draws:
                parts = []
                for row in rows:
                    torch.manual_seed(int(torch.randint(2**62, (), generator=self._generator[row])))
                    parts.append(self._ask(observation, [row]))
                found = torch.cat(parts)
        return found[:, : self.spec.execute_steps].numpy()

    @torch.no_grad()
    def _ask(self, observation: Observation, rows: list[int]) -> Tensor:
        """Chunks of some rows, in the units of their data."""
        from lerobot.policies.utils import populate_queues
        from lerobot.utils.constants import OBS_IMAGES

        policy = self._policy
        policy.reset()
        queues = getattr(policy, "_queues", None)  # policies that read a history keep it there
        batch: dict[str, Any] = {}
        for t in range(self.spec.observation_steps):
            words = {"task": [self._instruction] * len(rows)}
            seen = self._before({**_features(observation, rows, t), **words})
            batch = {k: v for k, v in seen.items() if v is not None}  # it adds an action, and rewards, that are none
            if queues is not None and OBS_IMAGES in queues:
                batch[OBS_IMAGES] = torch.stack([batch[k] for k in policy.config.image_features], dim=-4)
            if queues is not None:
                policy._queues = queues = populate_queues(queues, batch)
        return self._after(policy.predict_action_chunk(batch)).float().cpu()


def _features(observation: Observation, rows: list[int], t: int) -> dict[str, Tensor]:
    """One moment of some histories, named as LeRobot does; images in [0, 1]."""
    features = {STATE: observation.state_BOS[rows, t]}
    if observation.environment_state_BOS is not None:
        features[ENVIRONMENT_STATE] = observation.environment_state_BOS[rows, t]
    for name, image in observation.images.items():
        features[IMAGE_PREFIX + name] = image[rows, t].float() / 255
    return features


def lerobot_base(folder: Path, spec: PolicySpec, instruction: str) -> BaseSource:
    """Load a LeRobot policy as the base of a task.

    Args:
        folder: from ``lerobot_folder``.
        spec: observations and actions of the task.
        instruction: the task in words.

    Raises:
        UserError: a file is missing or cannot be read.
        SpecMismatchError: it reads or gives something else than the task has.
    """
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    missing = [name for name in (WEIGHTS, *PROCESSORS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"the LeRobot policy in {folder} lacks {', '.join(missing)}")
    for name in PROCESSORS:
        _require_known_steps(folder / name)
    try:
        config = PreTrainedConfig.from_pretrained(str(folder), local_files_only=True)
        config.device = "cpu"
        if getattr(config, "pretrained_backbone_weights", None):
            config.pretrained_backbone_weights = None  # they are in the file; else they would be downloaded
        kind = get_policy_class(config.type)
        ours = {"device_processor": {"device": "cpu"}}
        if getattr(config, "vlm_model_name", None):
            config.vlm_model_name = _backbone(config.vlm_model_name, folder)
            config.load_vlm_weights = False  # they are in the file
            ours["tokenizer_processor"] = {"tokenizer_name": config.vlm_model_name}
        with contextlib.redirect_stdout(sys.stderr):  # what LeRobot prints is none of our output
            policy = kind.from_pretrained(str(folder), config=config, local_files_only=True, strict=True).eval()
        processors = make_pre_post_processors(config, str(folder), preprocessor_overrides=ours)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise UserError(f"LeRobot cannot load the policy in {folder}: {_words(error)}") from error
    except (SafetensorError, DraccusException) as error:
        raise UserError(f"LeRobot cannot load the policy in {folder}: {_words(error)}") from error
    _require_fit(config, folder, spec)
    if getattr(config, "temporal_ensemble_coeff", None) is not None:
        raise UserError(
            f"the LeRobot policy in {folder} averages its chunks over time, which a base of chunks cannot; set it off"
        )
    steps = getattr(config, "n_action_steps", None) or getattr(config, "action_chunk_size", None)
    if steps is None:
        raise UserError(f"the LeRobot policy in {folder} ({config.type}) decides no chunks")
    its = BaseSpec(spec, int(getattr(config, "n_obs_steps", 1)), int(steps))

    def open_base(num_envs: int, seed: int) -> LeRobotBase:
        return LeRobotBase(policy, processors, its, instruction, num_envs, seed)

    return BaseSource(str(folder), sha256_tree(folder), its, open_base, folder=folder)


def _backbone(name: str, folder: Path) -> str:
    """The folder of a language model's configuration and tokenizer, here or in the hub's cache; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return name
    try:
        return snapshot_download(name, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"vlm_model_name in {folder / CONFIG} is {name!r}, which is no folder on this machine and not in the hub's cache; "
            "a folder with that model's configuration and tokenizer is allowed"
        ) from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _require_known_steps(path: Path) -> None:
    """Refuse processors that name a class to import instead of one that LeRobot has registered: loading would run it."""
    try:
        steps = json.loads(path.read_text())["steps"]
        unknown = [step.get("class", "nothing") for step in steps if "registry_name" not in step]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no processor of LeRobot's: {_words(error)}") from error
    if unknown:
        raise UserError(
            f"{path} names {', '.join(map(str, unknown))} to run; steps that LeRobot has registered are allowed"
        )


def _require_fit(config: Any, folder: Path, spec: PolicySpec) -> None:
    for name, feature in config.input_features.items():
        known = spec.observation_spec.get(name)
        if known is None or tuple(known.shape) != tuple(feature.shape):
            there = "lacks" if known is None else f"has in shape {tuple(known.shape)}"
            raise SpecMismatchError(
                f"the LeRobot policy in {folder} reads {name} of shape {tuple(feature.shape)}, which task {spec.task!r} {there}"
            )
    if "action" not in config.output_features:
        raise SpecMismatchError(f"the LeRobot policy in {folder} gives {sorted(config.output_features)}, not action")
    dim = config.output_features["action"].shape[0]
    if dim != spec.action_spec.dim:
        raise SpecMismatchError(
            f"the LeRobot policy in {folder} gives {dim} action dimensions, task {spec.task!r} wants {spec.action_spec.dim}"
        )
