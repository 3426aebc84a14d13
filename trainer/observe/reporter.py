"""What the loop tells: metrics of each step, evaluations, events; written in the background by the primary process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import jax

from trainer import contract
from trainer.config.flops import mfu
from trainer.config.terms import eval_terms
from trainer.config.train import TrainConfig
from trainer.observe.background import Background, Writer
from trainer.observe.console import Console
from trainer.observe.jsonl import JsonLines
from trainer.observe.metrics import StepClock, read, read_arrays, read_replica_arrays, read_replicas, start_copy
from trainer.observe.tensorboard import TensorBoard

CLOSE_SECONDS: Final = 5.0
"""How long `close` waits for the writers; within the grace of a preempted host."""


class Sums(Protocol):
    """Sums over valid tokens, as `trainer.loss.LossSums`."""

    @property
    def cross_entropy(self) -> jax.Array: ...
    @property
    def tokens(self) -> jax.Array: ...
    @property
    def terms(self) -> Mapping[str, jax.Array]: ...
    @property
    def counts(self) -> Mapping[Any, jax.Array]: ...


class Reporter:
    """Turns device metrics into records, one step late, so that the device always has the next step to work on.

    Every process reads its (replicated) metrics, because every process must see a NaN; only the primary writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_directory: str,
        header: Mapping[str, Any],
        primary: bool,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`header`: what `trainer.observe.make_header` returns. Files are opened in the background; trouble with them is a warning."""
        self._config = config
        self._header = header
        self._clock = clock
        self._started = clock()
        self._steps = StepClock()
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._first = True
        self._unlogged: list[tuple[float, float]] = []  # of timed steps since the last logged one: seconds, share of a whole batch
        self._writers = _writers(config, run_directory) if primary else []
        self._emit({"kind": "header", **header})

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float] | None:
        """Take the device metrics of `step`, just dispatched; return and log those of the step before, as `flush` does."""
        start_copy(metrics)
        previous = self.flush()
        self._pending = (step, metrics)
        return previous

    def flush(self) -> dict[str, float] | None:
        """Read what is still on the device: the metrics and the number (`step`) of the last step not yet returned; None if there is none.

        Waits for that step. Metrics are float32 scalars, `loss`, `gradient_norm` and `tokens` (valid ones) among them; arrays
        are logged, not returned.
        """
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        if self._config.diloco is None or self._config.diloco.files:
            values, arrays = read(metrics), read_arrays(metrics)
        else:
            values, arrays = read_replicas(metrics), read_replica_arrays(metrics)
        self._log_step(step, values, arrays, self._clock())
        return {"step": step, **values}

    def eval(self, done: int, sums: Sums) -> dict[str, float]:
        """Log an evaluation after `done` finished steps; waits for it. Returns `loss` (nats a token), `perplexity`, `tokens`, and
        the value of every term of `eval_terms`, before its weight."""
        values = read({"cross_entropy": sums.cross_entropy, "tokens": sums.tokens})
        tokens = values["tokens"]
        loss = values["cross_entropy"] / max(tokens, 1.0)
        counts = {**read(sums.counts), "tokens": tokens}
        sizes = {term.name: max(counts[term.counts], 1.0) for term in eval_terms(self._config)}
        terms = {name: value / sizes[name] for name, value in read(sums.terms).items()}
        result = {"loss": loss, "perplexity": _exp(loss), "tokens": tokens, **terms}
        self._steps.interrupt()
        self._emit({"kind": "eval", "step": done - 1, "done": done, **result})
        return result

    def event(self, kind: str, **fields: Any) -> None:
        """Log that something happened; `fields` must be values JSON can say."""
        self._emit({"kind": "event", "event": kind, **fields})

    def interrupted(self) -> None:
        """Something else than a step took time: the step after it has no time of its own."""
        self._steps.interrupt()

    @property
    def dropped(self) -> int:
        """Records no writer had room for."""
        return sum(writer.dropped for writer in self._writers)

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Write what is queued; give up on a writer that takes longer. A step still on the device is not waited for."""
        deadline = time.monotonic() + timeout_seconds
        for writer in self._writers:
            writer.close(deadline)
        self._writers = []

    def _log_step(self, step: int, values: dict[str, float], arrays: Mapping[str, Any], now: float) -> None:
        batch = self._config.batch
        size = batch.size_at(step)
        if self._evaluated_after(step) or batch.size_at(step + 1) != size:
            self._steps.interrupt()  # its end was seen only after the evaluation had been fed, or the next size compiled
        seconds = self._steps.finished(now)
        record: dict[str, Any] = {"kind": "step", "step": step, "done": step + 1, **values, **arrays}
        if batch.ramp_up:
            record["global_batch"] = size
        if self._first:
            self._first = False
            # Compilation and all; the CPU time is the process's since it began.
            record |= {"first_step_seconds": now - self._started, "first_step_cpu_seconds": time.process_time()}
        if seconds is not None:
            self._unlogged.append((seconds, size / batch.global_batch))
        every, last = self._config.metrics.log_every_steps, self._config.steps - 1
        if step % every and step != last and "first_step_seconds" not in record and all(map(math.isfinite, values.values())):
            return
        if self._unlogged:
            seconds, share = (sum(column) / len(self._unlogged) for column in zip(*self._unlogged, strict=True))
            record |= self._speed(seconds, share, values)
            self._unlogged = []
        if (typical := self._steps.typical_seconds) is not None:
            ahead = batch.sequences_before(last + 1) - batch.sequences_before(step + 1)
            record["eta_seconds"] = typical * (ahead / size)
        self._emit(record)

    def _evaluated_after(self, step: int) -> bool:
        every = self._config.eval.every_steps if self._config.eval else None
        return every is not None and ((step + 1) % every == 0 or step + 1 == self._config.steps)

    def _speed(self, seconds: float, share: float, values: Mapping[str, float]) -> dict[str, float]:
        """Throughput at `seconds` a step of a `share` of the whole batch. `tokens_per_second` counts every position, padding included."""
        header = self._header
        devices, flops = header["devices"], header["flops_per_step"] * share
        speed = {
            "step_seconds": seconds,
            "tokens_per_second": header["tokens_per_step"] * share / seconds,
            "valid_tokens_per_second": values["tokens"] / seconds,
            "tflops_per_device": flops / seconds / devices["count"] / 1e12,
        }
        if (peak := devices["peak_bf16_tflops"]) is not None:
            speed["mfu"] = mfu(flops_per_step=flops, step_seconds=seconds, devices=devices["count"], peak_tflops_per_device=peak)
        return speed

    def _emit(self, record: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.put(record)


def _writers(config: TrainConfig, run_directory: str) -> list[Background]:
    directory = f"{run_directory.rstrip('/')}/{contract.METRICS_FOLDER}"
    make: dict[str, Callable[[], Writer]] = {
        "console": lambda: Console(config.steps),
        "jsonl": lambda: JsonLines(directory),
        "tensorboard": lambda: TensorBoard(directory),
    }
    return [Background(name, make[name]) for name in dict.fromkeys(config.metrics.writers)]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
