"""Several policies, one for each kind of robot, with one trunk: they differ in what goes in and out of it, and share all else.

As Octo (arXiv 2405.12213) and GR00T have them: every embodiment has its own layers for state and actions, and its own normalisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_rl.data.windows import WindowBatch, Windows
from vla_rl.policies.base import ChunkPolicy
from vla_rl.policies.records import Draw

# what each embodiment keeps for itself, whatever its shape
OWN = (
    "observation_normalizer.",
    "action_normalizer.",
    "state_token.",
    "net.enter.",
    "net.leave.",
    "encoder.resampler.position.",
)


def share(first: ChunkPolicy, other: ChunkPolicy) -> int:
    """Have ``other`` use the parameters of ``first`` wherever both have one of the same name and shape; return how many numbers.

    What stands under ``OWN`` stays each one's own.
    """
    mine, shared = dict(first.named_parameters()), 0
    for name, parameter in list(other.named_parameters()):
        if name in mine and mine[name].shape == parameter.shape and not name.startswith(OWN):
            path, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(path), leaf, mine[name])
            shared += parameter.numel()
    return shared


@dataclass(frozen=True)
class JointBatch:
    """Windows of several embodiments.

    parts: of each one, its number, its rows of the whole, and its windows
    is_pad_BH: of the whole
    """

    parts: tuple[tuple[int, Tensor, WindowBatch], ...]
    is_pad_BH: Bool[Tensor, "B H"]

    def to(self, device: torch.device | str) -> JointBatch:
        """Return the batch on another device."""
        moved = tuple((member, rows.to(device), batch.to(device)) for member, rows, batch in self.parts)
        return JointBatch(moved, self.is_pad_BH.to(device))


class JointWindows:
    """The windows of several data sets, one after the other, as imitation draws from them."""

    def __init__(self, members: Sequence[Windows]) -> None:
        self.members = list(members)
        self.first = torch.tensor([0] + [len(w) for w in members]).cumsum(0)

    def __len__(self) -> int:
        return int(self.first[-1])

    def _split(self, window_B: Int[Tensor, " B"]) -> list[tuple[int, Tensor, Tensor]]:
        """Each member's number, its rows of the batch, and its own numbers of the windows."""
        member_B = torch.bucketize(window_B, self.first[1:], right=True)
        found = []
        for member in range(len(self.members)):
            rows = torch.nonzero(member_B == member)[:, 0]
            if len(rows):
                found.append((member, rows, window_B[rows] - self.first[member]))
        return found

    def padding(self, window_B: Int[Tensor, " B"]) -> Bool[Tensor, "B H"]:
        """See ``Windows``."""
        return self._whole(window_B, [(rows, self.members[m].padding(own)) for m, rows, own in self._split(window_B)])

    def batch(self, window_B: Int[Tensor, " B"]) -> JointBatch:
        """Gather windows by number in [0, len)."""
        parts = tuple((m, rows, self.members[m].batch(own)) for m, rows, own in self._split(window_B))
        return JointBatch(parts, self._whole(window_B, [(rows, batch.is_pad_BH) for _, rows, batch in parts]))

    @staticmethod
    def _whole(window_B: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        whole = torch.zeros(len(window_B), parts[0][1].shape[1], dtype=torch.bool)
        for rows, padding in parts:
            whole[rows] = padding
        return whole


@dataclass(frozen=True)
class JointDraw:
    """A draw for every embodiment, of which each row uses its own one's; the clean prefix is the same for all."""

    members: tuple[Draw, ...]
    prefix_BH: Bool[Tensor, "B H"]

    def rows(self, index: Tensor | slice) -> JointDraw:
        """Return some rows of the draw."""
        return JointDraw(tuple(draw.rows(index) for draw in self.members), self.prefix_BH[index])

    def to(self, device: torch.device | str) -> JointDraw:
        """Return the draw on another device."""
        return JointDraw(tuple(draw.to(device) for draw in self.members), self.prefix_BH.to(device))


class JointPolicy(nn.Module):
    """What imitation trains: the error of every row by its own embodiment's policy."""

    def __init__(self, members: Mapping[str, ChunkPolicy]) -> None:
        """Have all members share what they can.

        Args:
            members: policies by name, whose chunks are equally long.
        """
        super().__init__()
        self.members = nn.ModuleDict(members)
        first, *others = members.values()
        self.shared = [share(first, other) for other in others]

    def policies(self) -> list[ChunkPolicy]:
        """The members, in order."""
        return list(self.members.values())  # type: ignore[arg-type]

    def draw(self, batch_size: int, generator: torch.Generator) -> JointDraw:
        """Draw the random part of ``batch_size`` training samples on the CPU."""
        draws = tuple(policy.draw(batch_size, generator) for policy in self.policies())
        return JointDraw(draws, draws[0].prefix_BH)

    def forward(self, batch: JointBatch, draw: JointDraw, objective: None = None) -> Float[Tensor, "B H"]:
        """Training error of each action step, before masking; nothing but the policies' own objective is known here."""
        policies, parts, order = self.policies(), [], []
        for member, rows, windows in batch.parts:
            mine = draw.members[member].rows(rows)
            same = Draw(mine.noise_BHA, mine.uniform_B, draw.prefix_BH[rows], mine.encoder)
            parts.append(policies[member].error(windows, same))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]
