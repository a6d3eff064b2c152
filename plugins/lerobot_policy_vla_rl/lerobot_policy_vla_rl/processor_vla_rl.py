"""Processors around a vla-rl policy: names, batch and device; normalisation is the policy's own."""

from __future__ import annotations

from typing import Any

import torch
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_vla_rl.configuration_vla_rl import VlaRlConfig

Pipelines = tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]


def make_vla_rl_pre_post_processors(
    config: VlaRlConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None, **_: Any
) -> Pipelines:
    """Steps of the names that LeRobot's programs override; their normalisers do nothing, as ``normalization_mapping`` says."""
    features, given = config.input_features or {}, config.output_features or {}
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device or "cpu"),
        NormalizerProcessorStep(
            features={**features, **given}, norm_map=config.normalization_mapping, stats=dataset_stats
        ),
    ]
    after = [
        UnnormalizerProcessorStep(features=given, norm_map=config.normalization_mapping, stats=dataset_stats),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline[PolicyAction, PolicyAction](
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
