"""Batches from a step on, and from a later one where a slice has fallen behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trainer.ledger import Batch


class Batches:
    """Yields (n, batch n); `start` gives them from a step on."""

    def __init__(self, start: Callable[[int], Iterator[tuple[int, Batch]]], begin: int) -> None:
        self._start = start
        self._batches = start(begin)
        self._next = begin

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[int, Batch]:
        n, batch = next(self._batches)
        self._next = n + 1
        return n, batch

    def go_to(self, step: int) -> None:
        """The next batch is that of `step`."""
        if step != self._next:
            self._batches = self._start(step)
            self._next = step
