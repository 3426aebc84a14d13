"""How a run evaluates, saves, reports and meets its peers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Node, NonNegativeInt, PositiveInt


class Batch(Node):
    global_batch: PositiveInt
    """Sequences one step consumes over all devices."""
    sequence_length: PositiveInt
    accumulation: PositiveInt = 1
    """Microbatches a step adds up before one optimizer update; divides global_batch."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch % self.accumulation:
            raise ValueError(f"global_batch ({self.global_batch}) must be a multiple of accumulation ({self.accumulation})")
        return self


class Eval(Node):
    every_steps: PositiveInt
    global_batch: PositiveInt | None = None
    """Sequences per evaluation batch. Default: the training batch's."""


class Checkpoint(Node):
    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None
    """Steps divisible by this are never deleted."""
    save_timeout_seconds: PositiveInt = 1200
    """A save that is not committed after this long has failed, and with it the attempt: the next one starts from the
    newest committed step."""
    start_from: str | None = None
    """A Hugging Face safetensors folder (local or gs://) that gives the first parameters of a new run."""
    allow_mismatch: tuple[str, ...] = ()
    """Differences accepted at resume: dotted config paths, or `data`, `tokenizer`."""


class Metrics(Node):
    log_every_steps: PositiveInt = 1
    writers: tuple[Literal["console", "jsonl", "tensorboard"], ...] = ("console", "jsonl", "tensorboard")


class Profiler(Node):
    """Trace steps `first_step` to `last_step` (both included) on chosen processes."""

    first_step: NonNegativeInt
    last_step: NonNegativeInt
    processes: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step ({self.last_step}) is before first_step ({self.first_step})")
        return self


class Distributed(Node):
    initialization_timeout_seconds: PositiveInt = 300
    heartbeat_timeout_seconds: PositiveInt = 30
