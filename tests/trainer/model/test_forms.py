"""How the model is compiled does not change what it computes; what it holds is what the weight table declares."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.trainer.configs import config, layout, put, ragged_batch
from tests.trainer.model.models import BIASED, BLOCK, abstract_params, mean_loss, random_params, small
from trainer.config.model import Model
from trainer.config.presets import preset_names
from trainer.config.weights import join_repeat, parameter_count, split_repeat, weights
from trainer.model import create_abstract_model
from trainer.parallel.sharding import use_layout

FIELDS: dict[str, Any] = {"pattern": (BLOCK, BIASED), "repeats": 2, "tie_embeddings": True, "head_soft_cap": 20.0}
BATCH = {
    "inputs": np.random.default_rng(0).integers(0, 31, (2, 8), dtype=np.int32),
    "targets": np.random.default_rng(1).integers(0, 31, (2, 8), dtype=np.int32),
    "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
    "segments": np.ones((2, 8), np.int32),
    "weights": np.ones((2, 8), np.float32),
}


def evaluate(model: Model, params: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    (loss, _), gradients = jax.jit(jax.value_and_grad(lambda params: mean_loss(model, params, BATCH), has_aux=True))(params)
    return loss, gradients


@pytest.fixture(scope="module")
def scanned() -> tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]:
    """Parameters, loss and gradients of the scanned model that recomputes everything."""
    model = small(**FIELDS)
    params = random_params(model)
    return params, *evaluate(model, params)


def test_unrolled_layers_give_the_same_loss_and_gradients_as_scanned_ones(scanned: tuple[Any, ...]) -> None:
    params, loss, gradients = scanned
    model = small(layers="unroll", **FIELDS)

    def unrolled(stacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
        addresses = {weight.path: split_repeat(weight.path) for weight in weights(model)}
        return {path: stacked[source] if repeat is None else stacked[source][repeat] for path, (source, repeat) in addresses.items()}

    found_loss, found = evaluate(model, unrolled(params))
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    for path, gradient in unrolled(gradients).items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-4, atol=1e-6, err_msg=path)


def test_bfloat16_compute_keeps_float32_parameters_gradients_and_logits(scanned: tuple[Any, ...]) -> None:
    params, loss, gradients = scanned
    found_loss, found = evaluate(small(compute_dtype="bfloat16", **FIELDS), params)
    assert found_loss.dtype == jnp.float32 and {gradient.dtype for gradient in found.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(found_loss, loss, rtol=2e-2)
    for path, gradient in gradients.items():
        error = np.linalg.norm(found[path] - gradient) / np.linalg.norm(gradient)
        assert error < 0.1, f"{path}: {error}"


def test_a_sharded_kernel_is_gathered_in_compute_dtype_and_one_layer_at_a_time(tmp_path: Path) -> None:
    run = config("model.compute_dtype=bfloat16", "mesh.ici.fsdp=8")
    where = layout(run)
    batch = put(ragged_batch(0), where)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        with use_layout(where):
            return mean_loss(run.model, params, batch)[0]

    params = abstract_params(run.model, lambda weight: where.sharding(weight.axes, weight.shape))
    # As partitioned: the CPU's own passes turn bfloat16 into float32 later.
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    jax.jit(jax.grad(loss)).lower(params).compile(compiler_options=dump)
    (program,) = (file.read_text() for file in tmp_path.glob("*after_spmd-partitioning*"))
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", program)
    kernels = {",".join(map(str, weight.layer_shape)) for weight in weights(run.model) if weight.inputs and weight.path != "embed/table"}
    found = {(dtype, shape) for dtype, shape in gathered if dtype != "s32"}
    assert found == {("bf16", shape) for shape in kernels}


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_the_model_holds_exactly_the_declared_weights(layers: str) -> None:
    model = small(layers=layers, **(FIELDS | {"tie_embeddings": False}))
    held = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.split(create_abstract_model(model))[1])}
    assert {path: variable.get_value().shape for path, variable in held.items()} == {w.path: w.shape for w in weights(model)}
    for weight in weights(model):
        metadata = held[weight.path].get_metadata()
        assert (metadata["axes"], metadata["init"], metadata["inputs"]) == (weight.axes, weight.init, weight.inputs)
        assert len(weight.axes) == len(weight.shape)


def test_a_repeat_can_be_taken_out_of_a_path_and_put_back() -> None:
    assert split_repeat("segments/0/1/7/attention/query") == ("segments/0/1/attention/query", 7)
    assert join_repeat("segments/0/1/attention/query", 7) == "segments/0/1/7/attention/query"
    assert split_repeat("segments/0/1/attention/query") == ("segments/0/1/attention/query", None)
    assert split_repeat("head/kernel") == ("head/kernel", None)


# As counted from the published checkpoints' shapes; tied embeddings count once.
PUBLISHED = {
    "deepseek-v3": 671_026_419_200,
    "gemma-7b": 8_537_680_896,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "olmo2-7b": 7_298_617_344,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-moe-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_has_the_published_number_of_parameters_in_both_layer_forms(preset: str) -> None:
    counts = {parameter_count(Model.model_validate({"preset": preset, "layers": layers})) for layers in ("scan", "unroll")}
    assert counts == {PUBLISHED.get(preset, 2_115_264)}
