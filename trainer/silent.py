"""Tells of loss terms that are enabled and do nothing: exactly zero, or without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from trainer.config.terms import loss_terms
from trainer.config.train import TrainConfig
from trainer.ledger import Batch

TermProbe = Callable[[nnx.State, Batch, int], Mapping[str, jax.Array]]
"""(state, batch, number of the term) -> float32 scalars `value`, `tokens` and `gradient_norm`; a collective program."""


class Events(Protocol):
    def event(self, kind: str, **fields: Any) -> None: ...


class SilentTerms:
    """Watches the metrics of every step and, every `loss.silent_term_steps` steps, the gradient norm of each term.

    It logs the event `loss terms` (each term's value, weight, what it was divided by, gradient norm) with every such
    measurement, and `silent loss term` with `level: error` for a term that was exactly zero for so many steps in a row, or
    whose gradient is zero where something counted. A silence is told once. Measurements are read one step late, as metrics are.
    """

    def __init__(self, config: TrainConfig, probe: TermProbe, reporter: Events) -> None:
        self._every, self._last = config.loss.silent_term_steps, config.steps
        self._weights = {term.name: term.weight for term in loss_terms(config)}
        self._probe = probe
        self._reporter = reporter
        self._zeros = dict.fromkeys(("cross_entropy", *self._weights), 0)
        self._without_gradient: set[str] = set()
        self._pending: tuple[int, dict[str, Mapping[str, jax.Array]]] | None = None

    def step(self, n: int, state: nnx.State, batch: Batch, previous: Mapping[str, float] | None) -> None:
        """After step n is dispatched: its new state, its batch, and the metrics of the step before, where there was one."""
        if previous is not None:
            self._count_zeros(previous)
        self._read_gradients()
        if self._weights and (n + 1) % self._every == 0 and n + 1 < self._last:
            self._pending = n, {name: self._probe(state, batch, number) for number, name in enumerate(self._weights)}

    def _count_zeros(self, values: Mapping[str, float]) -> None:
        for name in self._zeros:
            self._zeros[name] = self._zeros[name] + 1 if values[name] == 0 else 0
            if self._zeros[name] == self._every:
                self._tell(int(values["step"]), name, f"exactly 0 for {self._every} steps")

    def _read_gradients(self) -> None:
        if self._pending is None:
            return
        (n, measured), self._pending = self._pending, None
        terms = {
            name: {"weight": self._weights[name], **{key: float(value) for key, value in values.items()}}
            for name, values in measured.items()
        }
        self._reporter.event("loss terms", step=n, terms=terms)
        for name, term in terms.items():
            if term["gradient_norm"] != 0 or not term["tokens"]:
                self._without_gradient.discard(name)
            elif name not in self._without_gradient:
                self._without_gradient.add(name)
                self._tell(n, name, "no trained parameter has a gradient from it")

    def _tell(self, n: int, name: str, reason: str) -> None:
        weight = self._weights.get(name, 1.0)
        self._reporter.event("silent loss term", level="error", step=n, term=name, weight=weight, reason=reason)
