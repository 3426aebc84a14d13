"""The training loop. It never waits for the device: metrics of a step are read after the next one is dispatched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from trainer.checkpoint import Checkpoints
from trainer.config.train import TrainConfig
from trainer.contract import COMMITTED, GRACE_SHORT, grace_needed
from trainer.errors import NumericsError, Preempted
from trainer.loss import LossSums
from trainer.observe import Profiler, Reporter
from trainer.silent import SilentTerms
from trainer.state import state_items
from trainer.step import TrainStep
from trainer.worlds import Batches, Exchange, Joined


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What the loop calls, once everything is built."""

    config: TrainConfig
    train_step: TrainStep
    evaluate: Callable[[nnx.State, Callable[[], bool]], LossSums | None] | None
    """Asks its second argument once a batch, and gives up (None) when told to."""
    checkpoints: Checkpoints
    meta: Callable[[int], Mapping[str, Any]]
    """What the checkpoint of a number of finished steps says of itself."""
    reporter: Reporter
    silent_terms: SilentTerms
    profiler: Profiler
    preemption_requested: Callable[[int], bool]
    """Agreed on all processes; asked once a step, and once a batch of an evaluation."""
    exchange: Exchange | None = None
    """Where slices are worlds of their own: how this one meets the others."""
    leaving: Callable[[], bool] = lambda: False
    """Whether this process alone was asked to leave; asked while it waits for other slices."""
    grace_seconds: float = math.inf
    """Between being asked to leave and being killed."""

    def run(self, state: nnx.State, batches: Batches) -> nnx.State:
        """Train to the last step and commit it. `batches` yields (n, batch n) from the resume position on.

        Raises NumericsError, after logging, for a loss or gradient norm that is not finite, Preempted once a
        checkpoint is committed because any process was asked to leave, and whatever made a save fail.
        """
        evaluation: tuple[int, LossSums] | None = None
        for n, batch in batches:
            self.profiler.before(n)
            state, metrics = self.train_step(state, batch)
            previous = self.reporter.step(n, metrics)
            self._require_finite(previous)
            self.silent_terms.step(n, state, batch, previous)
            if evaluation:
                self.reporter.eval(*evaluation)
                evaluation = None
            self.profiler.after(n, metrics)
            done = n + 1
            if self.exchange and self.exchange.due(done):
                state, done = self._meet(self.exchange, state, done)
                batches.go_to(done)
            last = done >= self.config.steps
            self.checkpoints.check()
            self._announce()
            leaving = self.preemption_requested(done) and not last
            saved = last or leaving or done % self.config.checkpoint.every_steps == 0
            if saved:
                self._save(done, state)
            if self.evaluate and self.config.eval and not leaving and (last or done % self.config.eval.every_steps == 0):
                sums = self.evaluate(state, functools.partial(self._asked_while_evaluating, done))
                evaluation = (done, sums) if sums else None
                leaving = sums is None
            if leaving:
                if not saved:
                    self._save(done, state)
                self.checkpoints.wait()
                self._announce()
                raise Preempted(f"asked to leave; checkpoint {done} is committed")
            if last:
                break
        if evaluation:
            self.reporter.eval(*evaluation)
        self.checkpoints.wait()
        self._announce()
        return state

    def finish(self, done: int, state: nnx.State) -> None:
        """Commit a state that has come to its last step without training."""
        self._save(done, state)
        self.checkpoints.wait()
        self._announce()

    def evaluate_last(self, done: int, state: nnx.State) -> None:
        """The evaluation of a run that was told to leave in the middle of it, behind its last step. Raises Preempted if told again."""
        assert self.evaluate
        sums = self.evaluate(state, functools.partial(self._asked_while_evaluating, done))
        if sums is None:
            raise Preempted(f"asked to leave during the last evaluation; checkpoint {done} is committed")
        self.reporter.eval(done, sums)

    def join(self, exchange: Exchange, state: nnx.State, done: int) -> tuple[nnx.State, int]:
        """The state of a slice that begins at the outer parameters of `state`, and its number of steps, after the rounds it has missed."""
        return self._told(exchange.join(state, done))

    def _meet(self, exchange: Exchange, state: nnx.State, done: int) -> tuple[nnx.State, int]:
        """What is not finite stays here."""
        self._require_finite(self.reporter.flush())
        return self._told(exchange.meet(state, done, self.leaving))

    def _told(self, joined: Joined) -> tuple[nnx.State, int]:
        self.reporter.interrupted()
        for record in joined.records:
            self.reporter.event("round", round=record.round, slices=record.slices, decided_by=record.decided_by, seconds=joined.seconds)
        return joined.state, joined.done

    def _save(self, done: int, state: nnx.State) -> None:
        # The copy to the host waits for this step anyway, so reading its metrics is free: a bad state is never saved.
        self._require_finite(self.reporter.flush())
        self.checkpoints.save(done, state_items(state), self.meta(done))

    def _asked_while_evaluating(self, done: int) -> bool:
        """Whether to leave; what was committed meanwhile is told, because an evaluation may be long."""
        self._announce()
        return self.preemption_requested(done)

    def _announce(self) -> None:
        for saved in self.checkpoints.newly_committed():
            self.reporter.event(COMMITTED, step=saved.step, seconds=saved.seconds)
            needed = grace_needed(saved.seconds)
            if needed > self.grace_seconds:
                self.reporter.event(GRACE_SHORT, step=saved.step, grace_seconds=self.grace_seconds, needed_seconds=needed)
            if self.exchange:
                self.exchange.saved(saved.step)

    def _require_finite(self, metrics: Mapping[str, float] | None) -> None:
        if metrics is None or all(math.isfinite(metrics[name]) for name in ("loss", "gradient_norm")):
            return
        self.checkpoints.wait()  # every process is here; a save in flight is from before
        raise NumericsError(
            f"step {int(metrics['step'])}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}",
            hint="every committed checkpoint is from before; lower the learning rate, or look at the rows of this step",
        )
