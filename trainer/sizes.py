"""A program for each size of a batch that grows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from trainer.config.train import TrainConfig


def for_each_size[Program: Callable[..., Any]](config: TrainConfig, make: Callable[[TrainConfig], Program]) -> Program:
    """`make(config)`; where batches have several sizes, what calls the program of the run with the size of its batch, the second argument.

    A program is made when its first batch comes, so that a run compiles only sizes it has.
    """
    if config.batch.ramp_up is None:
        return make(config)

    @functools.cache
    def of_size(sequences: int) -> Program:
        return make(config.of_size(sequences))

    def call(state: Any, batch: Any, *more: Any) -> Any:
        return of_size(batch["inputs"].shape[0])(state, batch, *more)

    return call  # pyright: ignore[reportReturnType]
