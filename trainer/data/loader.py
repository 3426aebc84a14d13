"""Batches ahead of time: Grain reads and prefetches in threads while the device works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trainer.data.split import EvalSplit, Split

Batch = dict[str, np.ndarray]
LocalRows = Sequence[int] | np.ndarray | Callable[[int], np.ndarray]
_ENDLESS = 2**40  # steps


class _Batches:
    """Grain's random-access source: item n is this process's share of global batch n."""

    def __init__(self, split: Split, local_rows: LocalRows | None) -> None:
        self._split, self._local_rows = split, local_rows

    def __len__(self) -> int:
        return self._split.batches if isinstance(self._split, EvalSplit) else _ENDLESS

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        ids = self._split.batch_rows(index)
        if self._local_rows is None:
            return index, self._split.rows(ids)
        return index, self._split.rows(ids[self._local_rows(index) if callable(self._local_rows) else np.asarray(self._local_rows)])


class BatchLoader:
    """Yields (n, batch n) from `start_step` on; ends after the last batch of an EvalSplit, never for a TrainSplit.

    `local_rows`: the positions within the global batch this process feeds, in the order its devices want them, all by
    default; a function of n where batches have several sizes. Every array of a batch has that many rows.
    `prefetch_batches` are kept ready; 0 reads on demand.
    """

    def __init__(self, split: Split, *, start_step: int = 0, local_rows: LocalRows | None = None, prefetch_batches: int = 2) -> None:
        import grain  # here, because preparing data needs neither Grain nor the JAX it imports

        options = grain.ReadOptions(num_threads=min(prefetch_batches, 4), prefetch_buffer_size=prefetch_batches)
        self._dataset = grain.MapDataset.source(_Batches(split, local_rows))[start_step:].to_iter_dataset(options)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return iter(self._dataset)
