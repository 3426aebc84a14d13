"""The splash kernel, interpreted, against plain attention: outputs and gradients, alone and sharded."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.configs import config, layout
from trainer.config.model import Attention, Block, GatedMlp
from trainer.model.attention import make_context
from trainer.model.kernels import PlacedMask
from trainer.parallel.sharding import use_layout

LENGTH = 256


def rows(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments: documents whose borders lie inside of the kernel's blocks, one row without padding."""
    positions, segments = np.zeros((batch, LENGTH), np.int32), np.zeros((batch, LENGTH), np.int32)
    for row in range(batch):
        borders = [0, 37 + row, 150, LENGTH if row == 0 else LENGTH - 19 * row]
        for number, (start, stop) in enumerate(itertools.pairwise(borders), 1):
            positions[row, start:stop], segments[row, start:stop] = np.arange(stop - start), number
    return positions, segments


def values_and_gradients(spec: Attention, kernel: Any, *, batch: int, mesh: str | None) -> list[np.ndarray]:
    """The output where it counts, and the gradients by queries, keys, values and sinks."""
    random = np.random.default_rng(7)
    shapes = [(batch, LENGTH, heads, spec.head_dim) for heads in (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads)]
    query, key, value, cotangent = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    query /= np.sqrt(spec.head_dim)
    sinks = random.standard_normal(spec.heads).astype(np.float32) if spec.sinks else None
    positions, segments = rows(batch)
    valid = (segments != 0)[..., None, None]

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        block = Block(attention=spec, mlp=GatedMlp(hidden=8))
        context = make_context([block], jnp.asarray(positions), jnp.asarray(segments), kernel=kernel)
        mixed = jnp.where(valid, context.attend(query, key, value, spec, sinks, None), 0)
        return jnp.sum(mixed * cotangent), mixed

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if spec.sinks else (0, 1, 2), has_aux=True))
    with jax.default_matmul_precision("highest"):
        if mesh is None:
            gradients, mixed = run(query, key, value, sinks)
        else:
            with use_layout(layout(config(mesh))):
                gradients, mixed = run(query, key, value, sinks)
    return [np.asarray(array) for array in (mixed, *gradients)]


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        pytest.param({}, None, id="grouped-queries"),
        pytest.param({"window": 45, "soft_cap": 3.0, "sinks": True}, None, id="window-soft-cap-sinks"),
        pytest.param({}, "mesh.ici={data: 2, fsdp: 2, tensor: 2}", id="sharded"),
        pytest.param({"sinks": True}, "mesh.ici={data: 2, tensor: 4}", id="more-ways-than-key-heads"),
        pytest.param({"kv_heads": 4}, None, id="all-heads", marks=pytest.mark.full),
        pytest.param({"kv_heads": 1, "window": 130}, None, id="one-key-head", marks=pytest.mark.full),
        pytest.param({"window": 1}, None, id="window-of-one", marks=pytest.mark.full),
        pytest.param({"soft_cap": 50.0, "window": 64}, "mesh.ici={fsdp: 4, tensor: 2}", id="sharded-window", marks=pytest.mark.full),
    ],
)
def test_the_kernel_gives_the_output_and_gradients_of_plain_attention(changes: dict[str, Any], mesh: str | None) -> None:
    spec = Attention(**{"heads": 4, "kv_heads": 2, "head_dim": 16, **changes})
    batch = 2 if mesh is None else 4
    plain = values_and_gradients(spec, "plain", batch=batch, mesh=None)
    ours = values_and_gradients(spec, "splash", batch=batch, mesh=mesh)
    for expected, found in zip(plain, ours, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@given(st.permutations(range(4)), st.sampled_from([4, 8]), st.sampled_from([None, 1, 3, 8, 20]))
@settings(max_examples=40)
def test_every_block_of_the_mask_says_what_each_query_sees_of_each_key(order: list[int], block: int, window: int | None) -> None:
    """Blocks of which all or nothing is seen are told by one element, the others element by element."""
    places, keys = np.arange(32, dtype=np.int32).reshape(4, 8)[order].reshape(-1), np.arange(40)
    mask, behind = PlacedMask(places, len(keys), window), places[:, None] - keys
    seen = (behind >= 0) & (behind < (window or len(keys)))
    for first, start in itertools.product(range(0, len(places), block), range(0, len(keys), block)):
        part = slice(first, first + block), slice(start, start + block)
        found, wanted = mask[part], seen[part]
        assert found.shape == ((block, block) if wanted.any() and not wanted.all() else (1, 1))
        np.testing.assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)
