"""The ledger: sums of every loss term over microbatches, and what they come to.

A forward pass returns, beside the logits, un-normalised sums of its own terms (`Forward.terms`) and statistics of
the batch (`Forward.statistics`). Both add up over microbatches and evaluation batches. Denominators are counts of
the whole global batch, known before the first microbatch, so that the gradient of a step is that of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from trainer.config.terms import DEPTHS, Count, Term
from trainer.config.train import TrainConfig
from trainer.loss import LossSums, loss_sums
from trainer.model.multi_token import ahead, goes_on

Batch = dict[str, jax.Array]
Statistics = dict[str, jax.Array]
"""Of a batch, by name, additive: the statistics of a batch are the sum of those of its microbatches. Not differentiated."""


class Forward(NamedTuple):
    """What a forward pass gives the training step."""

    logits: jax.Array | LossSums
    """Float32 [B, T, V]; or, where the loss is made in tiles, already its sums."""
    terms: Mapping[str, jax.Array]
    """Float32 scalars by the names of `trainer.config.terms.model_terms`, unweighted: the sum over what the term counts."""
    statistics: Statistics


def targets_ahead(batch: Batch, k: int) -> Batch:
    """`targets` and `weights` [B, T] of the k-th module of multi-token prediction: those k places on in the same document."""
    there_BT = goes_on(batch["segments"], k)
    return {
        "targets": jnp.where(there_BT, ahead(batch["targets"], k), 0),
        "weights": jnp.where(there_BT, ahead(batch["weights"], k), 0),
    }


def _tokens_ahead(k: int, batch: Batch) -> jax.Array:
    return jnp.sum(targets_ahead(batch, k)["weights"] > 0, dtype=jnp.float32)


COUNTS: Final[dict[Count, Callable[[Batch], jax.Array]]] = {
    "tokens": lambda batch: jnp.sum(batch["weights"] > 0, dtype=jnp.float32),
    "positions": lambda batch: jnp.sum(batch["segments"] != 0, dtype=jnp.float32),
    **{name: partial(_tokens_ahead, k) for k, name in enumerate(DEPTHS, 1)},
}


def counts_of(batch: Batch, terms: Sequence[Term]) -> dict[Count, jax.Array]:
    """Float32 scalars: `tokens`, and what else `terms` are divided by. Additive over parts of a batch."""
    names: list[Count] = ["tokens", *(term.counts for term in terms)]
    return {name: COUNTS[name](batch) for name in dict.fromkeys(names)}


def forward_sums(config: TrainConfig, forward: Forward, batch: Batch, terms: Sequence[Term]) -> LossSums:
    """Everything a batch adds to the ledger. `terms`: the model's.

    Raises ValueError while tracing when the forward pass does not return exactly the terms the config enables.
    """
    wanted, found = sorted(term.name for term in terms), sorted(forward.terms)
    if wanted != found:
        raise ValueError(f"the config enables the model's loss terms {wanted}, the forward pass returned {found}")
    sums = forward.logits
    if not isinstance(sums, LossSums):
        sums = loss_sums(sums, batch["targets"], batch["weights"], config.loss)
    counts = counts_of(batch, terms)
    return sums._replace(
        terms={name: value.astype(jnp.float32) for name, value in forward.terms.items()},
        counts={name: value for name, value in counts.items() if name != "tokens"},
    )


def mean_loss(sums: LossSums, counts: Mapping[Count, jax.Array], terms: Sequence[Term]) -> jax.Array:
    """What is minimised, float32 scalar: sums of a batch or of a part of it, over the counts of the whole."""
    loss = sums.total / at_least_one(counts["tokens"])
    for term in terms:
        loss += term.weight * sums.terms[term.name] / at_least_one(counts[term.counts])
    return loss


def ledger_metrics(config: TrainConfig, sums: LossSums, terms: Sequence[Term]) -> dict[str, jax.Array]:
    """Float32 scalars: `loss`, `cross_entropy`, `tokens`, every term's unweighted value by its name, and other counts.

    `z_loss` is there always, 0 where it is not enabled.
    """
    counts: dict[Count, jax.Array] = {"tokens": sums.tokens, **sums.counts}
    tokens = at_least_one(sums.tokens)
    return {
        "loss": mean_loss(sums, counts, terms),
        "cross_entropy": sums.cross_entropy / tokens,
        "z_loss": sums.z_loss / (tokens * (config.loss.z_loss_weight or 1)),
        "tokens": sums.tokens,
        **{term.name: sums.terms[term.name] / at_least_one(counts[term.counts]) for term in terms},
        **sums.counts,
    }


def at_least_one(count: jax.Array) -> jax.Array:
    """The count as a denominator: a batch in which nothing counts has loss 0, not NaN."""
    return jnp.maximum(count, 1)
