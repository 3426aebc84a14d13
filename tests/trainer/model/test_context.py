"""Attention over a split sequence against plain attention on one device: outputs and gradients, by method, shards and form."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.configs import config, layout
from trainer.config.model import Attention, Block, GatedMlp
from trainer.model.attention import make_context
from trainer.parallel.context import split_of
from trainer.parallel.sharding import use_layout

ROWS: Final = 2
GATHER, RING, ULYSSES = {"type": "gather"}, {"type": "ring"}, {"type": "ulysses"}
UNBALANCED: Final = {"balanced": False}


def rows(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments: documents with borders inside of chunks, one row without padding and one with."""
    positions, segments = np.zeros((ROWS, length), np.int32), np.zeros((ROWS, length), np.int32)
    for row in range(ROWS):
        borders = [0, length // 5 + row, length // 2 + 3, length - row * (length // 6)]
        for number, (start, stop) in enumerate(itertools.pairwise(borders), 1):
            positions[row, start:stop], segments[row, start:stop] = np.arange(stop - start), number
    return positions, segments


def values_and_gradients(
    spec: Attention,
    length: int,
    kernel: Any,
    mesh: dict[str, int] | None = None,
    context: dict[str, Any] | None = None,
    rules: Sequence[dict[str, Any]] = (),
) -> list[np.ndarray]:
    """The output where it counts, and the gradients by queries, keys, values and sinks, tokens in order."""
    random = np.random.default_rng(7)
    shapes = [(ROWS, length, heads, spec.head_dim) for heads in (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads)]
    arrays = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    arrays[0] /= np.sqrt(spec.head_dim)
    sinks = random.standard_normal(spec.heads).astype(np.float32) if spec.sinks else None
    arrays += rows(length)

    def loss(
        query: Any, key: Any, value: Any, sinks: Any, cotangent: jax.Array, positions: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        block = Block(attention=spec, mlp=GatedMlp(hidden=8))
        made = make_context([block], positions, segments, kernel=kernel)
        mixed = jnp.where((segments != 0)[..., None, None], made.attend(query, key, value, spec, sinks, None), 0)
        return jnp.sum(mixed * cotangent), mixed

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if spec.sinks else (0, 1, 2), has_aux=True))
    query, key, value, cotangent, positions, segments = arrays
    if mesh is None:
        gradients, mixed = run(query, key, value, sinks, cotangent, positions, segments)
        return [np.asarray(array) for array in (mixed, *gradients)]
    described = config(
        f"mesh.ici={json.dumps(mesh)}", f"sharding.context={json.dumps(context)}", f"sharding.rules={json.dumps(rules)}",
        f"batch.sequence_length={length}", f"batch.global_batch={ROWS}",
    )  # fmt: skip
    where = layout(described, int(np.prod(list(mesh.values())))).in_steps(described)
    with use_layout(where):
        split = split_of(("batch", "length"), (ROWS, length))
        assert split is not None and split.balanced == (context != ULYSSES and "balanced" not in (context or {}))
        places = split.places(length)
        back = np.argsort(places)
        query, key, value, cotangent, positions, segments = (array[:, places] for array in arrays)
        gradients, mixed = run(query, key, value, sinks, cotangent, positions, segments)
    found = [np.asarray(array) for array in (mixed, *gradients)]
    return [array[:, back] if array.ndim == 4 else array for array in found]


