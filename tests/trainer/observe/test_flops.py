"""FLOP counts against hand values and against what XLA counts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.configs import config, ragged_batch
from trainer.config.flops import forward_flops, mfu, train_flops, visible_pairs
from trainer.config.weights import weights
from trainer.model import create_abstract_model


def test_the_count_of_a_small_model_is_the_one_made_by_hand() -> None:
    model = config().model  # 2 layers, D=32, 4 heads and 2 kv heads of 8, F=48, V=64
    flops = forward_flops(model, 16)
    assert flops.projections == 2 * (2 * 16 * 32 * 8 * (4 + 2 + 2 + 4))
    assert flops.attention == 2 * (4 * 4 * 8 * (16 * 17 // 2))
    assert flops.mlp == 2 * (2 * 16 * 3 * 32 * 48)
    assert flops.head == 2 * 16 * 32 * 64
    assert train_flops(model, 8, 16) == 3 * 8 * flops.total


def test_a_window_counts_only_the_keys_it_shows() -> None:
    assert visible_pairs(5, None) == 15
    assert visible_pairs(5, 2) == 1 + 2 + 2 + 2 + 2
    assert visible_pairs(5, 100) == 15


@given(st.integers(1, 60), st.integers(1, 80))
def test_visible_pairs_equal_the_mask_counted_out(length: int, window: int) -> None:
    assert visible_pairs(length, window) == sum(min(t + 1, window) for t in range(length))


def test_matmul_weights_are_those_the_weight_table_declares() -> None:
    for changed in (config(), config("model.tie_embeddings=true")):
        model = changed.model
        declared = sum(math.prod(w.shape) for w in weights(model) if w.inputs and w.path != "embed/table")
        declared += model.vocab_size * model.width if model.tie_embeddings else 0
        flops = forward_flops(model, 1)
        assert flops.total - flops.attention == 2 * declared


@pytest.fixture(scope="module")
def xla_flops() -> float:
    """What XLA counts for one forward pass of an unrolled model with matrix products that dominate."""
    wide = config("model.layers=unroll", "model.remat=none", "model.width=128", "model.segments.0.pattern.0.mlp.hidden=256").model
    abstract = create_abstract_model(wide)
    batch = ragged_batch(0)

    def forward(params: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, params)(*(jnp.asarray(batch[name]) for name in ("inputs", "positions", "segments")))

    graphdef, params = nnx.split(abstract)
    return jax.jit(forward).lower(params).cost_analysis()["flops"]


def test_xla_counts_as_much_for_an_unrolled_forward_pass_but_for_masked_attention_and_small_operations(xla_flops: float) -> None:
    model = config("model.width=128", "model.segments.0.pattern.0.mlp.hidden=256").model
    ours = forward_flops(model, 16)
    # XLA computes all T * T pairs.
    full = ours.total - ours.attention + 2 * 4 * 4 * 8 * 16 * 16
    assert xla_flops == pytest.approx(8 * full, rel=0.05)


def test_mfu_is_the_share_of_the_devices_peak() -> None:
    assert mfu(flops_per_step=4e14, step_seconds=2.0, devices=4, peak_tflops_per_device=100) == pytest.approx(0.5)


def test_llama3_8b_costs_what_its_paper_says_within_the_convention() -> None:
    """6 N tokens, N without the embedding table, plus attention (Chowdhery et al. 2022: 12 L H Q T a token, halved for the mask)."""
    model = config().model.model_validate({"preset": "llama3-8b"})
    tokens = 8192
    matmul = 8_030_261_248 - 128_256 * 4096 - 4096 * (2 * 32 + 1)
    attention = 12 * 32 * 32 * 128 * (tokens + 1) // 2
    assert train_flops(model, 1, tokens) == tokens * (6 * matmul + attention)
