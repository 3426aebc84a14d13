"""Policies of rematerialisation: what they keep, by arithmetic, and that gradients do not depend on them."""

from __future__ import annotations

from typing import Any, get_args

import jax
import numpy as np
import pytest

from tests.trainer.configs import ragged_batch
from tests.trainer.model.models import BIASED, mean_loss, random_params, small
from trainer.config.model import Model, RematTensors
from trainer.config.remat import BlockTensor, RematPolicy, tensors_of

LAYERS, B, T, D = 3, 2, 8, 16
# Of the small model's block, elements of all tokens: 4 query heads, 2 key heads of 8 dims, hidden width 24.
SIZES: dict[BlockTensor, int] = {
    "block_input": B * T * D, "query": B * T * 32, "key": B * T * 16, "value": B * T * 16, "attention": B * T * 32,
    "attention_out": B * T * D, "mlp_gate": B * T * 24, "mlp_up": B * T * 24, "mlp_down": B * T * D,
}  # fmt: skip
BATCH = ragged_batch(5, batch=B, length=T, vocabulary=31)
# The residual sum behind it needs the MLP's result alone, and nothing needs that sum again within the block.
UNUSED: set[BlockTensor] = {"mlp_down"}


def model(remat: Any) -> Model:
    return small(repeats=LAYERS, remat=remat)


def residuals(remat: Any) -> int:
    """Elements that the backward pass is handed of the blocks: floating-point arrays with a leading dim of layers, parameters aside."""
    params = random_params(model(remat))
    shapes = {value.shape for value in params.values()}
    backward = jax.eval_shape(lambda params: jax.vjp(lambda params: mean_loss(model(remat), params, BATCH)[0], params)[1], params)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape[:1] == (LAYERS,) and np.issubdtype(leaf.dtype, np.floating)]
    return sum(leaf.size for leaf in kept if leaf.shape not in shapes) // LAYERS


@pytest.mark.parametrize("policy", [name for name in get_args(RematPolicy) if tensors_of(name)])
def test_a_policy_keeps_the_tensors_it_lists_and_nothing_else(policy: RematPolicy) -> None:
    named = tensors_of(policy)
    assert named is not None
    listed: list[BlockTensor] = [name for name in (*named.keep, *named.offload) if name not in UNUSED]
    assert residuals(policy) - residuals("full") == sum(SIZES[name] for name in listed)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in SIZES if name not in UNUSED])
def test_a_tensor_can_be_kept_or_offloaded_by_its_name(name: BlockTensor) -> None:
    extra = 0 if name == "block_input" else SIZES[name]  # it is kept anyway
    assert residuals({"keep": [name]}) - residuals("full") == extra
    assert residuals({"offload": [name]}) - residuals("full") == extra


QUICK = ("full", "minimal", "dots", "save_all_but_mlp_hidden")
GRADIENTS = [
    RematTensors(keep=("attention", "mlp_up"), offload=("block_input", "query")),
    *(name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in get_args(RematPolicy) if name != "none"),
]


@pytest.fixture(scope="module")
def everything_kept() -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss_and_gradients("none")


@pytest.mark.parametrize("remat", GRADIENTS)
def test_loss_and_gradients_are_those_of_a_model_that_keeps_everything(remat: Any, everything_kept: tuple[Any, Any]) -> None:
    (loss, gradients), (wanted_loss, wanted) = loss_and_gradients(remat), everything_kept
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    for name, gradient in gradients.items():
        scale = float(np.linalg.norm(wanted[name]))
        np.testing.assert_allclose(gradient, wanted[name], rtol=0, atol=1e-6 * scale, err_msg=name)


def loss_and_gradients(remat: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    described = small(repeats=2, pattern=(BIASED,), tie_embeddings=True, head_soft_cap=20.0, remat=remat)
    return jax.jit(jax.value_and_grad(lambda params: mean_loss(described, params, BATCH)[0]))(random_params(described))
