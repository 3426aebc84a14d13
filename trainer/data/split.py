"""Rows and the order they come in. Shapes: B rows, T sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trainer.data import packing
from trainer.data.order import Mixture, permute, scramble
from trainer.data.prepare import Prepared, stream_name
from trainer.data.storage import Span
from trainer.errors import DataError

PADDING_ROW = -1


class Rows(Protocol):
    """The packed rows of one source, numbered from 0."""

    count: int
    shuffled: bool

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """int64 [B] row numbers -> wide tokens (packing.widen) into uint32 [B, T + 1]."""
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

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        pieces = np.searchsorted(self._ends, rows, side="right")
        spans: list[Span] = []
        for piece, first in zip(pieces.tolist(), ((rows - self._begins[pieces]) * self._length).tolist(), strict=True):
            spans.append(Span(stream_name(piece, self._split), first, min(first + self._length + 1, self._tokens[piece])))
        for stored, row in zip(self._prepared.folder.spans(spans, self._prepared.dtype), out, strict=True):
            packing.widen(stored, row)


class SyntheticRows:
    """Uniform random tokens, one document a row, computed when read."""

    shuffled = False

    def __init__(self, count: int, vocabulary: int, seed: int) -> None:
        self.count, self._vocabulary, self._seed = count, np.uint64(vocabulary), np.uint64(seed)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        width = np.uint64(out.shape[1])
        key = scramble(np.array([self._seed + np.uint64(1)], np.uint64))
        cells = rows.astype(np.uint64)[:, None] * width + np.arange(out.shape[1], dtype=np.uint64)[None, :]
        out[:] = scramble(cells + key) % self._vocabulary
        out[:, 0] |= packing.START


@dataclass(frozen=True, kw_only=True)
class Split:
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

    def batch_rows(self, n: int) -> np.ndarray:
        """int64 [B] ids of the rows of global batch n: a pure function of (seed, n)."""
        raise NotImplementedError

    def rows(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """int64 [B] ids -> the batch `packing.batch_of` describes. Raises DataError when the cache gives an impossible token."""
        wide = np.full((len(ids), self.sequence_length + 1), packing.PADDING, np.uint32)
        owner = np.searchsorted(self.offsets, ids, side="right") - 1
        for index in np.unique(owner[ids != PADDING_ROW]):
            chosen = np.flatnonzero(owner == index)
            block = np.empty((len(chosen), wide.shape[1]), np.uint32)
            self.sources[index].read(ids[chosen] - self.offsets[index], block)
            wide[chosen] = block
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
    mixture: Mixture = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mixture", Mixture(self.weights))

    def batch_rows(self, n: int) -> np.ndarray:
        samples = np.arange(n * self.global_batch, (n + 1) * self.global_batch, dtype=np.int64)
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
        return ids


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
