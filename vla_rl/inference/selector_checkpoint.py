"""A fitted selector: what picks among a policy's candidates, saved with the policy it was fitted on, and refused on any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vla_rl.algos.iql import IQL, IQLConfig, blank_critic
from vla_rl.algos.progress_head import ProgressHead
from vla_rl.algos.pseudo_count.base import CountConfig, PseudoCount, discover_counts
from vla_rl.algos.pseudo_count.leverage import LeverageConfig
from vla_rl.inference.rules import SelectorConfig, consensus, constrained, first, highest, least_q, log_count
from vla_rl.inference.selectors import Candidates, Rule, SelectingSampler
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.checkpoint import load_policy, resolve_policy
from vla_rl.runtime.checkpoints import folder_digest, load_tensors, part, save_folder
from vla_rl.runtime.config import decode, encode, read_yaml, write_yaml
from vla_rl.runtime.errors import UserError

KIND = "selector"


@dataclass(frozen=True)
class Selector:
    """Everything that picks.

    config: how
    count: pseudo-count of the policy's features, where the rule asks for one
    levels: percentiles 0 to 100 of the logarithm of the training data's own counts
    progress: expected success by the policy's features, where the rule asks for it
    critic: Q, where the rule asks for it
    """

    config: SelectorConfig
    count: PseudoCount | None = None
    levels: tuple[float, ...] = ()
    progress: ProgressHead | None = None
    critic: IQL | None = None

    def rule(self) -> Rule:
        """The rule as candidates are put to it.

        Raises:
            UserError: it asks for a part that is missing.
        """
        config = self.config
        if config.rule == "first":
            return first
        if config.asks_q and self.critic is None:
            raise UserError(f"rule {config.rule} with objective q wants a critic (--critic FOLDER)")
        if config.asks_count and self.count is None:
            raise UserError(f"rule {config.rule} wants a fitted pseudo-count; 'vla-rl taco' fits one")
        if config.rule == "q":
            assert self.critic is not None
            return highest(least_q(self.critic.q_values), config.margin)
        if config.rule == "consensus":
            return consensus(config.margin)
        assert self.count is not None
        counted = log_count(self.count)
        if config.rule == "taco":
            return highest(counted, config.margin)
        objective = least_q(self.critic.q_values) if self.critic is not None and config.asks_q else self._progress
        return constrained(counted, self.levels[round(config.percentile)], objective, config.margin)

    def _progress(self, candidates: Candidates) -> Tensor:
        if self.progress is None:
            raise UserError("objective progress wants a fitted head; 'vla-rl taco' fits one")
        return self.progress(candidates.features_BNF.flatten(0, 1)).view(candidates.shape)

    def sampler(self, policy: ChunkPolicy) -> SelectingSampler:
        """Draw from a policy by this selector."""
        device = next(policy.parameters()).device
        for part_of in (self.count, self.progress, self.critic):
            if part_of is not None:
                part_of.to(device)
        features = self.config.features if self.config.asks_count else "last"  # no further pass for what nobody asks
        return SelectingSampler(policy, self.config.candidates, self.rule(), features)


def save_selector(selector: Selector, policy: Path, reference: str, path: Path, meta: Mapping[str, Any]) -> None:
    """Write a selector into a new folder.

    Args:
        selector: fitted.
        policy: folder of the policy it was fitted on.
        reference: where that is found from the folder that holds ``path``, or anywhere.
        path: the folder.
        meta: plain data kept in the manifest.
    """
    count, critic, progress = selector.count, selector.critic, selector.progress
    described: dict[str, Any] = {
        "selector": encode(selector.config),
        "policy": {"reference": reference, "digest": folder_digest(resolve_policy(policy))},
        "spec": read_yaml(resolve_policy(policy) / "config.yaml")["spec"],
        "levels": list(selector.levels),
    }
    tensors: dict[str, Tensor] = {}
    if count is not None:
        described["count"] = encode_choice(count.config)
        described["features"] = len(count.mean_F)
        tensors |= {f"count.{k}": v for k, v in count.state_dict().items()}
    if progress is not None:
        described["progress"] = encode_choice(progress.kernel.config)
        described["features"] = len(progress.kernel.mean_F)
        tensors |= {f"progress.{k}": v for k, v in progress.state_dict().items()}
    if critic is not None:
        described["critic"] = encode(critic.config)
        tensors |= {f"critic.{k}": v for k, v in critic.state_dict().items()}
    save_folder(
        path, tensors={"selector": tensors}, texts={"config.yaml": write_yaml(described)}, meta={"kind": KIND, **meta}
    )


def encode_choice(config: CountConfig) -> dict[str, Any]:
    """An estimator's config as plain data, with the name of its kind."""
    kind: type[CountConfig] = type(config)
    return {**encode(config), "type": kind.get_choice_name(kind)}


def load_selector(path: Path) -> tuple[ChunkPolicy, Selector]:
    """Load a selector and the policy it was fitted on.

    Raises:
        UserError: it is damaged, or the policy is another one.
    """
    discover_counts()
    raw = read_yaml(path / "config.yaml")
    there = Path(raw["policy"]["reference"])
    beside = path.parent / there
    folder = resolve_policy(beside if beside.exists() else there)
    policy = load_policy(folder)
    require_fitted_on(folder, raw["policy"]["digest"], path)
    state = load_tensors(path, "selector")
    count = progress = critic = None
    try:
        if "count" in raw:
            count = decode(CountConfig, raw["count"]).build(raw["features"])
            count.load_state_dict(part(state, "count."))
        if "progress" in raw:
            kernel = decode(CountConfig, raw["progress"])
            assert isinstance(kernel, LeverageConfig)
            progress = ProgressHead(raw["features"], kernel)
            progress.load_state_dict(part(state, "progress."))
        if "critic" in raw:
            critic = blank_critic(decode(IQLConfig, raw["critic"]), policy)
            critic.load_state_dict(part(state, "critic."))
    except RuntimeError as error:
        raise UserError(f"the tensors in {path} do not fit its config: {' '.join(str(error).split())[:200]}") from error
    return policy, Selector(decode(SelectorConfig, raw["selector"]), count, tuple(raw["levels"]), progress, critic)


def require_fitted_on(policy: Path, digest: str, selector: Path) -> None:
    """Raise UserError unless a policy is the one that a selector was fitted on."""
    found = folder_digest(policy)
    if found != digest:
        raise UserError(
            f"the selector in {selector} was fitted on a policy with the hash {digest[:12]}, and {policy} has {found[:12]}; "
            "fit one on this policy with 'vla-rl taco'"
        )
