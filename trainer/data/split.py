"""Rows and the order they come in. Shapes: B rows, T sequence length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trainer.data import packing
from trainer.data.order import Mixture, permute, scramble
from trainer.data.prepare import Prepared, stream_name
from trainer.data.storage import Span
from trainer.errors import DataError

PADDING_ROW = -1
_BLOCK_BATCHES = 32


class Rows(Protocol):
    """The packed rows of one source, numbered from 0."""

    count: int
    shuffled: bool

    def read(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B] row numbers -> uint32 [B, T + 1] wide tokens (packing.widen)."""
        ...


class StoredRows:
    """Rows of one split of a prepared source."""

    shuffled = True

    def __init__(self, prepared: Prepared, split: str, length: int) -> None:
        self._prepared, self._split, self._length = prepared, split, length
        self._tokens = prepared.tokens[split]
        counts = [packing.row_count(tokens, length) for tokens in self._tokens]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._begins = self._ends - counts
        self.count = int(self._ends[-1]) if counts else 0

    def read(self, rows: np.ndarray) -> np.ndarray:
        pieces = np.searchsorted(self._ends, rows, side="right")
        spans: list[Span] = []
        for piece, first in zip(pieces.tolist(), ((rows - self._begins[pieces]) * self._length).tolist(), strict=True):
            spans.append(Span(stream_name(piece, self._split), first, min(first + self._length + 1, self._tokens[piece])))
        dtype = self._prepared.dtype
        stored = np.full((len(spans), self._length + 1), np.iinfo(dtype).max, dtype)
        for row, found in zip(stored, self._prepared.folder.spans(spans, dtype), strict=True):
            row[: found.size] = found
        return packing.widen(stored)


class SyntheticRows:
    """Uniform random tokens, one document a row, computed when read."""

    shuffled = False

    def __init__(self, *, count: int, length: int, vocabulary: int, seed: int) -> None:
        self.count, self._vocabulary = count, np.uint64(vocabulary)
        self._key = scramble(np.array([seed + 1], np.uint64))
        self._columns = np.arange(length + 1, dtype=np.uint64)[None, :]

    def read(self, rows: np.ndarray) -> np.ndarray:
        cells = rows.astype(np.uint64)[:, None] * np.uint64(self._columns.size) + self._columns
        return (scramble(cells + self._key) % self._vocabulary).astype(np.uint32)


@dataclass(frozen=True, kw_only=True)
class Split(ABC):
    """Rows of all sources behind one another; `ids` below number them in that order, -1 is a row of padding."""

    sources: Sequence[Rows]
    global_batch: int
    sequence_length: int
    vocabulary: int
    """Every token is below this: the model's, not the tokenizer's."""
    fingerprint: str
    tokenizer_fingerprint: str
    offsets: np.ndarray = field(init=False)
    """int64 [sources + 1]: the first id of every source, then the number of rows."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.cumsum([0, *(rows.count for rows in self.sources)], dtype=np.int64))

    @property
    def row_count(self) -> int:
        return int(self.offsets[-1])

    @abstractmethod
    def batch_rows(self, n: int) -> np.ndarray:
        """int64 [B] ids of the rows of batch n: a pure function of (seed, n). B may change with n."""

    def rows(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """int64 [B] ids -> the batch `packing.batch_of` describes. Raises DataError when the cache gives an impossible token."""
        owner = np.searchsorted(self.offsets, ids, side="right") - 1
        if owner.size and owner[0] >= 0 and (owner == owner[0]).all():
            wide = self.sources[owner[0]].read(ids - self.offsets[owner[0]])
        else:
            wide = np.full((len(ids), self.sequence_length + 1), packing.PADDING, np.uint32)
            for index in set(owner.tolist()) - {PADDING_ROW}:
                wide[owner == index] = self.sources[index].read(ids[owner == index] - self.offsets[index])
        batch = packing.batch_of(wide)
        largest = max(int(batch["inputs"].max(initial=0)), int(batch["targets"].max(initial=0)))
        if largest >= self.vocabulary:
            raise DataError(
                f"the data cache is damaged: it holds token {largest:,}, the model has {self.vocabulary:,}", hint="delete the cache"
            )
        return batch


@dataclass(frozen=True, kw_only=True)
class TrainSplit(Split):
    """Endless: sources interleaved by weight, each of them shuffled anew in every epoch of its own."""

    weights: Sequence[float]
    seed: int
    shuffle: bool
    rows_before: Callable[[int], int] | None = None
    """Rows of all batches before batch n together. Default: n x global_batch."""
    mixture: Mixture = field(init=False)
    _latest: tuple[int, list[np.ndarray]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mixture", Mixture(self.weights))
        object.__setattr__(self, "_latest", (0, self._blocks_ids(0)))

    def batch_rows(self, n: int) -> np.ndarray:
        # The arithmetic costs the same for one batch as for many, so it is done for a block and the block kept.
        block, within = divmod(n, _BLOCK_BATCHES)
        number, ids = self._latest
        if number != block:
            ids = self._blocks_ids(block)
            object.__setattr__(self, "_latest", (block, ids))
        return ids[within]

    def _blocks_ids(self, block: int) -> list[np.ndarray]:
        """int64 [B] of each of _BLOCK_BATCHES batches: the ids of their rows."""
        first = block * _BLOCK_BATCHES
        before = self.rows_before or (lambda n: n * self.global_batch)
        begins = np.array([before(n) for n in range(first, first + _BLOCK_BATCHES + 1)], np.int64)
        samples = np.arange(begins[0], begins[-1], dtype=np.int64)
        owner, index = self.mixture.locate(samples)
        ids = np.empty_like(samples)
        for number, rows in enumerate(self.sources):
            epochs, within = np.divmod(index, rows.count)
            for epoch in np.unique(epochs[owner == number]):
                chosen = (owner == number) & (epochs == epoch)
                order = within[chosen]
                if self.shuffle and rows.shuffled:
                    order = permute(order, rows.count, f"{self.seed}/{number}/{epoch}")
                ids[chosen] = self.offsets[number] + order
        return np.split(ids, begins[1:-1] - begins[0])


@dataclass(frozen=True, kw_only=True)
class EvalSplit(Split):
    """Every held-out row once, in order; the last batch is filled with rows of padding, so all batches have one shape."""

    @property
    def batches(self) -> int:
        return -(-self.row_count // self.global_batch)

    def batch_rows(self, n: int) -> np.ndarray:
        if not 0 <= n < self.batches:
            raise IndexError(f"evaluation batch {n} of {self.batches}")
        ids = np.arange(n * self.global_batch, (n + 1) * self.global_batch, dtype=np.int64)
        return np.where(ids < self.row_count, ids, PADDING_ROW)


__all__ = ["PADDING_ROW", "EvalSplit", "Rows", "Split", "StoredRows", "SyntheticRows", "TrainSplit"]