def assert_equal_to_plain(
    changes: dict[str, Any],
    mesh: dict[str, int],
    context: dict[str, Any],
    *,
    length: int = 64,
    kernel: str = "plain",
    rules: Sequence[dict[str, Any]] = (),
) -> None:
    spec = Attention(**{"heads": 8, "kv_heads": 4, "head_dim": 8, **changes})
    with jax.default_matmul_precision("highest"):
        plain = values_and_gradients(spec, length, "plain")
        ours = values_and_gradients(spec, length, kernel, mesh, context, rules)
    for expected, found in zip(plain, ours, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


FOUR: Final = {"heads": 4, "kv_heads": 2}
KERNEL_FORM: Final = {"window": 45, "soft_cap": 3.0, "sinks": True}
FULL_FORM: Final = {"window": 13, "soft_cap": 3.0, "sinks": True, "kv_heads": 2}


@pytest.mark.parametrize(
    ("changes", "mesh", "context"),
    [
        pytest.param({}, {"context": 4}, GATHER, id="gather"),
        pytest.param(FULL_FORM, {"context": 4}, RING, id="ring-with-everything"),
        pytest.param(FULL_FORM, {"fsdp": 2, "context": 2, "tensor": 2}, ULYSSES, id="ulysses-with-everything"),
    ],
)
def test_output_and_gradients_are_those_of_plain_attention(changes: dict[str, Any], mesh: dict[str, int], context: dict[str, Any]) -> None:
    assert_equal_to_plain(changes, mesh, context)


@pytest.mark.full
def test_sinks_lie_with_their_heads_where_rows_have_taken_the_axis_of_heads() -> None:
    assert_equal_to_plain({"sinks": True}, {"context": 2, "tensor": 2}, GATHER, rules=[{"axis": "batch", "mesh": ["tensor"]}])


METHODS = {
    "gather": GATHER,
    "gather-unbalanced": GATHER | UNBALANCED,
    "ring": RING,
    "ring-unbalanced": RING | UNBALANCED,
    "ulysses": ULYSSES,
}


@pytest.mark.full
@pytest.mark.parametrize("ways", [2, 4, 8])
@pytest.mark.parametrize("context", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="grouped"),
        pytest.param({"kv_heads": 8}, id="all-heads"),
        pytest.param({"kv_heads": 1, "window": 9}, id="one-key-head-window"),
        pytest.param({"window": 1}, id="window-of-one"),
        pytest.param(FULL_FORM, id="everything"),
    ],
)
def test_every_method_and_form_over_two_four_and_eight_shards_is_plain_attention(
    changes: dict[str, Any], context: dict[str, Any], ways: int
) -> None:
    assert_equal_to_plain(changes, {"context": ways}, context)


@pytest.mark.parametrize(
    ("changes", "mesh", "context", "length"),
    [
        pytest.param(
            {"window": 45, "soft_cap": 3.0, "sinks": True}, {"context": 2}, GATHER, 512, id="gather-everything", marks=pytest.mark.full
        ),
        pytest.param({"soft_cap": 3.0, "sinks": True}, {"context": 2}, RING, 512, id="ring-soft-cap-sinks"),
        pytest.param({}, {"context": 4}, RING, 1024, id="ring-of-four", marks=pytest.mark.full),
        pytest.param({}, {"context": 4}, RING | UNBALANCED, 512, id="ring-unbalanced", marks=pytest.mark.full),
        pytest.param(
            {"heads": 4, "kv_heads": 2}, {"fsdp": 2, "context": 2, "tensor": 2}, GATHER, 512, id="gather-sharded", marks=pytest.mark.full
        ),
        pytest.param({}, {"context": 4}, GATHER | UNBALANCED, 512, id="gather-unbalanced", marks=pytest.mark.full),
        pytest.param({"window": 200}, {"context": 4}, GATHER, 1024, id="gather-window-across-chunks", marks=pytest.mark.full),
        pytest.param(FOUR | {"sinks": True}, {"context": 4}, ULYSSES, 256, id="ulysses", marks=pytest.mark.full),
    ],
)
def test_the_kernel_on_each_shard_is_plain_attention(
    changes: dict[str, Any], mesh: dict[str, int], context: dict[str, Any], length: int
) -> None:
    small = {"heads": 2, "kv_heads": 1}
    assert_equal_to_plain(small | changes, mesh, context, length=length, kernel="splash")
