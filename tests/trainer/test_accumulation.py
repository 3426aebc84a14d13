"""Microbatches give the gradient of the whole batch, whatever the loss is the sum of and wherever its tokens are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import BATCH, LENGTH, VOCABULARY, config, layout, put
from trainer.config.terms import Term
from trainer.ledger import Batch, Forward, ledger_metrics
from trainer.step import accumulate

TERMS = (Term(name="linear", weight=0.7, counts="positions"), Term(name="square", weight=0.3, counts="tokens"))
Z_WEIGHT = 0.05
LOSSES = {"cross-entropy": (0.0, ()), "z-loss": (Z_WEIGHT, ()), "one term": (0.0, TERMS[:1]), "everything": (Z_WEIGHT, TERMS)}


def parameters() -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    shapes = {"table": (VOCABULARY, 6), "head": (6, VOCABULARY), "aside": (6,)}
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def batch() -> dict[str, np.ndarray]:
    """Rows of very different numbers of valid tokens; of four microbatches the second has none, the third is padding."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, VOCABULARY, (BATCH, LENGTH + 1), dtype=np.int32)
    segments = (np.arange(LENGTH) < random.integers(1, LENGTH + 1, (BATCH, 1))).astype(np.int32)
    segments[2::4] = 0
    weights = (segments != 0) & (random.random((BATCH, LENGTH)) < 0.8)
    weights[1::4] = False
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
    rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segments": segments}
    return {**rows, "weights": weights.astype(np.float32)}


def values(params: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, V] and a number for each position."""
    x_BTD = params["table"][rows["inputs"]]
    return jnp.einsum("BTD,DV->BTV", x_BTD, params["head"], precision="highest"), jnp.sum(x_BTD * params["aside"][None, None], axis=-1)


def forward(terms: tuple[Term, ...]) -> Any:
    def run(params: Any, rows: Batch) -> Forward:
        logits, aside = values(params, rows)
        sums = {
            "linear": jnp.sum(jnp.where(rows["segments"] != 0, aside, 0)),
            "square": jnp.sum(jnp.where(rows["weights"] > 0, aside**2, 0)),
        }
        return Forward(logits, {term.name: sums[term.name] for term in terms}, {"rows": jnp.float32(len(rows["inputs"]))})

    return run


def whole_loss(params: Any, rows: Any, z_weight: float, terms: tuple[Term, ...]) -> jax.Array:
    """By its definition, on the batch at once."""
    logits, aside = values(params, rows)
    valid, placed = rows["weights"] > 0, rows["segments"] != 0
    log_z = jax.nn.logsumexp(logits, axis=-1)
    hits = jnp.sum(logits * jax.nn.one_hot(rows["targets"], VOCABULARY), axis=-1)
    loss = jnp.sum(jnp.where(valid, log_z - hits + z_weight * log_z**2, 0)) / jnp.sum(valid)
    means = {
        "linear": jnp.sum(jnp.where(placed, aside, 0)) / jnp.sum(placed),
        "square": jnp.sum(jnp.where(valid, aside**2, 0)) / jnp.sum(valid),
    }
    return loss + sum(term.weight * means[term.name] for term in terms)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_any_sum_of_terms_is_that_of_one_batch_under_every_accumulation(name: str) -> None:
    z_weight, terms = LOSSES[name]
    params, rows = parameters(), batch()
    wanted_loss, wanted = jax.value_and_grad(whole_loss)(params, rows, z_weight, terms)
    for count in (1, 2, 4):
        run = config(f"loss.z_loss_weight={z_weight}", f"batch.accumulation={count}", "mesh.ici.fsdp=1")
        where = layout(run, 1)
        shardings = dict.fromkeys(params, where.replicated)

        def step(params: Any, rows: Batch, run: Any = run, shardings: Any = shardings) -> Any:
            return accumulate(run, forward(terms), params, rows, terms, shardings)

        sums, gradients, statistics = jax.jit(step)(params, put(rows, where))
        np.testing.assert_allclose(ledger_metrics(run, sums, terms)["loss"], wanted_loss, rtol=1e-6)
        assert float(statistics["rows"]) == BATCH
        for path, gradient in wanted.items():
            assert np.linalg.norm(gradients[path] - gradient) <= 1e-6 * np.linalg.norm(gradient), (path, count)
