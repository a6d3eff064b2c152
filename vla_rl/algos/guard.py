"""One optimiser step that a bad number cannot spoil: it is dropped and counted, and after several in a row training stops."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOST_BAD_STEPS = 5


class NonFiniteLossError(RuntimeError):
    """Losses or gradients are NaN or infinite; the message says where."""


class BadSteps:
    """Counts the steps that were dropped, and stops training after several in a row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dropped = 0
        self._in_a_row = 0

    def count(self, *, bad: bool) -> None:
        """Note how a step went; raise NonFiniteLossError after several bad ones in a row."""
        self.dropped += bad
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if self._in_a_row >= MOST_BAD_STEPS:
            raise NonFiniteLossError(
                f"{self._in_a_row} {self.name} steps in a row had a loss or gradient that is not finite; the last good weights "
                "are kept: lower the learning rate or look at the data"
            )


class GuardedOptimizer:
    """Clips and steps an optimiser; weights are never touched by a step whose loss or gradient is not finite."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float, name: str) -> None:
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self._bad = BadSteps(name)

    @property
    def dropped(self) -> int:
        """Steps that were dropped."""
        return self._bad.dropped

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """All parameters that are optimised."""
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def step(self, loss: Tensor) -> float:
        """Go one step down; return the gradient's norm (NaN where the step was dropped).

        Raises:
            NonFiniteLossError: several steps in a row were dropped; the weights are those of the last good one.
        """
        self.optimizer.zero_grad()
        norm = torch.tensor(float("nan"))
        if torch.isfinite(loss):
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        good = bool(torch.isfinite(norm))
        if good:
            self.optimizer.step()
        self._bad.count(bad=not good)
        return float(norm) if good else float("nan")

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of all groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's moments as named tensors, for safetensors."""
    moments = optimizer.state_dict()["state"].items()
    return {f"{prefix}{index}.{k}": torch.as_tensor(v) for index, m in moments for k, v in m.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, state: dict[str, Tensor], prefix: str) -> None:
    """Undo ``optimizer_tensors``."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith(prefix):
            index, _, name = key.removeprefix(prefix).partition(".")
            moments.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
