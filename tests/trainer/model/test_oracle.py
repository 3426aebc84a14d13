"""The model computes what another framework computed from the same checkpoint (tests/oracle/README.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.trainer.model.models import ORACLE, load, mean_loss, one_document
from trainer.checkpoint.huggingface_config import model_from_huggingface
from trainer.config.model import Model
from trainer.config.optimizer import AdamW
from trainer.config.treatment import treatments
from trainer.config.weights import weights
from trainer.optim import build_optimizer

ROWS, LENGTH = 4, 32


@dataclass(frozen=True)
class Oracle:
    """One family's files, our model of it, and one compiled function of (params, batch)."""

    model: Model
    params: dict[str, jax.Array]
    reference: Any
    trajectory: Any
    evaluate: Callable[[Any, Any], tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]]  # ((loss, logits), gradients)


@pytest.fixture(scope="module", params=["llama3", "qwen3"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    folder = ORACLE / request.param
    model = model_from_huggingface(json.loads((folder / "config.json").read_text()))
    model = model.model_copy(update={"compute_dtype": "float32", "matmul_precision": "highest"})
    evaluate = jax.jit(jax.value_and_grad(lambda params, batch: mean_loss(model, params, batch), has_aux=True))
    return Oracle(model, load(folder, model), np.load(folder / "reference.npz"), np.load(folder / "trajectory.npz"), evaluate)


def test_logits_loss_and_gradient_norm_agree_with_the_reference(oracle: Oracle) -> None:
    ids = oracle.reference["input_ids"]
    (loss, logits), gradients = oracle.evaluate(oracle.params, one_document(ids, rows=ROWS, length=LENGTH))
    b, t = ids.shape
    assert np.abs(logits[:b, :t] - oracle.reference["logits"]).max() < 2e-4
    np.testing.assert_allclose(loss, oracle.reference["loss"], rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(gradients), oracle.reference["grad_norm"], rtol=1e-4)


def test_greedy_generation_gives_the_reference_ids(oracle: Oracle) -> None:
    expected = oracle.reference["greedy"]
    ids = expected[:, :8]
    while ids.shape[1] < expected.shape[1]:
        (_, logits), _ = oracle.evaluate(oracle.params, one_document(ids, rows=ROWS, length=LENGTH))
        following = np.argmax(logits[: ids.shape[0], ids.shape[1] - 1], axis=-1)
        ids = np.concatenate([ids, following[:, None]], axis=1)
    np.testing.assert_array_equal(ids, expected)


def test_ten_adamw_steps_follow_the_reference_trajectory(oracle: Oracle) -> None:
    by_path = {weight.path: weight for weight in weights(oracle.model)}
    config = AdamW(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
    tx = build_optimizer(config, lambda _: 1e-3, treatments(config, [by_path[path] for path in sorted(oracle.params)]))

    @jax.jit
    def update(params: Any, opt: Any, gradients: Any) -> tuple[Any, Any]:
        updates, opt = tx.update(gradients, opt, params)
        return optax.apply_updates(params, updates), opt

    params, opt = oracle.params, tx.init(oracle.params)
    losses, norms = [], []
    for ids, counted in zip(oracle.trajectory["ids"], oracle.trajectory["weights"], strict=True):
        batch = one_document(ids[:, :-1], rows=ROWS, length=LENGTH, targets=ids[:, 1:]) | {"weights": counted}
        (loss, _), gradients = oracle.evaluate(params, batch)
        losses.append(loss)
        norms.append(optax.tree.norm(gradients))
        params, opt = update(params, opt, gradients)
    np.testing.assert_allclose(losses, oracle.trajectory["loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, oracle.trajectory["grad_norm"], rtol=1e-4)
