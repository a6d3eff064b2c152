"""Steps of episodes on disk, mapped into memory: what survives kill -9, and what off-policy learning draws from.

Episodes lie one after the other, each with its true final observation and the base's action there; returns over several steps are
gathered when they are drawn, so that n, the discount and the end of an episode are never baked in. A journal, appended to after the
columns are written, says which episodes are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_rl.data.steps import Source, StepBatch, StepContext, StepEpisode
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import append_line, disk_errors, read_lines, write_text
from vla_rl.types import IMAGE_PREFIX, ObservationSpec, kind_of

JOURNAL = "episodes.jsonl"


class Replay:
    """Episodes of steps. Use ``open``."""

    def __init__(self, columns: Mapping[str, np.ndarray], observations: Sequence[str], folder: Path | None) -> None:
        self.folder = folder
        self._columns = dict(columns)
        self._observations = list(observations)
        capacity = len(columns["reward"])
        self._row_N = np.zeros(capacity, np.int64)  # of each transition: its row, the row of its episode's final
        self._end_N = np.zeros(capacity, np.int64)  # observation, and whether the task ended there
        self._terminated_N = np.zeros(capacity, bool)
        self._shown_N = np.zeros(capacity, bool)  # whether it is of a demonstration that succeeded
        self.episodes: list[dict[str, Any]] = []
        self.transitions = 0
        self._rows = 0
        self._drawn_B: Tensor | None = None

    @classmethod
    def open(cls, folder: Path | None, observation_spec: ObservationSpec, action_dim: int, capacity: int) -> Replay:
        """Create a replay of up to ``capacity`` rows (steps and final observations), or open the one that is there.

        Args:
            folder: where, or None to keep it in memory.
            observation_spec: images (``observation.images.*``) are kept as bytes, all else as float32.
            action_dim: A.
            capacity: rows; files are sparse, what is not written takes no space.

        Raises:
            UserError: the folder holds a replay of other columns, or there is no space.
        """
        layout: dict[str, tuple[tuple[int, ...], str]] = {
            k: (f.shape, kind_of(k).__name__) for k, f in observation_spec.items()
        }
        layout |= {"base": ((action_dim,), "float32"), "action": ((action_dim,), "float32")}
        layout |= {"phase": ((), "int16"), "reward": ((), "float32"), "intervened": ((), "bool")}
        if folder is None:
            columns = {k: np.zeros((capacity, *shape), kind) for k, (shape, kind) in layout.items()}
            return cls(columns, list(observation_spec), None)
        header = json.dumps({"replay": {k: [list(s), kind] for k, (s, kind) in layout.items()}, "capacity": capacity})
        journal = folder / JOURNAL
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lines = read_lines(journal)
            if lines and lines[0] != header:
                raise UserError(f"{folder} holds a replay of other columns or another capacity; remove it")
            if not lines:
                write_text(journal, header + "\n")
            columns = {}
            for name, (shape, kind) in layout.items():
                path = folder / f"{name}.bin"
                size = capacity * int(np.prod(shape)) * np.dtype(kind).itemsize
                if not path.exists() or path.stat().st_size != size:
                    if len(lines) > 1:
                        raise UserError(
                            f"{path} is lost or cut, and its replay holds {len(lines) - 1} episodes; remove {folder}"
                        )
                    with path.open("ab") as file:
                        file.truncate(size)
                columns[name] = np.memmap(path, kind, "r+", shape=(capacity, *shape))
        replay = cls(columns, list(observation_spec), folder)
        for line in lines[1:]:
            replay._count(json.loads(line))
        return replay

    def _count(self, entry: dict[str, Any]) -> None:
        length, begin = entry["length"], self._rows
        new = slice(self.transitions, self.transitions + length)
        self._row_N[new] = np.arange(begin, begin + length)
        self._end_N[new] = begin + length
        self._terminated_N[new] = entry["terminated"]
        self._shown_N[new] = entry["source"] == "demonstration" and entry["success"]
        self.episodes.append(entry)
        self.transitions += length
        self._rows += length + 1

    def add(self, steps: StepEpisode, source: Source) -> None:
        """Append an episode; when this returns, a kill does not lose it.

        Raises:
            UserError: it is ragged, not finite, does not fit the capacity, or the disk is full; the replay is as before.
        """
        episode, length = steps.episode, steps.length
        episode.validate()
        if steps.base_TA.shape != (length + 1, episode.action_TA.shape[1]) or steps.phase_T.shape != (length + 1,):
            raise UserError(
                f"an episode of {length} steps wants {length + 1} actions of the base and their places, got {steps.base_TA.shape}, "
                f"{steps.phase_T.shape}"
            )
        if not np.isfinite(steps.base_TA).all():
            raise UserError("an episode holds actions of the base that are not finite")
        if self._rows + length + 1 > len(self._columns["reward"]):
            raise UserError(f"a replay of {len(self._columns['reward'])} rows is full; {length + 1} more do not fit")
        for key in self._observations:
            kept, given = self._columns[key].dtype, episode.observations[key].dtype
            if not np.can_cast(given, kept, "same_kind"):
                raise UserError(
                    f"a replay keeps {key!r} as {kept}, got {given}; depth wants a name outside {IMAGE_PREFIX}*"
                )
        rows = slice(self._rows, self._rows + length + 1)
        self._reserve(rows)
        for key in self._observations:
            self._columns[key][rows] = episode.observations[key]
        self._columns["base"][rows] = steps.base_TA
        self._columns["phase"][rows] = steps.phase_T
        ran = slice(self._rows, self._rows + length)
        self._columns["action"][ran] = episode.action_TA
        self._columns["reward"][ran] = episode.reward_T
        self._columns["intervened"][ran] = episode.intervened_T if episode.intervened_T is not None else False
        entry = {
            "length": length,
            "terminated": episode.terminated,
            "success": episode.success,
            "source": source,
            "scene_seed": int(episode.provenance.get("scene_seed", -1)),
        }
        if self.folder is not None:
            with disk_errors(self.folder):
                for column in self._columns.values():
                    column.flush()  # type: ignore[attr-defined]
            append_line(self.folder / JOURNAL, json.dumps(entry))
        self._count(entry)

    def _reserve(self, rows: slice) -> None:
        """Have the disk set blocks aside: written into a hole of a sparse file that it has none for, a process dies by SIGBUS."""
        if self.folder is None:
            return
        with disk_errors(self.folder):
            for name, column in self._columns.items():
                size = column.nbytes // len(column)
                with (self.folder / f"{name}.bin").open("r+b") as file:
                    os.posix_fallocate(file.fileno(), rows.start * size, (rows.stop - rows.start) * size)

    def keep(self, episodes: int) -> None:
        """Forget all but the first ``episodes``: what came after the checkpoint that a run goes on from."""
        if episodes > len(self.episodes):
            raise UserError(f"{self.folder} holds {len(self.episodes)} episodes where its run has seen {episodes}")
        kept = self.episodes[:episodes]
        if self.folder is not None and len(kept) < len(self.episodes):
            header = read_lines(self.folder / JOURNAL)[0]
            write_text(self.folder / JOURNAL, "".join(line + "\n" for line in [header, *map(json.dumps, kept)]))
        self.episodes, self.transitions, self._rows = [], 0, 0
        for entry in kept:
            self._count(entry)

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, " B"]:
        """Numbers of ``count`` transitions, drawn with replacement."""
        if self._drawn_B is not None:
            return self._drawn_B[torch.randint(len(self._drawn_B), (count,), generator=generator)]
        return torch.randint(self.transitions, (count,), generator=generator)

    def draw_only(self, index_B: Int[Tensor, " B"]) -> None:
        """Draw among these transitions from now on; returns over several steps still see the others. Raises UserError for none."""
        if not len(index_B):
            raise UserError(f"no step is left to be drawn of {self.transitions}")
        self._drawn_B = index_B

    def gather(self, index_B: Int[Tensor, " B"], n_steps: int, discount: float) -> StepBatch:
        """Transitions by number, with returns over up to ``n_steps``: the sum is cut at an episode's end, its real length counts."""
        at_B = index_B.numpy()
        row_B, end_B = self._row_N[at_B], self._end_N[at_B]
        offset_N = np.arange(n_steps)
        row_BN = np.minimum(row_B[:, None] + offset_N, end_B[:, None] - 1)
        inside_BN = row_B[:, None] + offset_N < end_B[:, None]
        reward_B = (self._columns["reward"][row_BN] * inside_BN * discount**offset_N).sum(1)
        ran_B = inside_BN.sum(1)
        ends_B = self._terminated_N[at_B] & (row_B + ran_B == end_B)
        return StepBatch(
            self._context(row_B),
            torch.from_numpy(np.asarray(self._columns["action"][row_B])),
            torch.from_numpy(reward_B.astype(np.float32)),
            torch.from_numpy((discount**ran_B * ~ends_B).astype(np.float32)),
            self._context(row_B + ran_B),
            torch.from_numpy(np.asarray(self._columns["intervened"][row_B])),
            torch.from_numpy(self._shown_N[at_B]),
        )

    def _context(self, row_B: np.ndarray) -> StepContext:
        columns = self._columns
        return StepContext(
            {k: torch.from_numpy(np.asarray(columns[k][row_B])) for k in self._observations},
            torch.from_numpy(np.asarray(columns["base"][row_B])),
            torch.from_numpy(columns["phase"][row_B].astype(np.int64)),
        )

    def returns(self, discount: float) -> Float[Tensor, " N"]:
        """Discounted return to the end of the episode of each transition; nothing is taken to follow a time-out."""
        found = torch.zeros(self.transitions)
        for first, entry in self.spans():
            reward_T = self._columns["reward"][self._row_N[first] : self._end_N[first]]
            value = 0.0
            for t in reversed(range(entry["length"])):
                value = float(reward_T[t]) + discount * value
                found[first + t] = value
        return found

    def interventions(self) -> Int[Tensor, " B"]:
        """Numbers of the transitions in which a human acted."""
        taken_N = self._columns["intervened"][self._row_N[: self.transitions]]
        return torch.from_numpy(np.flatnonzero(taken_N))

    def spans(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number of the first transition of each episode, and what the journal says of it."""
        first = 0
        for entry in self.episodes:
            yield first, entry
            first += entry["length"]
