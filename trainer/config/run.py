"""How a run evaluates, saves, reports and meets its peers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Node, NonNegativeInt, PositiveInt


class RampUp(Node):
    """A batch that grows with the step: step n has `start + increment * (n // steps_per_size)` sequences, at most `global_batch`.

    Every size is compiled once, when its first step comes.
    """

    start: PositiveInt
    """Sequences of the first step, below `global_batch`."""
    increment: PositiveInt
    """Sequences that are added at a time."""
    steps_per_size: PositiveInt
    """Steps with one size."""


class Batch(Node):
    global_batch: PositiveInt
    """Sequences one step consumes over all devices."""
    sequence_length: PositiveInt
    accumulation: PositiveInt = 1
    """Microbatches a step adds up before one optimizer update; divides global_batch."""
    ramp_up: RampUp | None = None
    """Smaller batches at the beginning of the run. A microbatch stays as large as it is with `global_batch`, and a step takes fewer of
    them; a size below one microbatch is one smaller microbatch."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch % self.accumulation:
            raise ValueError(f"global_batch ({self.global_batch}) must be a multiple of accumulation ({self.accumulation})")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sequences of a step, every size there is, ascending."""
        ramp = self.ramp_up
        return (*(range(ramp.start, self.global_batch, ramp.increment) if ramp else ()), self.global_batch)

    @property
    def ramp_up_steps(self) -> int:
        """Steps before the first one with `global_batch` sequences."""
        return (len(self.sizes) - 1) * self.ramp_up.steps_per_size if self.ramp_up else 0

    def size_at(self, step: int) -> int:
        """Sequences of a step."""
        ramp = self.ramp_up
        return min(ramp.start + ramp.increment * (step // ramp.steps_per_size), self.global_batch) if ramp else self.global_batch

    def sequences_before(self, step: int) -> int:
        """Sequences of all steps before `step` together."""
        ramp = self.ramp_up
        if ramp is None:
            return step * self.global_batch
        growing = min(step, self.ramp_up_steps)
        sizes, within = divmod(growing, ramp.steps_per_size)
        whole = sizes * ramp.start + ramp.increment * (sizes * (sizes - 1) // 2)
        last = within * (ramp.start + ramp.increment * sizes)
        return whole * ramp.steps_per_size + last + (step - growing) * self.global_batch

    def of_size(self, sequences: int) -> Batch:
        """The batch of the steps that have one of `sizes`, as if every step had it."""
        accumulation = max(1, sequences * self.accumulation // self.global_batch)
        return self.model_copy(update={"global_batch": sequences, "accumulation": accumulation, "ramp_up": None})


class Ema(Node):
    """An average of the parameters that follows them: after each update it moves the share 1 - decay of the way to them.

    It begins at the first parameters, is stored in float32 as they are, and changes nothing in training.
    """

    decay: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    warm_up: bool = False
    """In step n at most (1 + n) / (10 + n), so that the first parameters are soon forgotten."""


class Eval(Node):
    every_steps: PositiveInt
    weights: Literal["trained", "ema"] = "trained"
    """`ema`: evaluate the average of `ema` instead of the parameters themselves."""
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
    restore: Literal["all_replicas", "one_replica"] = "all_replicas"
    """Who reads, at a resume, what the indices of the mesh axes `data` and `diloco` have in common. `one_replica`: the hosts of the first
    index, which pass it on to the others over the network: for many slices and a storage that is slower than what joins them."""
    start_from: str | None = None
    """A Hugging Face safetensors folder or a parameter-only checkpoint, local or gs://: the first parameters of a new run."""
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
