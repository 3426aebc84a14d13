"""What a position may depend on: nothing later, no other document, nothing in padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.model.models import BLOCK, mean_loss, random_params, small, with_params
from trainer.model import Transformer
from trainer.model.transformer import Block

LENGTH = 9
WINDOWED = {**BLOCK, "attention": {**BLOCK["attention"], "window": 3, "qk_norm": {}, "soft_cap": 5.0}}
MODEL = small(pattern=(BLOCK, WINDOWED), repeats=1)
# Row 0: documents of 4 and 3 tokens, 2 of padding. Row 1: padding first, then a document of 5. Row 2: nothing but padding.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * 9], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 0, 0, 0, 0, 1, 2, 3, 4], [0] * 9], np.int32)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, LENGTH), dtype=np.int32)
WEIGHTS = np.array([[1, 1, 1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 0], [0] * 9], np.float32)
BATCH = {"inputs": TOKENS, "targets": np.roll(TOKENS, -1, 1), "positions": POSITIONS, "segments": SEGMENTS, "weights": WEIGHTS}
PADDING = SEGMENTS == 0
Run = Callable[
    [dict[str, jax.Array], dict[str, np.ndarray]], tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]
]  # ((loss, logits), gradients)


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return random_params(MODEL)


@pytest.fixture(scope="module")
def run() -> Run:
    return compile_run()


@pytest.fixture(scope="module")
def influence(params: dict[str, jax.Array]) -> np.ndarray:
    """[B, T, S]: largest absolute derivative of the logits at t with respect to the embedded token at s, a few outputs each."""
    directions = jnp.asarray(np.random.default_rng(1).normal(size=(3, MODEL.vocab_size)), jnp.float32)

    def outputs(embedded: jax.Array) -> jax.Array:
        with replaced(Transformer, "embedding", lambda _: lambda *arguments: embedded):
            logits = with_params(MODEL, params)(TOKENS, POSITIONS, SEGMENTS)
        return jnp.einsum("BTV,EV->BTE", logits, directions)

    embedded = np.random.default_rng(2).normal(size=(3, LENGTH, MODEL.width)).astype(np.float32)
    jacobian_BTECSD = jax.jit(jax.jacrev(outputs))(embedded)
    rows = np.arange(3)
    return np.abs(np.asarray(jacobian_BTECSD)[rows, :, :, rows]).max(axis=(2, 4))


def test_the_gradient_with_respect_to_later_inputs_is_exactly_zero(influence: np.ndarray) -> None:
    later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    assert np.all(influence[:, later] == 0)
    assert np.all(influence[1, 8, 4:] > 0)  # the last token of a document of five depends on all of it


def test_no_position_depends_on_another_document_or_on_padding(influence: np.ndarray) -> None:
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    assert np.all(influence[~same] == 0)
    assert np.all(influence[np.broadcast_to(PADDING[:, None, :], same.shape)] == 0)


def test_a_document_gets_the_same_logits_wherever_it_stands(params: dict[str, jax.Array], run: Run) -> None:
    (_, packed), _ = run(params, BATCH)
    alone = {name: np.zeros((3, LENGTH), rows.dtype) for name, rows in BATCH.items()}
    for name, source in {**BATCH, "segments": np.ones_like(SEGMENTS)}.items():
        alone[name][0, :3], alone[name][1, :4], alone[name][2, :5] = source[0, 4:7], source[0, :4], source[1, 4:]
    (_, first), _ = run(params, alone)
    np.testing.assert_allclose(first[0, :3], packed[0, 4:7], atol=1e-5)
    np.testing.assert_allclose(first[1, :4], packed[0, :4], atol=1e-5)
    np.testing.assert_allclose(first[2, :5], packed[1, 4:], atol=1e-5)


def test_attention_follows_positions_and_not_places_in_the_row(params: dict[str, jax.Array], run: Run) -> None:
    order = np.random.default_rng(3).permutation(LENGTH)
    (_, shuffled), _ = run(params, {name: rows[:, order] for name, rows in BATCH.items()})
    (_, straight), _ = run(params, BATCH)
    np.testing.assert_allclose(shuffled[~PADDING[:, order]], straight[:, order][~PADDING[:, order]], atol=1e-5)


@pytest.mark.parametrize("where", ["embedding output", "block input", "head input"])
def test_nan_in_padding_reaches_neither_loss_nor_any_gradient(where: str, params: dict[str, jax.Array], run: Run) -> None:
    poison = np.where(PADDING, np.nan, 0).astype(np.float32)[..., None]
    match where:
        case "embedding output":
            spoiled = replaced(Transformer, "embedding", lambda real: lambda *arguments: real(*arguments) + poison)
        case "block input":
            spoiled = replaced(Block, "__call__", lambda real: lambda block, x, context: real(block, x + poison, context))
        case _:
            spoiled = replaced(Transformer, "logits", lambda real: lambda model, x, segments: real(model, x + poison, segments))
    with spoiled:
        found = compile_run()(params, BATCH)
    assert_equal(found, run(params, BATCH))


@pytest.mark.parametrize("ids", ["inputs", "targets"])
def test_an_invalid_token_id_in_padding_is_harmless(ids: str, params: dict[str, jax.Array], run: Run) -> None:
    rubbish = np.array([[-5, 10**9, MODEL.vocab_size] * 3], np.int32)
    found = run(params, BATCH | {ids: np.where(PADDING, rubbish, BATCH[ids])})
    assert_equal(found, run(params, BATCH))


def test_an_invalid_token_id_in_a_document_gives_nan_and_not_another_token(params: dict[str, jax.Array], run: Run) -> None:
    (loss, _), _ = run(params, BATCH | {"inputs": np.where(PADDING, 0, MODEL.vocab_size).astype(np.int32)})
    assert np.isnan(loss)


def compile_run() -> Run:
    return jax.jit(jax.value_and_grad(lambda params, batch: mean_loss(MODEL, params, batch), has_aux=True))


def assert_equal(found: Any, clean: Any) -> None:
    assert np.isfinite(clean[0][0]) and found[0][0] == clean[0][0]
    for path, gradient in found[1].items():
        np.testing.assert_array_equal(gradient, clean[1][path], err_msg=path)


@contextmanager
def replaced(owner: type, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """The method `name` of `owner` wrapped, for what is traced inside."""
    real = getattr(owner, name)
    setattr(owner, name, wrap(real))
    try:
        yield
    finally:
        setattr(owner, name, real)
